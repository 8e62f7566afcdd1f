"""Power-function EMA (EDM2, arXiv 2312.02696; method.md 5)."""

from __future__ import annotations

import numpy as np


def power_gamma(length: float) -> float:
    """gamma of the power-function EMA of relative length `length`: the largest real root of
    gamma^3 + 7 gamma^2 + (16 - s^-2) gamma + (12 - s^-2) = 0."""
    roots = np.roots([1.0, 7.0, 16.0 - length**-2, 12.0 - length**-2])
    return float(roots[np.abs(roots.imag) < 1e-9].real.max())


def ema_beta(length: float, step: int) -> float:
    """beta after own step `step` (from 1) of the averaged network: (1 - 1 / (step + 1))^(gamma + 1)."""
    return (1.0 - 1.0 / (step + 1)) ** (power_gamma(length) + 1.0)
