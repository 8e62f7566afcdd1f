"""Folders of torch.distributed.checkpoint: written and read in pieces, and without running what a stranger pickled."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import zlib
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from rcm_mcore.interop.lazy import LazyTensor, Weight, loaded

# What the index of a checkpoint, a pickle, is made of.
_INDEX_MODULES = ("metadata", "planner", "filesystem")
_INDEX_CLASSES = {
    "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "SavePlan", "StorageMeta", "TensorProperties",
    "TensorStorageMetadata", "TensorWriteData", "WriteItem", "WriteItemType", "_MEM_FORMAT_ENCODING", "_StorageInfo",
}  # fmt: skip
# Beside the index, what makes megatron-core's dist_checkpointing take a folder for one of its own.
_MEGATRON = {
    "sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1,
}  # fmt: skip


class Pieces(NamedTuple):
    """A part of a tensor: `size` is that of the whole, `parts` are boxes of it by their offset, which do not overlap."""

    size: torch.Size
    parts: tuple[tuple[tuple[int, ...], Any], ...]

    def map(self, function: Any) -> Pieces:
        """With another tensor, of the same shape, in the place of each part."""
        return Pieces(self.size, tuple((offset, function(part)) for offset, part in self.parts))


class Share(NamedTuple):
    """What one process wrote: its file, and of each box the key, the tensor's size and dtype, the box, and its bytes."""

    file: str
    boxes: list[tuple[str, torch.Size, torch.dtype, tuple[int, ...], torch.Size, int, int]]
    bytes: int
    crc: int


