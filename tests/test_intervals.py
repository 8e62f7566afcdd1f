"""Intervals against scipy, and how often they hold the truth."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from rcm_mcore.evaluation.intervals import bootstrap_interval, run_interval, runs_table


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8, 31])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.99])
def test_run_interval_equals_scipy(n: int, confidence: float) -> None:
    values = np.random.default_rng(n).normal(3, 2, n)
    found = run_interval(values.tolist(), confidence=confidence)
    low, high = scipy.stats.t.interval(confidence, n - 1, loc=values.mean(), scale=scipy.stats.sem(values))
    assert abs(found.mean - found.half_width - low) <= 1e-11 and abs(found.mean + found.half_width - high) <= 1e-11
    assert abs(found.sd - scipy.stats.tstd(values)) <= 1e-12 and found.runs == n


def test_default_confidence_is_95_percent() -> None:
    assert run_interval([1, 2, 4]) == run_interval([1, 2, 4], confidence=0.95)
    assert run_interval([1, 2, 4]).half_width < run_interval([1, 2, 4], confidence=0.96).half_width


@pytest.mark.parametrize(
    "values, text",
    [
        ([1.0, 2.0, 3.0], "2.0 ± 2.5 (3 runs)"),
        ([0.8112, 0.8113, 0.8111], "0.81120 ± 0.00025 (3 runs)"),
        ([500, 900], "700 ± 2541 (2 runs)"),
        ([0.25, 0.25], "0.25 ± 0 (2 runs)"),
    ],
)
def test_interval_as_text(values: list[float], text: str) -> None:
    assert str(run_interval(values)) == text


def test_bootstrap_of_the_mean_is_near_the_normal_interval() -> None:
    values = np.random.default_rng(0).normal(5, 3, 400)
    found = bootstrap_interval(values)
    half = 1.96 * values.std() / 20
    assert abs(found.value - values.mean()) <= 1e-12
    assert abs(found.low - (values.mean() - half)) < 0.1 * half and abs(found.high - (values.mean() + half)) < 0.1 * half
    expected = scipy.stats.bootstrap((values,), np.mean, method="percentile", rng=1).confidence_interval
    assert abs(found.low - expected.low) < 0.1 * half and abs(found.high - expected.high) < 0.1 * half
    assert found == bootstrap_interval(torch.from_numpy(values)) != bootstrap_interval(values, seed=1)
    narrow = bootstrap_interval(values, confidence=0.5)
    assert abs((narrow.high - narrow.low) / (2 * half) - 0.6745 / 1.96) < 0.05


def test_bootstrap_draws_whole_clusters() -> None:
    """Ten copies of each value say no more than one: as wide as without the copies, not the root of ten narrower."""
    values = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alone = bootstrap_interval(values)
    copies = bootstrap_interval(values.repeat(10), clusters=list(range(40)) * 10)
    assert abs(copies.low - alone.low) <= 1e-12 and abs(copies.high - alone.high) <= 1e-12
    taken_apart = bootstrap_interval(values.repeat(10))
    assert taken_apart.high - taken_apart.low < 0.4 * (alone.high - alone.low)


def test_clusters_of_different_sizes_keep_all_their_samples() -> None:
    """Every resample is a multiset of whole clusters, whatever the order of their samples."""
    labels = ["a", "b", "a", "c", "b", "a"]
    values = torch.tensor([1.0, 10.0, 2.0, 100.0, 20.0, 4.0])
    wholes = {"a": [1.0, 2.0, 4.0], "b": [10.0, 20.0], "c": [100.0]}
    seen = []

    def statistic(drawn: torch.Tensor) -> float:
        seen.append(sorted(drawn.tolist()))
        return 0.0

    bootstrap_interval(values, statistic, clusters=labels, resamples=50)
    possible = [sorted(wholes[x] + wholes[y] + wholes[z]) for x in wholes for y in wholes for z in wholes]
    assert len(seen) == 51 and all(drawn in possible for drawn in seen) and len({len(drawn) for drawn in seen}) > 2


def test_bootstrap_of_another_statistic_of_rows() -> None:
    rows = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    found = bootstrap_interval(rows, lambda rows: float(rows[:, 1].median()), resamples=200)
    assert found.value == float(rows[:, 1].median()) and found.low < found.value < found.high
    assert bootstrap_interval(torch.full((5,), 2.0)) == (2.0, 2.0, 2.0)


def test_table_of_runs() -> None:
    runs = [{"Frechet": x, "steps": 4, "legible": None} for x in (1.0, 2.0, 3.0)]
    lines = runs_table({"rCM": runs, "teacher": [{"Frechet": 0.5, "steps": 50}] * 2}).splitlines()
    assert lines[0] == "| method | Frechet | steps | legible | runs |"
    assert lines[2] == "| rCM | 2.0 ± 2.5 | 4 | - | 3 |"
    assert lines[3] == "| teacher | 0.5 ± 0 | 50 | - | 2 |"


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: run_interval([1.0]), r"values: shape \[1\]"),
        (lambda: run_interval([[1.0, 2.0]]), r"values: shape \[1, 2\]"),
        (lambda: run_interval([1.0, math.nan]), r"values: \[1.0, nan\]"),
        (lambda: run_interval([1.0, 2.0], confidence=95), "confidence = 95"),
        (lambda: bootstrap_interval(torch.ones(1)), "values: 1 samples or clusters"),
        (lambda: bootstrap_interval(torch.ones(3), clusters=[1, 1, 1]), "values: 1 samples or clusters"),
        (lambda: bootstrap_interval(torch.ones(3), clusters=[1, 2]), "clusters: 2 labels for 3 values"),
        (lambda: bootstrap_interval(torch.tensor([1.0, math.inf])), "must be finite"),
        (lambda: bootstrap_interval(torch.tensor(1.0)), r"values: shape \[\]"),
        (lambda: bootstrap_interval(torch.ones(3), confidence=1.0), "confidence = 1.0"),
        (lambda: runs_table({"rCM": [{"Frechet": 1.0}]}), "rCM: 1 runs"),
        (lambda: runs_table({"rCM": [{"Frechet": 1.0}, {}]}), r"rCM: Frechet is \[1.0, None\]"),
        (lambda: runs_table({"rCM": [{"Frechet": 1.0}, {"Frechet": math.nan}]}), "finite"),
        (lambda: runs_table({}), "rows: nothing"),
    ],
)
def test_bad_input(call, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()
