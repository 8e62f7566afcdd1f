"""Videos and images with captions: finding them, choosing frames by time, resizing and cropping to a bucket.

A size is (height, width) in pixels. What cannot be used raises BadInput, whose message is the reason in one line.
"""

from __future__ import annotations

import csv
import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif"})
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
SIZE_MULTIPLE = 16  # pixels: 8 to a latent position, 2 of those to a token

Size = tuple[int, int]


class BadInput(ValueError):
    """A video, image or caption that cannot be used; the message is the reason, in one line."""


@dataclass(frozen=True)
class MediaInput:
    """One entry of a folder or table: `name` is the path as listed, relative to the folder or the table."""

    name: str
    path: Path
    caption: str | None  # None: there is no caption file


def list_inputs(source: str | os.PathLike[str]) -> list[MediaInput]:
    """The videos and images of a folder, by name, or the rows of a CSV file, in their order.

    In a folder, and those inside it, the caption of `a.mp4` is in `a.txt`; other files are passed over. A CSV file has the
    columns `path`, relative to the file, and `caption`; others are passed over. Whether an entry can be used shows later.

    Raises: ValueError when there is no such folder or file, no entry in it, or a column is missing.
    """
    source = Path(source)
    if source.is_dir():
        inputs = list(_list_folder(source))
    elif source.suffix.lower() == ".csv" and source.is_file():
        try:
            inputs = list(_list_table(source))
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"input {source}: is no table in UTF-8: {error}") from None
    else:
        raise ValueError(f"input {source}: must be a folder of videos and images, or a .csv file with columns path, caption")
    if not inputs:
        known = " ".join(sorted(VIDEO_SUFFIXES | IMAGE_SUFFIXES))
        raise ValueError(f"input {source}: there is nothing to encode in it (a folder's files must end in {known})")
    return inputs


def _list_folder(folder: Path) -> Iterator[MediaInput]:
    paths = [path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES]
    for path in sorted(paths, key=lambda path: path.relative_to(folder).as_posix()):
        text = path.with_suffix(".txt")
        caption = text.read_text(encoding="utf-8", errors="replace") if text.is_file() else None
        yield MediaInput(path.relative_to(folder).as_posix(), path, caption)


def _list_table(table: Path) -> Iterator[MediaInput]:
    with open(table, encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        missing = [name for name in ("path", "caption") if name not in (rows.fieldnames or ())]
        if missing:
            found = ", ".join(rows.fieldnames or ()) or "none"
            raise ValueError(f"input {table}: the columns path and caption are needed, {missing[0]} is missing (found {found})")
        for number, row in enumerate(rows, 1):
            name = row["path"] or ""
            yield MediaInput(name or f"row {number}", table.parent / name, row["caption"] or "")


def parse_size(text: str) -> Size:
    """(height, width) of HEIGHTxWIDTH. Raises: ValueError unless both are positive multiples of 16."""
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise ValueError(f"size {text!r}: write HEIGHTxWIDTH in pixels, such as 480x832")
    for name, value in (("height", int(height)), ("width", int(width))):
        if value < SIZE_MULTIPLE or value % SIZE_MULTIPLE:
            near = max(1, round(value / SIZE_MULTIPLE)) * SIZE_MULTIPLE
            raise ValueError(f"size {text!r}: {name} {value} must be a multiple of {SIZE_MULTIPLE}, such as {near}")
    return int(height), int(width)


def nearest_size(height: int, width: int, sizes: Sequence[Size]) -> Size:
    """The bucket of nearest aspect ratio, by the ratio of the ratios; of equal ones the first."""
    ratio = height / width
    return min(sizes, key=lambda size: abs(np.log(size[0] / size[1] / ratio)))


def resize_and_crop(frame: np.ndarray, size: Size) -> Tensor:
    """A frame [H, W, 3] uint8, resized (bicubic) to just cover the size and cut to its centre: [3, height, width] uint8."""
    height, width = size
    h, w, _ = frame.shape
    scale = max(height / h, width / w)
    new_h, new_w = max(height, round(h * scale)), max(width, round(w * scale))
    pixels = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None]
    if (new_h, new_w) != (h, w):
        pixels = torch.nn.functional.interpolate(pixels, (new_h, new_w), mode="bicubic", antialias=True)
    top, left = (new_h - height) // 2, (new_w - width) // 2
    return pixels[0, :, top : top + height, left : left + width].contiguous()


