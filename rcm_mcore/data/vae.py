"""Videos to the latents that Wan and Cosmos-Predict2 see, and back: diffusers' AutoencoderKLWan and its normalization."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

PIXELS = 8  # pixels, along height and width, of a latent position
FRAMES = 4  # frames of a latent frame; the first latent frame is one frame


def latent_shape(frames: int, height: int, width: int, *, channels: int = 16) -> tuple[int, int, int, int]:
    """[C, F, H, W] of the latents of a video.

    Raises: ValueError unless frames are 4n + 1 and height and width multiples of 8.
    """
    if frames < 1 or frames % FRAMES != 1:
        below = max(0, frames - 1) // FRAMES * FRAMES + 1
        raise ValueError(f"frames={frames}: must be 4n + 1, such as {below} or {below + FRAMES}; 1 is an image")
    for name, size in (("height", height), ("width", width)):
        if size < PIXELS or size % PIXELS:
            raise ValueError(f"{name}={size}: must be a multiple of {PIXELS}, such as {max(1, size // PIXELS) * PIXELS}")
    return channels, (frames - 1) // FRAMES + 1, height // PIXELS, width // PIXELS


class VideoVAE:
    """AutoencoderKLWan of a local folder, or of `vae` in a pipeline folder, with the latents that networks are trained on.

    Those are (posterior mode - mean) / std, per channel, with `latents_mean` and `latents_std` of its configuration, which
    diffusers leaves to its pipelines. It keeps state between frames: one thread at a time.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        tiled: bool = False,
    ) -> None:
        """Loads it; never downloads.

        Args:
            folder: see the class.
            device: of the network and of what `encode` and `decode` return.
            dtype: of its weights; Wan's pipelines use float32.
            tiled: decode in overlapping tiles of 256 pixels, which need less memory and are blended; encoding is never tiled.
        Raises: ValueError when the folder holds none, or one that is damaged or of another kind.
        """
        self.folder, _ = find_vae(folder)
        self.model = _load(self.folder, dtype).eval().requires_grad_(False).to(device)
        self.device, self.tiled = torch.device(device), tiled
        config = self.model.config
        self.channels: int = config.z_dim
        stats = {name: getattr(config, name) for name in ("latents_mean", "latents_std")}
        for name, values in stats.items():
            if values is None or len(values) != self.channels:
                raise ValueError(f"{self.folder}: {name} of its config.json must have z_dim={self.channels} values")
        mean, std = (torch.tensor(values, device=device).view(1, -1, 1, 1, 1) for values in stats.values())
        self._mean, self._std = mean, std
        self.model.enable_tiling()

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Latents [B, C, (F - 1) // 4 + 1, H // 8, W // 8], float32, of a video [B, 3, F, H, W] in [-1, 1].

        Raises: ValueError for another shape; frames must be 4n + 1, height and width multiples of 8.
        """
        if video.ndim != 5 or video.shape[1] != 3:
            raise ValueError(f"video {list(video.shape)}: must be [B, 3, F, H, W]")
        frames, height, width = video.shape[2:]
        latent_shape(frames, height, width)
        self.model.use_tiling = False
        mode = self.model.encode(video.to(self.device, self.model.dtype)).latent_dist.mode()
        return (mode.float() - self._mean) / self._std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The video [B, 3, 4 (F - 1) + 1, 8 H, 8 W] in [-1, 1], float32, of latents [B, C, F, H, W].

        Raises: ValueError for another shape.
        """
        if latents.ndim != 5 or latents.shape[1] != self.channels:
            raise ValueError(f"latents {list(latents.shape)}: must be [B, {self.channels}, F, H, W]")
        self.model.use_tiling = self.tiled
        z = latents.to(self.device, torch.float32) * self._std + self._mean
        return self.model.decode(z.to(self.model.dtype)).sample.float()


def find_vae(folder: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    """Where the VAE is, in `folder/vae` or in the folder itself, and its configuration; ValueError when there is none."""
    folder = Path(folder)
    found = next((path for path in (folder / "vae", folder) if (path / "config.json").is_file()), None)
    if found is None:
        raise ValueError(
            f"VAE folder {folder}: no config.json in it or in vae/; expected an AutoencoderKLWan as saved by save_pretrained"
        )
    try:
        config = json.loads((found / "config.json").read_text(encoding="utf-8"))
        kind, patch = config.get("_class_name"), config.get("patch_size")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"VAE folder {found}: config.json cannot be read: {error}") from None
    if kind != "AutoencoderKLWan":
        raise ValueError(f"VAE folder {found} holds {kind}: must be an AutoencoderKLWan, as Wan2.1's and Cosmos-Predict2's are")
    if patch is not None:
        raise ValueError(f"VAE folder {found}: patch_size={patch} is Wan2.2's, which is not supported")
    return found, config


def _load(folder: Path, dtype: torch.dtype):
    from diffusers import AutoencoderKLWan

    try:
        model, report = AutoencoderKLWan.from_pretrained(
            folder, local_files_only=True, torch_dtype=dtype, low_cpu_mem_usage=False, output_loading_info=True
        )
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise ValueError(f"VAE folder {folder} cannot be loaded: {str(error).splitlines()[0]}") from None
    # What is missing would stay random.
    wrong = {name: sorted(report[name])[:5] for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[name]}
    if wrong:
        raise ValueError(f"VAE folder {folder} does not fit its config.json: {wrong}")
    return model
