"""How far the tangent of a network in low precision is from the same in float32 (tools/benchmark_tangent.py).

The student's side of a consistency step on one rank: F and its tangent along (cos t sin t F_T, cos t sin t), and g
(method.md 2; arXiv 2510.08431). A relative error is |x - reference| / |reference| over a sample.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rcm_mcore.condition import Condition
from rcm_mcore.diffusion.trigflow import diffuse, over_sample, rf_time, trig_velocity
from rcm_mcore.distill.losses import consistency_tangent
from rcm_mcore.distill.roles import conditioned, guided
from rcm_mcore.distill.steps import central_difference
from rcm_mcore.dual import Dual, primal, rowwise
from rcm_mcore.models import DiffusionTransformer
from rcm_mcore.models.wan.rounded import RoundedBlock, Roundings

GUIDANCE = 5.0
STEPS = (0.03, 0.01, 0.003, 0.001, 3e-4, 1e-4)  # of finite differences, in TrigFlow time as distill.difference_step


@dataclass
class Problem:
    """A consistency step's point and direction, float64; one sample."""

    t: Tensor
    x_t: Tensor
    condition: Condition
    teacher: Tensor

    @property
    def duals(self) -> tuple[Dual, Dual]:
        speed = self.t.cos() * self.t.sin()
        return Dual(self.x_t, over_sample(speed) * self.teacher), Dual(self.t, speed)


@dataclass
class Trace:
    """What a dual pass gave: F and its tangent, and hidden states [S, B, M] after every block."""

    out: Dual
    hidden: list[Dual]

    def g(self, problem: Problem) -> Tensor:
        t = problem.t
        return consistency_tangent(*self.out, problem.teacher, problem.x_t, t=t, warmup=1.0, scale_tangent=True)


def make_problem(net: DiffusionTransformer, t: float, latent: tuple[int, ...]) -> Problem:
    """Smooth latents of unit RMS, a text of 60 rows, and the guided velocity of `net` there."""
    model, device = net.model, next(net.parameters()).device
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, latent[0], *(max(1, n // 4) for n in latent[1:]), generator=generator)
    smooth = F.interpolate(coarse, size=latent[1:], mode="trilinear") + 0.1 * torch.randn(1, *latent, generator=generator)
    eps = torch.randn(1, *latent, generator=generator)
    texts = torch.zeros(2, model.text_len, model.text_dim)
    texts[:, :60] = torch.randn(texts[:, :60].shape, generator=generator)
    condition = Condition(texts[:1].to(device))
    times = torch.tensor([t], dtype=torch.float64, device=device)
    x_t = diffuse((smooth / smooth.std()).to(device), eps.to(device), times)
    with torch.no_grad():
        teacher = trig_velocity(guided(net, condition, texts[1:].to(device), GUIDANCE), x_t, times)
    return Problem(times, x_t, condition, primal(teacher))


@torch.no_grad()
def run(net: DiffusionTransformer, problem: Problem, duals: tuple[Dual, Dual] | None = None) -> Trace:
    """The dual pass of a consistency step, in the problem's direction unless `duals` says another."""
    hidden: list[Dual] = []
    hooks = [block.register_forward_hook(lambda *a: hidden.append(a[-1])) for block in net.blocks.values()]
    try:
        out = trig_velocity(conditioned(net, problem.condition), *(duals or problem.duals))
    finally:
        for hook in hooks:
            hook.remove()
    return Trace(out, hidden)


@contextlib.contextmanager
def emulated(net: DiffusionTransformer, roundings: Roundings) -> Iterator[list[RoundedBlock]]:
    """`net`, in float32, with blocks that round."""
    blocks = dict(net.blocks.items())
    stand_ins = {k: RoundedBlock(b, head_dim=net.model.head_dim, roundings=roundings) for k, b in blocks.items()}
    net.blocks.update(stand_ins)
    try:
        yield list(stand_ins.values())
    finally:
        net.blocks.update(blocks)


def error(x: Tensor, reference: Tensor) -> float:
    """|x - reference| / |reference|."""
    return float((x.double() - reference.double()).norm() / reference.double().norm())


def cosine(x: Tensor, reference: Tensor) -> float:
    x, reference = x.double().flatten(), reference.double().flatten()
    return float(x @ reference / (x.norm() * reference.norm()))


def compare(trace: Trace, reference: Trace, problem: Problem) -> dict[str, Any]:
    """Errors of a pass, and by layer."""
    g, wanted = trace.g(problem), reference.g(problem)
    pairs = list(zip(trace.hidden, reference.hidden))
    return {
        "F": error(trace.out.primal, reference.out.primal),
        "F_dot": error(trace.out.tangent, reference.out.tangent),
        "g": error(g, wanted),
        "cosine_F_dot": cosine(trace.out.tangent, reference.out.tangent),
        "cosine_g": cosine(g, wanted),
        "layers": [error(x.primal, y.primal) for x, y in pairs],
        "layers_dot": [error(x.tangent, y.tangent) for x, y in pairs],
    }


@torch.no_grad()
def differences(net: DiffusionTransformer, problem: Problem, reference: Trace) -> dict[str, Any]:
    """Of training's finite differences, at the step h with the least error of the tangent; `by_step`: that error at every h."""
    velocity, (x, t) = conditioned(net, problem.condition), (problem.x_t, problem.t)
    middle, speed = trig_velocity(velocity, x, t), over_sample(problem.duals[1].tangent)
    rows = []
    for h in STEPS:
        tangent = speed * central_difference(velocity, x, t, problem.teacher, h)
        rows.append(compare(Trace(Dual(middle, tangent), []), reference, problem) | {"h": h})
    return min(rows, key=lambda row: row["F_dot"]) | {"by_step": {f"{row['h']:g}": row["F_dot"] for row in rows}}


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@torch.no_grad()
def describe(net: DiffusionTransformer, problem: Problem, reference: Trace, logits: list[float]) -> dict[str, Any]:
    """What the weights lead to, by which a reader may judge how realistic they are."""
    x, t = problem.duals
    still = Dual(x.primal, torch.zeros_like(x.tangent)), Dual(t.primal, torch.zeros_like(t.tangent))
    parts = [run(net, problem, duals).out.tangent for duals in ((x, still[1]), (still[0], t))]
    s = rf_time(problem.t)
    e = rowwise(lambda s: net.embed_time(s)[1], Dual(s, torch.ones_like(s)))
    modulations: list[Any] = [block.modulation for block in net.blocks.values()]
    gates = [rms((e.primal + own.transpose(0, 1))[[2, 5]]) for own in modulations]
    channels = [h.primal.double().square().mean((0, 1)).sqrt() for h in reference.hidden]
    out = reference.out
    return {
        "stream": [rms(h.primal) for h in reference.hidden],
        "stream_dot": [rms(h.tangent) for h in reference.hidden],
        "outlier": [float(c.max() / c.median()) for c in channels],
        "logits": logits,
        "gates": gates,
        "time_speed": float(e.tangent.norm() / e.primal.norm()),
        "F": rms(out.primal),
        "teacher": rms(problem.teacher),
        "F_dot_over_F": float(out.tangent.norm() / out.primal.norm()),
        "x_part": float(parts[0].norm() / out.tangent.norm()),
        "t_part": float(parts[1].norm() / out.tangent.norm()),
        "cancellation": float((parts[0].norm() + parts[1].norm()) / out.tangent.norm()),
    }
