"""What image- and video-conditioned networks are given of a sample: files, checked, and encoded as training data are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from rcm_mcore.condition import Condition
from rcm_mcore.config import ModelConfig
from rcm_mcore.data.image import ImageEncoder, encode_given, rows_of_image
from rcm_mcore.data.media_input import IMAGE_SUFFIXES, BadInput, read_last_frames, read_media, to_unit
from rcm_mcore.data.vae import FRAMES, PIXELS, VideoVAE, find_vae, latent_shape

_FLAGS = ("--image", "--last-image", "--video")
# model.condition -> the flags that go together, one of these
_TAKEN: dict[str, tuple[tuple[str, ...], ...]] = {
    "text": ((),),
    "image": (("--image",),),
    "first_last": (("--image", "--last-image"),),
    "frames": (("--image",), ("--video",)),
}


@dataclass(frozen=True, kw_only=True)
class GivenFiles:
    """Files whose frames a network is given, of each kind one for all prompts or one for each, and what encodes them.

    Attributes:
        images, last_images: first frames and, for model.condition=first_last, last frames.
        videos: model.condition=frames: videos to continue.
        video_frames: the last so many frames of a video are given, 4n + 1, at the rate that they have.
        vae, image_encoder: local folders; the last for Wan alone.
        dtype: of both encoders' weights.
    """

    images: tuple[str, ...] = ()
    last_images: tuple[str, ...] = ()
    videos: tuple[str, ...] = ()
    video_frames: int = 5
    vae: str | None = None
    image_encoder: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"

    def of_prompt(self, number: int) -> tuple[str, ...]:
        """The files of a prompt: an image, an image and a last image, or a video."""
        return tuple(files[number % len(files)] for files in self._lists if files)

    @property
    def paths(self) -> list[str]:
        """Every file once."""
        return list(dict.fromkeys(path for files in self._lists for path in files))

    @property
    def _lists(self) -> tuple[tuple[str, ...], ...]:
        return self.images, self.last_images, self.videos

    @property
    def by_flag(self) -> dict[str, tuple[str, ...]]:
        """Files by flag, without flags that have none."""
        return {flag: files for flag, files in zip(_FLAGS, self._lists) if files}


def check_given(given: GivenFiles | None, model: ModelConfig, shape: Sequence[int], *, prompts: int) -> None:
    """ValueError unless a network samples `shape`, [C, F, H, W], with these files; decodes each of them once to see."""
    given = given or GivenFiles()
    there, condition = tuple(given.by_flag), model.condition
    if there not in _TAKEN[condition]:
        takes = " or ".join(" and ".join(flags) for flags in _TAKEN[condition]) or f"none of {', '.join(_FLAGS)}"
        raise ValueError(
            f"--checkpoint: its network has model.condition={condition} and takes {takes}; "
            f"given: {' and '.join(there) or 'nothing'}"
        )
    if condition == "text":
        return
    for flag, files in given.by_flag.items():
        if len(files) not in (1, prompts):
            raise ValueError(f"{flag}: {len(files)} files for {prompts} prompts; give one for all, or one for each")
    _check_frames(given, condition, shape[1])
    _check_encoders(given, model)
    size = PIXELS * shape[2], PIXELS * shape[3]
    for flag, files in given.by_flag.items():
        for path in dict.fromkeys(files):
            _read(flag, path, given.video_frames, size)


def _check_frames(given: GivenFiles, condition: str, frames: int) -> None:
    """`frames`: latent ones of a sample."""
    count = 1
    if given.videos:
        try:
            count = latent_shape(given.video_frames, PIXELS, PIXELS)[1]
        except ValueError as error:
            raise ValueError(f"--video-{str(error).replace('=', ' ', 1)}") from None
    if frames <= count:
        all_, known = FRAMES * (frames - 1) + 1, FRAMES * (count - 1) + 1
        raise ValueError(
            f"--frames {all_}: with model.condition={condition} and {known} given there must be more, at least {known + FRAMES}"
        )


def _check_encoders(given: GivenFiles, model: ModelConfig) -> None:
    condition = f"model.condition={model.condition}"
    if given.vae is None:
        raise ValueError(f"--vae: {condition} encodes {' and '.join(given.by_flag)} with it; give --vae or --pipeline")
    channels = find_vae(given.vae)[1].get("z_dim", 16)
    if channels != model.in_channels:
        raise ValueError(f"--vae {given.vae}: its latents have {channels} channels, the network's {model.in_channels}")
    if not model.image_tokens:
        return
    if given.image_encoder is None:
        raise ValueError(f"--image-encoder: {condition} needs a folder with a CLIP vision model, or --pipeline")
    rows, width = rows_of_image(given.image_encoder)
    if (rows, width) != (model.image_len, model.image_dim):
        raise ValueError(
            f"--image-encoder {given.image_encoder}: it gives {rows} rows of {width} for an image, the network takes "
            f"{model.image_len} of {model.image_dim}"
        )


def _read(flag: str, path: str, video_frames: int, size: tuple[int, int]) -> Tensor:
    """Pixels [3, n, height, width] uint8 of a file, covering the size and cut to its centre; ValueError naming the flag."""
    try:
        if flag == "--video":
            return read_last_frames(Path(path), frames=video_frames, size=size)
        if Path(path).suffix.lower() not in IMAGE_SUFFIXES:
            raise BadInput(f"must end in one of {' '.join(sorted(IMAGE_SUFFIXES))}")
        return read_media(Path(path), frames=1, fps=Fraction(1), sizes=(size,))
    except BadInput as error:
        raise ValueError(f"{flag} {path}: {error}") from None


class GivenEncoder:
    """From files to what a network is told of them, as `prepare_shards.py encode` makes it of training data."""

    def __init__(self, given: GivenFiles, model: ModelConfig, *, device: torch.device | str) -> None:
        """Loads the VAE, and for Wan the image encoder. Raises ValueError for folders that cannot be used."""
        assert given.vae is not None, "checked before"
        self._given, self._model, dtype = given, model, getattr(torch, given.dtype)
        self._vae = VideoVAE(given.vae, device=device, dtype=dtype)
        self._image = None
        if model.image_tokens:
            assert given.image_encoder is not None, "checked before"
            self._image = ImageEncoder(given.image_encoder, device=device, dtype=dtype)

    def encode(self, files: Sequence[str], shape: Sequence[int]) -> Condition:
        """One sample's condition with an empty text, on the CPU, of the files of a prompt and a sample of [C, F, H, W].

        Raises ValueError for files that cannot be read.
        """
        size = PIXELS * shape[2], PIXELS * shape[3]
        flags = self._given.by_flag
        pixels = torch.cat(
            [_read(flag, path, self._given.video_frames, size) for flag, path in zip(flags, files, strict=True)], 1
        )
        no_text = torch.zeros(1, 0, 0)
        if self._image is not None:
            frames = FRAMES * (shape[1] - 1) + 1
            latents, rows = encode_given(pixels.transpose(0, 1), frames, vae=self._vae, image_encoder=self._image)
            return Condition(no_text, latents=latents[None].cpu(), image=rows[None])
        first = self._vae.encode(to_unit(pixels.to(self._vae.device))[None]).cpu()
        latents = first.new_zeros(1, *shape)
        latents[:, :, : first.shape[2]] = first  # a network looks at these alone
        return Condition(no_text, latents=latents, frames=torch.tensor([first.shape[2]]))
