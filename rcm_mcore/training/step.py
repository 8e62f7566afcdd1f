"""One optimizer step: draws, microbatches, megatron's schedule, one reduction of gradients, the update, the EMA."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from rcm_mcore.condition import Condition
from rcm_mcore.config import Config, tokens_per_sample
from rcm_mcore.data import Batch
from rcm_mcore.distill.draws import Draws, draw
from rcm_mcore.distill.ema import ema_beta
from rcm_mcore.distill.phases import Phase, phase_of
from rcm_mcore.distill.steps import (
    MicroBatch,
    MicroBatchStep,
    Roles,
    consistency_step,
    critic_step,
    discrete_step,
    distillation_step,
    mean_flow_step,
    pretrain_step,
)
from rcm_mcore.parallel.mesh import Mesh
from rcm_mcore.training import pipeline
from rcm_mcore.training.networks import Trained, finalize_on
from rcm_mcore.training.stopwatch import Stopwatch

_APART = 1_000_003  # between the seeds of a run and of what follows a rollback; nobody chooses seeds so far apart


class NonFiniteError(RuntimeError):
    """Too many samples of a step, or its gradient, are not finite; `metrics` are those of the step, as far as it went."""

    def __init__(self, message: str, metrics: dict[str, float]) -> None:
        super().__init__(message)
        self.metrics = metrics


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """A rank's samples of one step with the draws of its phase."""

    batch: Batch
    phase: Phase
    draws: Draws


def phase_at(config: Config, step: int) -> Phase:
    """What optimizer step `step` (from 0) does."""
    if config.train.objective == "pretrain":
        return Phase(kind="pretrain", own_step=step)
    return phase_of(step, config.distill)


def with_draws(config: Config, batch: Batch, *, rollbacks: int = 0) -> StepBatch:
    """Add what is random to a batch; runs in the loader's thread. After a rollback it is drawn anew."""
    phase = phase_at(config, batch.step)
    if rollbacks:
        config = replace(config, train=replace(config.train, seed=config.train.seed + rollbacks * _APART))
    return StepBatch(batch=batch, phase=phase, draws=draw(config, phase, step=batch.step, slots=batch.slots))


def terms_of(phase: Phase, roles: Roles, config: Config) -> list[MicroBatchStep]:
    """The loss terms of a phase; their gradients add up."""
    if phase.kind == "pretrain":
        return [partial(pretrain_step, roles=roles, config=config)]
    if phase.kind == "critic":
        return [partial(critic_step, roles=roles, config=config)]
    terms: list[MicroBatchStep] = []
    if phase.scm:
        terms.append(consistency_term(phase, roles, config))
    if phase.dmd:
        terms.append(partial(distillation_step, roles=roles, config=config))
    return terms


def consistency_term(phase: Phase, roles: Roles, config: Config) -> MicroBatchStep:
    """The term of config.distill.method that follows the teacher's trajectories."""
    if config.distill.consistency == "scm":
        return partial(consistency_step, roles=roles, config=config, phase=phase)
    return partial(discrete_step if config.distill.consistency == "dcm" else mean_flow_step, roles=roles, config=config)


