"""Single networks in checkpoints: loading one into a run, and whole tensors for conversion."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from rcm_mcore.checkpoint.folder import check_files
from rcm_mcore.interop.dcp import Pieces, open_folder, read_index, read_pieces, write_folder
from rcm_mcore.interop.files import Counter, Progress
from rcm_mcore.interop.lazy import LazyTensor, Weight, loaded

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
        write_folder(partial, {PREFIX["student"] + name: counted(weight) for name, weight in tensors.items()})
        (partial / "config.yaml").write_text(yaml.safe_dump({"model": dict(model)}, sort_keys=False))
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@torch.no_grad()
def load_network(net: Any, path: str | Path, *, which: Which, new: str | None = None) -> None:
    """Load one network of a checkpoint into `net` (its part on its mesh), cast to the dtype of `net`.

    Weights whose names begin with `new` are left as they are where the checkpoint has none of them.
    `net` has `pieces` and `is_of_another_stage`. Raises ValueError when names or shapes differ, before anything is changed.
    """
    path = resolve(path)
    stored = _entries(path, which)
    wanted: dict[str, Pieces] = net.pieces()
    if new is not None and not any(name.startswith(new) for name in stored):
        wanted = {name: pieces for name, pieces in wanted.items() if not name.startswith(new)}
    missing = sorted(wanted.keys() - stored.keys())
    unknown = sorted(name for name in stored.keys() - wanted.keys() if not net.is_of_another_stage(name))
    if missing or unknown:
        raise ValueError(f"{path} does not fit the network: missing {missing[:20]}, unknown {unknown[:20]}")
    for name, (size, _) in wanted.items():
        if stored[name].size != size:
            raise ValueError(
                f"{path} does not fit the network: {name} is {list(stored[name].size)}, the network has {list(size)}"
            )
    read_pieces(path, {PREFIX[which] + name: pieces for name, pieces in wanted.items()})
