"""Attention by its definition, holding the whole Sq x Skv matrix: the yardstick of tests and benchmarks.

In float64 these are the exact values. In a lower dtype they are what plain PyTorch gives: each matmul is accumulated
in (at least) float32 and rounded to the dtype, the softmax is in float32.

Dimensions: B batch, S tokens (Sq queries, Skv keys), N heads, D head width. All differentiable by autograd.
"""

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v for q [B, Sq, N, D], k and v [B, Skv, N, D].

    Returns out [B, Sq, N, D] in q's dtype and lse [B, N, Sq] in max(float32, dtype). A scale of None is D**-0.5.
    """
    scores = _scores(q, k, scale)
    return _weighted_sum(scores.softmax(-1), v), scores.logsumexp(-1)


def attention_jvp(
    primals: tuple[Tensor, Tensor, Tensor],
    tangents: tuple[Tensor, Tensor | None, Tensor | None],
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`attention` of primals (q, k, v) and its derivative along tangents (q_dot, k_dot, v_dot), where None is zero.

    Returns out, out_dot [B, Sq, N, D] in q's dtype and lse, lse_dot [B, N, Sq] in max(float32, dtype).
    """
    (q, k, v), (q_dot, k_dot, v_dot) = primals, tangents
    out, lse = attention(q, k, v, scale=scale)
    probs = _scores(q, k, scale).softmax(-1)
    scores_dot = _scores(q_dot, k, scale)
    if k_dot is not None:
        scores_dot = scores_dot + _scores(q, k_dot, scale)
    lse_dot = (probs * scores_dot).sum(-1)
    out_dot = _weighted_sum(probs * (scores_dot - lse_dot.unsqueeze(-1)), v)
    if v_dot is not None:
        out_dot = out_dot + _weighted_sum(probs, v_dot)
    return out, out_dot, lse, lse_dot


def _scores(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    """[B, N, Sq, Skv] in max(float32, dtype), after rounding the matmul to the dtype."""
    scores = torch.einsum("bqnd,bknd->bnqk", q, k).to(torch.promote_types(q.dtype, torch.float32))
    return scores * (q.shape[-1] ** -0.5 if scale is None else scale)


def _weighted_sum(weights: Tensor, v: Tensor) -> Tensor:
    """[B, N, Sq, Skv] with [B, Skv, N, D] to [B, Sq, N, D] in v's dtype."""
    return torch.einsum("bnqk,bknd->bqnd", weights.to(v.dtype), v)
