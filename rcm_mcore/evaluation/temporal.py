"""How a video moves from frame to frame: similarity, change and jitter, and how far a set of videos is from real ones.

Each measure has a value that real videos have, and too high is as wrong as too low: a frozen video is the most consistent of
all. So report `wasserstein` from real videos, which also sees that half of the videos are frozen and the other half flicker.
Everything is computed in float64, video by video.
"""

from typing import NamedTuple

import numpy as np
import torch


class TemporalConsistency(NamedTuple):
    """[n] float64 of n videos, on the CPU.

    similarity: mean cosine of neighbouring frames, in [-1, 1]; falls with fast motion and with flicker alike. Of features: the
        pixels of nearly all neighbouring frames have a cosine near 1.
    change: root mean square, over entries and pairs of neighbouring frames, of their difference, in units of the input; 0 is
        frozen.
    jitter: 1 - the correlation of neighbouring changes, in [0, 2]; 0 where frozen.
    """

    similarity: torch.Tensor
    change: torch.Tensor
    jitter: torch.Tensor


def temporal_consistency(frames: torch.Tensor | np.ndarray) -> TemporalConsistency:
    """How videos change from frame to frame, from pixels or from the features of single frames.

    With differences a_t = x_{t+1} - x_t and all products over the d entries of a frame,

        similarity = mean_t x_t.x_{t+1} / (|x_t| |x_{t+1}|),    change = sqrt(mean_t |a_t|^2 / d),
        jitter = 1 - sum_t a_t.a_{t+1} / sum_t (|a_t|^2 + |a_{t+1}|^2) / 2
               = sum_t |a_{t+1} - a_t|^2 / sum_t (|a_t|^2 + |a_{t+1}|^2).

    Jitter depends on neither brightness, contrast nor the amount of motion. Steady change has 0; an edge that passes
    over each pixel once 1; noise that is new in every frame, or a thin stroke that is over each pixel for one frame, 1.5;
    two frames in turn 2. So motion of sharp edges has about 1, soft or slow motion less, flicker more; thin things that
    move fast look like flicker, so compare with real videos.

    Args:
        frames: [n, F, ...] of any real dtype, F >= 3: features [n, F, d], or pixels [n, F, H, W], [n, F, C, H, W].
    Raises: ValueError for another shape, fewer frames, non-finite entries.
    """
    frames = torch.as_tensor(frames).detach()
    if frames.is_complex() or frames.ndim < 3 or frames.shape[1] < 3 or 0 in frames.shape:
        raise ValueError(f"frames: {frames.dtype} {list(frames.shape)}; must be real, [videos, frames, ...], 3 frames or more")
    rows = [_of_video(name, video.flatten(1).double()) for name, video in enumerate(frames)]
    return TemporalConsistency(*torch.tensor(rows, dtype=torch.float64).unbind(1))


def wasserstein(real: torch.Tensor | np.ndarray, generated: torch.Tensor | np.ndarray) -> float:
    """Wasserstein-1 distance between two sets of numbers, [n] and [m]: the integral of |F_real - F_generated|, in their units.

    It is the mean distance that a value of one set has to move to make the sets equal; unlike the difference of the
    means it sees every change of the distribution. Raises: ValueError for other shapes, none, non-finite values.
    """
    x, y = (_sorted(name, values) for name, values in (("real", real), ("generated", generated)))
    points = torch.cat([x, y]).sort().values
    shares = [torch.searchsorted(z, points[:-1], right=True).double() / len(z) for z in (x, y)]
    return float(((shares[0] - shares[1]).abs() * points.diff()).sum())


def _of_video(name: int, video: torch.Tensor) -> list[float]:
    """The three measures of frames [F, d]."""
    if not bool(video.isfinite().all()):
        raise ValueError(f"frames: video {name} has NaN or infinite entries")
    similarity = torch.nn.functional.cosine_similarity(video[:-1], video[1:], dim=1).mean()
    change = video.diff(dim=0)
    power = change.square().sum(1)
    pairs = power[:-1].sum() + power[1:].sum()
    jitter = change.diff(dim=0).square().sum() / pairs if pairs > 0 else pairs
    return [float(similarity), float((power.mean() / video.shape[1]).sqrt()), float(jitter)]


def _sorted(name: str, values: torch.Tensor | np.ndarray) -> torch.Tensor:
    values = torch.as_tensor(values).detach().cpu().double()
    if values.ndim != 1 or not len(values) or not bool(values.isfinite().all()):
        raise ValueError(f"{name}: shape {list(values.shape)}; must be finite numbers [n], at least one")
    return values.sort().values
