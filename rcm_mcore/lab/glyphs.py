"""The captions of the scenes: how they are drawn, and exact reading of them.

A caption is a plate of 32x14 pixels at the top or the bottom, with three glyphs in cells of 10 pixels' width and 12 pixels'
height. It stands still and in front of everything, so the mean over the frames shows it alone.
"""

from functools import cache

import torch

from rcm_mcore.lab.vocabulary import CANVAS, CAPTION_LENGTH, GLYPHS, PLACES

GLYPH_HEIGHT, GLYPH_WIDTH = 12, 10  # pixels
PLATE_HEIGHT, PLATE_WIDTH = 14, 32
PLATE_TOP = (1, CANVAS - 1 - PLATE_HEIGHT)  # of PLACES, pixels from the upper edge
PLATE_LEFT = (CANVAS - PLATE_WIDTH) // 2

_FINE = 8  # a glyph is drawn this many times larger, then averaged
_FONT_SIZE = 14.0  # pixels of the em: capitals are 10 pixels high
_STROKE = 0.25  # pixels added to each side of a stroke, to make the font bolder
_SHIFT = 1  # pixels by which a read glyph may stand elsewhere, any way
_LEGIBLE = 0.7  # smallest correlation with a glyph that counts as showing it


@cache
def glyph_bitmaps() -> torch.Tensor:
    """The glyphs [len(GLYPHS), 12, 10] float32, 1 for ink: Pillow's own font, at the same size and baseline."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(_FONT_SIZE * _FINE)
    bitmaps = []
    for glyph in GLYPHS:
        picture = Image.new("L", (GLYPH_WIDTH * _FINE, GLYPH_HEIGHT * _FINE))
        centre, baseline = picture.width / 2, picture.height - _FINE
        draw = ImageDraw.Draw(picture)
        draw.text((centre, baseline), glyph, 255, font, anchor="ms", stroke_width=_STROKE * _FINE)
        fine = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).float() / 255
        bitmaps.append(fine.reshape(GLYPH_HEIGHT, _FINE, GLYPH_WIDTH, _FINE).mean((1, 3)))
    return torch.stack(bitmaps)


def plates(captions: torch.Tensor) -> torch.Tensor:
    """The plates [n, 14, 32] of captions [n, CAPTION_LENGTH], 1 for ink, on the device of the captions."""
    cells = glyph_bitmaps().to(captions.device)[captions]  # [n, 3, 12, 10]
    rows = cells.permute(0, 2, 1, 3).flatten(2)
    return torch.nn.functional.pad(rows, (1, 1, 1, 1))


def read_captions(videos: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The glyphs that are at the captions' places, and how clearly they are there.

    A cell of the mean over frames and colours is correlated (Pearson) with every glyph, moved by at most one pixel each way;
    light on dark counts as dark on light. A uniform cell has correlation 0.

    Args:
        videos: [n, 3, F, 64, 64].
        places: [n], indices into PLACES.
    Returns: indices into GLYPHS [n, CAPTION_LENGTH] int64 and correlations [n, CAPTION_LENGTH], 0 to 1.
    Raises: ValueError for other shapes, or a place that does not exist.
    """
    _check(videos, places)
    still = videos.float().mean((1, 2))  # [n, 64, 64]
    top = torch.tensor(PLATE_TOP, device=videos.device)[places.to(videos.device)]
    ys = top[:, None] + torch.arange(PLATE_HEIGHT, device=videos.device)
    left = PLATE_LEFT
    plate = still[torch.arange(len(still), device=videos.device)[:, None], ys, left : left + PLATE_WIDTH]
    best = videos.new_zeros(len(videos), CAPTION_LENGTH, len(GLYPHS), dtype=torch.float32)
    glyphs = _standardised(glyph_bitmaps().to(videos.device).flatten(1))
    for dy in range(1 - _SHIFT, 2 + _SHIFT):
        for dx in range(1 - _SHIFT, 2 + _SHIFT):
            area = plate[:, dy : dy + GLYPH_HEIGHT, dx : dx + CAPTION_LENGTH * GLYPH_WIDTH]
            cells = area.unflatten(2, (CAPTION_LENGTH, GLYPH_WIDTH)).permute(0, 2, 1, 3).flatten(2)
            best = torch.maximum(best, (_standardised(cells) @ glyphs.T).abs())
    correlation, glyph = best.max(-1)
    return glyph, correlation


def legibility(
    videos: torch.Tensor, captions: torch.Tensor, places: torch.Tensor, *, at_least: float = _LEGIBLE
) -> torch.Tensor:
    """Which characters of the captions are there to be read, [n, CAPTION_LENGTH] bool.

    One is where its glyph correlates best of all and by `at_least` (`read_captions`).

    Args:
        videos: [n, 3, F, 64, 64].
        captions: [n, CAPTION_LENGTH], what should be there.
        places: [n], where.
    Raises: ValueError for other shapes.
    """
    if tuple(captions.shape) != (len(videos), CAPTION_LENGTH):
        raise ValueError(f"captions: shape {list(captions.shape)}; expected [{len(videos)}, {CAPTION_LENGTH}]")
    glyphs, correlation = read_captions(videos, places)
    return (glyphs == captions.to(glyphs.device)) & (correlation >= at_least)


def _standardised(rows: torch.Tensor) -> torch.Tensor:
    """Rows [..., d] with mean 0 and norm 1; 0 where all entries are equal."""
    centred = rows - rows.mean(-1, keepdim=True)
    return centred / centred.norm(dim=-1, keepdim=True).clamp_min(1e-4)


def _check(videos: torch.Tensor, places: torch.Tensor) -> None:
    if videos.ndim != 5 or videos.shape[1] != 3 or tuple(videos.shape[3:]) != (CANVAS, CANVAS) or not videos.shape[2]:
        raise ValueError(f"videos: shape {list(videos.shape)}; expected [n, 3, F, {CANVAS}, {CANVAS}]")
    if tuple(places.shape) != (len(videos),) or not bool(((places >= 0) & (places < len(PLACES))).all()):
        raise ValueError(f"places: {places.tolist()}; expected {len(videos)} indices into {PLACES}")
