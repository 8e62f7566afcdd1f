"""Folders of torch.distributed.checkpoint, read one tensor at a time and without running what a stranger pickled."""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult

from rcm_mcore.interop.lazy import LazyTensor, Weight, loaded

# What the index of a checkpoint, a pickle, is made of.
_INDEX_MODULES = ("metadata", "planner", "filesystem")
_INDEX_CLASSES = {
    "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "SavePlan", "StorageMeta", "TensorProperties",
    "TensorStorageMetadata", "TensorWriteData", "WriteItem", "WriteItemType", "_MEM_FORMAT_ENCODING", "_StorageInfo",
}  # fmt: skip
_DATA = "__0_0.distcp"


class _IndexUnpickler(pickle.Unpickler):
    """Refuses to name anything but the parts of an index, so that nothing of a stranger's is run."""

    def find_class(self, module: str, name: str) -> Any:
        inside = module in [f"torch.distributed.checkpoint.{m}" for m in _INDEX_MODULES] and name in _INDEX_CLASSES
        plain = module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype))
        path = module.partition(".")[0] == "pathlib" and name in ("PosixPath", "PurePosixPath", "WindowsPath")
        if inside or plain or path or (module, name) == ("torch.serialization", "_get_layout"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def read_index(path: Path) -> Metadata:
    """What a checkpoint folder says of its tensors. Raises: ValueError for a pickle of anything else, which is not run."""
    try:
        with (path / ".metadata").open("rb") as file:
            index = _IndexUnpickler(file).load()
    except Exception as error:  # whatever a damaged or hostile file makes the unpickler raise
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{path}/.metadata is no index of a checkpoint: {type(error).__name__}: {reason}") from None
    if not isinstance(index, Metadata):
        raise ValueError(f"{path}/.metadata is no index of a checkpoint: it holds {type(index).__name__}")
    return index


def open_folder(path: Path, index: Metadata | None = None) -> dict[str, LazyTensor]:
    """Every tensor of a checkpoint folder by its key; other objects are left out. `index`: default read from the folder.

    Raises: ValueError for a damaged index; when a tensor is loaded, for a missing or damaged file.
    """
    index = read_index(path) if index is None else index
    reader = dcp.FileSystemReader(path)
    reader.set_up_storage_reader(index, is_coordinator=True)

    def load(key: str, size: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        tensor = torch.empty(size, dtype=dtype)
        planner = DefaultLoadPlanner()
        planner.set_up_planner({key: tensor}, index, is_coordinator=True)
        try:
            reader.read_data(planner.create_local_plan(), planner).wait()
        except Exception as error:  # a missing file, one that is too short, a pickle that wants to run code
            reason = (str(error).splitlines() or [""])[0]
            raise ValueError(f"{path}: {key} cannot be read: {type(error).__name__}: {reason}") from None
        return tensor

    found = {}
    for key, entry in index.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            # What no rank has stored would be whatever is in memory.
            if sum(math.prod(chunk.sizes) for chunk in entry.chunks) < math.prod(entry.size):
                raise ValueError(f"{path}/.metadata is no index of a checkpoint: parts of {key} are missing")
            dtype = entry.properties.dtype
            found[key] = LazyTensor(entry.size, dtype, partial(load, key, entry.size, dtype))
    return found


def write_folder(path: Path, weights: Mapping[str, Weight]) -> None:
    """Write weights by key into an existing folder, one tensor at a time; replaces its index. Not atomic.

    torch's plan and index around a loop of ours: its own writer holds every tensor until a file is complete.
    """
    planner = DefaultSavePlanner()
    empty = {key: torch.empty(weight.shape, dtype=weight.dtype, device="meta") for key, weight in weights.items()}
    planner.set_up_planner(empty, is_coordinator=True)
    (plan,), index = planner.create_global_plan([planner.create_local_plan()])
    results = []
    with (path / _DATA).open("wb") as file:
        for item in plan.items:
            begin = file.tell()
            # A tensor is pickled with its whole storage.
            torch.save(loaded(weights[item.index.fqn]).detach().clone(memory_format=torch.contiguous_format), file)
            length = file.tell() - begin
            results.append(WriteResult(item.index, length, _StorageInfo(_DATA, begin, length)))
    dcp.FileSystemWriter(str(path), overwrite=True).finish(index, [results])
