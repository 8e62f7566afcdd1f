"""Matrix products of float8 numbers (e4m3: 4 bits of exponent, 3 of mantissa, up to 448), with a scale for each row.

A row is scaled so that its largest entry becomes 448: for y = x W^T a scale for each token and one for each output channel.
"""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor

LARGEST = 448.0
SMALLEST = 1e-30  # what the largest entry of a row is taken for at least, so that a row of zeros has a scale


class Quantized(NamedTuple):
    """`values` float8_e4m3fn [..., K] times `scales` float32 [..., 1]."""

    values: Tensor
    scales: Tensor


def quantize_rows(x: Tensor) -> Quantized:
    """x [..., K], contiguous, each row rounded with a scale of its own; one with an entry that is not finite has NaN among
    its values or is scaled by one.
    """
    if x.is_cuda and importlib.util.find_spec("triton") is not None:
        return _quantize_in_triton(x)
    wide = x.float()
    largest = wide.abs().amax(-1, keepdim=True).clamp(min=SMALLEST)
    return Quantized((wide * (LARGEST / largest)).to(torch.float8_e4m3fn), largest / LARGEST)


def scaled_matmul(x: Quantized, weight: Quantized, dtype: torch.dtype) -> Tensor:
    """x [..., K] times weight [N, K] transposed -> [..., N] in `dtype`, which on a GPU must be bfloat16.

    K and N must be multiples of 16; a GPU must be of compute capability 9.0 or more.
    """
    out = torch._scaled_mm(
        x.values.flatten(0, -2),
        weight.values.t(),
        scale_a=x.scales.flatten(0, -2),
        scale_b=weight.scales.t(),
        out_dtype=dtype,
        use_fast_accum=True,
    )
    return out.unflatten(0, x.values.shape[:-1])


def _quantize_in_triton(x: Tensor) -> Quantized:
    from rcm_kernels.fp8_kernel import quantize_rows_kernel

    assert x.is_contiguous(), "rows that follow one another"
    width = x.shape[-1]
    result = Quantized(
        torch.empty_like(x, dtype=torch.float8_e4m3fn), torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    )
    block = 1 << (width - 1).bit_length()
    with torch.cuda.device_of(x):
        quantize_rows_kernel[(x.numel() // width,)](
            x, *result, WIDTH=width, BLOCK=block, LARGEST=LARGEST, SMALLEST=SMALLEST, num_warps=min(16, max(4, block // 1024))
        )
    return result
