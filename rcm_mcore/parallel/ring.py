"""Attention over tokens that are split over ranks: blocks of keys and values travel round a ring (arXiv 2310.01889).

Rank i of a ring of n holds tokens i s to (i + 1) s - 1 of every sample: the sequence is padded at its end to n s, and what
lies beyond `tokens` is never attended to. At each of n steps a rank attends to the block it holds while that block is on its
way to the next rank and another comes in; results over disjoint keys are merged (method.md 7) in float32 or better.

Dimensions: B batch, s tokens of this rank, N heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rcm_kernels import flash_attention, flash_attention_backward, flash_attention_jvp
from torch import Tensor


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
        merged: _Partial | None = None
        for k_, v_, k_dot_, v_dot_ in _filled_blocks((k, v, k_dot, v_dot), tokens, group):
            part = _Partial(*flash_attention_jvp(q, k_, v_, q_dot, k_dot_, v_dot_, scale=scale))
            merged = part if merged is None else _merge(merged, part)
        assert merged is not None and merged.out_dot is not None and merged.lse_dot is not None, "no rank holds a token"
        return merged.out.to(q.dtype), merged.out_dot.to(q.dtype), merged.lse, merged.lse_dot


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
            merged: _Partial | None = None
            for k_, v_ in _filled_blocks((k, v), tokens, group):
                part_out, part_lse = flash_attention(q, k_, v_, scale=scale)
                part = _Partial(part_out, None, part_lse, None)
                merged = part if merged is None else _merge(merged, part)
            assert merged is not None, "no rank holds a token"
            out, lse = merged.out.to(q.dtype), merged.lse
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
        wide = torch.promote_types(q.dtype, torch.float32)
        dq = torch.zeros_like(q, dtype=wide)
        # dk and dv follow their block one step behind it; the last step brings them home.
        d_block = torch.zeros(2, *k.shape, dtype=wide, device=k.device)
        coming: _Shift | None = None
        for keys, values in _blocks((k, v), ctx.tokens, ctx.group):
            parts, count = None, keys.shape[1]
            if count:
                parts = flash_attention_backward(dout, q, keys, values, out, lse, scale=ctx.scale)
                dq += parts[0]
            if coming is not None:
                d_block = coming.wait()
            if parts is not None:
                d_block[0, :, :count] += parts[1]
                d_block[1, :, :count] += parts[2]
            coming = _Shift(d_block, ctx.group)
        assert coming is not None, "a ring has at least two ranks"
        dk, dv = coming.wait()
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), *(None,) * 5


class _Partial(NamedTuple):
    """Attention over some of the keys: out, out_dot [B, s, N, D] and lse, lse_dot [B, N, s]."""

    out: Tensor
    out_dot: Tensor | None
    lse: Tensor
    lse_dot: Tensor | None


def _merge(a: _Partial, b: _Partial) -> _Partial:
    """Of two results over disjoint keys, that over all of them (method.md 7); in the dtype of lse."""
    share = torch.sigmoid(b.lse - a.lse)
    weight = share.transpose(1, 2).unsqueeze(-1)
    change = b.out.to(share.dtype) - a.out.to(share.dtype)
    out, lse = a.out + weight * change, torch.logaddexp(a.lse, b.lse)
    if a.out_dot is None or b.out_dot is None or a.lse_dot is None or b.lse_dot is None:
        return _Partial(out, None, lse, None)
    share_dot = share * (1 - share) * (b.lse_dot - a.lse_dot)
    out_dot = torch.lerp(a.out_dot.to(share.dtype), b.out_dot.to(share.dtype), weight)
    out_dot += share_dot.transpose(1, 2).unsqueeze(-1) * change
    return _Partial(out, out_dot, lse, torch.lerp(a.lse_dot, b.lse_dot, share))


def _filled_blocks(own: tuple[Tensor, ...], tokens: int, group: dist.ProcessGroup | None) -> Iterator[tuple[Tensor, ...]]:
    """`_blocks`, but those without a token."""
    return (block for block in _blocks(own, tokens, group) if block[0].shape[1])


def _blocks(own: tuple[Tensor, ...], tokens: int, group: dist.ProcessGroup | None) -> Iterator[tuple[Tensor, ...]]:
    """The blocks [B, s, N, D] of all ranks, this rank's first, without padding; each on its way to the next rank meanwhile."""
    if group is None:
        yield tuple(x[:, :tokens] for x in own)
        return
    size, rank, length = group.size(), group.rank(), own[0].shape[1]
    block = torch.stack(own)  # one message
    for step in range(size):
        coming = _Shift(block, group) if step < size - 1 else None
        count = tokens_of_rank(tokens, (rank - step) % size, length)
        yield tuple(x[:, :count] for x in block)
        if coming is not None:
            block = coming.wait()


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
