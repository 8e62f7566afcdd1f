"""Pure row-wise functions, written once for tensors; `rcm_mcore.dual.rowwise` derives their tangents.

Each computes in max(float32, dtype of its input) and rounds once, at its end. Shapes: S tokens, B batch, M width,
N heads, D head width; hidden states [S, B, M].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def island_dtype(dtype: torch.dtype) -> torch.dtype:
    """Where precision matters we compute in this: float32, or float64 for a float64 model."""
    return torch.promote_types(dtype, torch.float32)


def wide(x: Tensor) -> Tensor:
    """`x` in the dtype of the islands."""
    return x.to(island_dtype(x.dtype))


def layer_norm(x: Tensor, eps: float) -> Tensor:
    """LayerNorm without parameters over the last dimension; the result stays wide."""
    x = wide(x)
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float, dtype: torch.dtype) -> Tensor:
    """LN(x) (1 + scale) + shift, rounded to `dtype`."""
    return (layer_norm(x, eps) * (1 + scale) + shift).to(dtype)


def affine_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, dtype: torch.dtype) -> Tensor:
    """LN(x) weight + bias, rounded to `dtype`."""
    return (layer_norm(x, eps) * weight + bias).to(dtype)


def add(x: Tensor, bias: Tensor) -> Tensor:
    """x + bias, wide inside. Through `rowwise` the bias reaches the primal alone."""
    return (wide(x) + bias).to(x.dtype)


def gated_add(x: Tensor, y: Tensor, bias: Tensor, gate: Tensor) -> Tensor:
    """The residual step x + gate (y + bias), in the dtype of `x`."""
    return (wide(x) + gate * (wide(y) + bias)).to(x.dtype)


def biased_add(x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """The ungated residual step x + y + bias, in the dtype of `x`."""
    return (wide(x) + (wide(y) + bias)).to(x.dtype)


def gelu_tanh(x: Tensor, bias: Tensor) -> Tensor:
    """GELU (tanh approximation) of x + bias."""
    return F.gelu(wide(x) + bias, approximate="tanh").to(x.dtype)


def square_sums(q: Tensor, k: Tensor) -> Tensor:
    """Sums of squares of q and k [..., N, D] over this rank's heads: [2, ...], wide."""
    return torch.stack([wide(q).square().sum((-2, -1)), wide(k).square().sum((-2, -1))])


def square_sum(q: Tensor) -> Tensor:
    """Sum of squares of q [..., N, D] over this rank's heads: [...], wide."""
    return wide(q).square().sum((-2, -1))


def rms_norm(x: Tensor, square_sum: Tensor, weight: Tensor, *, width: int, eps: float) -> Tensor:
    """RMSNorm of x [..., N, D] over `width` = all heads of all ranks, whose squares sum to `square_sum` [...]; wide."""
    scale = torch.rsqrt(square_sum / width + eps)
    return wide(x) * scale[..., None, None] * weight.view(x.shape[-2:])


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding on interleaved pairs (2i, 2i+1). x [S, B, N, D]; cos, sin [S, 1, 1, D/2]."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
