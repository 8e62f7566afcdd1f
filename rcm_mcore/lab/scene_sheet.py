"""A picture of coloured videos with their prompts."""

import os
import textwrap
from collections.abc import Sequence

import numpy as np
import torch

_FONT_SIZE = 13
_LINE = 17  # pixels from a line of text to the next
_MARGIN = 8  # pixels


def scene_sheet(
    videos: torch.Tensor,
    prompts: Sequence[str],
    path: str | os.PathLike[str],
    *,
    frames: Sequence[int] = (0, 4, 8, 12, 16),
    columns: int = 2,
    scale: int = 2,
) -> None:
    """Writes a PNG: of each video some frames side by side, its prompt above them; videos from left to right, then downwards.

    Args:
        videos: [n, 3, F, H, W]; clamped to [0, 1].
        prompts: n.
        path: of the PNG.
        frames: the frames to show.
        columns: videos side by side.
        scale: pixels of the picture to a side of a video's pixel.
    Raises: ValueError for a wrong shape, values that are not finite, another number of prompts, a frame that is not there.
    """
    from PIL import Image, ImageDraw, ImageFont

    if videos.ndim != 5 or videos.shape[1] != 3 or 0 in videos.shape or not bool(videos.isfinite().all()):
        raise ValueError(f"videos: shape {list(videos.shape)}; expected [n, 3, F, H, W], none of them 0, and finite values")
    if len(prompts) != len(videos):
        raise ValueError(f"prompts: {len(prompts)} for {len(videos)} videos; give one for each")
    if not frames or not 0 <= min(frames) <= max(frames) < videos.shape[2]:
        raise ValueError(f"frames: {list(frames)}; must be at least one of 0 to {videos.shape[2] - 1}")
    chosen = videos.detach().float().clamp(0, 1)[:, :, list(frames)].permute(0, 3, 2, 4, 1).flatten(2, 3)  # [n, H, F W, 3]
    pixels = (chosen * 255).round().to(torch.uint8).cpu().numpy().repeat(scale, 1).repeat(scale, 2)
    height, width = pixels.shape[1:3]
    font = ImageFont.load_default(_FONT_SIZE)
    letters = int(width / max(font.getlength("abcdefghij") / 10, 1))
    texts = [textwrap.wrap(prompt, letters) for prompt in prompts]
    lines = max(map(len, texts))
    columns = min(columns, len(videos))
    down, across = lines * _LINE + height + _MARGIN, width + _MARGIN
    rows = -(-len(videos) // columns)
    sheet = Image.new("RGB", (columns * across + _MARGIN, rows * down + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (picture, text) in enumerate(zip(pixels, texts)):
        x, y = _MARGIN + index % columns * across, _MARGIN + index // columns * down
        for line, words in enumerate(text):
            draw.text((x, y + (lines - len(text) + line) * _LINE), words, "black", font)
        sheet.paste(Image.fromarray(np.ascontiguousarray(picture)), (x, y + lines * _LINE))
    sheet.save(path, format="PNG")
