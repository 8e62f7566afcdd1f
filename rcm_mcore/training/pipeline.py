"""A loss term over pipeline stages: every network pass runs over all microbatches at once, through megatron's schedules.

The steps of distill/steps.py call networks as functions. Over stages a call cannot answer at once, so they get stand-ins: a
call whose result is not known raises, the passes that all microbatches then want are run in one pipelined schedule, and the
steps begin again with the results known so far. What they compute between two passes is cheap and the same on every stage. The
pass that has a graph comes last, in 1F1B, so that the bubble is paid once per pass and not once per microbatch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from rcm_mcore.config import Config
from rcm_mcore.distill.steps import MicroBatch, MicroBatchStep, Roles, targets_follow_output
from rcm_mcore.dual import Dual, MaybeDual, primal
from rcm_mcore.parallel.mesh import Mesh
from rcm_mcore.training.networks import Trained


@dataclass(frozen=True)
class _Call:
    """A network pass that a step wants."""

    role: str
    x: MaybeDual
    s: MaybeDual
    text: Tensor
    has_graph: bool


class _WantedError(Exception):
    """Raised by a stand-in for a network at a call whose result is not known."""

    def __init__(self, call: _Call) -> None:
        super().__init__(call.role)
        self.call = call


@dataclass
class _Replay:
    """One microbatch of a loss term, run again and again with more and more results known."""

    term: Any  # a partial of a step, with roles among its keywords
    batch: MicroBatch
    known: list[Any] = field(default_factory=list)
    calls: int = 0

    def run(self) -> tuple[Any, _Call | None]:
        """The outcome of the step, or the next pass that it wants."""
        self.calls = 0
        stand_ins = {role: partial(self._answer, role) for role in ("student", "teacher", "fake_score")}
        roles = replace(self.term.keywords["roles"], **stand_ins)
        try:
            return partial(self.term, roles=roles)(self.batch), None
        except _WantedError as wanted:
            return None, wanted.call

    def _answer(self, role: str, x: MaybeDual, s: MaybeDual, text: Tensor) -> Any:
        self.calls += 1
        if self.calls <= len(self.known):
            return self.known[self.calls - 1]
        raise _WantedError(_Call(role, x, s, text, torch.is_grad_enabled()))


def forward_backward(
    trained: Trained, term: MicroBatchStep, microbatches: Sequence[MicroBatch], config: Config, mesh: Mesh
) -> list[dict[str, Tensor]]:
    """As on one stage: the gradients of a loss term are added; metrics of each microbatch, on the last stage alone.

    A sample whose output is not finite makes the gradient not finite, and so stops the run: it cannot be left out here.
    """
    replays = [_Replay(term, batch) for batch in microbatches]
    roles: Roles = term.keywords["roles"]  # type: ignore[attr-defined]
    graph_at = None  # which call is the one that has a graph
    graph_calls: list[_Call] = []
    active = replays
    while True:
        pairs = [(replay, call) for replay in active if (call := replay.run()[1]) is not None]
        # A second pass with a graph would leave samples out that are not finite: `loss_of` deals with them.
        pairs = [(replay, call) for replay, call in pairs if graph_at is None or not call.has_graph]
        if not pairs:
            break
        active, wanted = [replay for replay, _ in pairs], [call for _, call in pairs]
        assert len({(call.role, call.has_graph) for call in wanted}) == 1, "microbatches of one term want the same passes"
        if wanted[0].has_graph:
            graph_at, graph_calls = len(replays[0].known), wanted
            if not targets_follow_output(term):
                break
        # Where targets depend on the output, it is needed before the pass that gives it a graph.
        for replay, result in zip(active, _values(getattr(roles, wanted[0].role), wanted, trained, config, mesh), strict=True):
            replay.known.append(result)
    assert graph_at is not None, "a loss term has a pass with a graph"

    def loss_of(replay: _Replay, output: Any) -> tuple[Tensor, dict[str, Tensor]]:
        replay.known[graph_at : graph_at + 1] = [output]
        outcome, again = replay.run()
        if again is None and outcome[0] is not None:
            return outcome
        value = primal(output)
        left_out = (~value.isfinite().flatten(1).all(1)).sum()
        return value.sum() * torch.nan, {"samples": torch.tensor(len(value), device=value.device), "nonfinite_output": left_out}

    def forward_step(data: Iterator[tuple[_Replay, _Call]], model: Any) -> tuple[Tensor, Any]:
        replay, call = next(data)
        output = model(call.x, call.s, call.text)
        if not mesh.is_last_stage:
            return output, None
        loss, metrics = loss_of(replay, output)
        return loss, lambda value: (value, metrics)

    return _schedule(trained.ddp, forward_step, list(zip(replays, graph_calls)), trained, config, forward_only=False)


@torch.no_grad()
def _values(network: Any, calls: list[_Call], trained: Trained, config: Config, mesh: Mesh) -> list[Tensor]:
    """The outputs of a network, without graphs, on every stage."""

    def forward_step(data: Iterator[tuple[None, _Call]], model: Any) -> tuple[Tensor, Any]:
        _, call = next(data)
        return model(call.x, call.s, call.text), lambda output, non_loss_data: output

    outputs = _schedule(network, forward_step, [(None, call) for call in calls], trained, config, forward_only=True)
    x = primal(calls[0].x)
    dtype = torch.promote_types(getattr(torch, config.model.dtype), torch.float32)
    values = torch.stack(outputs) if mesh.is_last_stage else torch.empty(len(calls), *x.shape, dtype=dtype, device=x.device)
    dist.broadcast(values, dist.get_global_rank(mesh.pp_group, mesh.pp_size - 1), group=mesh.pp_group)
    return list(values)


def _schedule(
    model: Any, forward_step: Any, items: list[tuple[Any, _Call]], trained: Trained, config: Config, *, forward_only: bool
) -> list[Any]:
    x = items[0][1].x
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(items),
        model=model,
        num_microbatches=len(items),
        seq_length=trained.net.tokens_in_schedule(config.data.latent_shape),
        micro_batch_size=len(primal(x)) * (2 if isinstance(x, Dual) else 1),
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
