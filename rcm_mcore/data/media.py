"""Videos and pictures to files: mp4, png, and a contact sheet of them. PyAV and Pillow are imported where they are used.

Pixels are uint8 [F, H, W, 3], red, green, blue. A file appears under its name only when it is complete.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_BT709 = 1  # of color matrix, primaries and transfer in ISO/IEC 23091-2; files without them are shown in one way or another
_LIMITED = 1  # luma from 16 to 235
_QUALITY = "17"  # x264's constant rate factor: hardly told from the original
_GAP = 4  # pixels around the pictures of a sheet
_FONT = 12
_SHEET_WIDTH = 1600


def to_pixels(video: Tensor) -> Tensor:
    """uint8 [F, H, W, 3] of a video [3, F, H, W] in [-1, 1], rounded; what is outside is clamped."""
    return ((video / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 3, 0).contiguous()


def suffix_of(frames: int) -> str:
    """Of the file of so many frames."""
    return ".png" if frames == 1 else ".mp4"


def write_media(path: str | os.PathLike[str], pixels: np.ndarray, *, fps: float) -> None:
    """Writes pixels [F, H, W, 3] as png (one frame) or mp4, H.264 where PyAV has it and MPEG-4 else, 4:2:0, BT.709.

    Raises: ValueError for another shape or type, a suffix that is not that of so many frames, fps that are not positive, and
    odd sizes of an mp4.
    """
    path = Path(path)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3 or 0 in pixels.shape:
        raise ValueError(f"{path}: pixels are {pixels.dtype} {list(pixels.shape)}: must be uint8 [F, H, W, 3]")
    frames, height, width = pixels.shape[:3]
    if path.suffix != suffix_of(frames):
        raise ValueError(f"{path}: {frames} frames go to a {suffix_of(frames)}")
    if frames == 1:
        from PIL import Image

        with _published(path) as partial:
            Image.fromarray(pixels[0]).save(partial, format="PNG")
        return
    if not fps > 0:
        raise ValueError(f"{path}: fps={fps} must be positive")
    if height % 2 or width % 2:
        raise ValueError(f"{path}: {height}x{width} pixels; an mp4 with 4:2:0 colors needs even sizes")
    with _published(path) as partial:
        _write_mp4(partial, pixels, Fraction(fps).limit_denominator(1001))


def _write_mp4(path: Path, pixels: np.ndarray, fps: Fraction) -> None:
    import av

    has_x264 = "libx264" in av.codecs_available
    with av.open(str(path), "w", format="mp4") as container:
        # One thread: it works beside the sampling, and other ranks have theirs.
        options = {"crf": _QUALITY, "threads": "1"} if has_x264 else {}
        stream: Any = container.add_stream("libx264" if has_x264 else "mpeg4", rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = *pixels.shape[1:3], "yuv420p"
        if not has_x264:
            stream.bit_rate = int(pixels.shape[1] * pixels.shape[2] * fps)  # a bit a pixel
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED
        for image in pixels:
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=_BT709, dst_color_range=_LIMITED)
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def thumbnails(path: str | os.PathLike[str], *, height: int) -> list[np.ndarray]:
    """The first, the middle and the last frame of a file of `write_media`, uint8 [height, w, 3]; the picture of a png."""
    path = Path(path)
    if path.suffix == ".png":
        from PIL import Image

        with Image.open(path) as image:
            return thumbnails_of(np.asarray(image.convert("RGB"))[None], height=height)
    import av

    with av.open(str(path)) as container:
        return thumbnails_of([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)], height=height)


def thumbnails_of(pixels: Sequence[np.ndarray] | np.ndarray, *, height: int) -> list[np.ndarray]:
    """As `thumbnails`, of pixels [F, H, W, 3]; of fewer than three frames each once."""
    from PIL import Image

    shown = [pixels[index] for index in sorted({0, len(pixels) // 2, len(pixels) - 1})]
    width = max(1, round(shown[0].shape[1] * height / shown[0].shape[0]))
    return [np.asarray(Image.fromarray(picture).resize((width, height))) for picture in shown]


def write_contact_sheet(
    path: str | os.PathLike[str], cells: Sequence[tuple[str, Sequence[np.ndarray]]], *, columns: int | None = None
) -> None:
    """Writes a png of cells, left to right, then downwards: a caption, cut to the width, over pictures of one size.

    `columns` of them, or as many as a screen is wide. Raises: ValueError for no cells or pictures of different sizes.
    """
    from PIL import Image, ImageDraw, ImageFont

    sizes = {picture.shape for _, pictures in cells for picture in pictures}
    if len(sizes) != 1:
        raise ValueError(f"{path}: a contact sheet needs pictures of one size, not {sorted(sizes)}")
    height, width, _ = sizes.pop()
    across = max(len(pictures) for _, pictures in cells)
    cell_width, cell_height = across * (width + _GAP) + 2 * _GAP, height + 3 * _GAP + _FONT
    columns = columns or min(len(cells), max(1, _SHEET_WIDTH // cell_width))
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * cell_width, rows * cell_height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT)
    for number, (caption, pictures) in enumerate(cells):
        x, y = number % columns * cell_width + _GAP, number // columns * cell_height + _GAP
        draw.text((x, y), _fitting(caption, font, cell_width - 2 * _GAP), fill="black", font=font)
        for place, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture), (x + place * (width + _GAP), y + _FONT + _GAP))
    with _published(Path(path)) as partial:
        sheet.save(partial, format="PNG")


def _fitting(text: str, font: Any, width: float) -> str:
    """As much of the text as fits."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


@contextmanager
def _published(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes `path` if nothing goes wrong."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
