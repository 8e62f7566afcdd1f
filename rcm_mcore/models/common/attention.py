"""Attention on megatron's layout, for tensors and Duals, with a cache for the one-pass dual block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from rcm_kernels import flash_attention, flash_attention_backward, flash_attention_jvp
from torch import Tensor

from rcm_mcore.dual import Dual, MaybeDual, primal


@dataclass
class AttentionCache:
    """Output and log-sum-exp of an attention that backward will not compute again.

    Filled by the first call of `attention` it is given to, used by later ones. out [B, S, N, D], lse [B, N, S].
    """

    out: Tensor | None = None
    lse: Tensor | None = None


class _KnownAttention(torch.autograd.Function):
    """The result of an attention computed before, with the gradient of computing it now."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        q, k, v, out, lse = tensors
        ctx.save_for_backward(q, k, v, out, lse)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        return *flash_attention_backward(grads[0], q, k, v, out, lse), None, None


def attention(q: MaybeDual, k: MaybeDual, v: MaybeDual, cache: AttentionCache | None = None) -> MaybeDual:
    """softmax(q k^T / sqrt(D)) v over all keys, with its tangent when q is a Dual (method.md 7).

    q [S, B, N, D], k and v [S', B, N, D] -> [S, B, N D]. A Dual builds no graph. `cache`: see AttentionCache.
    """
    query, key, value = (primal(x).transpose(0, 1) for x in (q, k, v))
    if isinstance(q, Dual):
        k_dot, v_dot = (x.tangent.transpose(0, 1) if isinstance(x, Dual) else None for x in (k, v))
        out, out_dot, lse, _ = flash_attention_jvp(query, key, value, q.tangent.transpose(0, 1), k_dot, v_dot)
        if cache is not None:
            cache.out, cache.lse = out, lse
        return Dual(_merge_heads(out), _merge_heads(out_dot))
    if cache is not None and cache.out is not None:
        return _merge_heads(_KnownAttention.apply(query, key, value, cache.out, cache.lse))
    return _merge_heads(flash_attention(query, key, value)[0])


def _merge_heads(x: Tensor) -> Tensor:
    return x.transpose(0, 1).flatten(2)
