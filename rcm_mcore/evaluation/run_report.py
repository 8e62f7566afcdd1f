"""A run's log as one HTML page that stands alone: a table, curves, events, sheets of samples.

Reads `log.jsonl` and, where they are there, `events.jsonl` and `sheets/*.png` of a run's folder; what the keys mean is in
training/log.py. Curves are SVG; nothing is fetched, and no script runs.
"""

from __future__ import annotations

import base64
import json
import math
import time
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

Line = dict[str, Any]
Curve = list[tuple[float, float]]

_POINTS = 600  # of a curve, at most: a longer one is shown by the means of as many stretches
_EVENTS, _SHEETS = 200, 6  # the newest, at most
_RECENT = 100  # steps whose mean time says when the run ends
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 560, 220, 64, 12, 8, 24
_COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e")
# Charts: title, keys, and whether the phases are told apart.
_CHARTS = (
    ("Loss of the consistency term (constant by construction)", ("loss_scm",), False),
    ("Loss of score distillation", ("loss_dmd",), False),
    ("Loss of the fake score", ("loss_critic",), False),
    ("Loss, weighted sum of the terms", ("loss",), True),
    ("Norm of the tangent before normalisation", ("g_norm",), False),
    ("Gaps to the teacher", ("teacher_gap", "score_gap"), False),
    ("Norm of the gradient", ("grad_norm",), True),
    ("Learning rate", ("lr",), True),
    ("Seconds of a step", ("seconds",), True),
    ("Seconds of a step spent waiting for data", ("data_seconds",), False),
)
_STYLE = """
body { font: 14px/1.4 sans-serif; margin: 2em auto; max-width: 1180px; color: #222; }
table { border-collapse: collapse; } td, th { border: 1px solid #ccc; padding: 2px 8px; text-align: left; }
figure { display: inline-block; margin: 8px; } figcaption { font-weight: bold; } figure img { max-width: 100%; }
svg text { font: 11px sans-serif; fill: #444; } .legend span { margin-right: 1em; }
"""


