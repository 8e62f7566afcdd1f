"""Few-step sampling of students and many-step sampling of teachers; states in float64.

A network here is `velocity(x, s) -> v` on tensors [B, C, F, H, W] and s [B]: text and guidance are already in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from rcm_mcore.config import MID_TIMES
from rcm_mcore.diffusion.trigflow import diffuse, rf_time

TensorVelocity = Callable[[Tensor, Tensor], Tensor]


def few_step_times(steps: int, *, sigma_max: float = 80.0, mid_times: Sequence[float] = MID_TIMES["wan"]) -> list[float]:
    """The `steps` + 1 TrigFlow times [arctan sigma_max, first steps - 1 mid times, 0].

    Raises ValueError when there are too few mid times or the times do not fall.
    """
    if steps < 1 or steps - 1 > len(mid_times):
        raise ValueError(
            f"steps={steps}: must be from 1 to {len(mid_times) + 1}, one more than the mid times {list(mid_times)}"
        )
    times = [math.atan(sigma_max), *mid_times[: steps - 1], 0.0]
    if not all(a >= b for a, b in zip(times, times[1:])) or not times[-2] > 0:  # NaN is in no order
        raise ValueError(f"times {times} must fall from arctan(sigma_max={sigma_max}) to 0")
    return times


@torch.no_grad()
def sample_few_step(velocity: TensorVelocity, noises: Iterable[Tensor], times: Sequence[float]) -> Tensor:
    """rCM's sampler: x0 = student(x, t), then x = cos t' x0 + sin t' fresh noise, down `times` (method.md 6).

    `noises`: one standard normal [B, C, F, H, W] per step; the first starts the state as sin t_0 noise.
    Returns x0 [B, C, F, H, W], float64.
    """
    draws = iter(noises)
    x = math.sin(times[0]) * next(draws).double()
    x0 = x
    for i, t in enumerate(times[:-1]):
        if i > 0:
            x = diffuse(x0, next(draws).to(x0), x0.new_full((len(x0),), t))
        at = x.new_full((len(x),), t)
        s = rf_time(at)
        scale = math.cos(t) + math.sin(t)
        x0 = x / scale - s.view(-1, 1, 1, 1, 1) * velocity(x / scale, s).double()
    return x0


@torch.no_grad()
def sample_mean_flow(average: Callable[[Tensor, Tensor, Tensor], Tensor], noise: Tensor, times: Sequence[float]) -> Tensor:
    """MeanFlow's sampler, x_e = x_s - (s - e) u(x_s, e, s), down `times` (arXiv 2505.13447, eq. 12).

    `average(x, s, e)`: the velocity u averaged over [e, s]. `noise` [B, C, F, H, W]; `times` of TrigFlow, as `few_step_times`
    gives them, so that a step costs and starts what one of the few-step sampler does. Returns x0 [B, C, F, H, W], float64.
    """
    s = rf_time(noise.new_tensor(times, dtype=torch.float64))
    x = s[0] * noise.double()
    for now, end in zip(s[:-1].expand(len(x), -1).T, s[1:].expand(len(x), -1).T):
        x = x - (now - end).view(-1, 1, 1, 1, 1) * average(x, now, end).double()
    return x


def shifted_sigmas(steps: int, shift: float) -> list[float]:
    """`steps` + 1 rectified-flow times from 1 to 0: uniform u mapped to shift u / (1 + (shift - 1) u)."""
    if steps < 1 or not 0 < shift < math.inf:
        raise ValueError(f"steps={steps} must be at least 1 and shift={shift} positive")
    return [shift * u / (1 + (shift - 1) * u) for u in (1 - i / steps for i in range(steps + 1))]


@torch.no_grad()
def sample_ode(
    velocity: TensorVelocity, noise: Tensor, *, steps: int, shift: float, solver: Literal["euler", "unipc"] = "euler"
) -> Iterator[Tensor]:
    """Teacher sampling along dx/ds = v from `noise` [B, C, F, H, W] at s = 1; yields the state after every step, float64.

    `unipc` is diffusers' UniPCMultistepScheduler with flow sigmas; the network sees the exact s, where Wan's pipeline gives
    it 1000 s truncated to a whole number.
    """
    x = noise.double()
    if solver == "euler":
        sigmas = shifted_sigmas(steps, shift)
        for s, s_next in zip(sigmas, sigmas[1:]):
            x = x + (s_next - s) * velocity(x, x.new_full((len(x),), s)).double()
            yield x
        return
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(
        num_train_timesteps=1000, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    scheduler.set_timesteps(steps, device=x.device)
    for sigma, timestep in zip(scheduler.sigmas, scheduler.timesteps):
        v = velocity(x, x.new_full((len(x),), float(sigma)))
        x = scheduler.step(v.double(), timestep, x, return_dict=False)[0]
        yield x
