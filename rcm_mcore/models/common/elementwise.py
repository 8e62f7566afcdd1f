"""Pure row-wise functions, written once for tensors; `rcm_mcore.dual.rowwise` derives their tangents and can fuse them.

Each computes in max(float32, dtype of its input) and rounds once, at its end. Shapes: S tokens, B batch, M width,
N heads, D head width; hidden states [S, B, M]. Shifts, scales and gates are [B, M]; or [2, B, M] beside `given` [S, B, 1],
which marks the tokens that the second is for.
"""

from __future__ import annotations

from collections.abc import Callable

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


def modulation(time: Tensor, table: Tensor) -> tuple[Tensor, ...]:
    """time [n, B, M] + table [1, n, M] -> n of [B, M]: shifts, scales, gates."""
    return (time + table.transpose(0, 1)).unbind(0)


def modulated_norm(
    x: Tensor, shift: Tensor, scale: Tensor, given: Tensor | None = None, *, eps: float, dtype: torch.dtype
) -> Tensor:
    """LN(x) (1 + scale) + shift, rounded to `dtype`."""
    return (layer_norm(x, eps) * (1 + _of_tokens(scale, given)) + _of_tokens(shift, given)).to(dtype)


def affine_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, dtype: torch.dtype) -> Tensor:
    """LN(x) weight + bias, rounded to `dtype`."""
    return (layer_norm(x, eps) * weight + bias).to(dtype)


def gated_add(x: Tensor, y: Tensor, bias: Tensor | None, gate: Tensor, given: Tensor | None = None) -> Tensor:
    """The residual step x + gate (y + bias), in the dtype of `x`."""
    return (wide(x) + _of_tokens(gate, given) * _biased(y, bias)).to(x.dtype)


def biased_add(x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """The ungated residual step x + y + bias, in the dtype of `x`."""
    return (wide(x) + _biased(y, bias)).to(x.dtype)


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y."""
    return x + y


def gelu_tanh(x: Tensor, bias: Tensor | None) -> Tensor:
    """GELU (tanh approximation) of x + bias."""
    return F.gelu(_biased(x, bias), approximate="tanh").to(x.dtype)


def gelu_erf(x: Tensor, bias: Tensor | None) -> Tensor:
    """GELU of x + bias."""
    return F.gelu(_biased(x, bias)).to(x.dtype)


def square_sums(x: Tensor, bias: Tensor | None, *, parts: int, normed: int, head_dim: int) -> Tensor:
    """Sums of squares over this rank's heads of the first `normed` of the `parts` in x + bias: [normed, S, B, 1], wide.

    x [S, B, N parts D]: queries, keys, values of each head.
    """
    return torch.stack([_all_heads(part) for part in _split_heads(x, bias, parts, head_dim)[:normed]])


def heads(
    x: Tensor,
    bias: Tensor | None,
    sums: Tensor | None,
    weights: tuple[Tensor, ...],
    positions: tuple[Tensor, Tensor] | None = None,
    *,
    parts: int,
    head_dim: int,
    over: int,
    eps: float,
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """x + bias [S, B, N parts D] -> `parts` of [S, B, N, D]; RMSNorm on the first len(weights), rotated if told how.

    RMSNorm is over `over` entries: all heads, whose squares sum to `sums` [n, S, B, 1], or None for the sums over the heads
    that are here; or D, each head by itself. weights: [N D], or [D] for every head alike. positions: cos, sin [S, 1, 1, D/2].
    """
    split = _split_heads(x, bias, parts, head_dim)
    normed = []
    for i, (part, weight) in enumerate(zip(split, weights)):
        if over == head_dim:
            total = part.square().sum(-1, keepdim=True)
        else:
            total = (_all_heads(part) if sums is None else sums[i])[..., None]
        y = part * torch.rsqrt(total / over + eps) * weight.view(-1, head_dim)
        normed.append(y if rotate is None or positions is None else rotate(y, *positions))
    return tuple(y.to(x.dtype) for y in (*normed, *split[len(weights) :]))


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding on pairs (i, i + D/2). x [S, B, N, D]; cos, sin [S, 1, 1, D/2]."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding on interleaved pairs (2i, 2i+1). x [S, B, N, D]; cos, sin [S, 1, 1, D/2]."""
    even, odd = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def _biased(x: Tensor, bias: Tensor | None) -> Tensor:
    """x + bias, wide. Through `rowwise` the bias reaches the primal alone."""
    return wide(x) if bias is None else wide(x) + bias


def _split_heads(x: Tensor, bias: Tensor | None, parts: int, head_dim: int) -> tuple[Tensor, ...]:
    """x + bias, wide: [S, B, N parts D] -> `parts` of [S, B, N, D]."""
    return _biased(x, bias).reshape(*x.shape[:-1], -1, parts, head_dim).unbind(-2)


def _all_heads(x: Tensor) -> Tensor:
    """Sums of squares of x [S, B, N, D]: [S, B, 1]."""
    return x.square().sum((-2, -1))[..., None]


def _of_tokens(x: Tensor, given: Tensor | None) -> Tensor:
    """What tokens see of x: see the module's docstring."""
    return x if given is None else torch.where(given, x[1], x[0])