def read_lines(path: Path) -> list[Line]:
    """The objects of a JSON-lines file; lines that are none, such as one that a kill cut short, are left out."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def run_report(folder: str | Path) -> str:
    """The page of the run in `folder`. Raises ValueError if its log is not there or has no step."""
    root = Path(folder)
    path = root / "log.jsonl"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the folder of a run (checkpoint.dir)")
    steps = {line["step"]: line for line in read_lines(path) if isinstance(line.get("step"), int)}
    lines = [steps[step] for step in sorted(steps)]  # a step that was done again counts as it was last
    if not lines:
        raise ValueError(f"{path}: no line of a step; a run writes its first when the first step is done")
    noted = root / "events.jsonl"
    events = read_lines(noted) if noted.is_file() else []
    name = escape(str(root.resolve().name))
    rows = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>\n" for k, v in summary(lines, events).items())
    charts = "\n".join(_chart(title, _curves(lines, keys, split)) for title, keys, split in _CHARTS)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title><style>{_STYLE}</style></head>\n'
        f'<body><h1>{name}</h1>\n<table id="summary">\n{rows}</table>\n<h2>Curves over steps</h2>\n{charts}\n'
        f"{_event_table(events)}{_sheets(root / 'sheets')}</body></html>\n"
    )


def summary(lines: Sequence[Line], events: Sequence[Line]) -> dict[str, str]:
    """What the table says of the run: names to values; a dash for what was not logged."""
    total = next((e["of"] for e in reversed(events) if isinstance(e.get("of"), int)), None)
    last, seconds = lines[-1]["step"], sum(_values(lines, "seconds"))
    saving = sum(_values(lines, "save_seconds"))
    rows = {"Steps": f"{last} of {total}" if total is not None else str(last)}
    rows["Time in steps"] = _duration(seconds)
    rows["Time of saves"] = _duration(saving)
    if total is not None and last < total:
        recent = lines[-_RECENT:]
        each = (sum(_values(recent, "seconds")) + sum(_values(recent, "save_seconds"))) / len(recent)
        rows["Time left"] = f"{_duration((total - last) * each)}, as the last {len(recent)} steps took"
    for phase in _phases(lines):
        rows[f"Mean seconds of a {phase} step"] = _mean(_values((x for x in lines if x.get("phase") == phase), "seconds"))
    tokens = sum(x["tokens_per_second"] * x["seconds"] for x in lines if _is_number(x.get("tokens_per_second")))
    rows["Tokens per second"] = f"{tokens / seconds:.4g}" if tokens and seconds else "-"
    rows["TFLOP/s of a rank, mean over time"] = _over_time(lines, "tflops_per_rank")
    rows["MFU, mean over time"] = _over_time(lines, "mfu")
    rows["Share of time waiting for data"] = f"{sum(_values(lines, 'data_seconds')) / seconds:.1%}" if seconds else "-"
    rows["Peak memory, GiB"] = f"{max(_values(lines, 'memory_gib')):.1f}" if _values(lines, "memory_gib") else "-"
    for key, what in (("nonfinite_output", "outputs"), ("nonfinite_target", "targets")):
        rows[f"Samples with non-finite {what}"] = f"{sum(_values(lines, key)):.0f}"
    bad = _values(lines, "bad_samples")
    rows["Bad samples of the data"] = f"{bad[-1]:.0f}" if bad else "-"
    rows["Written"] = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    return rows


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _values(lines: Iterable[Line], key: str) -> list[float]:
    return [line[key] for line in lines if _is_number(line.get(key))]


def _phases(lines: Iterable[Line]) -> list[str]:
    return list(dict.fromkeys(str(line.get("phase")) for line in lines))


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.4g}" if values else "-"


def _over_time(lines: Sequence[Line], key: str) -> str:
    """The mean of a rate, weighted by the seconds of the steps."""
    known = [x for x in lines if _is_number(x.get(key)) and _is_number(x.get("seconds"))]
    seconds = sum(x["seconds"] for x in known)
    return f"{sum(x[key] * x['seconds'] for x in known) / seconds:.4g}" if seconds else "-"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def _curves(lines: Sequence[Line], keys: Sequence[str], split: bool) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    for line in lines:
        for key in keys:
            if _is_number(line.get(key)):
                name = str(line.get("phase")) if split else key
                curves.setdefault(name, []).append((line["step"], line[key]))
    return {name: _thinned(curve) for name, curve in curves.items()}


def _thinned(curve: Curve) -> Curve:
    """The means of at most _POINTS stretches of equal length."""
    size = -(-len(curve) // _POINTS)
    parts = (curve[i : i + size] for i in range(0, len(curve), size))
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def _chart(title: str, curves: dict[str, Curve]) -> str:
    """Lines over steps, logarithmic upwards where all values are positive and span more than a decade; nothing for no value."""
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return ""
    low, high = min(y for _, y in points), max(y for _, y in points)
    is_log = 0 < 10 * low < high
    scale = math.log10 if is_log else float
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    bottom, top = scale(low), scale(high)
    if top == bottom:
        bottom, top = bottom - (abs(bottom) or 1.0) / 10, top + (abs(top) or 1.0) / 10
    wide, tall = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def place(x: float, y: float) -> str:
        across = (x - first) / (last - first) if last > first else 0.5
        return f"{_LEFT + wide * across:.1f},{_TOP + tall * (top - y) / (top - bottom):.1f}"

    parts = []
    for i in range(5):
        level = bottom + (top - bottom) * i / 4
        y = _TOP + tall * (1 - i / 4)
        shown = f"{10**level if is_log else level:.3g}"
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{shown}</text>')
    for x, anchor in ((first, "start"), (last, "end")):
        across = place(x, bottom).split(",")[0]
        parts.append(f'<text x="{across}" y="{_HEIGHT - 6}" text-anchor="{anchor}">{x:g}</text>')
    legend = ""
    for (name, curve), color in zip(curves.items(), _COLORS):
        if len(curve) == 1:
            at = place(curve[0][0], scale(curve[0][1])).split(",")
            parts.append(f'<circle cx="{at[0]}" cy="{at[1]}" r="2.5" fill="{color}"/>')
        else:
            path = " ".join(place(x, scale(y)) for x, y in curve)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.3"/>')
        legend += f'<span style="color:{color}">{escape(name)}</span>'
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}">{"".join(parts)}</svg>'
        f'<div class="legend">{legend}</div></figure>'
    )


def _event_table(events: Sequence[Line]) -> str:
    if not events:
        return ""
    shown = events[-_EVENTS:]
    note = f"the newest {len(shown)} of {len(events)}" if len(shown) < len(events) else f"{len(events)}"
    rows = []
    for event in reversed(shown):
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(event["time"])) if _is_number(event.get("time")) else ""
        facts = ", ".join(f"{k} {_fact(v)}" for k, v in event.items() if k not in ("time", "step", "event"))
        cells = (when, str(event.get("step", "")), str(event.get("event", "")), facts)
        rows.append(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>\n")
    head = "<tr><th>time, UTC</th><th>after step</th><th>event</th><th></th></tr>\n"
    return f'<h2>Events ({note}, newest first)</h2>\n<table id="events">\n{head}{"".join(rows)}</table>\n'


def _fact(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def _sheets(folder: Path) -> str:
    """The newest sheets of samples, by their time of writing."""
    paths = sorted(folder.glob("*.png"), key=lambda path: (path.stat().st_mtime, path.name), reverse=True)[:_SHEETS]
    figures = [
        f'<figure><figcaption>{escape(path.name)}</figcaption><img alt="{escape(path.stem)}" '
        f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"></figure>\n'
        for path in paths
    ]
    return f"<h2>Samples</h2>\n{''.join(figures)}" if figures else ""
