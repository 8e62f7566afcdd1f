"""Single networks in checkpoints: loading one into a run, and whole tensors for conversion."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed.checkpoint as dcp
import yaml
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from rcm_mcore.parallel.cpu import write_checkpoints_in_process
from rcm_mcore.parallel.mesh import local_mesh

Which = Literal["student", "ema", "fake_score"]
PREFIX: dict[str, str] = {"student": "student.", "ema": "ema.student.", "fake_score": "fake_score."}


def resolve(path: str | Path) -> Path:
    """The checkpoint folder meant by `path`: itself, or the latest of the run folder it is.

    Raises ValueError when it is neither.
    """
    path = Path(path)
    marker = path / "latest"
    if marker.is_file():
        path = path / marker.read_text().strip()
    if not (path / ".metadata").is_file() or not (path / "config.yaml").is_file():
        raise ValueError(f"{path} is no checkpoint of ours: it must be a step_* folder, or a run folder with `latest`")
    return path


def model_of(path: str | Path) -> dict[str, Any]:
    """The `model` section stored with a checkpoint."""
    return yaml.safe_load((resolve(path) / "config.yaml").read_text())["model"]


def _entries(path: Path, which: Which) -> dict[str, TensorStorageMetadata]:
    """Tensors of one network in a checkpoint by parameter name; ValueError when there are none."""
    metadata = dcp.FileSystemReader(path).read_metadata()
    prefix = PREFIX[which]
    found = {
        key[len(prefix) :]: entry
        for key, entry in metadata.state_dict_metadata.items()
        if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    if not found:
        held = [w for w, p in PREFIX.items() if any(k.startswith(p) for k in metadata.state_dict_metadata)]
        raise ValueError(f"{path} holds no {which} network; it holds: {', '.join(held) or 'none'}")
    return found


def read_network(path: str | Path, *, which: Which = "student") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Whole tensors of one network by parameter name, in the dtype they are stored in, and its `model` section.

    `path`: a checkpoint or a run folder. Needs no process group. ValueError when the network is not there.
    """
    path = resolve(path)
    prefix = PREFIX[which]
    tensors: dict[str, Any] = {
        prefix + name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in _entries(path, which).items()
    }
    dcp.load(tensors, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    return {key[len(prefix) :]: value for key, value in tensors.items()}, model_of(path)


def write_network(path: str | Path, tensors: Mapping[str, Tensor], model: Mapping[str, Any]) -> None:
    """Write whole tensors by parameter name as the `student` of a new checkpoint at `path`, with its `model` section.

    All or nothing: the folder appears when it is complete. ValueError if `path` exists.
    """
    path = Path(path)
    if path.exists():
        raise ValueError(f"{path} exists already: choose another place or remove it")
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with local_mesh():
            write_checkpoints_in_process()
            sharded = {
                name: ShardedTensor.from_rank_offsets(PREFIX["student"] + name, tensor.contiguous())
                for name, tensor in tensors.items()
            }
            dist_checkpointing.save(sharded, str(partial))
        (partial / "config.yaml").write_text(yaml.safe_dump({"model": dict(model)}, sort_keys=False))
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@torch.no_grad()
def load_network(net: Any, path: str | Path, *, which: Which, dp_cp_group: torch.distributed.ProcessGroup) -> None:
    """Collective: load one network of a checkpoint into `net` (its shards on its mesh), cast to the dtype of `net`.

    `net` has `sharded_state_dict`. Raises ValueError when names or shapes differ, before anything is changed.
    """
    path = resolve(path)
    stored = _entries(path, which)
    wanted: dict[str, ShardedTensor] = net.sharded_state_dict(prefix="", metadata={"dp_cp_group": dp_cp_group})
    missing, unknown = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    if missing or unknown:
        raise ValueError(f"{path} does not fit the network: missing {missing[:20]}, unknown {unknown[:20]}")
    for name, tensor in wanted.items():
        if tuple(stored[name].size) != tuple(tensor.global_shape):
            raise ValueError(
                f"{path} does not fit the network: {name} is {list(stored[name].size)}, "
                f"the network has {list(tensor.global_shape)}"
            )
    params = {name: tensor.data for name, tensor in wanted.items()}
    for name, tensor in wanted.items():
        tensor.key = PREFIX[which] + name
        tensor.data = torch.empty_like(params[name], dtype=stored[name].properties.dtype, requires_grad=False)
        tensor.dtype = tensor.data.dtype
    loaded = dist_checkpointing.load(wanted, str(path))
    for name, param in params.items():
        param.copy_(loaded[name])
