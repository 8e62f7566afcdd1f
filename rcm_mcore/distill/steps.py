"""One microbatch of every kind of step: networks, samples and draws in, a loss with a graph and metrics out.

Non-finite samples (method.md 2): where only the target is not finite the sample's gradient is zero; where the trained
network's own output is not, the sample is left out on all ranks of its model-parallel group. Both are counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rcm_mcore.condition import Condition
from rcm_mcore.config import Config
from rcm_mcore.diffusion.trigflow import Velocity, denoised, diffuse, over_sample, rf_time, time_grid, trig_velocity
from rcm_mcore.distill.draws import Draws
from rcm_mcore.distill.losses import (
    average_velocity_error,
    consistency_loss,
    consistency_tangent,
    discrete_tangent,
    finite_samples,
    normalize_error,
    normalize_tangent,
    score_distillation_loss,
    score_target,
    squared_error,
)
from rcm_mcore.distill.phases import Phase
from rcm_mcore.distill.roles import Network, conditioned, guided
from rcm_mcore.distill.rollout import rollout
from rcm_mcore.dual import Dual, MaybeDual, primal


@dataclass(frozen=True, kw_only=True)
class Roles:
    """The networks of a step; `negative` [1, X, text_dim] is the text of the unconditional branch."""

    student: Network
    teacher: Network
    fake_score: Network
    negative: Tensor
    sample_group: dist.ProcessGroup


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Samples of one forward: latents [b, C, F, H, W], what the networks are told of them, and their draws."""

    latents: Tensor
    condition: Condition
    draws: Draws


# The loss of a microbatch (None when no sample is left), and metrics summed over its samples.
Outcome = tuple[Tensor | None, dict[str, Tensor]]
MicroBatchStep = Callable[[MicroBatch], Outcome]


def pretrain_step(batch: MicroBatch, roles: Roles, config: Config) -> Outcome:
    """Flow matching: |v - (eps - x0)|^2, mean over what is generated of a sample; dropped samples see the negative text."""
    draws = batch.draws
    assert draws.t_g is not None and draws.eps_g is not None and draws.dropped is not None, "draws of another phase"
    t, eps = draws.t_g, draws.eps_g
    condition = batch.condition
    condition = condition.with_text(torch.where(draws.dropped[:, None, None], roles.negative, condition.text))
    # Without finite latents there is no target; zeros stand in so that the forward stays finite.
    usable = _agree(finite_samples(batch.latents), roles)
    latents = torch.where(over_sample(usable), batch.latents, 0.0)
    x_s = diffuse(latents, eps, t) / over_sample(t.cos() + t.sin())
    out, rows = _finite_forward(lambda r: roles.student(x_s[r], rf_time(t[r]), condition.rows(r)), len(t), roles)
    metrics = _counters(out, rows, len(t)) | {"nonfinite_target": (~usable).sum()}
    if out is None:
        return None, metrics
    share = condition.rows(rows).generated_share(eps.shape[2])
    losses = squared_error(primal(out).double(), (eps - latents)[rows]) / (eps[0].numel() * share)
    loss = torch.where(usable[rows], losses, 0.0).sum()
    return loss / len(t), metrics | {"loss": loss.detach()}