def run_step(
    trained: Trained, item: StepBatch, *, roles: Roles, config: Config, mesh: Mesh, own_time: Stopwatch | None = None
) -> dict[str, float | None]:
    """One optimizer step of `trained`; returns the metrics of the global batch (documented in training/log.py).

    `own_time` gets a span: what this rank does before it waits for other data-parallel ranks.

    Raises NonFiniteError, before the weights are touched, when the share of non-finite samples is above
    train.max_nonfinite_share or the gradient is not finite.
    """
    trained.ddp.zero_grad_buffer()
    trained.optimizer.zero_grad()
    latents, condition, bad_samples = _received(item, config, mesh)
    if own_time is not None:
        own_time.begin()
    size = config.train.micro_batch_size
    microbatches = list(_microbatches(latents, condition, item.draws.to(mesh.device), size))
    terms: list[Any] = list(terms_of(item.phase, roles, config))  # partials
    sums: dict[str, Tensor] = {}
    watch = Stopwatch(mesh.device)
    watch.begin()
    for i, term in enumerate(terms):
        last = i == len(terms) - 1
        finalize_on(trained, last, before=own_time.end if own_time is not None else None)
        with contextlib.nullcontext() if last else trained.ddp.no_sync():
            if mesh.pp_size > 1:
                outcomes = pipeline.forward_backward(trained, term, microbatches, mesh)
            else:
                outcomes = _forward_backward(trained, term, microbatches, config)
            for outcome in outcomes:
                for name, value in outcome.items():
                    sums[name] = sums.get(name, 0.0) + value.double()
    watch.end()
    # Every rank has every metric, also one whose microbatches were all left out.
    nothing = {name: torch.zeros((), dtype=torch.float64) for term in terms for name in _METRICS[term.func]}
    sums = nothing | _from_last_stage(sums, mesh) | {"bad_samples": bad_samples}
    metrics = _over_global_batch(sums, mesh, terms=len(terms))
    if item.phase.kind == "student":
        weights = {"loss_scm": config.distill.scm_weight, "loss_dmd": config.distill.dmd_weight}
        metrics["loss"] = sum(weight * metrics.get(name, 0.0) for name, weight in weights.items())
    elif item.phase.kind == "critic":
        metrics["loss"] = metrics.get("loss_critic", 0.0)
    share = (metrics["nonfinite_output"] + metrics["nonfinite_target"]) / (config.train.global_batch_size * len(terms))
    if share > config.train.max_nonfinite_share:
        raise NonFiniteError(
            f"step {item.batch.step}: {share:.0%} of the samples are not finite ({metrics['nonfinite_output']:.0f} outputs, "
            f"{metrics['nonfinite_target']:.0f} targets), above train.max_nonfinite_share={config.train.max_nonfinite_share}",
            metrics,
        )
    # A GPU has come to the end of the backward: the metrics were read from it.
    return metrics | {"forward_backward_seconds": watch.take()[-1]} | _update(trained, item, config, metrics)


def _update(trained: Trained, item: StepBatch, config: Config, metrics: dict[str, float]) -> dict[str, float | None]:
    """Optimizer step and EMA from the reduced gradients."""
    before = trained.watch.take()
    trained.watch.begin()
    optimizer, lr = trained.optimizer, trained.lr(config)
    optimizer.set_lr(lr)
    grad_norm = optimizer.prepare_and_clip()
    if not math.isfinite(grad_norm):
        raise NonFiniteError(f"step {item.batch.step}: the gradient of the {trained.name} is not finite ({grad_norm})", metrics)
    optimizer.step()
    trained.steps += 1
    if optimizer.has_ema:
        assert config.optim.ema_length is not None, "an EMA has a length"
        optimizer.update_ema(ema_beta(config.optim.ema_length, trained.steps))
    trained.watch.end()
    return {"grad_norm": grad_norm, "lr": lr, "optimizer_seconds": before[-1] if before else None}


def _forward_backward(
    trained: Trained, term: MicroBatchStep, microbatches: Sequence[MicroBatch], config: Config
) -> list[dict[str, Tensor]]:
    """Forward and backward of one loss term over the microbatches through megatron's schedule; metrics of each."""

    def forward_step(data: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Any]:
        loss, metrics = term(next(data))
        if loss is None:
            # Every rank must run a backward, for the collectives in it: a zero that reaches every parameter.
            loss = 0.0 * sum(p.sum() for p in trained.net.parameters())
        assert isinstance(loss, Tensor)
        return loss, lambda output: (output, metrics)

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(microbatches),
        model=trained.ddp,
        num_microbatches=len(microbatches),
        seq_length=tokens_per_sample(config.model, config.data.latent_shape),
        micro_batch_size=config.train.micro_batch_size,
        forward_only=False,
    )


