"""Metrics against scipy, scikit-learn and closed forms."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial.distance
import scipy.stats
import torch
from sklearn.neighbors import NearestNeighbors

from rcm_mcore.evaluation import metrics
from rcm_mcore.evaluation.metrics import (
    density_coverage,
    frechet_distance,
    mean_distance,
    median_distance,
    per_group,
    precision_recall,
    rows_per_group,
    vendi_score,
    within_group_diversity,
    within_group_vendi,
)


def gaussian(n: int, d: int, seed: int) -> torch.Tensor:
    """Correlated features [n, d] with a mean, float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix + torch.rand(d, generator=generator)


def exact_gaussian(n: int, stds: list[float], mean: list[float], seed: int) -> torch.Tensor:
    """Features whose sample mean and (diagonal) sample covariance are exactly these."""
    noise = gaussian(n, len(stds), seed)
    unit = torch.linalg.qr(noise - noise.mean(0)).Q * (n - 1) ** 0.5
    return unit * torch.tensor(stds, dtype=torch.float64) + torch.tensor(mean, dtype=torch.float64)


def frechet_by_scipy(x: np.ndarray, y: np.ndarray) -> float:
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(cov_x @ cov_y)
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cov_x + cov_y - 2 * np.real(root)))


@pytest.mark.parametrize("n, m, d", [(50, 80, 6), (300, 200, 20), (9, 7, 1)])
def test_frechet_equals_scipy(n: int, m: int, d: int) -> None:
    x, y = gaussian(n, d, seed=1), gaussian(m, d, seed=2)
    expected = frechet_by_scipy(x.numpy(), y.numpy()) if d > 1 else None
    if expected is None:  # one dimension: (m1 - m2)^2 + (s1 - s2)^2
        expected = float((x.mean() - y.mean()) ** 2 + (x.std() - y.std()) ** 2)
    assert abs(frechet_distance(x, y) - expected) <= 1e-9 * expected
    assert abs(frechet_distance(y, x) - expected) <= 1e-9 * expected
    assert abs(frechet_distance(x.numpy(), y.numpy()) - expected) <= 1e-9 * expected


def test_frechet_of_known_gaussians() -> None:
    x = exact_gaussian(40, [1.0, 2.0, 0.0], [0.0, 1.0, 5.0], seed=3)
    y = exact_gaussian(25, [4.0, 2.5, 1.0], [1.0, -1.0, 5.0], seed=4)
    assert abs(frechet_distance(x, y) - (1 + 4 + 9 + 0.25 + 1)) <= 1e-9


def test_frechet_of_fewer_samples_than_features() -> None:
    """Singular covariances, whose product scipy's square root handles to about the root of the rounding."""
    x, y = gaussian(10, 30, seed=5), gaussian(14, 30, seed=6)
    cov_x, cov_y = np.cov(x.numpy(), rowvar=False), np.cov(y.numpy(), rowvar=False)
    values, vectors = np.linalg.eigh(cov_x)
    root_x = vectors * np.sqrt(values.clip(0)) @ vectors.T
    roots = np.sqrt(np.linalg.eigvalsh(root_x @ cov_y @ root_x).clip(0)).sum()
    expected = float((x.mean(0) - y.mean(0)).square().sum() + np.trace(cov_x) + np.trace(cov_y) - 2 * roots)
    assert abs(frechet_distance(x, y) - expected) <= 1e-5 * expected


def test_frechet_of_equal_and_of_constant_sets() -> None:
    for seed in range(20):  # rounding makes about half of these differences negative
        x = gaussian(10, 30, seed=seed)
        shuffled = x[torch.randperm(10, generator=torch.Generator().manual_seed(seed))]
        assert 0.0 <= frechet_distance(x, shuffled) <= 1e-10
    constant = torch.ones(4, 3)
    assert abs(frechet_distance(constant, 3 * constant) - 12.0) <= 1e-12


