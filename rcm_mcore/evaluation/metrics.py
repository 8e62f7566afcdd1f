"""Distances between sets of feature vectors: Frechet distance, precision and recall, diversity.

Everything is computed in float64 on the device of the first argument. Features are [n, d] tensors or arrays of any
real dtype: n samples (rows), d features. The functions know nothing of the network that produced the features.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import torch

_ROWS_PER_CHUNK = 1024  # rows of a distance matrix held at a time: bounds memory at 8 KB x samples


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]: generated samples that look real, and real samples that the generator covers."""

    precision: float
    recall: float


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
    if k < 1:
        raise ValueError(f"k = {k}: the radius needs a neighbour other than the sample itself; use k >= 1")
    real = _as_features("real", real, minimum=k + 1)
    generated = _as_features("generated", generated, minimum=k + 1, like=real)
    return PrecisionRecall(
        precision=_share_inside(generated, real, _radii(real, k)),
        recall=_share_inside(real, generated, _radii(generated, k)),
    )


def within_group_diversity(features: torch.Tensor | np.ndarray, groups: Sequence[Hashable]) -> float:
    """Mean pairwise Euclidean distance within a group (samples of one prompt), averaged over the groups.

    Args:
        features: [n, d].
        groups: n labels, the group of each row (prompts, for instance); every group counts equally.
    Returns: the mean distance, in feature units; 0 when every group has collapsed to one point.
    Raises: ValueError for wrong shapes, non-finite features, no groups, or a group of a single sample.
    """
    features = _as_features("features", features, minimum=2)
    if len(groups) != len(features):
        raise ValueError(f"groups: {len(groups)} labels for {len(features)} rows of features; give one label per row")
    members: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    means = []
    for group, rows in members.items():
        if len(rows) < 2:
            raise ValueError(f"groups: {group!r} has a single sample; a pairwise distance needs at least 2 per group")
        means.append(torch.nn.functional.pdist(features[rows]).mean())
    return float(torch.stack(means).mean())


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