def consistency_step(batch: MicroBatch, roles: Roles, config: Config, phase: Phase) -> Outcome:
    """The sCM term (method.md 2): one dual pass of the student gives F, its tangent, and F's graph."""
    distill, draws = config.distill, batch.draws
    assert draws.t_g is not None and draws.eps_g is not None, "draws of another phase"
    t = draws.t_g
    x_t = diffuse(batch.latents, draws.eps_g, t)
    with torch.no_grad():
        teacher = trig_velocity(guided(roles.teacher, batch.condition, roles.negative, distill.guidance), x_t, t)
    speed = t.cos() * t.sin()
    x_dot = over_sample(speed) * primal(teacher)
    by_difference = None
    if distill.tangent == "finite_difference":
        student = conditioned(roles.student, batch.condition)
        by_difference = over_sample(speed) * central_difference(student, x_t, t, primal(teacher), distill.difference_step)

    def run(rows: Tensor) -> MaybeDual:
        student = conditioned(roles.student, batch.condition.rows(rows))
        if by_difference is not None:
            return trig_velocity(student, x_t[rows], t[rows])
        return trig_velocity(student, Dual(x_t[rows], x_dot[rows]), Dual(t[rows], speed[rows]))

    out, rows = _finite_forward(run, len(t), roles)
    metrics = _counters(out, rows, len(t))
    if out is None:
        return None, metrics
    assert isinstance(out, Dual) == (by_difference is None), "the student of a dual pass returns a Dual"
    trig_dot = out.tangent if isinstance(out, Dual) else _present(by_difference)[rows]
    trig, teacher = primal(out), primal(teacher)[rows]
    g = consistency_tangent(
        trig.detach(), trig_dot, teacher, x_t[rows], t=t[rows], warmup=phase.warmup, scale_tangent=distill.scale_tangent
    )
    usable = _agree(finite_samples(g), roles)
    g, norm = normalize_tangent(torch.where(over_sample(usable), g, 0.0), distill.tangent_norm_constant)
    ends: dict[str, Any] = dict(norm=norm, usable=usable, teacher=teacher, metrics=metrics)
    return _follow(trig, g, **ends, config=config, count=len(t))


@torch.no_grad()
def central_difference(student: Velocity, x: Tensor, t: Tensor, x_dot: Tensor, step: float) -> Tensor:
    """dF/dt [B, C, F, H, W] along (x_dot, 1) from two evaluations at x + (t' - t) x_dot, `step` to either side in TrigFlow
    time t [B] where time goes on that far.

    Never at 0, where the velocity towards frames that are given is 0 / 0.
    """
    before, after = torch.maximum(t - step, t / 2), (t + step).clamp_max(math.pi / 2)
    low, high = (trig_velocity(student, x + over_sample(at - t) * x_dot, at) for at in (before, after))
    return (high - low) / over_sample(after - before)


def discrete_step(batch: MicroBatch, roles: Roles, config: Config) -> Outcome:
    """The dCM term: x0 at t is to be x0 at the next time of a grid, where one Euler step of the teacher leads.

    Weighted and normalised as the sCM term, to which it tends with the number of steps (losses.discrete_tangent).
    """
    distill, draws = config.distill, batch.draws
    assert draws.t_g is not None and draws.eps_g is not None, "draws of another phase"
    grid = time_grid(distill.time_g, distill.discrete_steps).to(draws.t_g.device)
    above = torch.searchsorted(grid, draws.t_g).clamp(1, distill.discrete_steps)
    t, t_next = grid[above], grid[above - 1]
    x_t = diffuse(batch.latents, draws.eps_g, t)
    with torch.no_grad():
        teacher = trig_velocity(guided(roles.teacher, batch.condition, roles.negative, distill.guidance), x_t, t)
        # x0 and noise stand still: Euler in rectified-flow time, the first order of DDIM.
        ahead = over_sample((t - t_next).cos()) * x_t - over_sample((t - t_next).sin()) * teacher
        target = denoised(ahead, t_next, trig_velocity(conditioned(roles.student, batch.condition), ahead, t_next))
        # There x_t is x0; the velocity towards frames that are given would be 0 / 0.
        target = torch.where(over_sample(t_next) == 0, ahead, target)

    def run(rows: Tensor) -> Tensor:
        return trig_velocity(conditioned(roles.student, batch.condition.rows(rows)), x_t[rows], t[rows])

    out, rows = _finite_forward(run, len(t), roles)
    metrics = _counters(out, rows, len(t))
    if out is None:
        return None, metrics
    assert isinstance(out, Tensor)
    ours = denoised(x_t[rows], t[rows], out.detach())
    g = discrete_tangent(ours, target[rows], t=t[rows], t_next=t_next[rows])
    usable = _agree(finite_samples(g), roles)
    g, norm = normalize_tangent(torch.where(over_sample(usable), g, 0.0), distill.tangent_norm_constant)
    ends: dict[str, Any] = dict(norm=norm, usable=usable, teacher=teacher[rows], metrics=metrics)
    return _follow(out, g, **ends, config=config, count=len(t))


