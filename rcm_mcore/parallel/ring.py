"""Attention over tokens that are split over ranks: blocks of keys and values travel round a ring (arXiv 2310.01889).

Rank i of a group of n holds tokens i s to (i + 1) s - 1 of every sample, s = ceil(tokens / n): the sequence is padded at its
end, and what lies beyond `tokens` is never attended to. At each of n steps a rank attends to the block it holds while that
block is on its way to the next rank and another comes in; results over disjoint keys are merged (method.md 7) in float32 or
better.

Dimensions: B batch, s tokens of this rank, N heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from rcm_kernels import flash_attention, flash_attention_backward, flash_attention_jvp
from torch import Tensor


def tokens_of_rank(tokens: int, rank: int, size: int) -> int:
    """How many of `tokens` are in the block of `rank`; the last blocks may be short or empty."""
    block = -(-tokens // size)
    return min(block, max(0, tokens - rank * block))


def ring_attention_jvp(
    primals: tuple[Tensor, Tensor, Tensor],
    tangents: tuple[Tensor, Tensor, Tensor],
    *,
    tokens: int,
    group: dist.ProcessGroup,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`rcm_kernels.flash_attention_jvp` of this rank's queries over the keys of all ranks. Builds no graph.

    primals and tangents: q, k, v [B, s, N, D] of this rank. tokens: those of the whole sequence, padding excluded.
    Returns out, out_dot [B, s, N, D] in q's dtype and lse, lse_dot [B, N, s]; rows of padded queries mean nothing.
    """
    with torch.no_grad():
        q, k, v = primals
        q_dot, k_dot, v_dot = tangents
        merged: _Partial | None = None
        # One message: keys, values and both tangents.
        for owner, block in _blocks(torch.stack((k, v, k_dot, v_dot)), group):
            count = tokens_of_rank(tokens, owner, group.size())
            if count:
                k_, v_, k_dot_, v_dot_ = block[:, :, :count]
                part = _Partial(*flash_attention_jvp(q, k_, v_, q_dot, k_dot_, v_dot_, scale=scale))
                merged = part.widened() if merged is None else _merge(merged, part)
        assert merged is not None and merged.out_dot is not None and merged.lse_dot is not None, "no rank holds a token"
        return merged.out.to(q.dtype), merged.out_dot.to(q.dtype), merged.lse, merged.lse_dot


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, *, tokens: int, group: dist.ProcessGroup, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """`rcm_kernels.flash_attention` of this rank's queries over the keys of all ranks, differentiable through out.

    q, k, v [B, s, N, D] of this rank -> out [B, s, N, D], lse [B, N, s]. The gradient of a padded query's row must be zero,
    which it is when the loss does not look at padding.
    """
    return _RingAttention.apply(q, k, v, tokens, group, scale)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        q, k, v, tokens, group, scale = args
        merged: _Partial | None = None
        for owner, block in _blocks(torch.stack((k, v)), group):
            count = tokens_of_rank(tokens, owner, group.size())
            if count:
                out, lse = flash_attention(q, *block[:, :, :count], scale=scale)
                part = _Partial(out, None, lse, None)
                merged = part.widened() if merged is None else _merge(merged, part)
        assert merged is not None, "no rank holds a token"
        out, lse = merged.out.to(q.dtype), merged.lse
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.tokens, ctx.group, ctx.scale = tokens, group, scale
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * 6
        dout = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        q, k, v, out, lse = ctx.saved_tensors
        group: dist.ProcessGroup = ctx.group
        wide = torch.promote_types(q.dtype, torch.float32)
        dq = torch.zeros_like(q, dtype=wide)
        # dk and dv follow their block one step behind it; the last step brings them home.
        d_block = torch.zeros(2, *k.shape, dtype=wide, device=k.device)
        coming: _Shift | None = None
        for owner, block in _blocks(torch.stack((k, v)), group):
            count = tokens_of_rank(ctx.tokens, owner, group.size())
            parts = None
            if count:
                parts = flash_attention_backward(dout, q, block[0, :, :count], block[1, :, :count], out, lse, scale=ctx.scale)
                dq += parts[0]
            if coming is not None:
                d_block = coming.wait()
            if parts is not None:
                d_block[0, :, :count] += parts[1]
                d_block[1, :, :count] += parts[2]
            coming = _Shift(d_block, group)
        assert coming is not None, "a ring has at least one rank"
        dk, dv = coming.wait()
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


class _Partial(NamedTuple):
    """Attention over some of the keys: out, out_dot [B, s, N, D] and lse, lse_dot [B, N, s]."""

    out: Tensor
    out_dot: Tensor | None
    lse: Tensor
    lse_dot: Tensor | None

    def widened(self) -> _Partial:
        """In the dtype of lse, to accumulate in."""
        out_dot = None if self.out_dot is None else self.out_dot.to(self.lse.dtype)
        return _Partial(self.out.to(self.lse.dtype), out_dot, self.lse, self.lse_dot)


def _merge(a: _Partial, b: _Partial) -> _Partial:
    """Of two results over disjoint keys, that over all of them (method.md 7); in a's dtype."""
    share = torch.sigmoid(b.lse - a.lse)
    weight = share.transpose(1, 2).unsqueeze(-1)
    change = b.out.to(a.out.dtype) - a.out
    out, lse = a.out + weight * change, torch.logaddexp(a.lse, b.lse)
    if a.out_dot is None or b.out_dot is None or a.lse_dot is None or b.lse_dot is None:
        return _Partial(out, None, lse, None)
    share_dot = share * (1 - share) * (b.lse_dot - a.lse_dot)
    out_dot = torch.lerp(a.out_dot, b.out_dot.to(a.out.dtype), weight) + share_dot.transpose(1, 2).unsqueeze(-1) * change
    return _Partial(out, out_dot, lse, torch.lerp(a.lse_dot, b.lse_dot, share))


def _blocks(own: Tensor, group: dist.ProcessGroup) -> Iterator[tuple[int, Tensor]]:
    """The blocks of all ranks as (owner's rank, block), this rank's first, each on its way to the next rank meanwhile."""
    size, rank = group.size(), group.rank()
    block = own
    for step in range(size):
        coming = _Shift(block, group) if step < size - 1 else None
        yield (rank - step) % size, block
        if coming is not None:
            block = coming.wait()


class _Shift:
    """A tensor on its way to the next rank of a ring, and that of the rank before on its way here."""

    def __init__(self, leaving: Tensor, group: dist.ProcessGroup) -> None:
        self.leaving, self.works = leaving, []  # the former must live until it is sent
        if group.size() == 1:
            self.coming = leaving
            return
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
