"""Forwards without graphs over pipeline stages, one after another without a flush between them.

megatron's forward-only schedule ends when the last stage has its last microbatch: a step that calls networks one after
another would pay the bubble once per call. Here every rank runs the same list of forwards in the same order and a result
comes back to all stages beside the forwards that follow, so that a rank waits only for what it needs (docs/adr/0004).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rcm_mcore import dual
from rcm_mcore.condition import Condition
from rcm_mcore.dual import Dual, MaybeDual, primal
from rcm_mcore.parallel.mesh import Mesh


class Call(NamedTuple):
    """The arguments of a network: x [B, C, F, H, W], s [B], and what it is told besides."""

    x: MaybeDual
    s: MaybeDual
    condition: Condition


@dataclass
class Coming:
    """A tensor, or a Dual as one, that another stage sends."""

    value: Tensor
    work: Any  # None once it has arrived
    is_dual: bool = False

    def wait(self) -> MaybeDual:
        """What was sent; a kernel that uses it waits for its arrival."""
        if self.work is not None:
            self.work.wait()
            self.work = None
        return dual.unstack(self.value, 0) if self.is_dual else self.value


class Stages:
    """Runs networks of one shape over the pipeline stages of `mesh`, with the stages of megatron's interleaved schedule.

    Collective over `mesh.pp_group`: every rank makes the same calls in the same order.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        group, rank = mesh.pp_group, mesh.pp_group.rank()
        self._before = dist.get_global_rank(group, (rank - 1) % mesh.pp_size)
        self._after = dist.get_global_rank(group, (rank + 1) % mesh.pp_size)
        self._last = dist.get_global_rank(group, mesh.pp_size - 1)
        self._leaving: list[tuple[dist.Work, Tensor]] = []  # messages must live until they are sent

    @torch.no_grad()
    def forward(self, network: Any, calls: Sequence[Call]) -> list[Coming]:
        """The outputs of `calls`, which are alike in shape; they pass through each chunk of layers as a group."""
        visits = [(chunk, call) for chunk in range(network.num_chunks) for call in calls]
        message, results = self._expect(network, *visits[0]), []
        for (chunk, call), after in zip(visits, [*visits[1:], None]):
            # The next message comes while this one is computed on; not that of the next chunk, which this one may lead to.
            early = self._expect(network, *after) if after is not None and after[0] == chunk else None
            if message is not None:
                network.set_input_tensor(message.wait())
            output = network(*call, chunk=chunk)
            is_last_chunk = chunk == network.num_chunks - 1
            if not (is_last_chunk and self._mesh.is_last_stage):
                self._send(output)
            if is_last_chunk:
                results.append(self._shared(network, call, output))
            message = self._expect(network, *after) if after is not None and after[0] != chunk else early
        return results

    def finish(self) -> None:
        """Wait until everything has left this rank."""
        for work, _ in self._leaving:
            work.wait()
        self._leaving.clear()

    def _expect(self, network: Any, chunk: int, call: Call) -> Coming | None:
        """Hidden states from the stage before, none on the very first."""
        first = self._mesh.pp_group.rank() == 0
        if first and chunk == 0:
            return None
        device = call.condition.text.device
        hidden = torch.empty(network.hidden_shape(call.x), dtype=network.config.pipeline_dtype, device=device)
        work = dist.irecv(hidden, self._before, group=self._mesh.groups.embd if first else self._mesh.pp_group)
        return Coming(hidden, work)

    def _send(self, hidden: Tensor) -> None:
        # From the last stage back to the first in a group of its own: in one with two ranks both directions would queue up.
        group = self._mesh.groups.embd if self._mesh.is_last_stage else self._mesh.pp_group
        work = dist.isend(hidden, self._after, group=group)
        assert work is not None, "this rank is in its group"
        self._leaving = [(w, t) for w, t in self._leaving if not w.is_completed()] + [(work, hidden)]

    def _shared(self, network: Any, call: Call, output: MaybeDual) -> Coming:
        """The last stage's output on every stage."""
        is_dual = isinstance(call.x, Dual)
        if self._mesh.is_last_stage:
            value = dual.stack(output, 0).contiguous()
        else:
            batch, *sizes = primal(call.x).shape
            value = torch.empty(batch * (1 + is_dual), *sizes, dtype=network.output_dtype, device=call.condition.text.device)
        work = dist.broadcast(value, self._last, group=self._mesh.results_group, async_op=True)
        return Coming(value, work, is_dual)


def as_function(network: Any, mesh: Mesh) -> Callable[[MaybeDual, MaybeDual, Condition], Any]:
    """`network` on every stage of `mesh` as a function of x, s and condition, without gradients."""
    if mesh.pp_size == 1:
        return network
    stages = Stages(mesh)

    def run(x: MaybeDual, s: MaybeDual, condition: Condition) -> MaybeDual:
        (output,) = stages.forward(network, [Call(x, s, condition)])
        value = output.wait()
        stages.finish()
        return value

    return run