def mean_flow_step(batch: MicroBatch, roles: Roles, config: Config) -> Outcome:
    """MeanFlow along the teacher's velocity: the student, told of an interval, is its average (arXiv 2505.13447, eq. 9, 10)."""
    distill, draws = config.distill, batch.draws
    assert draws.t_g is not None and draws.t_end is not None and draws.eps_g is not None, "draws of another phase"
    s, end = rf_time(draws.t_g), rf_time(draws.t_end)
    # Without finite latents there is no target; zeros stand in so that the forward stays finite.
    known = finite_samples(batch.latents)
    x_s = over_sample(1 - s) * torch.where(over_sample(known), batch.latents, 0.0) + over_sample(s) * draws.eps_g
    with torch.no_grad():
        velocity = guided(roles.teacher, batch.condition, roles.negative, distill.guidance)(x_s, s).double()
    told = batch.condition._replace(end=end)

    def run(rows: Tensor) -> MaybeDual:
        x, time = Dual(x_s[rows], velocity[rows]), Dual(s[rows], torch.ones_like(s[rows]))
        return Dual(*(half.double() for half in roles.student(x, time, told.rows(rows))))

    out, rows = _finite_forward(run, len(s), roles)
    metrics = _counters(out, rows, len(s))
    if out is None:
        return None, metrics
    assert isinstance(out, Dual), "the student of a dual pass returns a Dual"
    u, teacher = out.primal, velocity[rows]
    error = average_velocity_error(u.detach(), out.tangent, teacher, s=s[rows], end=end[rows])
    usable = _agree(finite_samples(error) & known[rows], roles)
    g, norm = normalize_error(torch.where(over_sample(usable), error, 0.0), distill.tangent_norm_constant)
    ends: dict[str, Any] = dict(norm=norm, usable=usable, teacher=teacher, metrics=metrics)
    return _follow(u, g, **ends, config=config, count=len(s))


def _follow(
    out: Tensor,
    g: Tensor,
    *,
    norm: Tensor,
    usable: Tensor,
    teacher: Tensor,
    config: Config,
    metrics: dict[str, Tensor],
    count: int,
) -> Outcome:
    """The end of every consistency term: the loss whose gradient moves the output `out` along `g`, and what is logged."""
    loss = consistency_loss(out, g).sum()
    gap = (out.detach() - teacher).flatten(1).norm(dim=1)
    metrics |= {
        "loss_scm": loss.detach(),
        "g_norm": norm.sum(),
        "teacher_gap": torch.where(usable, gap, 0.0).sum(),
        "nonfinite_target": (~usable).sum(),
    }
    return config.distill.scm_weight * loss / count, metrics


def _present(x: Tensor | None) -> Tensor:
    assert x is not None
    return x


