"""The digit-and-motion classifier: features for the metrics of the digit videos, and adherence to prompts.

Videos are [n, 4, 16, 16] in [0, 1] and directions number left, right, up, down, as in rcm_mcore.data.digits. Clamp
what a sampler made to this range first: an unclamped sampler reads many times worse than it looks.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import nn

VIDEO_SHAPE = (4, 16, 16)  # frames, height, width: those of rcm_mcore.data.digits
DIGITS = 10
DIRECTIONS = 4
DIGIT_FEATURES = 32
MOTION_FEATURES = 16

FORMAT = "digit-classifier-1"  # in the metadata of its files
# Augmentation in training: without it some one per cent more of the held-out digits are misread.
_NOISE = 0.05  # standard deviation, in pixel units
_WARP = 0.1  # largest change of an entry of the affine map, half a canvas as the unit of length
_DROPOUT = 0.3  # of the features before the output layers
_BATCH = 512  # videos in a pass of evaluation


class DigitPrediction(NamedTuple):
    """The digits [n] and directions [n] that videos show, int64."""

    digits: torch.Tensor
    directions: torch.Tensor


class DigitClassifier(nn.Module):
    """Two small networks: which digit a frame shows, wherever it is, and which way the video moves.

    The 48 features of a video are the inputs of the two output layers, before their activation (after it some would
    be zero but for a few videos, and no Gaussian fits that): 32 of the digit network, averaged over the frames, and
    16 of the motion network. Each is standardised by its mean and standard
    deviation over the training videos, so that every feature weighs alike in a Frechet distance and distances of
    classifiers that were trained apart are on one scale: the features of real data have variances that sum to 48.
    """

    feature_mean: torch.Tensor
    feature_std: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.digit_body = _body(1, DIGIT_FEATURES)
        self.digit_head = _head(DIGIT_FEATURES, DIGITS)
        self.motion_body = _body(VIDEO_SHAPE[0], MOTION_FEATURES)
        self.motion_head = _head(MOTION_FEATURES, DIRECTIONS)
        self.register_buffer("feature_mean", torch.zeros(DIGIT_FEATURES + MOTION_FEATURES))
        self.register_buffer("feature_std", torch.ones(DIGIT_FEATURES + MOTION_FEATURES))

    def forward(self, videos: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Raw features [n, 48], digit logits [n, 10] (mean over the frames) and direction logits [n, 4]."""
        digit = self.digit_body(videos.flatten(0, 1)[:, None]).unflatten(0, (-1, VIDEO_SHAPE[0]))
        motion = self.motion_body(videos)
        features = torch.cat([digit.mean(1), motion], 1)
        return features, self.digit_head(digit).mean(1), self.motion_head(motion)

    def features(self, videos: torch.Tensor) -> torch.Tensor:
        """Standardised features [n, 48], float32 on the CPU.

        Raises: ValueError for videos of another shape.
        """
        raw = self._evaluate(videos)[0]
        return (raw - self.feature_mean.cpu()) / self.feature_std.cpu()

    def predict(self, videos: torch.Tensor) -> DigitPrediction:
        """The most likely digit and direction of each video.

        Raises: ValueError for videos of another shape.
        """
        _, digit, direction = self._evaluate(videos)
        return DigitPrediction(digit.argmax(1), direction.argmax(1))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes weights and feature statistics as safetensors."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        # Not save_file, whose files only their owner may read, whatever the umask.
        Path(path).write_bytes(safetensors.torch.save(tensors, metadata={"format": FORMAT}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "DigitClassifier":
        """Reads what ``save`` wrote.

        Raises: ValueError for another file; OSError when it cannot be read.
        """
        classifier = cls()
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("format") != FORMAT:
                    raise ValueError("its format is another")
                classifier.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (ValueError, RuntimeError, safetensors.SafetensorError) as error:
            raise ValueError(f"{path}: no {FORMAT} file ({error}); train the classifier anew") from error
        return classifier.eval()

    @torch.no_grad()
    def _evaluate(self, videos: torch.Tensor) -> list[torch.Tensor]:
        """The outputs of ``forward`` on the CPU, in batches."""
        _check_videos(videos)
        parameter = next(self.parameters())
        batches = [self(batch.to(parameter)) for batch in videos.split(_BATCH)]
        return [torch.cat(parts).cpu() for parts in zip(*batches)]


def train_classifier(
    videos: torch.Tensor,
    digits: torch.Tensor,
    directions: torch.Tensor,
    *,
    seed: int,
    steps: int = 1100,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    log: Callable[[int, float], None] | None = None,
) -> DigitClassifier:
    """A classifier trained on real videos, augmented with noise, slight affine warps and dropout.

    Args:
        videos: [n, 4, 16, 16] in [0, 1], the training split.
        digits: [n] 0 to 9.
        directions: [n] 0 to 3.
        seed: of weights, batches and noise; the global random state is left as it was.
        steps: optimizer steps (AdamW, learning rate 3e-3 with a cosine to zero).
        batch_size: videos in a step.
        device: where to train; the classifier stays there.
        log: called after every step with the step, from 1, and its loss (digit plus direction cross-entropy, nats).
    Raises: ValueError for videos of another shape, labels of another count.
    """
    _check_videos(videos)
    if not len(videos) == len(digits) == len(directions):
        raise ValueError(f"{len(videos)} videos, {len(digits)} digits, {len(directions)} directions: counts must agree")
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        classifier = DigitClassifier().to(device).train()
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3, weight_decay=1e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for step in range(1, steps + 1):
            rows = torch.randint(len(videos), (batch_size,))
            loss = _loss(classifier, videos[rows].to(device), digits[rows].to(device), directions[rows].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if log is not None:
                log(step, loss.item())
    classifier.eval()
    raw = classifier.features(videos)  # mean 0 and standard deviation 1 so far, hence as they are
    classifier.feature_mean.copy_(raw.mean(0))
    classifier.feature_std.copy_(raw.std(0).clamp_min(1e-6))
    return classifier


def adherence(prediction: DigitPrediction, digits: torch.Tensor, directions: torch.Tensor) -> float:
    """Share of videos, 0 to 1, whose digit and direction are both those of the prompt.

    Args:
        prediction: of n videos.
        digits, directions: [n] what the prompts ask for.
    Raises: ValueError for different counts or none.
    """
    if not len(prediction.digits) == len(digits) == len(directions) > 0:
        raise ValueError(f"{len(prediction.digits)} predictions for {len(digits)} digits and {len(directions)} directions")
    return float(((prediction.digits == digits) & (prediction.directions == directions)).double().mean())


def _loss(classifier: DigitClassifier, videos: torch.Tensor, digits: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of digits and of directions, nats, on augmented videos."""
    n = len(videos)
    # One frame of a video teaches the digit as well as all four, at a quarter of the cost; half of them are warped.
    frames = videos[torch.arange(n), torch.randint(VIDEO_SHAPE[0], (n,))][:, None]
    warps = torch.eye(2, 3) + _WARP * (2 * torch.rand(n // 2, 2, 3) - 1)
    grid = nn.functional.affine_grid(warps.to(videos), [n // 2, 1, *VIDEO_SHAPE[1:]], align_corners=False)
    warped = nn.functional.grid_sample(frames[: n // 2], grid, align_corners=False)
    digit = classifier.digit_body(_with_noise(torch.cat([warped, frames[n // 2 :]])))
    motion = classifier.motion_body(_with_noise(videos))
    return nn.functional.cross_entropy(classifier.digit_head(digit), digits) + nn.functional.cross_entropy(
        classifier.motion_head(motion), directions
    )


def _with_noise(videos: torch.Tensor) -> torch.Tensor:
    return videos + _NOISE * torch.randn_like(videos)


def _body(channels: int, features: int) -> nn.Sequential:
    """Three convolutions, a maximum over all positions, a linear layer: [n, channels, H, W] to [n, features]."""
    return nn.Sequential(
        nn.Conv2d(channels, 24, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(24, 48, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(48, 64, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(64, features),
    )


def _head(features: int, classes: int) -> nn.Sequential:
    return nn.Sequential(nn.ReLU(), nn.Dropout(_DROPOUT), nn.Linear(features, classes))


def _check_videos(videos: torch.Tensor) -> None:
    if videos.ndim != 4 or tuple(videos.shape[1:]) != VIDEO_SHAPE or not len(videos):
        raise ValueError(f"videos: shape {list(videos.shape)}; expected [n, 4, 16, 16] with n >= 1")
