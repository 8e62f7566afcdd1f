"""The public attention functions: they validate, then hand over to a backend (`backends`).

Dimensions: B batch, S tokens (Sq of the queries, Skv of keys and values), N heads, D head width.
Tensors are [B, S, N, D] with any strides whose last one is 1; float16, bfloat16, float32 or float64, all arguments of a
call alike. Softmax statistics (lse, lse_dot) are [B, N, Sq], float64 for float64 inputs and float32 for all others.

A ValueError that names the argument, its value and what is accepted is raised for a wrong rank, an empty dimension,
shapes that do not belong together, mixed or unsupported dtypes, mixed devices, a last dimension that is not contiguous,
and a scale that is not a finite number above zero.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from rcm_kernels.backends import choose
from rcm_kernels.blockwise import accumulation_dtype

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def flash_attention_jvp(  # noqa: PLR0917 (the three tangents mirror the three primals)
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_dot: Tensor,
    k_dot: Tensor | None = None,
    v_dot: Tensor | None = None,
    *,
    scale: float | None = None,
    wide_out: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention and its directional derivative, in one pass over the keys.

    With S = scale q k^T and P = softmax(S) over the keys:
    S_dot = scale (q_dot k^T + q k_dot^T), lse_dot = rowsum(P * S_dot), out_dot = P v_dot + (P * S_dot) v - lse_dot out.
    (sCM, arXiv 2410.11081, "JVP of Flash Attention".)

    Builds no autograd graph, whatever the inputs and the grad mode.

    Args:
        q, q_dot: [B, Sq, N, D].
        k, v, k_dot, v_dot: [B, Skv, N, D]. A tangent of None is zero, and its matmul is skipped.
        scale: factor on q k^T; None for D**-0.5.
        wide_out: out in the dtype of lse, for a part that is to be merged: its rounding error would be multiplied by how much
            lse_dot differs between the parts.

    Returns:
        out, out_dot: [B, Sq, N, D] in q's dtype.
        lse, lse_dot: [B, N, Sq], logsumexp of S over the keys (natural logarithm) and its tangent. Both are needed to
            merge the results over disjoint sets of keys.

    Raises:
        ValueError: see the module's docstring.
    """
    scale = _checked_scale(scale, q)
    like_q, like_kv = {"q_dot": q_dot}, {"v": v, "k_dot": k_dot, "v_dot": v_dot}
    _check_tensors(q, k, like_q, like_kv)
    with torch.no_grad():
        forward = choose("jvp", q, k, v, q_dot, k_dot, v_dot)
        out, out_dot, lse, lse_dot = forward(q, k, v, tangents=(q_dot, k_dot, v_dot), scale=scale, wide_out=wide_out)
    assert out_dot is not None and lse_dot is not None, "tangents went in, so tangents must come out"
    return out, out_dot, lse, lse_dot


def flash_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Attention, differentiable (once) through `out`; `lse` carries no gradient.

    Args:
        q: [B, Sq, N, D].
        k, v: [B, Skv, N, D].
        scale: factor on q k^T; None for D**-0.5.

    Returns:
        out: [B, Sq, N, D] in q's dtype.
        lse: [B, N, Sq], logsumexp of scale q k^T over the keys (natural logarithm).

    Raises:
        ValueError: see the module's docstring.
    """
    scale = _checked_scale(scale, q)
    _check_tensors(q, k, {}, {"v": v})
    return _FlashAttention.apply(q, k, v, scale)


def flash_attention_backward(  # noqa: PLR0917 (the order in which autograd saves them)
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of attention for the gradient `dout` of its output.

    `out` and `lse` may belong to a larger set of keys of which k and v are one block: dk and dv are then that block's
    share of the whole gradient, and the dq of all blocks add up to the whole dq.
    (FlashAttention-2, arXiv 2307.08691, algorithm 2.)

    Args:
        dout, q, out: [B, Sq, N, D].
        k, v: [B, Skv, N, D].
        lse: [B, N, Sq], as returned by the forward functions.
        scale: the scale of the forward; None for D**-0.5.

    Returns:
        dq [B, Sq, N, D], dk and dv [B, Skv, N, D], in q's dtype.

    Raises:
        ValueError: see the module's docstring.
    """
    scale = _checked_scale(scale, q)
    _check_tensors(q, k, {"dout": dout, "out": out}, {"v": v})
    _check_lse(lse, q)
    with torch.no_grad():
        return choose("backward", q, k, v, dout, out)(dout, q, k, v, out, lse, scale=scale)


