"""Short videos of real handwritten digits that move over a canvas, with prompts and an exact codec.

The digits are scikit-learn's bundled set: 1,797 scans of 8x8 pixels with values 0 to 16 (UCI, Alpaydin and Kaynak).
A video has 4 frames of 16x16 pixels; the digit moves 2 pixels a frame in one of four directions. Its position across
the motion is 0, 4 or 8, along it 0 to 6 or 8 to 2: a coarse grid, because on a finer one a network of a few million
weights does not learn the digits within minutes.

Shapes: videos [n, F, H, W] in [0, 1]; latents [n, C, F/2, H/4, W/4], C = 32.
"""

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIRECTIONS = ("left", "right", "up", "down")

FRAMES = 4
CANVAS = 16  # pixels, height and width of a frame
DIGIT_SIZE = 8  # pixels, height and width of a scan
PIXELS_PER_FRAME = 2  # speed of the digit
CROSS_POSITIONS = (0, 4, 8)  # offsets across the motion
HELDOUT_SHARE = 0.2

_CODEC_FORMAT = "digit-codec-1"


class DigitImages(NamedTuple):
    """Scans [n, 8, 8] float32 in [0, 1] and the digits [n] int64 they show."""

    images: torch.Tensor
    digits: torch.Tensor


class DigitVideos(NamedTuple):
    """Videos [n, 4, 16, 16] float32 in [0, 1], digits [n] and directions [n] (indices into DIRECTIONS), int64."""

    videos: torch.Tensor
    digits: torch.Tensor
    directions: torch.Tensor

    def prompts(self) -> list[str]:
        """The n prompts."""
        return [prompt_of(digit, way) for digit, way in zip(self.digits.tolist(), self.directions.tolist())]


def prompt_of(digit: int, direction: int) -> str:
    """The prompt of a video, such as "a handwritten seven moving left".

    Args:
        digit: 0 to 9.
        direction: index into DIRECTIONS.
    Raises: ValueError outside these ranges.
    """
    if not 0 <= digit < len(DIGIT_NAMES):
        raise ValueError(f"digit = {digit}: must be 0 to 9")
    if not 0 <= direction < len(DIRECTIONS):
        raise ValueError(f"direction = {direction}: must be 0 to 3, an index into {DIRECTIONS}")
    return f"a handwritten {DIGIT_NAMES[digit]} moving {DIRECTIONS[direction]}"


def parse_prompt(text: str) -> tuple[int, int]:
    """(digit, direction) of a prompt; the inverse of ``prompt_of``.

    Raises: ValueError for any other text.
    """
    words = text.split()
    if (
        len(words) != 5
        or words[:2] + words[3:4] != ["a", "handwritten", "moving"]
        or words[2] not in DIGIT_NAMES
        or words[4] not in DIRECTIONS
    ):
        raise ValueError(
            f"prompt {text!r}: expected 'a handwritten DIGIT moving DIRECTION' with DIGIT one of"
            f" {', '.join(DIGIT_NAMES)} and DIRECTION one of {', '.join(DIRECTIONS)}"
        )
    return DIGIT_NAMES.index(words[2]), DIRECTIONS.index(words[4])


def all_prompts() -> list[str]:
    """The 40 prompts, by digit, then by direction."""
    return [prompt_of(digit, way) for digit in range(len(DIGIT_NAMES)) for way in range(len(DIRECTIONS))]


def load_images() -> DigitImages:
    """scikit-learn's 1,797 scans; no network.

    Raises: ImportError without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn, which is missing: install rcm-mcore[demo]") from error

    bundle = load_digits()
    return DigitImages(torch.from_numpy(bundle.images / 16.0).float(), torch.from_numpy(bundle.target).long())


def split_indices(digits: torch.Tensor, *, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices (train, held out) of a random split by image: a fifth of each digit, rounded up, is held out.

    Args:
        digits: labels [n].
        seed: of the split.
    Returns: two sorted, disjoint int64 tensors that together hold 0 .. n-1 (1,433 and 364 for the whole set).
    """
    generator = np.random.default_rng(seed)
    heldout = torch.zeros(len(digits), dtype=torch.bool)
    for digit in digits.unique().tolist():
        members = (digits == digit).nonzero().squeeze(1)
        chosen = generator.permutation(len(members))[: math.ceil(HELDOUT_SHARE * len(members))]
        heldout[members[torch.from_numpy(chosen)]] = True
    return (~heldout).nonzero().squeeze(1), heldout.nonzero().squeeze(1)


def render_videos(images: torch.Tensor, direction: int, cross: int) -> torch.Tensor:
    """The videos [n, 4, 16, 16] of scans that move alike.

    Args:
        images: [n, 8, 8] in [0, 1].
        direction: index into DIRECTIONS.
        cross: offset in pixels across the motion (from the top for left and right, from the left for up and down).
    """
    name = DIRECTIONS[direction]
    start, step = (0, PIXELS_PER_FRAME) if name in ("right", "down") else (CANVAS - DIGIT_SIZE, -PIXELS_PER_FRAME)
    videos = images.new_zeros(len(images), FRAMES, CANVAS, CANVAS)
    for frame in range(FRAMES):
        along = start + step * frame
        top, left = (cross, along) if name in ("left", "right") else (along, cross)
        videos[:, frame, top : top + DIGIT_SIZE, left : left + DIGIT_SIZE] = images
    return videos