def _from_last_stage(sums: dict[str, Tensor], mesh: Mesh) -> dict[str, Tensor]:
    """What the last pipeline stage has counted, on every stage."""
    if mesh.pp_size == 1:
        return sums
    counted = [{name: float(value) for name, value in sums.items()}]
    dist.broadcast_object_list(counted, dist.get_global_rank(mesh.pp_group, mesh.pp_size - 1), group=mesh.pp_group)
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in counted[0].items()}


def _received(item: StepBatch, config: Config, mesh: Mesh) -> tuple[Tensor, Condition, Tensor]:
    """Latents [b, C, F, H, W], what the networks are told of them, and the count of bad samples, on the device.

    One rank of those that work on the same samples has read them; the others get them from it, those of later stages at last.
    """
    batch, model = item.batch, config.model
    count = len(batch.slots)
    shapes: dict[str, tuple[int, ...]] = {
        "latents": (count, *config.data.latent_shape),
        "text": (count, model.text_len, model.text_dim),
    }
    if model.image_tokens:
        shapes |= {"given": shapes["latents"], "image": (count, model.image_tokens, model.image_dim)}
    tensors = [
        getattr(batch, name).to(mesh.device) if mesh.reads else torch.empty(shape, device=mesh.device)
        for name, shape in shapes.items()
    ]
    bad = torch.tensor(float(batch.state["bad_samples"]), dtype=torch.float64, device=mesh.device)
    tensors.append(bad)
    for group in ([mesh.sample_group] if mesh.pp_group.rank() == 0 else []) + [mesh.pp_group]:
        if group.size() > 1:
            for x in tensors:
                dist.broadcast(x, dist.get_global_rank(group, 0), group=group)
    latents, text, *of_images, bad = tensors
    condition = Condition(text)
    if model.image_tokens:
        condition = Condition(text, latents=of_images[0], image=of_images[1])
    elif model.condition == "frames":
        assert item.draws.frames is not None, "draws for another model"
        condition = Condition(text, latents=latents, frames=item.draws.frames.to(mesh.device))
    return latents, condition, bad


def _microbatches(latents: Tensor, condition: Condition, draws: Draws, size: int) -> Iterator[MicroBatch]:
    for start in range(0, len(latents), size):
        rows = slice(start, start + size)
        yield MicroBatch(latents=latents[rows], condition=condition.rows(rows), draws=draws.rows(rows))


# What a term reports besides samples and nonfinite_output.
_METRICS: dict[Any, tuple[str, ...]] = {
    pretrain_step: ("loss", "nonfinite_target"),
    consistency_step: ("loss_scm", "g_norm", "teacher_gap", "nonfinite_target"),
    discrete_step: ("loss_scm", "g_norm", "teacher_gap", "nonfinite_target"),
    mean_flow_step: ("loss_scm", "g_norm", "teacher_gap", "nonfinite_target"),
    distillation_step: ("loss_dmd", "dmd_weight", "score_gap", "nonfinite_target"),
    critic_step: ("loss_critic", "nonfinite_target"),
}
_COUNTS = ("nonfinite_output", "nonfinite_target", "bad_samples")


def _over_global_batch(sums: dict[str, Tensor], mesh: Mesh, *, terms: int) -> dict[str, float]:
    """Sums over the ranks' samples to means per sample (counts stay sums), equal on every rank."""
    names = sorted(sums)
    values = torch.stack([sums[name].to(mesh.device) for name in names])
    dist.all_reduce(values, group=mesh.dp_group)
    totals = dict(zip(names, values.tolist()))
    samples = totals.pop("samples")
    # A student step counts each sample once per loss term; every mean is over the samples of one term.
    return {name: value if name in _COUNTS else value * terms / samples for name, value in totals.items()}