def boxes_of_range(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Elements [start, stop) of a row-major array as boxes (offset, shape), in the order of the elements.

    At most 2 D - 1 of them for D dimensions.
    """
    if stop <= start:
        return
    if not shape:
        yield (), ()
    elif len(shape) == 1:
        yield (start,), (stop - start,)
    else:
        row = math.prod(shape[1:])
        first, last = -(-start // row), stop // row  # whole rows
        inside = lambda index, begin, end: (
            ((index, *offset), (1, *box)) for offset, box in boxes_of_range(shape[1:], begin, end)
        )
        if first > last:
            yield from inside(last, start - last * row, stop - last * row)
            return
        yield from inside(first - 1, start - (first - 1) * row, row) if start < first * row else ()
        if first < last:
            yield (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])
        yield from inside(last, 0, stop - last * row)


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
        _read(path, reader, planner.create_local_plan(), planner)
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


def write_share(path: Path, file: str, pieces: Iterable[tuple[str, Pieces]]) -> Share:
    """Write parts of tensors, by key, into one file of a folder; the index comes later (`write_index`).

    Loads what is lazy and copies what is a view, one part at a time. Raises: OSError.
    """
    boxes = []
    with (path / file).open("wb") as raw:
        sink = _Sink(raw)
        for key, (size, parts) in pieces:
            for offset, part in parts:
                begin = sink.bytes
                sink.save(loaded(part).detach())  # not named: it goes before the next one comes
                boxes.append((key, size, part.dtype, offset, torch.Size(part.shape), begin, sink.bytes - begin))
        raw.flush()
        os.fsync(raw.fileno())
    return Share(file, boxes, sink.bytes, sink.crc)


class _Sink(io.RawIOBase):
    """A file that counts its bytes and their CRC-32."""

    def __init__(self, raw: Any) -> None:
        self.raw, self.bytes, self.crc = raw, 0, 0
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            self.raw.write(data)
        except OSError as error:
            self._error = error
            raise
        count = len(data)
        self.bytes, self.crc = self.bytes + count, zlib.crc32(data, self.crc)
        return count

    def save(self, tensor: Tensor) -> None:
        alone = tensor.untyped_storage().nbytes() == tensor.nbytes  # torch.save writes the whole storage
        if not (alone and tensor.is_contiguous() and tensor.device.type == "cpu"):
            tensor = tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
        try:
            torch.save(tensor, self)  # type: ignore[arg-type]  # all that it needs is here
        except RuntimeError:
            # What torch's writer says when it is interrupted hides why it was.
            if self._error is not None:
                raise self._error from None
            raise


def write_index(path: Path, shares: Iterable[Share]) -> None:
    """Make a folder of the files that `shares` describe complete: torch's index, and megatron-core's two files.

    Raises: ValueError when the boxes of a tensor do not make it up.
    """
    entries: dict[str, Any] = {}
    results = []
    for share in shares:
        for key, size, dtype, offset, box, begin, length in share.boxes:
            entry = entries.setdefault(key, TensorStorageMetadata(TensorProperties(dtype=dtype), size, []))
            entry.chunks.append(ChunkStorageMetadata(torch.Size(offset), box))
            place = MetadataIndex(key, torch.Size(offset), len(entry.chunks) - 1)
            results.append(WriteResult(place, length, _StorageInfo(share.file, begin, length)))
    for key, entry in entries.items():
        if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size):
            raise ValueError(f"{path}: the parts of {key} do not make up its {list(entry.size)}")
    torch.save({}, path / "common.pt")
    (path / "metadata.json").write_text(json.dumps(_MEGATRON))
    index = Metadata(entries, planner_data={key: (key,) for key in entries})
    dcp.FileSystemWriter(str(path), overwrite=True).finish(index, [results])


def write_folder(path: Path, weights: Mapping[str, Weight]) -> None:
    """Write whole weights by key into an existing folder, one tensor at a time. Not atomic."""
    whole = ((key, Pieces(torch.Size(w.shape), (((0,) * len(w.shape), w),))) for key, w in weights.items())
    write_index(path, [write_share(path, "__0_0.distcp", whole)])


def read_pieces(path: Path, wanted: Mapping[str, Pieces]) -> None:
    """Fill parts of tensors, by key, from a checkpoint folder, whatever pieces it was written in; casts to their dtypes.

    Raises: ValueError for keys that are not there and tensors of another size, before anything is changed; for a missing or
    damaged file.
    """
    index = read_index(path)
    items: list[ReadItem] = []
    parts: dict[tuple[str, torch.Size], Tensor] = {}
    if missing := sorted(wanted.keys() - index.state_dict_metadata.keys()):
        raise ValueError(f"{path} does not hold {', '.join(missing[:20])}")
    for key, pieces in wanted.items():
        entry = index.state_dict_metadata[key]
        if not isinstance(entry, TensorStorageMetadata) or entry.size != pieces.size:
            raise ValueError(f"{path}: {key} is {list(getattr(entry, 'size', []))}, not {list(pieces.size)}")
        parts |= {(key, torch.Size(offset)): part for offset, part in pieces.parts}
        chunks = [ChunkStorageMetadata(torch.Size(offset), part.shape) for offset, part in pieces.parts]
        items += create_read_items_for_chunk_list(key, entry, chunks)
    if sum(math.prod(item.lengths) for item in items) != sum(part.numel() for part in parts.values()):
        raise ValueError(f"{path}/.metadata is no index of a checkpoint: parts of tensors are missing")
    reader = dcp.FileSystemReader(path)
    reader.set_up_storage_reader(index, is_coordinator=True)
    _read(path, reader, LoadPlan(items), _Filler(parts))


class _Filler(DefaultLoadPlanner):
    """Tells a reader where what it reads goes."""

    def __init__(self, parts: Mapping[tuple[str, torch.Size], Tensor]) -> None:
        super().__init__()
        self._parts = parts

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        index = read_item.dest_index
        assert index.offset is not None, "parts have an offset"
        where = tuple(slice(o, o + n) for o, n in zip(read_item.dest_offsets, read_item.lengths))
        return self._parts[index.fqn, index.offset].detach()[where]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """It is in its place already."""


def _read(path: Path, reader: Any, plan: LoadPlan, planner: Any) -> None:
    try:
        reader.read_data(plan, planner).wait()
    except Exception as error:  # a missing file, one that is too short, a pickle that wants to run code
        keys = sorted({item.dest_index.fqn for item in plan.items})
        what = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{path}: {what} cannot be read: {type(error).__name__}: {reason}") from None