def test_frechet_is_computed_in_float64() -> None:
    """A large common offset costs float32 all its digits."""
    x, y = gaussian(30, 5, seed=8).float() + 1e4, gaussian(30, 5, seed=9).float() + 1e4
    expected = frechet_by_scipy(x.double().numpy(), y.double().numpy())
    assert abs(frechet_distance(x, y) - expected) <= 1e-6 * expected


def inside_by_sklearn(samples: np.ndarray, centres: np.ndarray, k: int) -> float:
    distances, _ = NearestNeighbors(n_neighbors=k + 1, algorithm="brute").fit(centres).kneighbors(centres)
    to_centres = scipy.spatial.distance.cdist(samples, centres)
    return float((to_centres <= distances[:, k]).any(1).mean())


def overlapping() -> tuple[torch.Tensor, torch.Tensor]:
    """Real features, and generated ones of which a fifth is far out and the others are too narrow."""
    real, generated = gaussian(60, 4, seed=10), 0.5 * gaussian(45, 4, seed=10) + 0.4
    generated[:9] += 50.0 * torch.arange(1, 10)[:, None]
    return real, generated


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_equal_sklearn(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real, generated = overlapping()
    expected = (
        inside_by_sklearn(generated.numpy(), real.numpy(), k),
        inside_by_sklearn(real.numpy(), generated.numpy(), k),
    )
    assert 0 < expected[1] < expected[0] < 1, "the case must tell the two apart"
    assert precision_recall(real, generated, k=k) == expected
    monkeypatch.setattr(metrics, "_ROWS_PER_CHUNK", 7)
    assert precision_recall(real, generated, k=k) == expected


def test_precision_and_recall_of_extremes() -> None:
    real = gaussian(30, 3, seed=11)
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 1e3) == (0.0, 0.0)
    collapsed = real[:1].expand(10, -1)  # one real point, ten times: real, and covers nothing but itself
    assert precision_recall(real, collapsed) == (1.0, 1 / 30)
    assert precision_recall(collapsed, collapsed + 1e-9) == (0.0, 0.0)


def test_default_neighbour_is_the_third() -> None:
    real, generated = overlapping()
    assert precision_recall(real, generated) == precision_recall(real, generated, k=3)
    assert precision_recall(real, generated) != precision_recall(real, generated, k=2)


def test_diversity_equals_scipy_with_every_group_alike() -> None:
    features = gaussian(12, 5, seed=12)
    groups = ["b", "a", "a", "b", "a", "c", "c", "a", "a", "a", "a", "a"]
    means = []
    for name in "abc":
        rows = features[[group == name for group in groups]].numpy()
        means.append(scipy.spatial.distance.pdist(rows).mean())
    assert abs(within_group_diversity(features, groups) - np.mean(means)) <= 1e-12
    assert within_group_diversity(torch.ones(4, 2), [0, 0, 1, 1]) == 0.0


def density_coverage_by_sklearn(real: np.ndarray, generated: np.ndarray, k: int) -> tuple[float, float]:
    """By eq. 3 and 4 of Naeem et al., on whole matrices."""
    distances, _ = NearestNeighbors(n_neighbors=k + 1, algorithm="brute").fit(real).kneighbors(real)
    inside = scipy.spatial.distance.cdist(generated, real) <= distances[:, k]
    return inside.sum() / (k * len(generated)), inside.any(0).mean()


