"""Linears of blocks in float8, for passes of a network that need no gradient and carry no tangent.

Activations are rounded to e4m3 with a scale for each token, weights with one for each output channel, both anew in each pass:
weights change under the optimizer, and a copy of them would cost a byte a parameter, of every network. Rows split by tensor
parallelism have a scale on each rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from rcm_kernels.fp8 import Quantized, quantize_rows, scaled_matmul
from torch import Tensor

from rcm_mcore.config import ModelConfig

_on: ContextVar[bool] = ContextVar("fp8_forwards", default=False)  # of this thread: the one of a backward has its own


@contextmanager
def fp8_forwards(on: bool) -> Iterator[None]:
    """Inside, the linears of blocks are float8, or not, whatever was so outside.

    For the network's forward to say once: blocks that are run without a graph to be run again in backward look, from within,
    like a pass that needs no gradient.
    """
    token = _on.set(on)
    try:
        yield
    finally:
        _on.reset(token)


def are_fp8() -> bool:
    """Whether the linears of blocks are float8 here."""
    return _on.get()


def parallel_linear(layer: ColumnParallelLinear | RowParallelLinear, x: Tensor) -> Tensor:
    """What the layer without its bias makes of x [s, b, in], with its collectives, in the dtype of x and without a graph."""
    weight = quantize_rows(layer.weight.detach())
    quantized = quantize_rows(x.detach().contiguous())
    group: Any = layer.tp_group
    if isinstance(layer, ColumnParallelLinear):
        if layer.sequence_parallel:  # a token's scale is of its whole row: tokens travel as bytes, half of bfloat16
            quantized = Quantized(*(_gather(part, group) for part in quantized))
        return scaled_matmul(quantized, weight, x.dtype)
    out = scaled_matmul(quantized, weight, x.dtype)
    if layer.sequence_parallel:
        return reduce_scatter_to_sequence_parallel_region(out, group=group)
    return reduce_from_tensor_model_parallel_region(out, group=group)


def _gather(x: Tensor, group: Any) -> Tensor:
    """All rows of x [s, ...] of any dtype."""
    return gather_from_sequence_parallel_region(x.view(torch.uint8), group=group).view(x.dtype)


def require_fp8(model: ModelConfig) -> None:
    """ValueError where this machine cannot do what `model.fp8_forwards` asks for: a CPU can, slowly."""
    if not model.fp8_forwards or not torch.cuda.is_available():
        return
    capability = torch.cuda.get_device_capability()
    if capability < (9, 0):
        raise ValueError(
            f"model.fp8_forwards=true needs GPUs of compute capability 9.0 (Hopper) or more, {torch.cuda.get_device_name()} "
            f"has {capability[0]}.{capability[1]}: set model.fp8_forwards=false"
        )
