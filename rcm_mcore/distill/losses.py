"""The losses, tensors in and tensors out (method.md 2, 3; arXiv 2510.08431). B samples; states [B, C, F, H, W] in float64.

A loss is summed over a sample and returned per sample, [B]: the trainer averages over the global batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rcm_mcore.diffusion.trigflow import over_sample


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """|prediction - target|^2 summed over each sample: [B]."""
    return (prediction - target).square().flatten(1).sum(1)


def finite_samples(x: Tensor) -> Tensor:
    """Which samples hold only finite numbers: [B] bool."""
    return x.detach().isfinite().flatten(1).all(1)


def consistency_tangent(
    trig: Tensor, trig_dot: Tensor, teacher: Tensor, x_t: Tensor, *, t: Tensor, warmup: float, scale_tangent: bool
) -> Tensor:
    """The unnormalised tangent g of the sCM term (method.md 2).

    g = -cos t sqrt(1 - r^2 sin^2 t) (F - F_teacher) - r (cos t sin t x_t + F_dot), r = `warmup`, where F_dot is the
    derivative of F along (cos t sin t F_teacher, cos t sin t). Without `scale_tangent` F_dot is not multiplied by r.
    `trig`: F without a graph; t [B].
    """
    cos, sin, r = over_sample(t).cos(), over_sample(t).sin(), warmup
    g = -cos * torch.sqrt(1 - r**2 * sin**2) * (trig - teacher) - r * cos * sin * x_t
    return g - (r if scale_tangent else 1.0) * trig_dot


def discrete_tangent(denoised: Tensor, target: Tensor, *, t: Tensor, t_next: Tensor) -> Tensor:
    """The discrete counterpart of sCM's g, cos((t + t') / 2) (x0(x_t, t) - x0(x_t', t')) / (t - t').

    x_t' is where the teacher leads x_t in one step to t' = `t_next` < t, so that it tends to cos t dx0/dt = g (arXiv
    2303.01469, eq. 7 and theorem 5; 2410.11081, eq. 5). `denoised` and `target` are the two x0. The weight is that of the
    middle of the step: cos t is 0 at pure noise, where sampling starts, and the only step from there would not be learnt.
    """
    return over_sample(((t + t_next) / 2).cos() / (t - t_next)) * (denoised - target)


def average_velocity_error(u: Tensor, u_dot: Tensor, velocity: Tensor, *, s: Tensor, end: Tensor) -> Tensor:
    """How far the average velocity u over [e, s] is from MeanFlow's identity: v - (s - e) du/ds - u.

    arXiv 2505.13447, eq. 6. u_dot: du/ds along the teacher's `velocity` v, e standing still (eq. 8).
    """
    return velocity - over_sample(s - end) * u_dot - u


def normalize_tangent(g: Tensor, constant: float) -> tuple[Tensor, Tensor]:
    """g / (|g| + constant) per sample, and |g| [B]."""
    norm = g.flatten(1).norm(dim=1)
    return g / over_sample(norm + constant), norm


def normalize_error(error: Tensor, constant: float) -> tuple[Tensor, Tensor]:
    """MeanFlow's weight, error / (|error|^2 + constant) per sample, and |error| [B] (arXiv 2505.13447, eq. 22 with p = 1)."""
    norm = error.flatten(1).norm(dim=1)
    return error / over_sample(norm.square() + constant), norm


def consistency_loss(trig: Tensor, g: Tensor) -> Tensor:
    """L_scm = |F - sg(F) - g|^2 [B], so dL/dF = -2 g; g the normalised tangent, or MeanFlow's weighted error."""
    return squared_error(trig, trig.detach() + g)


def score_distillation_loss(
    generated: Tensor, fake: Tensor, teacher: Tensor, *, share: Tensor | float = 1.0
) -> tuple[Tensor, Tensor]:
    """L_dmd = |x_G - sg(x_G - grad)|^2 [B] with grad = (x0_fake - x0_teacher) / w, and w [B] (method.md 3).

    w = mean |x_G - x0_teacher| of the sample, at least 1e-5. Where a prediction is not finite the gradient is zero. share [B]:
    of a sample, what is generated; the rest, frames that are given and so the same in all three, does not count in the mean.
    """
    weight = ((generated.detach() - teacher).abs().flatten(1).mean(1) / share).clamp_min(1e-5)
    grad = (fake - teacher) / over_sample(weight)
    grad = torch.where(over_sample(finite_samples(grad)), grad, 0.0)
    return squared_error(generated, generated.detach() - grad), weight


def score_target(generated: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """What the fake score regresses: the TrigFlow velocity cos t eps - sin t x_G.

    |F - (cos t eps - sin t x_G)|^2 = |x0 - x_G|^2 / sin^2 t, without its 0/0 at t = 0.
    """
    t = over_sample(t)
    return t.cos() * eps - t.sin() * generated
