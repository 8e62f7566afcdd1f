"""A loss term over pipeline stages: every network pass runs over all microbatches before the next begins.

The steps of distill/steps.py call networks as functions. Over stages a call cannot answer at once, so they get stand-ins: a
call whose result is not known raises, the passes that all microbatches then want follow each other through the stages, and the
steps begin again with the results known so far. What they compute between two passes is cheap and the same on every stage. The
pass that has a graph comes last, in megatron's 1F1B or, with chunks of layers, its interleaved form. The bubble is paid once
for the passes without graphs (parallel/stages.py) and once for that with one, not for every pass and microbatch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from rcm_mcore.condition import Condition
from rcm_mcore.config import microbatches_of_a_chunk
from rcm_mcore.distill.steps import MicroBatch, MicroBatchStep, Roles, targets_follow_output
from rcm_mcore.dual import MaybeDual, primal
from rcm_mcore.models import DiffusionTransformer
from rcm_mcore.parallel.mesh import Mesh
from rcm_mcore.parallel.stages import Call, Coming, Stages
from rcm_mcore.training.networks import Trained


@dataclass(frozen=True)
class _Pass:
    """A network pass that a step wants."""

    role: str
    arguments: Call
    has_graph: bool


class _WantedError(Exception):
    """Raised by a stand-in for a network at a call whose result is not known."""

    def __init__(self, call: _Pass) -> None:
        super().__init__(call.role)
        self.call = call


@dataclass
class _Replay:
    """One microbatch of a loss term, run again and again with more and more results known."""

    term: Any  # a partial of a step, with roles among its keywords
    batch: MicroBatch
    known: list[Any] = field(default_factory=list)
    calls: int = 0

    def run(self) -> tuple[Any, _Pass | None]:
        """The outcome of the step, or the next pass that it wants."""
        self.calls = 0
        stand_ins = {role: partial(self._answer, role) for role in ("student", "teacher", "fake_score")}
        roles = replace(self.term.keywords["roles"], **stand_ins)
        try:
            return partial(self.term, roles=roles)(self.batch), None
        except _WantedError as wanted:
            return None, wanted.call

    def _answer(self, role: str, x: MaybeDual, s: MaybeDual, condition: Condition) -> Any:
        self.calls += 1
        if self.calls <= len(self.known):
            known = self.known[self.calls - 1]
            return known.wait() if isinstance(known, Coming) else known
        raise _WantedError(_Pass(role, Call(x, s, condition), torch.is_grad_enabled()))


def forward_backward(
    trained: Trained, term: MicroBatchStep, microbatches: Sequence[MicroBatch], mesh: Mesh
) -> list[dict[str, Tensor]]:
    """As on one stage: the gradients of a loss term are added; metrics of each microbatch, on the last stage alone.

    A sample whose output is not finite makes the gradient not finite, and so stops the run: it cannot be left out here.
    """
    replays = [_Replay(term, batch) for batch in microbatches]
    stages = Stages(mesh)
    graph_at, graph_calls = _know_all_but_the_graph(replays, term, stages, mesh)

    def loss_of(replay: _Replay, output: Any) -> tuple[Tensor, dict[str, Tensor]]:
        replay.known[graph_at : graph_at + 1] = [output]
        outcome, again = replay.run()
        if again is None and outcome[0] is not None:
            return outcome
        value = primal(output)
        left_out = (~value.isfinite().flatten(1).all(1)).sum()
        return value.sum() * torch.nan, {"samples": torch.tensor(len(value), device=value.device), "nonfinite_output": left_out}

    def forward_step(data: Iterator[tuple[_Replay, _Pass]], chunk: Chunk) -> tuple[Tensor, Any]:
        replay, call = next(data)
        output = chunk(*call.arguments)
        if not (mesh.is_last_stage and chunk.index == trained.net.num_chunks - 1):
            return output, None
        loss, metrics = loss_of(replay, output)
        return loss, lambda value: (value, metrics)

    like = graph_calls[0].arguments.x
    outcomes = forward_backward_schedule(trained.net, forward_step, list(zip(replays, graph_calls)), mesh, like=like)
    for replay in replays:
        for known in replay.known:  # whatever other stages have sent and this one had no need of
            if isinstance(known, Coming):
                known.wait()
    stages.finish()
    return outcomes


def _know_all_but_the_graph(
    replays: list[_Replay], term: MicroBatchStep, stages: Stages, mesh: Mesh
) -> tuple[int, list[_Pass]]:
    """Run the passes that have no graph; returns which call of a step is the one that has, and its arguments in each."""
    roles: Roles = term.keywords["roles"]  # type: ignore[attr-defined]
    graph_at, graph_calls = -1, []
    active = replays
    while active:
        following: list[_Replay] = []
        # With chunks of layers as many microbatches go through the first as the stages need to be busy, then through the next.
        size = 1 if mesh.config.vpp == 1 else mesh.pp_size
        for group in (active[i : i + size] for i in range(0, len(active), size)):
            wanted = [(replay, call) for replay in group if (call := replay.run()[1]) is not None]
            # A second pass with a graph would leave samples out that are not finite: `loss_of` deals with them.
            wanted = [(r, call) for r, call in wanted if not call.has_graph or graph_at in (-1, len(r.known))]
            if not wanted:
                continue
            # One that begins a rollout again, whose samples are not finite, is given up: `loss_of` makes its loss NaN.
            kind = wanted[0][1].role, wanted[0][1].has_graph
            wanted = [(r, call) for r, call in wanted if (call.role, call.has_graph) == kind]
            calls = [call for _, call in wanted]
            if calls[0].has_graph:
                graph_at = len(wanted[0][0].known)
                graph_calls += calls
                if not targets_follow_output(term):
                    continue
            # Where targets depend on the output, it is needed before the pass that gives it a graph.
            results = stages.forward(getattr(roles, calls[0].role), [call.arguments for call in calls])
            for (replay, _), result in zip(wanted, results, strict=True):
                replay.known.append(result)
                following.append(replay)
        active = following
    assert graph_at >= 0, "a loss term has a pass with a graph"
    return graph_at, graph_calls


class Chunk(nn.Module):
    """A chunk of a rank's layers, as megatron's schedules call it."""

    def __init__(self, net: DiffusionTransformer, index: int) -> None:
        super().__init__()
        self.net, self.index, self.config, self.model_type = net, index, net.config, net.model_type

    def forward(self, x: MaybeDual, s: MaybeDual, condition: Condition) -> MaybeDual:
        return self.net(x, s, condition, chunk=self.index)

    def set_input_tensor(self, hidden: Any) -> None:
        self.net.set_input_tensor(hidden)


def forward_backward_schedule(
    net: DiffusionTransformer,
    forward_step: Callable[[Iterator[Any], Any], Any],
    items: Sequence[Any],
    mesh: Mesh,
    *,
    like: MaybeDual,
) -> list[Any]:
    """megatron's schedule with gradients: forward and backward of every item, a microbatch of latents `like` these.

    `forward_step(items, chunk)` takes the next item and calls `chunk(x, s, condition)` of `chunk.index`; see megatron for what
    it returns. Returns what it reports of every item on the last stage, elsewhere nothing.
    """
    chunks = [Chunk(net, i) for i in range(net.num_chunks)]
    rows, batch, _ = net.hidden_shape(like)
    split = mesh.cp_size * (mesh.tp_size if net.config.sequence_parallel else 1)
    net.config.microbatch_group_size_per_vp_stage = microbatches_of_a_chunk(mesh.config, len(items))
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(items) for _ in chunks],
        model=chunks,
        num_microbatches=len(items),
        seq_length=rows * split,
        micro_batch_size=batch,
        forward_only=False,
    )