class _FlashAttention(torch.autograd.Function):
    """Keeps q, k, v, out and lse, and recomputes the probabilities tile by tile in the backward."""

    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        out, _, lse, _ = choose("forward", q, k, v)(q, k, v, scale=scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)  # otherwise autograd fills a zero gradient for lse at every backward
        ctx.scale = scale  # type: ignore[attr-defined]
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor | None, _dlse: None):
        if dout is None:
            return None, None, None, None
        # The gradient of a sum or a mean arrives expanded: all its strides are zero.
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        return *flash_attention_backward(dout, *ctx.saved_tensors, scale=ctx.scale), None


def _checked_scale(scale: float | None, q: Tensor) -> float:
    if scale is None:
        return q.shape[-1] ** -0.5 if q.dim() == 4 and q.shape[-1] else 1.0  # a wrong q is reported by _check_tensors
    # Nobody divides by the width with a negative sign or a zero: such a scale is a slip, so it is refused.
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale is {scale}; it must be a finite number above 0, or None for D**-0.5")
    return float(scale)


def _check_tensors(q: Tensor, k: Tensor, like_q: dict[str, Tensor], like_kv: dict[str, Tensor | None]) -> None:
    """Checks q and k, then that `like_q` have q's shape and `like_kv` have k's (None is skipped)."""
    dtype, device = q.dtype, q.device
    if dtype not in _DTYPES:
        raise ValueError(f"q has dtype {dtype}; use one of {', '.join(map(str, _DTYPES))}")
    for name, x in {"q": q, "k": k}.items():
        if x.dim() != 4:
            raise ValueError(f"{name} has {x.dim()} dimensions, shape {tuple(x.shape)}; it must be [B, S, N, D]")
        if 0 in x.shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; every dimension of [B, S, N, D] must be at least 1")
    q_shape, k_shape = q.shape, k.shape
    if (q_shape[0], q_shape[2:]) != (k_shape[0], k_shape[2:]):
        raise ValueError(
            f"k has shape {tuple(k_shape)}, but q has {tuple(q_shape)}: "
            f"batch, heads and head width must agree, so k must be ({q_shape[0]}, Skv, {q_shape[2]}, {q_shape[3]})"
        )
    families: tuple[tuple[str, dict[str, Tensor | None], torch.Size], ...] = (
        ("q", {"q": q, **like_q}, q_shape),
        ("k", {"k": k, **like_kv}, k_shape),
    )
    for other, others, shape in families:
        for name, tensor in others.items():
            if tensor is None:
                continue
            x = tensor
            if x.shape != shape:
                raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be {other}'s, {tuple(shape)}")
            if x.dtype != dtype:
                raise ValueError(f"{name} has dtype {x.dtype}; it must be q's, {dtype}")
            if x.device != device:
                raise ValueError(f"{name} is on device {x.device}; it must be on q's, {device}")
            if x.stride(-1) != 1 and shape[-1] != 1:
                raise ValueError(
                    f"{name} has strides {x.stride()}; the last one must be 1: pass {name}.contiguous(), "
                    "or a view that keeps D innermost"
                )


def _check_lse(lse: Tensor, q: Tensor) -> None:
    batch, queries, heads, _ = q.shape
    if lse.shape != (batch, heads, queries):
        raise ValueError(f"lse has shape {tuple(lse.shape)}; it must be [B, N, Sq] = {(batch, heads, queries)}")
    if lse.dtype != accumulation_dtype(q):
        raise ValueError(f"lse has dtype {lse.dtype}; it must be {accumulation_dtype(q)} for {q.dtype} inputs")
    if lse.device != q.device:
        raise ValueError(f"lse is on device {lse.device}; it must be on q's, {q.device}")
