"""Uncertainty of measures: intervals over runs with different seeds, and over the samples or prompts of one run.

The two answer different questions. `run_interval` says how a measure varies when everything is trained and sampled anew, which
is what a claim about a method needs; `bootstrap_interval` how it varies with the samples drawn, for a network that stands.
To compare two methods whose runs share seeds, take `run_interval` of the differences, seed by seed.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from rcm_mcore.evaluation.report import metrics_table


class RunInterval(NamedTuple):
    """Mean over runs, standard deviation among them (divisor n - 1), half the width of the interval, number of runs."""

    mean: float
    sd: float
    half_width: float
    runs: int

    def __str__(self) -> str:
        """`mean ± half width (n runs)`, the half width to two significant digits and the mean to as many decimals."""
        return f"{_rounded(self.mean, self.half_width)} ({self.runs} runs)"


class BootstrapInterval(NamedTuple):
    """The statistic of the values, and the ends of its interval."""

    value: float
    low: float
    high: float


def run_interval(values: Sequence[float], *, confidence: float = 0.95) -> RunInterval:
    """Student's t interval of the mean of independent runs: mean ± t_{(1 + confidence) / 2, n - 1} sd / sqrt(n).

    It supposes that runs differ by about normal noise. Use 3 runs or more: of 2 it is 12.7 standard errors wide to each side.

    Raises: ValueError for fewer than 2 runs, non-finite values, a confidence outside (0, 1).
    """
    _check_confidence(confidence)
    runs = np.asarray(values, dtype=np.float64)
    if runs.ndim != 1 or len(runs) < 2:
        raise ValueError(f"values: shape {list(runs.shape)}; an interval needs a number from each of 2 runs or more")
    if not np.isfinite(runs).all():
        raise ValueError(f"values: {runs.tolist()}; every run must have given a finite number")
    sd = float(runs.std(ddof=1))
    half_width = _student_quantile((1 + confidence) / 2, len(runs) - 1) * sd / math.sqrt(len(runs))
    return RunInterval(float(runs.mean()), sd, half_width, len(runs))


def bootstrap_interval(
    values: torch.Tensor | np.ndarray,
    statistic: Callable[[torch.Tensor], float] = lambda values: float(values.mean()),
    *,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> BootstrapInterval:
    """Percentile bootstrap (Efron 1979) of a statistic of samples, or of whole clusters such as prompts.

    Clusters are drawn with replacement and keep all their samples: samples of one prompt are alike, and an interval that
    takes them for independent is too narrow. For means and the like only: repeated samples bias a Frechet distance upwards,
    and a repeated neighbour is at distance 0.

    Args:
        values: [n, ...], of each sample.
        statistic: of values [m, ...]; default the mean.
        clusters: n labels; None: every sample is its own.
        confidence: of the interval, in (0, 1).
        resamples: how often to draw; 2000 give the ends of a 95 % interval to some 3 % of its width.
        seed: of the draws.
    Raises: ValueError for fewer than 2 samples or clusters, another number of labels, non-finite values.
    """
    _check_confidence(confidence)
    values = torch.as_tensor(values).detach().cpu().double()
    if values.ndim < 1 or not bool(values.isfinite().all()):
        raise ValueError(f"values: shape {list(values.shape)}; must be finite, [samples, ...]")
    labels = range(len(values)) if clusters is None else clusters
    if len(labels) != len(values):
        raise ValueError(f"clusters: {len(labels)} labels for {len(values)} values; give one label for each")
    members: dict[Hashable, list[int]] = {}
    for row, label in enumerate(labels):
        members.setdefault(label, []).append(row)
    if len(members) < 2:
        raise ValueError(f"values: {len(members)} samples or clusters to draw from; at least 2 are needed")
    ordered = values[[row for rows in members.values() for row in rows]]
    sizes = np.array([len(rows) for rows in members.values()])
    starts = sizes.cumsum() - sizes  # of each cluster in `ordered`
    generator = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples):
        draw = generator.integers(len(sizes), size=len(sizes))
        lengths = sizes[draw]
        # Of every sample drawn: where its cluster starts, and which of the cluster it is.
        within = np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)
        drawn.append(statistic(ordered[torch.from_numpy(np.repeat(starts[draw], lengths) + within)]))
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return BootstrapInterval(float(statistic(values)), float(low), float(high))


def runs_table(rows: Mapping[str, Sequence[Mapping[str, Any]]], *, label: str = "method") -> str:
    """A Markdown table with a row for each method and `mean ± half width` over its runs in every column; their number last.

    Values that are the same integer or text in every run (evaluations of a sample, a name) stand as they are; a value
    that every run lacks or has as None is a dash.

    Args:
        rows: label to the measures of each run, by name; 2 runs or more.
        label: heading of the first column.
    Raises: ValueError for fewer than 2 runs, a measure that only some runs of a method have, non-finite values.
    """
    table = []
    for name, runs in rows.items():
        if len(runs) < 2:
            raise ValueError(f"{name}: {len(runs)} runs; an interval needs 2 or more")
        columns = dict.fromkeys(column for run in runs for column in run)
        cells = {column: _cell(f"{name}: {column}", [run.get(column) for run in runs]) for column in columns}
        table.append({label: name, **cells, "runs": len(runs)})
    return metrics_table(table)


def _cell(name: str, values: list[Any]) -> Any:
    if all(value == values[0] and not isinstance(value, float) for value in values):
        return values[0]
    if not all(isinstance(value, int | float) for value in values):
        raise ValueError(f"{name} is {values}; every run must have a number, or all the same")
    interval = run_interval(values)
    return _rounded(interval.mean, interval.half_width)


def _rounded(mean: float, half_width: float) -> str:
    """`mean ± half width`, two significant digits of the half width."""
    if half_width == 0:
        return f"{mean:.6g} ± 0"
    decimals = max(0, 1 - math.floor(math.log10(half_width)))
    return f"{mean:.{decimals}f} ± {half_width:.{decimals}f}"


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence = {confidence}: must lie between 0 and 1, such as 0.95")


def _student_quantile(probability: float, freedom: int) -> float:
    """t with P(T <= t) = probability > 1/2, of Student's distribution with `freedom` >= 1 degrees.

    P(|T| <= sqrt(freedom) tan w) has a finite series in sin w and cos w (Abramowitz and Stegun 26.7.3 and 26.7.4); it
    grows with w, so w is found by bisection. scipy has the same, but the library does not need scipy.
    """

    def inside(w: float) -> float:
        sine, cosine = math.sin(w), math.cos(w)
        odd = freedom % 2
        term, total = (cosine, 0.0) if odd else (1.0, 0.0)
        for power in range(1 + odd, freedom, 2):
            total += term
            term *= power / (power + 1) * cosine**2
        return 2 / math.pi * (w + sine * total) if odd else sine * total

    low, high = 0.0, math.pi / 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if inside(middle) < 2 * probability - 1 else (low, middle)
    return math.sqrt(freedom) * math.tan(middle)
