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


def add(x: Tensor, bias: Tensor | None) -> Tensor:
    """x + bias, wide inside. Through `rowwise` the bias reaches the primal alone."""
    return x if bias is None else (wide(x) + bias).to(x.dtype)


def gated_add(x: Tensor, y: Tensor, bias: Tensor | None, gate: Tensor) -> Tensor:
    """The residual step x + gate (y + bias), in the dtype of `x`."""
    return (wide(x) + gate * (wide(y) if bias is None else wide(y) + bias)).to(x.dtype)


def biased_add(x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """The ungated residual step x + y + bias, in the dtype of `x`."""
    return (wide(x) + (wide(y) + bias)).to(x.dtype)


def gelu_tanh(x: Tensor, bias: Tensor | None) -> Tensor:
    """GELU (tanh approximation) of x + bias."""
    return F.gelu(wide(x) if bias is None else wide(x) + bias, approximate="tanh").to(x.dtype)


def gelu_erf(x: Tensor, bias: Tensor | None) -> Tensor:
    """GELU of x + bias."""
    return F.gelu(wide(x) if bias is None else wide(x) + bias).to(x.dtype)


def square_sums(*xs: Tensor) -> Tensor:
    """Sums of squares of each of xs [..., N, D] over this rank's heads: [n, ..., 1], wide."""
    return torch.stack([wide(x).square().sum((-2, -1)) for x in xs])[..., None]


def square_sums_of_heads(*xs: Tensor) -> Tensor:
    """Sums of squares of each of xs [..., N, D] over every head: [n, ..., N], wide."""
    return torch.stack([wide(x).square().sum(-1) for x in xs])


def rms_norm(x: Tensor, square_sum: Tensor, weight: Tensor, *, width: int, eps: float) -> Tensor:
    """RMSNorm of x [..., N, D] over `width` entries, whose squares sum to `square_sum` [..., 1 or N]; wide.

    `weight`: [N D], or [D] for every head alike.
    """
    scale = torch.rsqrt(square_sum / width + eps)
    return wide(x) * scale[..., None] * weight.unflatten(0, (-1, x.shape[-1]))


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding on pairs (i, i + D/2). x [S, B, N, D]; cos, sin [S, 1, 1, D/2]."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding on interleaved pairs (2i, 2i+1). x [S, B, N, D]; cos, sin [S, 1, 1, D/2]."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
