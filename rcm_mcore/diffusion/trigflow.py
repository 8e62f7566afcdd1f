"""TrigFlow around a rectified-flow velocity network, in float64 (method.md 1; sCM, arXiv 2410.11081, with sigma_data = 1).

Three times: `t` in [0, pi/2] is TrigFlow's, x_t = cos t x0 + sin t eps; `s` in [0, 1] is rectified flow's,
x_s = (1 - s) x0 + s eps; sigma = tan t = s / (1 - s). Batched: t [B], states [B, C, F, H, W].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor

from rcm_mcore.config import TimeConfig
from rcm_mcore.dual import Dual, MaybeDual, rowwise

# v = network(x_s, s): a rectified-flow velocity eps - x0, tensor to tensor and Dual to Dual.
Velocity = Callable[[Any, Any], Any]


def rf_time(t: Tensor) -> Tensor:
    """s = sin t / (sin t + cos t)."""
    return t.sin() / (t.sin() + t.cos())


def trig_time(s: Tensor) -> Tensor:
    """t = arctan(s / (1 - s)), the inverse of `rf_time`."""
    return torch.atan2(s, 1 - s)


def over_sample(t: Tensor) -> Tensor:
    """t [B] shaped to multiply [B, C, F, H, W]."""
    return t.view(-1, 1, 1, 1, 1)


def diffuse(x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t = cos t x0 + sin t eps, float64."""
    t = over_sample(t.double())
    return t.cos() * x0 + t.sin() * eps


@overload
def trig_velocity(network: Velocity, x: Tensor, t: Tensor) -> Tensor: ...
@overload
def trig_velocity(network: Velocity, x: Dual, t: Dual) -> Dual: ...
def trig_velocity(network: Velocity, x: MaybeDual, t: MaybeDual) -> MaybeDual:
    """F(x_t, t) = ((cos t - sin t) x_t + v) / (cos t + sin t), with v the network at x_t / (cos t + sin t).

    x [B, C, F, H, W] and t [B] in float64, Duals or tensors; so is the result. Gradients flow through v.
    """
    v = network(rowwise(_to_rf_state, x, t), rowwise(rf_time, t))
    return rowwise(_to_trig, x, t, v)


def denoised(x: Tensor, t: Tensor, trig: Tensor) -> Tensor:
    """x0 = cos t x_t - sin t F."""
    t = over_sample(t)
    return t.cos() * x - t.sin() * trig


def _to_rf_state(x: Tensor, t: Tensor) -> Tensor:
    t = over_sample(t)
    return x / (t.cos() + t.sin())


def _to_trig(x: Tensor, t: Tensor, v: Tensor) -> Tensor:
    t = over_sample(t)
    return ((t.cos() - t.sin()) * x + v.to(x.dtype)) / (t.cos() + t.sin())


def time_grid(distribution: TimeConfig, steps: int) -> Tensor:
    """`steps` + 1 TrigFlow times from 0 to pi/2, float64: a draw from `distribution` lies between any two neighbours alike."""
    u = torch.arange(1, steps, dtype=torch.float64) / steps
    if distribution.kind == "lognormal":
        inner = (distribution.mean + distribution.std * math.sqrt(2) * torch.erfinv(2 * u - 1)).exp().atan()
    else:
        inner = trig_time(distribution.shift * u / (1 + (distribution.shift - 1) * u))
    return torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), math.pi / 2)])


def draw_time(distribution: TimeConfig, generator: torch.Generator) -> float:
    """One TrigFlow time from p_G or p_D (method.md 5)."""
    if distribution.kind == "lognormal":
        log_sigma = distribution.mean + distribution.std * torch.randn((), generator=generator, dtype=torch.float64)
        return math.atan(math.exp(float(log_sigma)))
    u = float(torch.rand((), generator=generator, dtype=torch.float64))
    s = distribution.shift * u / (1 + (distribution.shift - 1) * u)
    return math.atan2(s, 1 - s)
