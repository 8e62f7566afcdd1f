"""Single networks in checkpoints: loading one into a run, and whole tensors for conversion."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import yaml
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from rcm_mcore.checkpoint.folder import check_files
from rcm_mcore.interop.dcp import open_folder, read_index, write_folder
from rcm_mcore.interop.files import Counter, Progress
from rcm_mcore.interop.lazy import LazyTensor, Weight, loaded
from rcm_mcore.parallel.cpu import write_checkpoints_in_process
from rcm_mcore.parallel.mesh import init_distributed

Which = Literal["student", "ema", "fake_score"]
PREFIX: dict[str, str] = {"student": "student.", "ema": "ema.student.", "fake_score": "fake_score."}


def resolve(path: str | Path) -> Path:
    """The checkpoint folder meant by `path`: itself, or the latest of the run folder it is.

    Raises ValueError when it is neither, and when its index is a pickle of something else (which is not run).
    """
    path = Path(path)
    marker = path / "latest"
    if marker.is_file():
        path = path / marker.read_text().strip()
    if not (path / ".metadata").is_file() or not (path / "config.yaml").is_file():
        raise ValueError(f"{path} is no checkpoint of ours: it must be a step_* folder, or a run folder with `latest`")
    read_index(path)
    return path


def model_of(path: str | Path) -> dict[str, Any]:
    """The `model` section stored with a checkpoint."""
    return config_of(path)["model"]


def config_of(path: str | Path) -> dict[str, Any]:
    """The configuration stored with a checkpoint: that of its run, or only its `model` section (`write_network`).

    Raises ValueError when there is none.
    """
    file = resolve(path) / "config.yaml"
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("model"), dict):
        raise ValueError(f"{file} has no `model` section")
    return tree


def require_network(path: str | Path, which: Which) -> None:
    """Check that a checkpoint holds a network; ValueError, saying which it holds, when it does not."""
    _entries(resolve(path), which)


def _entries(path: Path, which: Which) -> dict[str, TensorStorageMetadata]:
    """Tensors of one network in a checkpoint by parameter name; ValueError when there are none."""
    metadata = read_index(path)
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


def open_network(path: str | Path, *, which: Which = "student") -> tuple[dict[str, LazyTensor], dict[str, Any]]:
    """Whole weights of one network by parameter name, each read when it is loaded, and the `model` section.

    `path`: a checkpoint or a run folder. Needs no process group. ValueError when the network is not there, or a file is not
    what the manifest says (all are read for that).
    """
    path = resolve(path)
    entries = _entries(path, which)
    check_files(path)
    weights = open_folder(path)
    return {name: weights[PREFIX[which] + name] for name in entries}, model_of(path)


def read_network(path: str | Path, *, which: Which = "student") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Whole tensors of one network by parameter name, in the dtype they are stored in, and its `model` section.

    `path`: a checkpoint or a run folder. Needs no process group. ValueError when the network is not there.
    """
    weights, model = open_network(path, which=which)
    return {name: loaded(weight) for name, weight in weights.items()}, model


def write_network(
    path: str | Path, tensors: Mapping[str, Weight], model: Mapping[str, Any], *, progress: Progress | None = None
) -> None:
    """Write whole weights by parameter name as the `student` of a new checkpoint at `path`, with its `model` section.

    One weight at a time is loaded. All or nothing: the folder appears when it is complete. ValueError if `path` exists.
    """
    path = Path(path)
    if path.exists():
        raise ValueError(f"{path} exists already: choose another place or remove it")
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    counter = Counter(tensors, progress)

    def counted(weight: Weight) -> LazyTensor:
        def load() -> Tensor:
            counter.add(weight)
            return loaded(weight)

        return LazyTensor(weight.shape, weight.dtype, load)

    try:
        write_checkpoints_in_process()
        with _process_group():
            dist_checkpointing.save({}, str(partial))  # all but the tensors, which it would want all at once
        write_folder(partial, {PREFIX["student"] + name: counted(weight) for name, weight in tensors.items()})
        (partial / "config.yaml").write_text(yaml.safe_dump({"model": dict(model)}, sort_keys=False))
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def _process_group() -> Iterator[None]:
    """A default process group, of this process alone if there is none."""
    fresh = not dist.is_initialized()
    init_distributed()
    try:
        yield
    finally:
        if fresh:
            dist.destroy_process_group()


@torch.no_grad()
def load_network(net: Any, path: str | Path, *, which: Which, dp_cp_group: dist.ProcessGroup) -> None:
    """Collective: load one network of a checkpoint into `net` (its shards on its mesh), cast to the dtype of `net`.

    `net` has `sharded_state_dict`. Raises ValueError when names or shapes differ, before anything is changed.
    """
    path = resolve(path)
    stored = _entries(path, which)
    wanted: dict[str, ShardedTensor] = net.sharded_state_dict(prefix="", metadata={"dp_cp_group": dp_cp_group})
    missing = sorted(wanted.keys() - stored.keys())
    unknown = sorted(name for name in stored.keys() - wanted.keys() if not net.is_of_another_stage(name))
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
