"""Distances between sets of feature vectors (Frechet; precision, recall, density, coverage) and diversity within prompts.

Everything is computed in float64 on the device of the first argument. Features are [n, d] tensors or arrays of any
real dtype: n samples (rows), d features. The functions know nothing of the network that produced the features.
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np
import torch

_ROWS_PER_CHUNK = 1024  # rows of a distance matrix held at a time: bounds memory at 8 KB x samples


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]: generated samples that look real, and real samples that the generator covers."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Real neighbourhoods that a generated sample lies in, over the number expected (no upper bound); share of real
    neighbourhoods, in [0, 1], that hold a generated sample."""

    density: float
    coverage: float


def frechet_distance(x: torch.Tensor | np.ndarray, y: torch.Tensor | np.ndarray) -> float:
    """Frechet (2-Wasserstein) distance, squared, between Gaussians fitted to two sets of features.

    |mu_x - mu_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^{1/2}), the quantity known as FID when the features are Inception's
    (Heusel et al. 2017, eq. 6); C is the covariance with divisor n - 1.

    No covariance is formed. With centred features X = Q R the covariance is R^T R, and the eigenvalues of C_x C_y are
    the squared singular values of R_x R_y^T, so the trace of the square root is the sum of these singular values:
    real, non-negative and accurate when fewer samples than features make the covariances singular.

    Args:
        x: features [n, d], n >= 2.
        y: features [m, d], m >= 2.
    Returns: the distance, >= 0, in squared feature units. It is biased upwards for few samples: compare only values
        computed with the same sample counts.
    Raises: ValueError for wrong or different widths, too few samples, non-finite features.
    """
    x = _as_features("x", x, minimum=2)
    y = _as_features("y", y, minimum=2, like=x)
    mean_x, mean_y = x.mean(0), y.mean(0)
    factor_x, factor_y = _covariance_factor(x - mean_x), _covariance_factor(y - mean_y)
    traces = factor_x.square().sum() + factor_y.square().sum()
    root_trace = torch.linalg.svdvals(factor_x @ factor_y.T).sum()
    distance = (mean_x - mean_y).square().sum() + traces - 2.0 * root_trace
    return max(float(distance), 0.0)  # equal sets may round to a small negative number


