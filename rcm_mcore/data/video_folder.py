"""Folders of videos to be measured: finding them, and reading all of them alike. No captions, unlike media_input.

A video is a file with times (mp4 and the like, gif), a folder of pictures, or an array; with one frame, a picture is one too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rcm_mcore.data.media_input import IMAGE_SUFFIXES, VIDEO_SUFFIXES, BadInput, Size, read_media, resize_and_crop

ARRAY_SUFFIXES = frozenset({".npy", ".safetensors"})
_SUFFIXES = VIDEO_SUFFIXES | IMAGE_SUFFIXES | ARRAY_SUFFIXES


def list_videos(folder: str | os.PathLike[str], *, frames: int, pattern: str = "**/*") -> list[Path]:
    """The videos of a folder, relative to it, by name; hidden ones are passed over.

    With `frames` = 1 every video, array and picture counts; else every video and array, and every folder in it that holds
    pictures and no videos, as one video.

    Args:
        folder: where they are.
        frames: of each video.
        pattern: glob of what is looked at, such as `*/samples/*.png`.
    Raises: ValueError when there is no such folder, or nothing in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: is no folder")
    files, folders = set(), set()
    for path in folder.glob(pattern):
        name, suffix = path.relative_to(folder), path.suffix.lower()
        if any(part.startswith(".") for part in name.parts) or not path.is_file():
            continue
        if suffix in VIDEO_SUFFIXES | ARRAY_SUFFIXES or (suffix in IMAGE_SUFFIXES and frames == 1):
            files.add(name)
        elif suffix in IMAGE_SUFFIXES and name.parent.name:
            folders.add(name.parent)
    found = files | (folders - {name.parent for name in files})
    if not found:
        known = " ".join(sorted(VIDEO_SUFFIXES | ARRAY_SUFFIXES))
        pictures = "pictures" if frames == 1 else "folders of pictures"
        raise ValueError(f"{folder}: nothing matches {pattern!r} that is a video ({known}, or {pictures})")
    return sorted(found, key=lambda name: name.as_posix())


def group_of(name: Path) -> str:
    """What samples of one prompt have in common: the name without its suffix and its number after the last `-` or `/`.

    `a cat-0.mp4` and `a cat-1.mp4` (VBench) are of `a cat`, `00003/samples/0002.png` (GenEval) of `00003/samples`; a name
    without a number is a group of its own.
    """
    stem = name.with_suffix("").as_posix() if name.suffix.lower() in _SUFFIXES else name.as_posix()
    return re.sub(r"[-/]\d+$", "", stem)


def read_video(path: Path, *, frames: int, fps: Fraction, size: Size) -> Tensor:
    """The first `frames` frames, resized (bicubic) to cover the size and cut to its centre: [3, F, height, width] uint8.

    Files with times give the frames nearest to k / fps (`read_media`). Arrays and folders of pictures have no times: their
    frames are taken one by one, as if they were at fps. An array is uint8 [F, H, W, 3], or floating point [3, F, H, W] in
    [0, 1], which is rounded to 8 bits; a safetensors file holds nothing else.

    Raises: BadInput when it cannot be read, is too short or is something else.
    """
    if path.is_dir():
        pictures: Iterator[np.ndarray] = _pictures(path, frames)
    elif path.suffix.lower() in ARRAY_SUFFIXES:
        pictures = iter(_array(path, frames))
    else:
        return read_media(path, frames=frames, fps=fps, sizes=[size])
    return torch.stack([resize_and_crop(picture, size) for picture in pictures], dim=1)


def _pictures(folder: Path, frames: int) -> Iterator[np.ndarray]:
    """The first pictures [H, W, 3] uint8 of a folder, in the order of the numbers in their names."""
    from PIL import Image, UnidentifiedImageError

    paths = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")]
    _check_count(len(paths), frames)
    for path in sorted(paths, key=lambda path: _by_number(path.name))[:frames]:
        try:
            with Image.open(path) as image:
                yield np.array(image.convert("RGB"))
        except (OSError, UnidentifiedImageError, ValueError, SyntaxError) as error:
            raise BadInput(f"{path.name} cannot be decoded: {type(error).__name__}: {error}") from error


def _by_number(name: str) -> list[tuple[str, int]]:
    """A key that puts frame 10 behind frame 9."""
    return [(text, int(number or 0)) for text, number in re.findall(r"(\D*)(\d*)", name)]


def _array(path: Path, frames: int) -> np.ndarray:
    """The first frames [F, H, W, 3] uint8 of a file of one array."""
    try:
        if path.suffix.lower() == ".npy":
            values = torch.from_numpy(np.load(path, allow_pickle=False))
        else:
            with safe_open(path, "pt") as file:
                names = list(file.keys())
                if len(names) != 1:
                    raise BadInput(f"holds {len(names)} tensors, must hold one")
                values = file.get_tensor(names[0])
    except BadInput:
        raise
    except (OSError, ValueError, TypeError, EOFError, SafetensorError) as error:
        raise BadInput(f"cannot be read: {type(error).__name__}: {error}") from error
    if values.ndim == 4 and values.dtype == torch.uint8 and values.shape[3] == 3 and 0 not in values.shape:
        pixels = values
    elif values.ndim == 4 and values.is_floating_point() and values.shape[0] == 3 and 0 not in values.shape:
        low, high = float(values.min()), float(values.max())
        if not (low >= 0 and high <= 1):
            raise BadInput(f"values from {low:g} to {high:g}: floating point must lie in [0, 1]")
        pixels = (values.permute(1, 2, 3, 0).float() * 255).round().to(torch.uint8)
    else:
        raise BadInput(f"holds {values.dtype} {list(values.shape)}: must be uint8 [F, H, W, 3] or floating point [3, F, H, W]")
    _check_count(len(pixels), frames)
    return pixels[:frames].numpy()


def _check_count(found: int, frames: int) -> None:
    if found < frames:
        raise BadInput(f"has {found} frames, {frames} are wanted")
