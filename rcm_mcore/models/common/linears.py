"""Tensor-parallel linears by spec: megatron-core's own, or transformer-engine's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, overload

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from rcm_mcore import dual
from rcm_mcore.dual import Dual, MaybeDual
from rcm_mcore.models.common import fp8
from rcm_mcore.parallel.sequence import gathering, scattering_sums


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
    """The layer without its bias; float8 where the network's forward says so."""
    if fp8.are_fp8():
        assert isinstance(x, Tensor), "float8 passes carry no tangent"
        return fp8.parallel_linear(layer, x)
    is_ours = isinstance(layer, ColumnParallelLinear | RowParallelLinear)
    if isinstance(x, Dual) and is_ours and layer.sequence_parallel and not torch.is_grad_enabled():
        return _halves_in_turn(layer, x)
    return dual.linear(lambda z: layer(z)[0], x)


def _halves_in_turn(layer: Any, x: Dual) -> Dual:
    """A Dual under sequence parallelism: while one half is multiplied the other is on its way between the ranks."""
    if isinstance(layer, ColumnParallelLinear):
        coming = [gathering(half, layer.tp_group) for half in x]
        return Dual(*[F.linear(half(), layer.weight) for half in coming])
    leaving = [scattering_sums(F.linear(half, layer.weight), layer.tp_group) for half in x]
    return Dual(*[half() for half in leaving])
