"""Parameters of a network under any mesh: initialization by name, sharded state, loading of full tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn


def tensor_parallel_dim(param: Tensor) -> int | None:
    """The dimension of `param` that is split over tensor-parallel ranks, or None."""
    return param.partition_dim if getattr(param, "tensor_model_parallel", False) else None  # type: ignore[attr-defined]


def on_every_stage(param: Tensor) -> bool:
    """Whether every pipeline stage holds `param` (megatron's mark for it)."""
    return not getattr(param, "allreduce", True)


def local_shard(full: Tensor, param: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's part of the full tensor of `param`, a view."""
    dim = tensor_parallel_dim(param)
    return full if dim is None else full.chunk(group.size(), dim)[group.rank()]


def full_shape(param: Tensor, group: dist.ProcessGroup) -> torch.Size:
    """Shape of `param` before it was split over `group`."""
    shape = list(param.shape)
    dim = tensor_parallel_dim(param)
    if dim is not None:
        shape[dim] *= group.size()
    return torch.Size(shape)


@torch.no_grad()
def initialize(net: nn.Module, rule: Callable[[str, Tensor], None], *, seed: int, group: dist.ProcessGroup) -> None:
    """Fill every parameter with values that depend on its name and `seed`, not on the mesh.

    `rule(name, full)` fills a full float32 CPU tensor in place, drawing from torch's global CPU generator.
    """
    with torch.random.fork_rng(devices=[]):
        for name, param in net.named_parameters():
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            full = torch.empty(full_shape(param, group), dtype=torch.float32, device="cpu")
            rule(name, full)
            param.copy_(local_shard(full, param, group))


@torch.no_grad()
def load_full(net: nn.Module, tensors: Mapping[str, Tensor], group: dist.ProcessGroup) -> None:
    """Copy full tensors by name into the parameters (each rank its shard).

    Those of other pipeline stages are left out. Raises ValueError listing missing and unknown names, or the first tensor of
    another shape; `net` is then unchanged.
    """
    params = dict(net.named_parameters())
    elsewhere = getattr(net, "is_of_another_stage", lambda name: False)
    missing = sorted(params.keys() - tensors.keys())
    unknown = sorted(name for name in tensors.keys() - params.keys() if not elsewhere(name))
    if missing or unknown:
        raise ValueError(f"weights do not fit the network: missing {missing[:20]}, unknown {unknown[:20]}")
    for name, param in params.items():
        if tensors[name].shape != full_shape(param, group):
            raise ValueError(
                f"weights do not fit the network: {name} is {list(tensors[name].shape)}, "
                f"the network has {list(full_shape(param, group))}"
            )
    for name, param in params.items():
        param.copy_(local_shard(tensors[name], param, group))


def sharded_parameters(
    net: nn.Module, prefix: str, *, groups: ProcessGroupCollection, dp_cp_group: dist.ProcessGroup
) -> dict[str, Any]:
    """Every parameter as megatron's ShardedTensor under `prefix` + its name (so independent of the mesh)."""
    params = dict(net.named_parameters())
    dims = {name: dim for name, p in params.items() if (dim := tensor_parallel_dim(p)) is not None}
    state = make_sharded_tensors_for_checkpoint(params, prefix, dims, (), tp_group=groups.tp, dp_cp_group=dp_cp_group)
    for name, param in params.items():
        if on_every_stage(param):  # the first stage's copy is stored
            tensor = state[prefix + name]
            tensor.replica_id = (groups.pp.rank(), *tensor.replica_id[1:])
    return state
