"""The learned codec of the scenes: videos to latents that a small diffusion transformer can learn, and back.

A latent position stands for 4x4 pixels and, after the first frame, which has latents of its own, for four frames: 192 values
become 16, as many channels as Wan's. With patches of (1, 2, 2) latents a video is 320 tokens of 64 values, each of 8x8 pixels,
about the size of a letter of the captions. 8x8 pixels to a position (`space=8`) would be 80 tokens, four times cheaper, but
each of 16x16 pixels, most of two letters or of a small object, behind one linear layer. How much there is to learn: the best
linear codec (principal components of the positions of 96 scenes) has a PSNR of 21.6 dB with 8 channels and 24.5 dB with 16;
at 8x8 pixels 23.0 dB with 32 channels and 25.9 dB with 64. Training starts from it.

Shapes: videos [n, 3, 17, 64, 64] in [0, 1]; latents [n, C, 5, 64 / space, 64 / space]. A group is the frames of a latent frame;
a cell is 2x2 pixels of a group.
"""

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rcm_mcore.lab.blocks import Block, check_videos, descend, mixed
from rcm_mcore.lab.scenes import CANVAS, FRAMES, legibility, render
from rcm_mcore.lab.stream import batches, scenes_for
from rcm_mcore.lab.weights import read_network, write_network

GROUP = 4  # frames of a latent frame
LATENT_FRAMES = (FRAMES - 1) // GROUP + 1

_FORMAT = "scene-codec-1"
_PATCH = 2  # pixels to a side that become channels before the first convolution
_BATCH = 128  # videos in a pass without a graph
_NOISE = (
    0.1  # standard deviation, added to latents of variance 1 in training: what a sampler leaves of its errors must not show
)
_ABSOLUTE = 0.1  # weight of the mean absolute error beside the mean square: edges and letters are sharper for it


