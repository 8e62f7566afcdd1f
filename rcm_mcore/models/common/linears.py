"""Tensor-parallel linears by spec: megatron-core's own, or transformer-engine's."""

from __future__ import annotations

from collections.abc import Iterable
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
from rcm_mcore.parallel.sequence import gathering, scattering_sums, summing


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
    if isinstance(layer, ColumnParallelLinear | RowParallelLinear) and not torch.is_grad_enabled():
        return _without_graph(layer, x)
    return dual.linear(lambda z: layer(z)[0], x)


def _without_graph(layer: Any, x: MaybeDual) -> MaybeDual:
    """megatron's linear without what it prepares for a backward, which takes longer to launch than a small matmul to run.

    While one half of a Dual is multiplied the other is on its way between the ranks.
    """
    halves: Iterable[Tensor] = x if isinstance(x, Dual) else (x,)
    group, split = layer.tp_group, layer.sequence_parallel
    if split and isinstance(layer, ColumnParallelLinear):
        coming = [gathering(half, group) for half in halves]
        halves = (half() for half in coming)  # each waited for when its turn comes
    if group.size() > 1 and isinstance(layer, RowParallelLinear):
        add_up = scattering_sums if split else summing
        leaving = [add_up(F.linear(half, layer.weight), group) for half in halves]
        results = [half() for half in leaving]
    else:
        results = [F.linear(half, layer.weight) for half in halves]
    return Dual(*results) if isinstance(x, Dual) else results[0]
