"""The sequence axis over tensor- and context-parallel ranks, and sums over ranks that keep gradients exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from torch import Tensor


def scatter_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's rows of `x` [s, ...] -> [s / n, ...] over n ranks; the gradient is gathered."""
    return x if group.size() == 1 else scatter_to_sequence_parallel_region(x, group=group)


def gather_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All rows of `x` [s / n, ...] -> [s, ...], for a loss that every rank computes alike (the gradient is sliced)."""
    if group.size() == 1:
        return x
    return gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False, group=group)


def gathering(x: Tensor, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """Begin to gather the rows of `x` [s / n, ...] of all ranks; call what is returned for them, [s, ...]. No graph."""
    x = x.contiguous()
    whole = x.new_empty(group.size() * len(x), *x.shape[1:])
    return _finished(dist.all_gather_into_tensor(whole, x, group=group, async_op=True), whole, x)


def scattering_sums(x: Tensor, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """Begin to sum `x` [s, ...] over ranks; call what is returned for this rank's rows of the sum, [s / n, ...]. No graph."""
    rows = x.new_empty(len(x) // group.size(), *x.shape[1:])
    return _finished(dist.reduce_scatter_tensor(rows, x, group=group, async_op=True), rows, x)


def summing(x: Tensor, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """Begin to sum `x` over ranks, in place; call what is returned for the sum. No graph."""
    return _finished(dist.all_reduce(x, group=group, async_op=True), x, x)


def _finished(work: Any, result: Tensor, sent: Tensor) -> Callable[[], Tensor]:
    def finish() -> Tensor:
        nonlocal sent
        work.wait()
        del sent  # it had to live until now
        return result

    return finish


class _SumOverRanks(torch.autograd.Function):
    """All-reduce in forward and in backward.

    Each rank's summand influences every rank's use of the sum, so its gradient is the sum of theirs. (megatron's
    reduction has an identity backward, right only where the loss after it is computed alike on all ranks.)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum of `x` over `group`, with the exact gradient where each rank uses the sum differently."""
    return x if group.size() == 1 else _SumOverRanks.apply(x, group)
