"""All-to-all between a split over tokens and a split over heads (Ulysses, arXiv 2309.14509).

Dimensions: B batch, N heads, D head width; s tokens and N heads of each of n ranks before, n s tokens and N / n heads after.
Rank i has tokens i s to (i + 1) s - 1, or heads i N / n to (i + 1) N / n - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_TOKENS, _HEADS = 1, 2  # dimensions


def tokens_for_heads(xs: Sequence[Tensor], group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    """Each [B, s, N, D] -> [B, n s, N / n, D], all in one collective; differentiable."""
    return _Exchange.apply(group, _HEADS, _TOKENS, *xs)


def heads_for_tokens(xs: Sequence[Tensor], group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    """The inverse: each [B, n s, N / n, D] -> [B, s, N, D]."""
    return _Exchange.apply(group, _TOKENS, _HEADS, *xs)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        ctx.group, ctx.split, ctx.join = args[:3]
        return _exchange(args[3:], *args[:3])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, None, None, *_exchange(grads, ctx.group, ctx.join, ctx.split)


def _exchange(xs: Sequence[Tensor], group: dist.ProcessGroup, split: int, join: int) -> tuple[Tensor, ...]:
    """Part i of dimension `split` goes to rank i; the parts that come in are joined along dimension `join`."""
    leaving = torch.stack([x.unflatten(split, (group.size(), -1)).movedim(split, 0) for x in xs], 1)
    coming = torch.empty_like(leaving)
    dist.all_to_all_single(coming, leaving, group=group)
    return tuple(x.movedim(0, join).flatten(join, join + 1) for x in coming.unbind(1))