def precision_recall(real: torch.Tensor | np.ndarray, generated: torch.Tensor | np.ndarray, *, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019, eq. 1 and 2).

    The manifold of a set is the union of balls around its samples, each reaching to its k-th nearest neighbour in the
    set (itself excluded). Precision is the share of generated samples inside the real manifold, recall the share of
    real samples inside the generated manifold; borders belong to the manifold.

    Args:
        real: features [n, d], n > k.
        generated: features [m, d], m > k.
        k: which neighbour sets the radius, at least 1.
    Raises: ValueError for k < 1, wrong or different widths, too few samples, non-finite features.
    """
    _check_neighbour(k)
    real = _as_features("real", real, minimum=k + 1)
    generated = _as_features("generated", generated, minimum=k + 1, like=real)
    return PrecisionRecall(
        precision=_share_inside(generated, real, _radii(real, k)),
        recall=_share_inside(real, generated, _radii(generated, k)),
    )


def density_coverage(real: torch.Tensor | np.ndarray, generated: torch.Tensor | np.ndarray, *, k: int = 5) -> DensityCoverage:
    """Density and coverage (Naeem et al. 2020, eq. 3 and 4).

    With B_i the ball around real sample i that reaches to its k-th nearest real neighbour (itself excluded, border included):

        density = 1/(k m) sum_j sum_i [y_j in B_i],    coverage = 1/n sum_i [some y_j in B_i].

    Only real samples have balls, so one outlier among the generated ones does not inflate coverage as it does recall, and
    one among the real ones counts once in density where it makes a whole region count in precision. Two sets of one
    distribution have density 1 in expectation and coverage near 1 - 2^-k for n = m large (0.97 for k = 5).

    Args:
        real: features [n, d], n > k.
        generated: features [m, d], m >= 1.
        k: which neighbour sets the radius, at least 1.
    Returns: both. Coverage depends on n and m: compare only values computed with the same sample counts.
    Raises: ValueError for k < 1, wrong or different widths, too few samples, non-finite features.
    """
    _check_neighbour(k)
    real = _as_features("real", real, minimum=k + 1)
    generated = _as_features("generated", generated, minimum=1, like=real)
    inside, covered = 0, 0
    for rows, radii in zip(real.split(_ROWS_PER_CHUNK), _radii(real, k).split(_ROWS_PER_CHUNK)):
        held = _distances(rows, generated) <= radii[:, None]
        inside += int(held.sum())
        covered += int(held.any(1).sum())
    return DensityCoverage(density=inside / (k * len(generated)), coverage=covered / len(real))


def mean_distance(features: torch.Tensor | np.ndarray) -> float:
    """Mean Euclidean distance between two different rows of [n, d], n >= 2, in feature units."""
    return float(torch.nn.functional.pdist(_as_features("features", features, minimum=2)).mean())


def median_distance(features: torch.Tensor | np.ndarray, groups: Sequence[Hashable]) -> float:
    """Median Euclidean distance between rows [n, d] of one group, over all pairs of all groups: a bandwidth for `vendi_score`.

    Take it of REAL samples and use it for every method, or a collapsed generator shrinks its own yardstick.

    Raises: ValueError as `per_group`, and for a median of 0, of which no kernel can be made.
    """
    features = _as_features("features", features, minimum=2)
    distances = [torch.nn.functional.pdist(features[rows]) for rows in _rows_of_groups(features, groups)]
    median = float(np.median(torch.cat(distances).cpu().numpy()))  # torch.median takes the lower of two middle values
    if median == 0:
        raise ValueError(
            "features: more than half of the pairs within a group are equal; a bandwidth needs samples that differ"
        )
    return median


def vendi_score(features: torch.Tensor | np.ndarray, *, bandwidth: float, q: float = 1.0) -> float:
    """Vendi score of order q: the effective number of different samples (Friedman and Dieng 2023; Pasarkar and Dieng 2024).

    exp of the Renyi entropy of the eigenvalues l_i, which sum to 1, of K / n with K_ij = exp(-|x_i - x_j|^2 / (2 bandwidth^2)):

        exp(-sum_i l_i log l_i) for q = 1,    (sum_i l_i^q)^(1 / (1 - q)) else,    1 / max_i l_i for q = inf.

    n equal samples score 1, n samples far apart score n. A Gaussian kernel and not the cosine, which sees no
    lengths and has no width to set: samples of one prompt, close together far from the origin, would count as nearly equal.

    Args:
        features: [n, d]; takes memory 8 n^2 bytes and time ~ n^3, so use it within prompts or on some thousand samples.
        bandwidth: of the kernel, in feature units: one number for every method, from real data (`median_distance`).
        q: order, > 0; small ones count rare samples, large ones only the frequent.
    Returns: the score, from 1 to n. It grows with n: compare only values of the same n.
    Raises: ValueError for a bandwidth or order that is not positive, wrong shapes, non-finite features.
    """
    if not (bandwidth > 0 and math.isfinite(bandwidth)):
        raise ValueError(f"bandwidth = {bandwidth}: must be positive and finite, such as median_distance of real samples")
    if not q > 0:
        raise ValueError(f"q = {q}: the order must be positive; 1 is the Shannon entropy")
    features = _as_features("features", features, minimum=1)
    kernel = torch.exp(-_distances(features, features).square() / (2 * bandwidth**2))
    shares = torch.linalg.eigvalsh(kernel / len(features)).clamp_min(0)  # rounding makes tiny negative ones
    if q == 1:
        return float(torch.exp(-torch.special.xlogy(shares, shares).sum()))
    if math.isinf(q):
        return float(1 / shares.max())
    return float(shares.pow(q).sum().pow(1 / (1 - q)))


def per_group(
    features: torch.Tensor | np.ndarray, groups: Sequence[Hashable], measure: Callable[[torch.Tensor], float]
) -> torch.Tensor:
    """The measure of each group's rows, [G] float64 on the CPU, in order of the groups' first appearance.

    Args:
        features: [n, d].
        groups: n labels, the group of each row (prompts, for instance).
        measure: of features [m, d], m >= 2, such as `mean_distance`.
    Raises: ValueError for wrong shapes, non-finite features, or a group of a single sample.
    """
    features = _as_features("features", features, minimum=2)
    values = [measure(features[rows]) for rows in _rows_of_groups(features, groups)]
    return torch.tensor(values, dtype=torch.float64)


def within_group_diversity(features: torch.Tensor | np.ndarray, groups: Sequence[Hashable]) -> float:
    """Mean pairwise Euclidean distance within a group (samples of one prompt), averaged over the groups.

    Args:
        features: [n, d].
        groups: n labels, the group of each row (prompts, for instance); every group counts equally.
    Returns: the mean distance, in feature units; 0 when every group has collapsed to one point.
    Raises: ValueError for wrong shapes, non-finite features, or a group of a single sample.
    """
    return float(per_group(features, groups, mean_distance).mean())


def within_group_vendi(
    features: torch.Tensor | np.ndarray, groups: Sequence[Hashable], *, bandwidth: float, q: float = 1.0
) -> float:
    """Mean over the groups of `vendi_score`: the effective number of different samples that one prompt gives.

    The mean distance does not tell two far clusters from an even spread; this does. Arguments as `vendi_score` and `per_group`.

    Raises: ValueError as those, and for groups of different sizes, which bound the score (`rows_per_group` makes them equal).
    """
    sizes = set(Counter(groups).values())
    if len(sizes) > 1:
        raise ValueError(f"groups: sizes from {min(sizes)} to {max(sizes)}; scores of different counts cannot be averaged")
    return float(per_group(features, groups, lambda rows: vendi_score(rows, bandwidth=bandwidth, q=q)).mean())


def rows_per_group(groups: Sequence[Hashable], size: int) -> list[int]:
    """The first `size` rows of every group that has so many, in their order; the other groups are left out.

    Raises: ValueError for a size below 2, or when no group has so many.
    """
    if size < 2:
        raise ValueError(f"size = {size}: diversity within a group needs at least 2 samples")
    seen: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        seen.setdefault(group, []).append(row)
    kept = [row for rows in seen.values() if len(rows) >= size for row in rows[:size]]
    if not kept:
        most = max(map(len, seen.values()), default=0)
        raise ValueError(f"size = {size}: the largest group has {most} samples")
    return sorted(kept)


def _rows_of_groups(features: torch.Tensor, groups: Sequence[Hashable]) -> list[list[int]]:
    """The rows of each group, at least 2, in order of first appearance."""
    if len(groups) != len(features):
        raise ValueError(f"groups: {len(groups)} labels for {len(features)} rows of features; give one label per row")
    members: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    for group, rows in members.items():
        if len(rows) < 2:
            raise ValueError(f"groups: {group!r} has a single sample; a pairwise distance needs at least 2 per group")
    return list(members.values())


def _check_neighbour(k: int) -> None:
    if k < 1:
        raise ValueError(f"k = {k}: the radius needs a neighbour other than the sample itself; use k >= 1")


def _as_features(
    name: str, values: torch.Tensor | np.ndarray, *, minimum: int, like: torch.Tensor | None = None
) -> torch.Tensor:
    """The values as float64 [n, d], checked; ``like`` gives the width and the device to match."""
    features = torch.as_tensor(values).detach()
    if features.is_complex():
        raise ValueError(f"{name}: dtype {features.dtype}; features must be real")
    if features.ndim != 2 or features.shape[1] == 0:
        raise ValueError(f"{name}: shape {list(features.shape)}; features must be [samples, features]")
    if len(features) < minimum:
        raise ValueError(f"{name}: {len(features)} samples; at least {minimum} are needed")
    features = features.to(device=None if like is None else like.device, dtype=torch.float64)
    if like is not None and features.shape[1] != like.shape[1]:
        raise ValueError(f"{name}: {features.shape[1]} features a sample, the other set has {like.shape[1]}")
    bad = int((~features.isfinite()).any(1).sum())
    if bad:
        raise ValueError(f"{name}: {bad} of {len(features)} samples have NaN or infinite features")
    return features


def _covariance_factor(centred: torch.Tensor) -> torch.Tensor:
    """R [min(n, d), d] with R^T R = covariance of the centred rows."""
    return torch.linalg.qr(centred, mode="r").R / (len(centred) - 1) ** 0.5


def _distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Euclidean distances [n, m]; without the matrix-multiply form, whose rounding makes equal points differ."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(points: torch.Tensor, k: int) -> torch.Tensor:
    """Distance [n] of each point to its k-th nearest other point."""
    # Each point is its own nearest neighbour at distance 0, hence k + 1.
    chunks = [_distances(rows, points).kthvalue(k + 1, dim=1).values for rows in points.split(_ROWS_PER_CHUNK)]
    return torch.cat(chunks)


def _share_inside(samples: torch.Tensor, centres: torch.Tensor, radii: torch.Tensor) -> float:
    """Share of the samples that lie in at least one ball."""
    inside = [(_distances(rows, centres) <= radii).any(1) for rows in samples.split(_ROWS_PER_CHUNK)]
    return float(torch.cat(inside).double().mean())