def read_media(path: Path, *, frames: int, fps: Fraction, sizes: Sequence[Size]) -> Tensor:
    """The first `frames` frames at `fps` of a video, or an image, in the nearest bucket: [3, F, height, width] uint8.

    Frame k is the one whose time is nearest to k / fps after the first, the earlier of two. One frame is held at its own
    size at a time.

    Raises: BadInput when it cannot be decoded, is too short, or is an image and frames > 1.
    """
    if not path.is_file():
        raise BadInput("there is no such file")
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        if frames != 1:
            raise BadInput(f"an image is one frame, {frames} are wanted")
        chosen: Iterator[np.ndarray] = iter([_read_image(path)])
    elif suffix in VIDEO_SUFFIXES:
        chosen = _read_video(path, frames, fps)
    else:
        raise BadInput(f"{suffix or 'no suffix'} is neither a video's nor an image's suffix")
    size = None
    cropped = []
    for frame in chosen:
        size = size or nearest_size(frame.shape[0], frame.shape[1], sizes)
        cropped.append(resize_and_crop(frame, size))
    return torch.stack(cropped, dim=1)


def read_last_frames(path: Path, *, frames: int, size: Size) -> Tensor:
    """The last `frames` frames of a video, at the times that they have: [3, F, height, width] uint8.

    Raises: BadInput when it cannot be decoded, is no video or is too short.
    """
    import av

    if not path.is_file():
        raise BadInput("there is no such file")
    if path.suffix.lower() not in VIDEO_SUFFIXES:
        raise BadInput(f"must end in one of {' '.join(sorted(VIDEO_SUFFIXES))}")
    last: deque[av.VideoFrame] = deque(maxlen=frames)
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise BadInput("there is no video stream in it")
            last.extend(container.decode(container.streams.video[0]))
            cropped = [resize_and_crop(_pixels(frame), size) for frame in last]
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(f"cannot be decoded: {type(error).__name__}: {_one_line(error)}") from error
    if len(cropped) < frames:
        raise BadInput(f"it has {len(cropped)} frames, the last {frames} are wanted")
    return torch.stack(cropped, dim=1)


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 pixels as float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def _read_image(path: Path) -> np.ndarray:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))  # torch warns of a view, which is read-only
    # Bytes from a stranger can make the decoder raise nearly anything.
    except Exception as error:
        raise BadInput(f"cannot be decoded: {type(error).__name__}: {_one_line(error)}") from error


def _read_video(path: Path, count: int, fps: Fraction) -> Iterator[np.ndarray]:
    """Yields `count` frames [H, W, 3] uint8, chosen by time."""
    import av

    last: av.VideoFrame | None = None
    start = time = Fraction(0)  # of the first frame; of `last`
    duration = Fraction(0)
    taken = 0
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise BadInput("there is no video stream in it")
            stream = container.streams.video[0]
            if stream.average_rate:
                duration = 1 / stream.average_rate
            for frame in container.decode(stream):
                if frame.pts is None or frame.time_base is None:
                    raise BadInput("its frames have no times")
                now = frame.pts * frame.time_base
                if last is None:
                    start = now
                elif now <= time:
                    continue
                else:
                    duration = now - time
                    # Every wanted time up to half way to this frame is nearest to the one before.
                    while taken < count and start + taken / fps <= (time + now) / 2:
                        taken += 1
                        yield _pixels(last)
                if taken == count:
                    return
                last, time = frame, now
            if last is None:
                raise BadInput("there is no frame in it")
            while taken < count and start + taken / fps <= time + duration / 2:
                taken += 1
                yield _pixels(last)
    except (BadInput, GeneratorExit):
        raise
    except Exception as error:
        raise BadInput(f"cannot be decoded: {type(error).__name__}: {_one_line(error)}") from error
    if taken < count:
        seconds, needed = float(time - start + duration), float((count - 1) / fps)
        raise BadInput(f"{seconds:.2f} s are too short: {count} frames at {float(fps):g} a second need {needed:.2f} s")


def _pixels(frame) -> np.ndarray:
    """A decoded frame as [H, W, 3] uint8 RGB, turned upright as its display matrix says (phones film sideways)."""
    pixels = frame.to_ndarray(format="rgb24")
    return np.rot90(pixels, k=round(frame.rotation / 90) % 4)


def _one_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