@pytest.mark.parametrize("k", [1, 3, 5])
def test_density_and_coverage_equal_sklearn(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real, generated = overlapping()
    expected = density_coverage_by_sklearn(real.numpy(), generated.numpy(), k)
    assert 0 < expected[1] < 1 and expected[0] != expected[1] and expected[0] > 0.5, "the case must tell the two apart"
    assert density_coverage(real, generated, k=k) == expected
    monkeypatch.setattr(metrics, "_ROWS_PER_CHUNK", 7)
    assert density_coverage(real, generated, k=k) == expected


def test_density_and_coverage_of_known_cases() -> None:
    real = torch.tensor([[0.0], [1.0], [3.0], [7.0]])  # radii of the first neighbour 1, 1, 2, 4
    generated = torch.tensor([[-1.0], [0.5], [20.0]])  # on the border of the first; in the first two; in none
    assert density_coverage(real, generated, k=1) == (3 / 3, 2 / 4)
    assert density_coverage(real, real[:1].expand(9, -1), k=1) == (2.0, 0.5), "mode collapse: dense, hardly covering"
    same = gaussian(400, 2, seed=13)
    found = density_coverage(same[:200], same[200:])  # one distribution: expected 1 and 1 - 2^-5
    assert abs(found.density - 1) < 0.1 and abs(found.coverage - (1 - 2**-5)) < 0.03


def test_default_neighbour_of_density_is_the_fifth() -> None:
    real, generated = overlapping()
    assert density_coverage(real, generated) == density_coverage(real, generated, k=5) != density_coverage(real, generated, k=3)


def test_median_distance_is_that_of_all_pairs_within_groups() -> None:
    features = gaussian(11, 3, seed=14)
    groups = list("aabbbbabbbb")
    pairs = [scipy.spatial.distance.pdist(features[[g == name for g in groups]].numpy()) for name in "ab"]
    assert abs(median_distance(features, groups) - np.median(np.concatenate(pairs))) <= 1e-12
    even = torch.tensor([[0.0], [1.0], [10.0], [13.0]])  # two pairs, at 1 and 3
    assert median_distance(even, list("aabb")) == 2.0


@pytest.mark.parametrize("q", [0.5, 1.0, 2.0, math.inf])
def test_vendi_counts_different_samples(q: float) -> None:
    far = 100.0 * torch.eye(6)
    assert abs(vendi_score(far, bandwidth=1.0, q=q) - 6) <= 1e-9
    assert abs(vendi_score(far[:1].expand(9, -1), bandwidth=1.0, q=q) - 1) <= 1e-6
    twice = far.repeat(2, 1)
    assert abs(vendi_score(twice, bandwidth=1.0, q=q) - 6) <= 1e-6, "copies add nothing"
    # two kinds, of which one makes up three quarters: eigenvalues 3/4 and 1/4
    uneven = far[[0, 0, 0, 1]]
    expected = {
        0.5: (math.sqrt(0.75) + math.sqrt(0.25)) ** 2,
        1.0: 0.75**-0.75 * 0.25**-0.25,
        2.0: 1 / (0.75**2 + 0.25**2),
        math.inf: 1 / 0.75,
    }
    assert abs(vendi_score(uneven, bandwidth=1.0, q=q) - expected[q]) <= 1e-6


@pytest.mark.parametrize("q", [0.5, 1.0, 3.0])
def test_vendi_equals_scipy(q: float) -> None:
    features = gaussian(20, 4, seed=15)
    squares = scipy.spatial.distance.squareform(scipy.spatial.distance.pdist(features.numpy(), "sqeuclidean"))
    shares = scipy.linalg.eigvalsh(np.exp(-squares / (2 * 1.7**2)) / 20).clip(0)
    expected = np.exp(scipy.stats.entropy(shares)) if q == 1 else (shares**q).sum() ** (1 / (1 - q))
    assert 2 < expected < 19
    found = vendi_score(features, bandwidth=1.7, q=q)
    assert abs(found - expected) <= 1e-6 * expected
    shuffled = features[torch.randperm(20, generator=torch.Generator().manual_seed(0))]
    assert abs(vendi_score(shuffled, bandwidth=1.7, q=q) - found) <= 1e-6 * expected
    assert abs(vendi_score(3 * features + 5, bandwidth=3 * 1.7, q=q) - found) <= 1e-6 * expected


def test_vendi_tells_clusters_from_a_spread_where_the_mean_distance_does_not() -> None:
    line = torch.linspace(0, 3, 8)[:, None]
    clusters = torch.tensor([0.0, float(mean_distance(line)) * 7 / 4])[:, None].repeat_interleave(4, 0)
    assert abs(mean_distance(clusters) - mean_distance(line)) < 1e-6
    assert vendi_score(clusters, bandwidth=0.2) < 2.001 < 4 < vendi_score(line, bandwidth=0.2)


def test_vendi_within_groups_is_the_mean_over_the_groups() -> None:
    features = torch.cat([100.0 * torch.eye(3), torch.zeros(3, 3)])[[0, 3, 1, 4, 2, 5]]
    groups = ["spread", "same"] * 3
    assert abs(within_group_vendi(features, groups, bandwidth=1.0) - 2) <= 1e-9
    assert torch.allclose(per_group(features, groups, mean_distance), torch.tensor([100 * math.sqrt(2), 0.0]).double())
    assert abs(within_group_vendi(features[[0, 2, 1, 3]], list("aabb"), bandwidth=1.0, q=2) - 1.5) <= 1e-9


def test_rows_per_group() -> None:
    groups = list("abcabbaab")
    assert rows_per_group(groups, 3) == [0, 1, 3, 4, 5, 6]
    assert rows_per_group(groups, 4) == [0, 1, 3, 4, 5, 6, 7, 8]


GOOD = torch.arange(12.0).reshape(4, 3)
BAD = GOOD.clone()
BAD[2, 1] = torch.nan


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: frechet_distance(GOOD[0], GOOD), r"x: shape \[3\]"),
        (lambda: frechet_distance(GOOD[:, :0], GOOD), r"x: shape \[4, 0\]"),
        (lambda: frechet_distance(GOOD, GOOD[:, :2]), "y: 2 features a sample, the other set has 3"),
        (lambda: frechet_distance(GOOD, GOOD[:1]), "y: 1 samples; at least 2"),
        (lambda: frechet_distance(BAD, GOOD), "x: 1 of 4 samples have NaN or infinite"),
        (lambda: frechet_distance(GOOD, GOOD / 0), "y: 4 of 4 samples"),
        (lambda: frechet_distance(GOOD.to(torch.complex64), GOOD), "x: dtype torch.complex64"),
        (lambda: precision_recall(GOOD, GOOD, k=0), "k = 0"),
        (lambda: precision_recall(GOOD, GOOD[:3]), "generated: 3 samples; at least 4"),
        (lambda: precision_recall(GOOD[:3], GOOD), "real: 3 samples; at least 4"),
        (lambda: precision_recall(GOOD, BAD), "generated: 1 of 4"),
        (lambda: within_group_diversity(GOOD, [0, 0, 1]), "groups: 3 labels for 4 rows"),
        (lambda: within_group_diversity(GOOD, ["x", "x", "x", "y"]), "groups: 'y' has a single sample"),
        (lambda: within_group_diversity(BAD, [0] * 4), "features: 1 of 4"),
        (lambda: density_coverage(GOOD, GOOD, k=0), "k = 0"),
        (lambda: density_coverage(GOOD, GOOD, k=4), "real: 4 samples; at least 5"),
        (lambda: density_coverage(GOOD, GOOD[:0], k=1), "generated: 0 samples; at least 1"),
        (lambda: density_coverage(GOOD, BAD, k=1), "generated: 1 of 4"),
        (lambda: mean_distance(GOOD[:1]), "features: 1 samples"),
        (lambda: median_distance(GOOD[[0, 0, 0, 0, 1]], [0] * 5), "more than half of the pairs within a group are equal"),
        (lambda: median_distance(GOOD, [0, 1, 1, 1]), "groups: 0 has a single sample"),
        (lambda: vendi_score(GOOD, bandwidth=0.0), "bandwidth = 0.0"),
        (lambda: vendi_score(GOOD, bandwidth=math.nan), "bandwidth = nan"),
        (lambda: vendi_score(GOOD, bandwidth=math.inf), "bandwidth = inf"),
        (lambda: vendi_score(GOOD, bandwidth=1.0, q=0.0), "q = 0.0"),
        (lambda: vendi_score(BAD, bandwidth=1.0), "features: 1 of 4"),
        (lambda: within_group_vendi(GOOD, [0, 0, 0, 1], bandwidth=1.0), "groups: sizes from 1 to 3"),
        (lambda: rows_per_group("aab", 1), "size = 1"),
        (lambda: rows_per_group("aab", 3), "size = 3: the largest group has 2 samples"),
    ],
)
def test_bad_input(call, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()
