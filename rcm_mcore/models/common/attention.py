"""Attention on megatron's layout, for tensors and Duals, over ranks, with a cache for the one-pass dual block."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from rcm_kernels import flash_attention, flash_attention_jvp
from torch import Tensor

from rcm_mcore.dual import Dual, MaybeDual, primal
from rcm_mcore.parallel.exchange import heads_for_tokens, tokens_for_heads
from rcm_mcore.parallel.ring import ring_attention, ring_attention_jvp


@dataclass
class AttentionCache:
    """Output and log-sum-exp of a self-attention that backward will not compute again.

    Filled by the first call of a SplitAttention it is given to, used by later ones. out [B, S, N, D], lse [B, N, S], with the
    tokens and heads that this rank attends to.
    """

    out: Tensor | None = None
    lse: Tensor | None = None


def attention(q: MaybeDual, k: MaybeDual, v: MaybeDual) -> MaybeDual:
    """softmax(q k^T / sqrt(D)) v over keys that this rank holds, with its tangent when q is a Dual (method.md 7).

    q [S, B, N, D], k and v [S', B, N, D] -> [S, B, N D]. A Dual builds no graph.
    """
    query, key, value = (_batch_first(primal(x)) for x in (q, k, v))
    if isinstance(q, Dual):
        k_dot, v_dot = (_batch_first(x.tangent) if isinstance(x, Dual) else None for x in (k, v))
        out, out_dot, *_ = flash_attention_jvp(query, key, value, _batch_first(q.tangent), k_dot, v_dot)
        return Dual(_merge_heads(out), _merge_heads(out_dot))
    return _merge_heads(flash_attention(query, key, value)[0])


class SplitAttention:
    """Self-attention among tokens that are split over context-parallel ranks.

    Ranks of `exchange` exchange heads for tokens (parallel/exchange.py); then keys travel round `ring` (parallel/ring.py).
    Either is none where that level has one rank.
    """

    def __init__(self, exchange: dist.ProcessGroup | None, ring: dist.ProcessGroup | None) -> None:
        self.exchange, self.ring = exchange, ring

    def __call__(
        self, q: MaybeDual, k: MaybeDual, v: MaybeDual, *, tokens: int, cache: AttentionCache | None = None
    ) -> MaybeDual:
        """q, k, v of this rank's tokens, all Duals or none, [S, B, N, D] -> [S, B, N D].

        tokens: of a whole sample; tokens behind them, at the end of the last ranks, are padding. `cache`: see AttentionCache.
        A Dual builds no graph.
        """
        parts = [_batch_first(primal(x)) for x in (q, k, v)]
        if isinstance(q, Dual):
            parts += [_batch_first(x.tangent) for x in (q, k, v) if isinstance(x, Dual)]
        if self.exchange is not None:
            parts = list(tokens_for_heads(parts, self.exchange))
        results: tuple[Tensor, ...]
        if isinstance(q, Dual):
            primals, tangents = (parts[0], parts[1], parts[2]), (parts[3], parts[4], parts[5])
            out, out_dot, lse, _ = ring_attention_jvp(primals, tangents, tokens=tokens, group=self.ring)
            results = out, out_dot
            if cache is not None:
                cache.out, cache.lse = out, lse
        else:
            known = None if cache is None or cache.out is None or cache.lse is None else (cache.out, cache.lse)
            out, lse = ring_attention(*parts, tokens=tokens, group=self.ring, known=known)
            results = (out,)
            if cache is not None and known is None:
                cache.out, cache.lse = out, lse
        if self.exchange is not None:
            results = heads_for_tokens(results, self.exchange)
        merged = [_merge_heads(x) for x in results]
        return Dual(*merged) if isinstance(q, Dual) else merged[0]


def _batch_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1)


def _merge_heads(x: Tensor) -> Tensor:
    return x.transpose(0, 1).flatten(2)