def distillation_step(batch: MicroBatch, roles: Roles, config: Config) -> Outcome:
    """The score-distillation term (method.md 3) on a rollout of the student."""
    distill, draws = config.distill, batch.draws
    assert draws.t_d is not None and draws.eps_d is not None, "draws of another phase"
    assert draws.rollout_times is not None and draws.rollout_noise is not None, "draws of another phase"
    count = len(draws.t_d)

    def run(rows: Tensor) -> Tensor:
        assert draws.rollout_times is not None and draws.rollout_noise is not None
        student = conditioned(roles.student, batch.condition.rows(rows))
        return rollout(student, draws.rollout_times[:, rows], draws.rollout_noise[:, rows])

    generated, rows = _finite_forward(run, count, roles)
    metrics = _counters(generated, rows, count)
    if generated is None:
        return None, metrics
    assert isinstance(generated, Tensor)
    t, condition = draws.t_d[rows], batch.condition.rows(rows)
    with torch.no_grad():
        x_t = diffuse(generated.detach(), draws.eps_d[rows], t)
        fake = denoised(x_t, t, trig_velocity(conditioned(roles.fake_score, condition), x_t, t))
        with_guidance = guided(roles.teacher, condition, roles.negative, distill.guidance)
        teacher = denoised(x_t, t, trig_velocity(with_guidance, x_t, t))
        usable = _agree(finite_samples(fake) & finite_samples(teacher), roles)
        fake, teacher = (torch.where(over_sample(usable), x, generated.detach()) for x in (fake, teacher))
    share = condition.generated_share(generated.shape[2])
    losses, weight = score_distillation_loss(generated, fake, teacher, share=share)
    loss = losses.sum()
    metrics |= {
        "loss_dmd": loss.detach(),
        "dmd_weight": weight.sum(),
        "score_gap": (fake - teacher).flatten(1).norm(dim=1).sum(),
        "nonfinite_target": (~usable).sum(),
    }
    return distill.dmd_weight * loss / count, metrics


def targets_follow_output(step: Any) -> bool:
    """Whether a step (or a partial of it) calls networks on the output of the pass that has the graph."""
    return getattr(step, "func", step) is distillation_step


def critic_step(batch: MicroBatch, roles: Roles, config: Config) -> Outcome:
    """The fake score learns the student's samples (method.md 3, critic)."""
    draws = batch.draws
    assert draws.t_d is not None and draws.eps_d is not None, "draws of another phase"
    assert draws.rollout_times is not None and draws.rollout_noise is not None, "draws of another phase"
    t, eps = draws.t_d, draws.eps_d
    with torch.no_grad():
        generated = rollout(conditioned(roles.student, batch.condition), draws.rollout_times, draws.rollout_noise)
    # A sample that the student could not make is no target; zeros stand in so that the forward stays finite.
    usable = _agree(finite_samples(generated), roles)
    generated = torch.where(over_sample(usable), generated, 0.0)
    x_t = diffuse(generated, eps, t)

    def run(rows: Tensor) -> MaybeDual:
        return trig_velocity(conditioned(roles.fake_score, batch.condition.rows(rows)), x_t[rows], t[rows])

    out, rows = _finite_forward(run, len(t), roles)
    metrics = _counters(out, rows, len(t)) | {"nonfinite_target": (~usable).sum()}
    if out is None:
        return None, metrics
    losses = squared_error(primal(out), score_target(generated, eps, t)[rows])
    loss = torch.where(usable[rows], losses, 0.0).sum()
    return loss / len(t), metrics | {"loss_critic": loss.detach()}


def _finite_forward(run: Callable[[Tensor], Any], count: int, roles: Roles) -> tuple[Any, Tensor]:
    """`run` on the samples whose output is finite on every rank of the model-parallel group, and their indices.

    A non-finite sample must not reach backward, where 0 x NaN is NaN in the weight gradients: the forward is then run again
    without it. Returns (None, no rows) when no sample is left.
    """
    rows = torch.arange(count, device=roles.negative.device)
    out = run(rows)
    good = _agree(finite_samples(primal(out)), roles)
    if bool(good.all()):
        return out, rows
    rows = rows[good]
    return (run(rows) if len(rows) else None), rows


def _agree(good: Tensor, roles: Roles) -> Tensor:
    """Samples that every rank that works on them finds good."""
    if roles.sample_group.size() > 1:
        votes = good.to(torch.int32)
        dist.all_reduce(votes, dist.ReduceOp.MIN, group=roles.sample_group)
        return votes.bool()
    return good


def _counters(out: Any, rows: Tensor, count: int) -> dict[str, Tensor]:
    device = rows.device
    left_out = torch.tensor(count - len(rows), device=device)
    return {"samples": torch.tensor(count, device=device), "nonfinite_output": left_out}
