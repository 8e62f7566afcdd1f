"""Parameters of a network under any mesh: initialization by name, full tensors, what of it this rank has."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rcm_mcore.interop.dcp import Pieces


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
def initialize(
    net: nn.Module, rule: Callable[[str, Tensor], None], *, seed: int, group: dist.ProcessGroup, only: str = ""
) -> None:
    """Fill every parameter whose name begins with `only` with values that depend on its name and `seed`, not on the mesh.

    `rule(name, full)` fills a full float32 CPU tensor in place, drawing from torch's global CPU generator.
    """
    with torch.random.fork_rng(devices=[]):
        for name, param in net.named_parameters():
            if not name.startswith(only):
                continue
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


def pieces(net: nn.Module, group: dist.ProcessGroup) -> dict[str, Pieces]:
    """Every parameter by name as this rank's part of the full tensor, which is the same for every mesh."""
    return {name: Pieces(full_shape(p, group), ((offset_of(p, group), p.data),)) for name, p in net.named_parameters()}


def offset_of(param: Tensor, group: dist.ProcessGroup) -> tuple[int, ...]:
    """Where this rank's part of the full tensor of `param` begins."""
    split = tensor_parallel_dim(param)
    return tuple(group.rank() * size if dim == split else 0 for dim, size in enumerate(param.shape))
