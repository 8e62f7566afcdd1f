"""Attention over all keys out of attentions over disjoint sets of them (a ring's blocks), with or without tangents.

With lse_i the log-sum-exp over set i, lse = log sum_i exp(lse_i) and w_i = exp(lse_i - lse):

    out = sum w_i out_i      lse_dot = sum w_i lse_dot_i      out_dot = sum w_i (out_dot_i + (lse_dot_i - lse_dot) out_i)
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Partial(NamedTuple):
    """Attention of the same queries over some keys: out, out_dot [B, S, N, D] and lse, lse_dot [B, N, S].

    With tangents, out should be in the dtype of lse (`wide_out`): lse_dot_i - lse_dot multiplies its rounding.
    """

    out: Tensor
    out_dot: Tensor | None
    lse: Tensor
    lse_dot: Tensor | None


def merge(parts: Sequence[Partial], dtype: torch.dtype | None = None) -> Partial:
    """The attention over all keys of `parts`, which are alike in shape, strides and dtypes and all have tangents, or none.

    out and out_dot are returned in `dtype`, by default that of out's parts; sums are formed in the dtype of lse.
    """
    if not parts:
        raise ValueError("merge needs at least one part: no rank holds a key")
    first = parts[0]
    dtype = dtype or first.out.dtype
    if len(parts) == 1:
        return first._replace(out=first.out.to(dtype), out_dot=None if first.out_dot is None else first.out_dot.to(dtype))
    if first.out.is_cuda and first.lse.dtype == torch.float32 and importlib.util.find_spec("triton") is not None:
        return _merge_in_triton(parts, dtype)
    return _merge_in_torch(parts, dtype)


def _merge_in_torch(parts: Sequence[Partial], dtype: torch.dtype) -> Partial:
    lses = torch.stack([part.lse for part in parts])
    lse = lses.logsumexp(0)
    weights = (lses - lse).exp()
    out, out_dot, lse_dot = torch.zeros_like(parts[0].out, dtype=lse.dtype), None, None
    for part, weight in zip(parts, weights):
        out += _per_row(weight) * part.out
    out_dots = [part.out_dot for part in parts if part.out_dot is not None]
    lse_dots = [part.lse_dot for part in parts if part.lse_dot is not None]
    if out_dots:
        lse_dot = (weights * torch.stack(lse_dots)).sum(0)
        out_dot = torch.zeros_like(out)
        for part, part_dot, weight, rate in zip(parts, out_dots, weights, lse_dots):
            out_dot += _per_row(weight) * part_dot + _per_row(weight * (rate - lse_dot)) * part.out
        out_dot = out_dot.to(dtype)
    return Partial(out.to(dtype), out_dot, lse, lse_dot)


def _per_row(x: Tensor) -> Tensor:
    """[B, N, S] -> [B, S, N, 1]."""
    return x.transpose(1, 2).unsqueeze(-1)


def _merge_in_triton(parts: Sequence[Partial], dtype: torch.dtype) -> Partial:
    from rcm_kernels.merge_kernel import merge_kernel

    first = parts[0]
    batch, rows, heads, width = first.out.shape
    assert all(p.out.stride() == first.out.stride() and p.lse.is_contiguous() for p in parts), "parts of unlike strides"
    outs, out_dots, lses, lse_dots = (tuple(x) for x in zip(*parts))
    if first.out_dot is None:
        out_dots, lse_dots = outs, lses  # pointers that the kernel does not follow
    empty = lambda x, kind=torch.float32: None if x is None else torch.empty_like(x, dtype=kind)
    out = torch.empty_like(first.out, dtype=dtype)
    result = Partial(out, empty(first.out_dot, dtype), torch.empty_like(first.lse), empty(first.lse_dot))
    tile = 16  # rows a program; with 4 warps 3.6 TB/s on an H200, with 32 rows 1.5
    with torch.cuda.device_of(first.out):
        merge_kernel[(-(-rows // tile), heads, batch)](
            outs,
            out_dots,
            lses,
            lse_dots,
            *(result.out if x is None else x for x in result),
            *first.out.stride()[:3],
            rows,
            heads,
            D=width,
            BLOCK_D=1 << (width - 1).bit_length(),
            TILE=tile,
            TANGENT=first.out_dot is not None,
        )
    return result
