"""Tensor-parallel linears by spec: megatron-core's own, or transformer-engine's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, overload

import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from rcm_mcore import dual
from rcm_mcore.dual import MaybeDual
from rcm_mcore.models.common import fp8


@dataclass(frozen=True)
class ParallelLinears:
    """Classes of a block's linears, submodules of its ModuleSpec."""

    column: type
    row: type


def parallel_linears(transformer_impl: str) -> ParallelLinears:
    """The linears of `model.transformer_impl`; ValueError when transformer-engine is asked for and missing."""
    if transformer_impl == "local":
        return ParallelLinears(ColumnParallelLinear, RowParallelLinear)
    # Without transformer-engine, megatron's wrappers are built on mocks and fail late: ask first.
    from megatron.core.extensions import transformer_engine as te

    if not te.HAVE_TE:
        raise ValueError(
            f"model.transformer_impl={transformer_impl} needs transformer-engine, which cannot be imported here: "
            "pip install 'rcm-mcore[te]', or set model.transformer_impl=local"
        )
    return ParallelLinears(te.TEColumnParallelLinear, te.TERowParallelLinear)


def _leave(weight: Tensor) -> None:
    """Initialization is done by name for the whole network (common/init.py), the same for every mesh."""


def column_linear(
    linears: ParallelLinears,
    in_features: int,
    out_features: int,
    *,
    config: TransformerConfig,
    group: dist.ProcessGroup,
    bias: bool,
) -> nn.Module:
    """[s, b, in] -> [s', b, out / tp]; gathers the sequence first under sequence parallelism. Bias left to the caller."""
    return linears.column(
        in_features,
        out_features,
        config=config,
        init_method=_leave,
        bias=bias,
        gather_output=False,
        skip_bias_add=True,
        is_expert=False,
        tp_group=group,
    )


def row_linear(
    linears: ParallelLinears,
    in_features: int,
    out_features: int,
    *,
    config: TransformerConfig,
    group: dist.ProcessGroup,
    bias: bool,
) -> nn.Module:
    """[s', b, in / tp] -> [s, b, out], summed over ranks; scatters the sequence under sequence parallelism."""
    return linears.row(
        in_features,
        out_features,
        config=config,
        init_method=_leave,
        bias=bias,
        input_is_parallel=True,
        skip_bias_add=True,
        is_expert=False,
        tp_group=group,
    )


@overload
def apply(layer: Any, x: Tensor) -> Tensor: ...
@overload
def apply(layer: Any, x: MaybeDual) -> MaybeDual: ...
def apply(layer: Any, x: MaybeDual) -> MaybeDual:
    """The layer without its bias, once for both halves of a Dual; float8 where the network's forward says so."""
    if fp8.are_fp8():
        assert isinstance(x, Tensor), "float8 passes carry no tangent"
        return fp8.parallel_linear(layer, x)
    return dual.linear(lambda z: layer(z)[0], x)