class SceneCodec(nn.Module):
    """An autoencoder: two-dimensional convolutions over groups of frames, which see their neighbours where space is coarsest,
    beside one linear layer each way.

    Latents have mean 0 and standard deviation 1 per channel over real videos (sigma_data = 1).

    Attributes:
        channels: of the latents, C.
        space: pixels to a side of a latent position, 4 or 8.
        facts: of the training, among them `psnr` (dB) and `legible` (share of characters) on held-out scenes.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, *, channels: int = 16, width: int = 64, space: int = 4) -> None:
        """A codec with random weights.

        Args:
            width: channels at half the resolution of the videos; twice that at a quarter of it, and so on.
        Raises: ValueError for another `space`, no channels or no width.
        """
        super().__init__()
        if space not in (4, 8) or channels < 1 or width < 1:
            raise ValueError(
                f"codec: space={space}, channels={channels}, width={width}; space is 4 or 8, the others at least 1"
            )
        self.channels, self.width, self.space = channels, width, space
        self.facts: dict[str, Any] = {}
        widths = [width * 2**level for level in range((space // _PATCH).bit_length())]
        pixels = 3 * GROUP * _PATCH**2
        down: list[nn.Module] = [nn.Conv2d(pixels, width, 3, padding=1), Block(width), Block(width)]
        for narrow, wide in zip(widths, widths[1:]):
            down += [nn.Conv2d(narrow, wide, 4, stride=2, padding=1), Block(wide), Block(wide)]
        deepest = widths[-1]
        self.encoder = nn.Sequential(
            *down, Block(deepest, groups=LATENT_FRAMES), nn.SiLU(), nn.Conv2d(deepest, channels, 3, padding=1)
        )
        up: list[nn.Module] = [nn.Conv2d(channels, deepest, 3, padding=1), Block(deepest, groups=LATENT_FRAMES)]
        for wide, narrow in zip(widths[:0:-1], widths[-2::-1]):
            up += [Block(wide), Block(wide), nn.Conv2d(wide, 4 * narrow, 3, padding=1), nn.PixelShuffle(2)]
        self.decoder = nn.Sequential(*up, Block(width), Block(width), nn.SiLU(), nn.Conv2d(width, pixels, 3, padding=1))
        # Beside the networks, which add nothing at first.
        corner = space // _PATCH
        self.to_latents = nn.Conv2d(pixels, channels, corner, stride=corner)
        self.to_pixels = nn.ConvTranspose2d(channels, pixels, corner, stride=corner)
        for last in (self.encoder[-1], self.decoder[-1]):
            for parameter in last.parameters():
                nn.init.zeros_(parameter)
        self.register_buffer("latent_mean", torch.zeros(channels))
        self.register_buffer("latent_std", torch.ones(channels))

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """[C, F, H, W] of the latents of a video."""
        return self.channels, LATENT_FRAMES, CANVAS // self.space, CANVAS // self.space

    @torch.no_grad()
    def encode(self, videos: Tensor) -> Tensor:
        """Latents [n, *latent_shape], float32, on the codec's device.

        Raises: ValueError for videos of another shape.
        """
        check_videos(videos)
        mean, std = (stat.view(1, -1, 1, 1, 1) for stat in (self.latent_mean, self.latent_std))
        return torch.cat([(self._latents(part.to(mean)) - mean) / std for part in videos.split(_BATCH)])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Videos [n, 3, 17, 64, 64], float32, clamped to [0, 1], on the codec's device.

        Raises: ValueError for latents of another shape.
        """
        if latents.ndim != 5 or tuple(latents.shape[1:]) != self.latent_shape or not len(latents):
            raise ValueError(
                f"latents: shape {list(latents.shape)}; expected [n, {str(list(self.latent_shape))[1:]} with n >= 1"
            )
        parts = (part.to(self.latent_mean) for part in latents.split(_BATCH))
        return torch.cat([self._videos(part).clamp(0.0, 1.0) for part in parts])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes weights, statistics of the latents and facts as safetensors."""
        built = {"channels": self.channels, "width": self.width, "space": self.space}
        write_network(path, self, _FORMAT, {"built": built, **self.facts})

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> "SceneCodec":
        """Reads what `save` wrote.

        Raises: ValueError for another file; OSError when it cannot be read.
        """
        tensors, facts = read_network(path, _FORMAT)
        codec = cls(**facts.pop("built"))
        codec.load_state_dict(tensors)
        codec.facts = facts
        return codec.to(device).eval().requires_grad_(False)

    def _latents(self, videos: Tensor) -> Tensor:
        """Latents before standardization."""
        cells = _folded(videos)
        with mixed(cells.device):
            return (self.to_latents(cells) + self.encoder(cells)).float().unflatten(0, (-1, LATENT_FRAMES)).transpose(1, 2)

    def _videos(self, latents: Tensor) -> Tensor:
        """Unclamped videos of standardized latents."""
        cells = latents.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        with mixed(cells.device):
            cells = (self.to_pixels(cells) + self.decoder(cells)).float()
        groups = functional.pixel_shuffle(cells, _PATCH).unflatten(1, (3, GROUP)).unflatten(0, (-1, LATENT_FRAMES))
        return (groups.transpose(1, 2).flatten(2, 3)[:, :, GROUP - 1 :] + 1) / 2


def _folded(videos: Tensor) -> Tensor:
    """Cells [5 n, 3 4 2 2, 32, 32] in [-1, 1]: frames of a group and pixels of a patch as channels."""
    first = videos[:, :, :1].expand(-1, -1, GROUP - 1, -1, -1)  # the first group is four times the first frame
    groups = torch.cat([first, videos], 2).unflatten(2, (-1, GROUP)).transpose(1, 2).flatten(0, 1).flatten(1, 2)
    return functional.pixel_unshuffle(2 * groups - 1, _PATCH).contiguous(memory_format=torch.channels_last)


def train_codec(
    *,
    seed: int,
    steps: int = 4000,
    batch_size: int = 32,
    channels: int = 16,
    width: int = 64,
    space: int = 4,
    device: torch.device | str = "cpu",
    heldout: int = 512,
    show: bool = True,
) -> SceneCodec:
    """A codec trained on scenes that are rendered as it goes, on every combination of attributes: it must not judge novelty.

    Args:
        seed: of weights, scenes and noise; the global random state is left as it was.
        steps: optimizer steps (AdamW, one cycle of the learning rate).
        batch_size: videos in a step.
        channels, width, space: of the codec.
        device: where to train; the codec stays there. Convolutions are in bfloat16 on a GPU.
        heldout: scenes of other seeds that `facts` are measured on, and as many again for the statistics of the latents.
        show: a progress bar.
    Raises: ValueError for no steps, or a batch or held-out set of less than two.
    """
    if steps < 1 or batch_size < 2 or heldout < 2:
        raise ValueError(f"codec: steps={steps}, batch_size={batch_size}, heldout={heldout}; at least 1, 2 and 2")
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        codec = SceneCodec(channels=channels, width=width, space=space).to(device).train()
        _start_linear(codec, render(scenes_for("statistics", min(heldout, _BATCH), seed=seed), device))
        losses = (_loss(codec, videos) for _, videos in batches("codec", steps, batch_size, seed=seed, device=device))
        descend(codec.parameters(), losses, steps=steps, label="codec", show=show)
    codec.eval().requires_grad_(False)
    latents = codec.encode(render(scenes_for("statistics", heldout, seed=seed), device))  # mean 0 and std 1 so far: as they are
    codec.latent_mean.copy_(latents.mean((0, 2, 3, 4)))
    codec.latent_std.copy_(latents.std((0, 2, 3, 4)).clamp_min(1e-6))
    codec.facts = {"seed": seed, "steps": steps, "batch_size": batch_size, **_measured(codec, heldout, seed=seed)}
    return codec


@torch.no_grad()
def _start_linear(codec: SceneCodec, videos: Tensor) -> None:
    """Makes the codec the best linear one for these videos: principal components of what a latent position stands for.

    Every latent then has mean square 1.
    """
    side = codec.space // _PATCH
    cells = _folded(videos)
    mean = cells.mean((0, 2, 3))  # of the channels of a cell: what a bias can hold
    patches = functional.unfold(cells - mean[:, None, None], side, stride=side).transpose(1, 2).flatten(0, 1).double()
    moments = patches.T @ patches / len(patches)
    variances, components = torch.linalg.eigh(moments)  # smallest first
    scale = variances[-codec.channels :].clamp_min(1e-8).sqrt()[:, None]
    rows = components[:, -codec.channels :].T
    codec.to_latents.weight.copy_((rows / scale).view_as(codec.to_latents.weight))
    codec.to_pixels.weight.copy_((rows * scale).view_as(codec.to_pixels.weight))
    for layer, bias in (
        (codec.to_latents, -(rows / scale) @ mean.double().repeat_interleave(side**2)),
        (codec.to_pixels, mean),
    ):
        assert layer.bias is not None
        layer.bias.copy_(bias)


def psnr(videos: Tensor, others: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of videos in [0, 1]: -10 log10 of the mean square error over all of them."""
    return float(-10 * (videos.double() - others.double()).square().mean().log10())


def _measured(codec: SceneCodec, count: int, *, seed: int) -> dict[str, float]:
    """`psnr` (dB) and `legible` (share of the captions' characters, 1 before the codec) on held-out scenes."""
    scenes = scenes_for("held out", count, seed=seed)
    videos = render(scenes, codec.latent_mean.device)
    decoded = codec.decode(codec.encode(videos))
    legible = legibility(decoded, scenes.caption, scenes.place).double().mean()
    return {"psnr": psnr(videos, decoded), "legible": float(legible)}


def _loss(codec: SceneCodec, videos: Tensor) -> Tensor:
    """Mean square error and a little of the mean absolute one. The batch standardizes its own latents."""
    latents = codec._latents(videos)
    std, mean = torch.std_mean(latents, (0, 2, 3, 4), keepdim=True)
    error = codec._videos((latents - mean) / (std + 1e-6) + _NOISE * torch.randn_like(latents)) - videos
    return error.square().mean() + _ABSOLUTE * error.abs().mean()
