"""Attention over tokens that are split over ranks: blocks of keys and values travel round a ring (arXiv 2310.01889).

Rank i of a ring of n holds tokens i s to (i + 1) s - 1 of every sample: the sequence is padded at its end to n s, and what
lies beyond `tokens` is never attended to. At each of n steps a rank attends to one block while the next comes in: over NVLink
from its owner's memory (shared_memory.py), else passed on by the rank before. Results over disjoint keys are merged at the end
(method.md 7) in float32 or better.

Dimensions: B batch, s tokens of this rank, N heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rcm_kernels import Partial, flash_attention, flash_attention_backward, flash_attention_jvp, merge
from torch import Tensor

from rcm_mcore.parallel.shared_memory import PartsHome, peers_of


def tokens_of_rank(tokens: int, rank: int, block: int) -> int:
    """How many of `tokens` are in the block of `block` tokens that `rank` holds; the last blocks may be short or empty."""
    return min(block, max(0, tokens - rank * block))


def ring_attention_jvp(
    primals: tuple[Tensor, Tensor, Tensor],
    tangents: tuple[Tensor, Tensor, Tensor],
    *,
    tokens: int,
    group: dist.ProcessGroup | None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`rcm_kernels.flash_attention_jvp` of this rank's queries over the keys of all ranks. Builds no graph.

    primals and tangents: q, k, v [B, s, N, D] of this rank. tokens: those of the whole sequence, padding excluded.
    group: none where one rank holds them all. Returns out, out_dot [B, s, N, D] in q's dtype and lse, lse_dot [B, N, s];
    rows of padded queries mean nothing.
    """
    with torch.no_grad():
        q, k, v = primals
        q_dot, k_dot, v_dot = tangents
        parts = [
            Partial(*flash_attention_jvp(q, k_, v_, q_dot, k_dot_, v_dot_, scale=scale, wide_out=group is not None))
            for k_, v_, k_dot_, v_dot_ in _filled_blocks((k, v, k_dot, v_dot), tokens, group)
        ]
        out, out_dot, lse, lse_dot = merge(parts, q.dtype)
        assert out_dot is not None and lse_dot is not None, "every part has tangents"
        return out, out_dot, lse, lse_dot


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    tokens: int,
    group: dist.ProcessGroup | None,
    scale: float | None = None,
    known: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """`rcm_kernels.flash_attention` of this rank's queries over the keys of all ranks, differentiable through out.

    q, k, v [B, s, N, D] of this rank -> out [B, s, N, D], lse [B, N, s]. `known`: these two, where they were computed before.
    The gradient of a padded query's row must be zero, which it is when the loss does not look at padding.
    """
    return _RingAttention.apply(q, k, v, tokens, group, scale, *(known or (None, None)))


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        q, k, v, tokens, group, scale, out, lse = args
        if out is None:
            parts = []
            for k_, v_ in _filled_blocks((k, v), tokens, group):
                part_out, part_lse = flash_attention(q, k_, v_, scale=scale)
                parts.append(Partial(part_out, None, part_lse, None))
            out, _, lse, _ = merge(parts)
        else:
            out, lse = out.view_as(out), lse.view_as(lse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.tokens, ctx.group, ctx.scale = tokens, group, scale
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * 8
        dout = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        q, k, v, out, lse = ctx.saved_tensors
        if ctx.group is None:
            keys, values = k[:, : ctx.tokens], v[:, : ctx.tokens]
            dq, dk, dv = flash_attention_backward(dout, q, keys, values, out, lse, scale=ctx.scale)
            if padding := k.shape[1] - keys.shape[1]:
                dk, dv = (F.pad(x, (0, 0, 0, 0, 0, padding)) for x in (dk, dv))
            return dq, dk, dv, *(None,) * 5
        dq = torch.zeros_like(q, dtype=torch.promote_types(q.dtype, torch.float32))
        peers = peers_of(ctx.group, q.device)
        home: PartsHome | _PassedHome = _PassedHome(ctx.group, (k, v)) if peers is None else PartsHome(peers, (k, v))
        for keys, values in _blocks((k, v), ctx.tokens, ctx.group):
            dk, dv = keys, values  # nothing, for a block of padding alone
            if keys.shape[1]:
                dq_part, dk, dv = flash_attention_backward(dout, q, keys, values, out, lse, scale=ctx.scale)
                dq += dq_part
            home.add((dk, dv))
        return dq.to(q.dtype), *home.total(), *(None,) * 5


def _filled_blocks(own: tuple[Tensor, ...], tokens: int, group: dist.ProcessGroup | None) -> Iterator[tuple[Tensor, ...]]:
    """`_blocks`, but those without a token."""
    return (block for block in _blocks(own, tokens, group) if block[0].shape[1])


def _blocks(own: tuple[Tensor, ...], tokens: int, group: dist.ProcessGroup | None) -> Iterator[tuple[Tensor, ...]]:
    """The blocks [B, s, N, D] of all ranks, this rank's first, without padding; each comes in while the one before is used."""
    if group is None:
        yield tuple(x[:, :tokens] for x in own)
        return
    peers = peers_of(group, own[0].device)
    for step, block in enumerate(_passed_on(torch.stack(own), group) if peers is None else peers.blocks(own)):
        count = tokens_of_rank(tokens, (group.rank() - step) % group.size(), own[0].shape[1])
        yield tuple(x[:, :count] for x in block)


def _passed_on(block: Tensor, group: dist.ProcessGroup) -> Iterator[Tensor]:
    """The blocks of all ranks, each on its way to the next rank meanwhile."""
    for _ in range(group.size() - 1):
        coming = _Shift(block, group)
        yield block
        block = coming.wait()
    yield block


class _PassedHome:
    """As `PartsHome`: sums in float32 or better that follow their block one step behind it; the last step brings them home."""

    def __init__(self, group: dist.ProcessGroup, like: tuple[Tensor, ...]) -> None:
        self.group, self.dtype = group, like[0].dtype
        wide = torch.promote_types(self.dtype, torch.float32)
        self.sums = torch.zeros(len(like), *like[0].shape, dtype=wide, device=like[0].device)
        self.coming: _Shift | None = None

    def add(self, parts: tuple[Tensor, ...]) -> None:
        """What this rank contributes to the block that came last."""
        if self.coming is not None:
            self.sums = self.coming.wait()
        for total, part in zip(self.sums, parts):
            total[:, : part.shape[1]] += part
        self.coming = _Shift(self.sums, self.group)

    def total(self) -> tuple[Tensor, ...]:
        """The sums of this rank's block."""
        assert self.coming is not None, "a ring has at least two ranks"
        return self.coming.wait().to(self.dtype).unbind(0)


class _Shift:
    """A tensor on its way to the next rank of a ring, and that of the rank before on its way here."""

    def __init__(self, leaving: Tensor, group: dist.ProcessGroup) -> None:
        self.leaving = leaving  # must live until it is sent
        self.coming = torch.empty_like(leaving)
        size, rank = group.size(), group.rank()
        to, from_ = (dist.get_global_rank(group, (rank + step) % size) for step in (1, -1))
        send = dist.P2POp(dist.isend, leaving, to, group)
        receive = dist.P2POp(dist.irecv, self.coming, from_, group)
        self.works = dist.batch_isend_irecv([send, receive])

    def wait(self) -> Tensor:
        """What came in, once both transfers are done."""
        for work in self.works:
            work.wait()
        return self.coming
