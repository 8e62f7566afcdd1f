"""Few-step generation by the student while it trains ("backward simulation", method.md 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from rcm_mcore.diffusion.trigflow import Velocity, denoised, diffuse, trig_velocity


def rollout(student: Velocity, times: Tensor, noise: Tensor) -> Tensor:
    """x0 [b, C, F, H, W] (float64) after one student evaluation per row of `times` [N, b].

    noise [N, b, C, F, H, W]: the start (times[0] = pi/2, pure noise) and the fresh noise of each later step. Only the last
    evaluation keeps a graph (if gradients are on).
    """
    with torch.no_grad():
        x = noise[0].double()
        for k in range(len(times) - 1):
            x0 = denoised(x, times[k], trig_velocity(student, x, times[k]))
            x = diffuse(x0, noise[k + 1], times[k + 1])
    return denoised(x, times[-1], trig_velocity(student, x, times[-1]))