def make_videos(images: DigitImages, *, seed: int) -> DigitVideos:
    """One video for each image and direction, at a random position across the motion, in random order.

    Args:
        images: m scans.
        seed: of positions and order.
    Returns: n = 4 m videos.
    """
    generator = np.random.default_rng(seed)
    m = len(images.images)
    videos = images.images.new_zeros(len(DIRECTIONS), m, FRAMES, CANVAS, CANVAS)
    crosses = torch.from_numpy(generator.choice(CROSS_POSITIONS, size=(len(DIRECTIONS), m)))
    for direction in range(len(DIRECTIONS)):
        for cross in CROSS_POSITIONS:
            rows = crosses[direction] == cross
            videos[direction, rows] = render_videos(images.images[rows], direction, cross)
    order = torch.from_numpy(generator.permutation(len(DIRECTIONS) * m))
    return DigitVideos(
        videos=videos.flatten(0, 1)[order],
        digits=images.digits.repeat(len(DIRECTIONS))[order],
        directions=torch.arange(len(DIRECTIONS)).repeat_interleave(m)[order],
    )


def train_heldout_videos(*, seed: int) -> tuple[DigitVideos, DigitVideos]:
    """The data set of the demo, (train, held out): 5,732 and 1,456 videos that share no image."""
    images = load_images()
    train, heldout = split_indices(images.digits, seed=seed)
    return (
        make_videos(DigitImages(images.images[train], images.digits[train]), seed=seed),
        make_videos(DigitImages(images.images[heldout], images.digits[heldout]), seed=seed + 1),
    )


@dataclass(frozen=True, kw_only=True)
class DigitCodec:
    """Pixels to latents and back, without loss: standardise, then space-to-depth 4 and time-to-depth 2.

    It stands in for a video VAE. Two frames share a latent frame so that motion is visible inside one token.

    Attributes:
        mean, std: of the training pixels, so that latents have unit variance (sigma_data = 1).
        space: pixels to a side of a latent cell.
        time: frames in a latent frame.
    """

    mean: float
    std: float
    space: int = 4
    time: int = 2

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std > 0):
            raise ValueError(f"codec: mean = {self.mean}, std = {self.std}; both must be finite and std positive")
        if self.space < 1 or self.time < 1:
            raise ValueError(f"codec: space = {self.space}, time = {self.time}; both must be at least 1")

    @classmethod
    def fit(cls, videos: torch.Tensor) -> "DigitCodec":
        """The codec with the mean and standard deviation of all pixels of these videos (any shape)."""
        pixels = videos.double()
        return cls(mean=float(pixels.mean()), std=float(pixels.std(correction=0)))

    @property
    def channels(self) -> int:
        """Latent channels C."""
        return self.time * self.space**2

    def encode(self, videos: torch.Tensor) -> torch.Tensor:
        """Latents [n, C, F/time, H/space, W/space] of videos [n, F, H, W] in [0, 1].

        Raises: ValueError when the shape is no multiple of the cell.
        """
        if videos.ndim != 4 or videos.shape[1] % self.time or any(n % self.space for n in videos.shape[2:]):
            raise ValueError(
                f"videos: shape {list(videos.shape)}; expected [n, F, H, W], F a multiple of {self.time},"
                f" H and W of {self.space}"
            )
        n, f, h, w = videos.shape
        cells = ((videos - self.mean) / self.std).reshape(
            n, f // self.time, self.time, h // self.space, self.space, w // self.space, self.space
        )
        latents = cells.permute(0, 2, 4, 6, 1, 3, 5)
        return latents.reshape(n, self.channels, f // self.time, h // self.space, w // self.space)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Videos [n, F, H, W], clamped to [0, 1], of latents [n, C, F/time, H/space, W/space].

        Raises: ValueError for another number of dimensions or channels.
        """
        if latents.ndim != 5 or latents.shape[1] != self.channels:
            raise ValueError(f"latents: shape {list(latents.shape)}; expected [n, {self.channels}, f, h, w]")
        n, _, f, h, w = latents.shape
        cells = latents.reshape(n, self.time, self.space, self.space, f, h, w).permute(0, 4, 1, 5, 2, 6, 3)
        videos = cells.reshape(n, f * self.time, h * self.space, w * self.space)
        return (videos * self.std + self.mean).clamp(0.0, 1.0)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the parameters as JSON."""
        Path(path).write_text(json.dumps({"format": _CODEC_FORMAT, **asdict(self)}, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "DigitCodec":
        """Reads what ``save`` wrote.

        Raises: ValueError for another file; OSError when it cannot be read.
        """
        fields = {"mean": float, "std": float, "space": int, "time": int}
        try:
            content = json.loads(Path(path).read_text())
            if content.pop("format") != _CODEC_FORMAT or set(content) != set(fields):
                raise KeyError
            values = {name: kind(content[name]) for name, kind in fields.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path}: no digit codec; expected JSON with format {_CODEC_FORMAT!r}, {list(fields)}") from None
        return cls(**values)
