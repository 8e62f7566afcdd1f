"""Pictures and tables of a run: contact sheet, GIF, training curves, metrics as Markdown.

Videos are greyscale, [n, F, H, W] in [0, 1], tensors or arrays; other values are clamped. Pillow and matplotlib (the
``demo`` extra) are imported where they are used, so the library imports without them.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

Videos: TypeAlias = torch.Tensor | np.ndarray
PathLike: TypeAlias = str | os.PathLike[str]

_GAP = 2  # pixels between the frames of a video
_MARGIN = 10  # pixels around videos and labels
_FONT_SIZE = 14
_PAPER = 255
_TANGENT_NORM = "g_norm"
_POINTS_PER_MEAN = 50  # a curve's running mean spans one in so many of its points


def contact_sheet(rows: Mapping[str, Videos], path: PathLike, *, captions: Sequence[str] = (), scale: int = 4) -> None:
    """Writes a PNG with one row of videos for each label; the frames of a video stand side by side.

    The picture is (label width) + n (F W scale + (F - 1) 2 + 10) pixels wide, with n the longest row.

    Args:
        rows: label to videos [n, F, H, W]; n may differ, the rest may not.
        path: of the PNG.
        captions: text above the columns, such as the prompts; none or one for each video of the longest row.
        scale: pixels of the picture to a side of a video's pixel.
    Raises: ValueError for no rows, wrong shapes, non-finite videos, another number of captions.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not rows:
        raise ValueError("rows: nothing to show; give at least one label with videos")
    pixels = {label: _to_bytes(f"rows[{label!r}]", videos) for label, videos in rows.items()}
    shapes = {values.shape[1:] for values in pixels.values()}
    if len(shapes) != 1:
        raise ValueError(f"rows: videos of shapes {sorted(shapes)}; all rows must have the same frames and size")
    columns = max(len(values) for values in pixels.values())
    if captions and len(captions) != columns:
        raise ValueError(f"captions: {len(captions)} for {columns} columns; give one for each or none")
    frames, height, width = shapes.pop()
    font = ImageFont.load_default(_FONT_SIZE)
    label_width = _MARGIN + math.ceil(max(font.getlength(label) for label in rows)) + _MARGIN
    column_width = frames * width * scale + (frames - 1) * _GAP + _MARGIN
    row_height = height * scale + _MARGIN
    top = _MARGIN + (_FONT_SIZE + _MARGIN if captions else 0)
    sheet = Image.new("L", (label_width + columns * column_width, top + len(rows) * row_height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, caption in enumerate(captions):
        draw.text((label_width + column * column_width, _MARGIN), caption, fill=0, font=font)
    for row, (label, videos) in enumerate(pixels.items()):
        y = top + row * row_height
        draw.text((_MARGIN, y + height * scale / 2), label, fill=0, font=font, anchor="lm")
        for column, video in enumerate(videos):
            for frame, image in enumerate(video):
                x = label_width + column * column_width + frame * (width * scale + _GAP)
                sheet.paste(Image.fromarray(_enlarge(image, scale)), (x, y))
    sheet.save(path, format="PNG")


def write_gif(videos: Videos, path: PathLike, *, columns: int = 10, scale: int = 4, frames_per_second: float = 4.0) -> None:
    """Writes an endless GIF in which all videos play side by side, left to right, then downwards.

    Args:
        videos: [n, F, H, W].
        path: of the GIF; columns W scale + (columns - 1) 2 pixels wide (columns at most n), rows likewise high.
        columns: videos in a row.
        scale: pixels of the picture to a side of a video's pixel.
        frames_per_second: speed.
    Raises: ValueError for a wrong shape or non-finite videos.
    """
    from PIL import Image

    pixels = _to_bytes("videos", videos)
    n, frames, height, width = pixels.shape
    columns = min(columns, n)
    rows = math.ceil(n / columns)
    high, wide = height * scale + _GAP, width * scale + _GAP
    grid = np.full((frames, rows * high - _GAP, columns * wide - _GAP), _PAPER, dtype=np.uint8)
    for index, video in enumerate(pixels):
        y, x = index // columns * high, index % columns * wide
        grid[:, y : y + height * scale, x : x + width * scale] = _enlarge(video, scale)
    first, *others = [Image.fromarray(frame) for frame in grid]
    duration = round(1000 / frames_per_second)
    first.save(path, format="GIF", save_all=True, append_images=others, duration=duration, loop=0)


def training_curves(logs: Sequence[PathLike] | Mapping[str, PathLike], path: PathLike) -> None:
    """Writes a PNG with one line of plots for each log: its loss terms, and the norm of the tangent.

    A log has one JSON object to a line with ``step``, ``loss`` or its terms ``loss_*`` (then ``loss``, which mixes
    student and critic steps, is not plotted), and ``g_norm``. Absent, null and non-finite values are left out, and so
    are lines that are cut off. A step that was logged twice, before a kill and after the resumption, counts once, as
    it was logged last. Faint lines are the values, strong ones a running mean. A plot is titled by its log's key, or folder.

    Raises: ValueError for no logs, or a log without a step.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not logs:
        raise ValueError("logs: nothing to plot; give at least one JSON-lines file")
    titled = list(logs.items()) if isinstance(logs, Mapping) else [(Path(log).resolve().parent.name, log) for log in logs]
    figure = Figure(figsize=(11.0, 3.2 * len(titled)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(titled), 2, squeeze=False)
    for (left, right), (title, log) in zip(axes, titled):
        curves = _read_curves(Path(log))
        terms = {name: curve for name, curve in curves.items() if name.startswith("loss_")}
        _plot(left, terms or {name: curve for name, curve in curves.items() if name == "loss"}, f"{title}: loss")
        tangent = {name: curve for name, curve in curves.items() if name == _TANGENT_NORM}
        _plot(right, tangent, f"{title}: tangent norm before normalisation")
    figure.savefig(path, format="png", dpi=110)


def metrics_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of rows that map column names to values; columns in order of their first appearance.

    Floats are shown with three significant digits, None and missing values as a dash.

    Raises: ValueError for no rows.
    """
    if not rows:
        raise ValueError("rows: nothing to tabulate; give at least one row")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    numeric = [all(isinstance(row.get(name), int | float | None) for row in rows) for name in columns]
    lines = [columns, ["---:" if right else "---" for right in numeric]]
    lines += [[_cell(row.get(name)) for name in columns] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _to_bytes(name: str, videos: Videos) -> np.ndarray:
    """The videos as uint8 [n, F, H, W], checked."""
    values = torch.as_tensor(videos).detach().float().cpu()
    if values.ndim != 4 or 0 in values.shape:
        raise ValueError(f"{name}: shape {list(values.shape)}; expected [n, F, H, W], none of them 0")
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name}: has NaN or infinite pixels")
    return (values.clamp(0.0, 1.0) * 255.0).round().to(torch.uint8).numpy()


def _enlarge(image: np.ndarray, scale: int) -> np.ndarray:
    """Each pixel [..., H, W] as a square of scale x scale."""
    return image.repeat(scale, axis=-2).repeat(scale, axis=-1)


def _read_curves(log: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values of every field to plot, in order of the steps."""
    records: dict[int, dict[str, Any]] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
            records[int(record["step"])] = record
        except (ValueError, KeyError, TypeError):  # a line that a kill cut off
            continue
    if not records:
        raise ValueError(f"{log}: no line with a step; expected JSON lines as the trainer writes them")
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for step, record in sorted(records.items()):
        for name, value in record.items():
            wanted = name == _TANGENT_NORM or name.startswith("loss")
            if wanted and isinstance(value, int | float) and math.isfinite(value):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(step)
                values.append(float(value))
    return curves


def _plot(axes: Any, curves: dict[str, tuple[list[int], list[float]]], title: str) -> None:
    """Curves over steps on one axes; logarithmic when all values are positive and span more than a decade."""
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel("step")
    if not curves:
        axes.text(0.5, 0.5, "not logged", ha="center", va="center", transform=axes.transAxes)
        return
    for name, (steps, values) in curves.items():
        (line,) = axes.plot(steps, values, alpha=0.25, linewidth=0.8)
        span = max(1, len(values) // _POINTS_PER_MEAN)
        means = np.convolve(values, np.full(span, 1.0 / span), mode="valid")
        axes.plot(steps[span - 1 :], means, color=line.get_color(), label=name)
    flat = [value for _, values in curves.values() for value in values]
    if 0 < 10 * min(flat) < max(flat):
        axes.set_yscale("log")
    axes.legend()


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        if math.isfinite(value) and abs(value) >= 1000:
            return f"{value:.0f}"
        return f"{value:#.3g}".rstrip(".")
    return str(value).replace("|", r"\|").replace("\n", " ")
