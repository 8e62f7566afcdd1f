"""Files of weights: torch files and safetensors, read and written one tensor at a time."""

from __future__ import annotations

import bisect
import contextlib
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rcm_mcore.interop.lazy import LazyTensor, Weight, Weights, loaded

Progress = Callable[[int, int], None]  # told (bytes done, bytes in all) after every tensor

TORCH_SUFFIXES = (".pt", ".pth")
SAFETENSORS_SUFFIX = ".safetensors"
MAX_SHARD_BYTES = 5_000_000_000

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def open_tensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a .pt, .pth or .safetensors file, or of a folder with one safetensors file or a sharded set.

    A torch file may hold the dict itself or {"model": dict}; `_extra_state` is left out whatever it is. No code of a file is
    run. A torch file from before the zip format (torch < 1.6) is read whole.

    Raises: ValueError for a missing, damaged or unsafe file, and for content that is not a dict of tensors.
    """
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file or folder")
    if path.suffix == SAFETENSORS_SUFFIX:
        return _open_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return _open_torch(path)
    raise ValueError(f"{path}: expected a name ending in {endings((*TORCH_SUFFIXES, SAFETENSORS_SUFFIX))}, or a folder")


def save_tensors(path: Path, weights: Weights, *, progress: Progress | None = None) -> None:
    """Writes a .pt, .pth or .safetensors file, by the ending of the path. Not atomic: see `atomic_destination`.

    Raises: OSError when writing fails, as on a full disk.
    """
    counter = Counter(weights, progress)
    if path.suffix == SAFETENSORS_SUFFIX:
        _save_safetensors(path, weights, counter)
    else:
        _save_torch(path, weights, counter)


def save_shards(
    folder: Path, stem: str, weights: Weights, *, max_shard_bytes: int = MAX_SHARD_BYTES, progress: Progress | None = None
) -> None:
    """Writes `stem`.safetensors, or `stem`-00001-of-0000N.safetensors and their index, into an existing folder.

    max_shard_bytes: largest file; a larger tensor gets a file of its own. Raises: OSError when writing fails.
    """
    shards = _shards(weights, max_shard_bytes)
    counter = Counter(weights, progress)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file_name = f"{stem}{part}{SAFETENSORS_SUFFIX}"
        _save_safetensors(folder / file_name, {name: weights[name] for name in names}, counter)
        weight_map |= dict.fromkeys(names, file_name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": counter.total}, "weight_map": weight_map}
        write_json(folder / f"{stem}{SAFETENSORS_SUFFIX}.index.json", index)


class Counter:
    """Bytes of weights that are done, told to a Progress."""

    def __init__(self, weights: Weights, progress: Progress | None) -> None:
        self.total = sum(weight.nbytes for weight in weights.values())
        self._done, self._progress = 0, progress

    def add(self, weight: Weight) -> None:
        """One more is done."""
        self._done += weight.nbytes
        if self._progress is not None:
            self._progress(self._done, self.total)


def _open_torch(path: Path) -> dict[str, LazyTensor]:
    """Read by place in the file: torch's own mapping of a file can be refused where memory is less than the file."""
    in_zip = zipfile.is_zipfile(path)
    if in_zip:
        _check_zip(path)
    try:
        with FakeTensorMode() if in_zip else contextlib.nullcontext():
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file makes the unpickler raise
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{path}: refused, not a torch file of nothing but tensors (it is damaged, or its pickle wants to run code): "
            f"{type(error).__name__}: {reason}"
        ) from error
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a dict of tensors")
    content = {name: value for name, value in content.items() if not str(name).endswith("_extra_state")}
    strange = [str(name) for name, value in content.items() if not isinstance(value, torch.Tensor)]
    if strange:
        raise ValueError(f"{path}: expected a dict of tensors; {len(strange)} are none: {', '.join(strange[:20])}")
    tensors = {}
    for name, tensor in content.items():
        if in_zip:
            place = tensor.untyped_storage()._checkpoint_offset + tensor.storage_offset() * tensor.dtype.itemsize
            load = partial(_read, path, place, tensor.shape, tensor.stride(), tensor.dtype)
        else:
            load = tensor.detach
        tensors[name] = LazyTensor(tensor.shape, tensor.dtype, load)
    return tensors


def _check_zip(path: Path) -> None:
    """ValueError for a torch file whose tensors are not there as they are: they would be read as noise."""
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
            orders = [archive.read(name) for name in archive.namelist() if name.endswith("/byteorder")]
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: refused, it is damaged: {error}") from error
    if packed:
        raise ValueError(f"{path}: {packed[0]} is compressed, as torch never does: load the file and torch.save it again")
    if any(order != b"little" for order in orders):
        raise ValueError(f"{path}: written on a big-endian machine, which is not supported")


def _open_safetensors(path: Path) -> dict[str, LazyTensor]:
    """Checked by the library, read by place in the file like a torch file."""
    tensors = {}
    try:
        with safetensors.safe_open(path, "np"):  # without torch's mapping
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as safetensors: {error}") from error
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{path}: {name} has the dtype {entry['dtype']}, which cannot be read")
        dtype, shape = _DTYPES[entry["dtype"]], torch.Size(entry["shape"])
        stride = torch.empty(shape, device="meta").stride()
        place = 8 + length + entry["data_offsets"][0]
        tensors[name] = LazyTensor(shape, dtype, partial(_read, path, place, shape, stride, dtype))
    return tensors


def _read(path: Path, place: int, shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor whose first element is at a place in a file. Raises: ValueError when the file ends too early."""
    count = 1 + sum((n - 1) * step for n, step in zip(shape, stride)) if 0 not in shape else 0
    elements = torch.empty(count, dtype=dtype)
    with path.open("rb") as file:
        file.seek(place)
        got = file.readinto(elements.view(torch.uint8).numpy().data)
    if got != elements.nbytes:
        raise ValueError(f"{path}: it ends {elements.nbytes - got} bytes too early")
    return elements.as_strided(shape, stride)


def _open_folder(folder: Path) -> dict[str, LazyTensor]:
    """Tensors of the one safetensors file, or of the one sharded set, in a folder."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    files = sorted(folder.glob("*.safetensors"))
    if len(indices) == 1:
        return _open_shards(indices[0])
    if not indices and len(files) == 1:
        return _open_safetensors(files[0])
    found = ", ".join(path.name for path in indices or files) or "none"
    raise ValueError(f"{folder}: expected one .safetensors file or one .safetensors.index.json, found {found}")


def _open_shards(index: Path) -> dict[str, LazyTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: has no weight_map")
    tensors: dict[str, LazyTensor] = {}
    for name in sorted({str(file_name) for file_name in weight_map.values()}):
        path = index.parent / name
        if Path(name).name != name or not path.is_file():
            raise ValueError(f"{index}: names the file {name!r}, which is not in the folder")
        found = _open_safetensors(path)
        if twice := sorted(tensors.keys() & found.keys()):
            raise ValueError(f"{path}: {twice[:20]} are in another file of the set as well")
        tensors |= found
    if differing := sorted(tensors.keys() ^ weight_map.keys()):
        raise ValueError(f"{index}: {len(differing)} tensors are not in both index and files: {differing[:20]}")
    return tensors


def _save_safetensors(path: Path, weights: Weights, counter: Counter) -> None:
    """One tensor after the other, which the library's own writer cannot: it takes them all at once.

    Wider dtypes first, as it does: then every tensor is aligned.
    """
    order = sorted(weights, key=lambda name: -weights[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        begin, end = end, end + weights[name].nbytes
        header[name] = {
            "dtype": _DTYPE_NAMES[weights[name].dtype],
            "shape": list(weights[name].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(_data(loaded(weights[name])))
            counter.add(weights[name])


def _save_torch(path: Path, weights: Weights, counter: Counter) -> None:
    """torch.save of tensors without data, whose places in the file are then filled one by one."""
    with FakeTensorMode():
        empty = {name: torch.empty(weight.shape, dtype=weight.dtype) for name, weight in weights.items()}
    try:
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(empty, path)
    except RuntimeError as error:  # torch's writer has no OSError for a full disk
        raise OSError(f"{path}: writing failed (is the disk full?): {error}") from error
    with FakeTensorMode():
        places = torch.load(path, weights_only=True)
    checksums = {}  # by place
    with path.open("r+b") as file:
        for name, weight in weights.items():
            place = places[name].untyped_storage()._checkpoint_offset
            data = _data(loaded(weight))
            file.seek(place)
            file.write(data)
            checksums[place] = zlib.crc32(data)
            del data  # or it would be there while the next is loaded
            counter.add(weight)
    _write_checksums(path, checksums)


def _write_checksums(path: Path, checksums: Mapping[int, int]) -> None:
    """Put the CRC-32 of data at these places into the directory of a zip file, where torch.save left that of nothing.

    torch.load does not look at them; tools for zip files do.
    """
    with zipfile.ZipFile(path) as archive:
        entry, headers = archive.start_dir, [info.header_offset for info in archive.infolist()]
    places = sorted(checksums)
    with path.open("r+b") as file:
        for header, after in zip(headers, [*headers[1:], entry]):
            file.seek(entry)
            fixed = file.read(46)
            here = bisect.bisect(places, header)
            if here < len(places) and places[here] < after:
                file.seek(entry + 16)
                file.write(checksums[places[here]].to_bytes(4, "little"))
            entry += 46 + sum(struct.unpack("<3H", fixed[28:34]))  # name, extra field, comment


def _data(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, in order."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _shards(weights: Mapping[str, Weight], max_shard_bytes: int) -> list[list[str]]:
    """Names in order, cut into runs of at most max_shard_bytes."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, weight in weights.items():
        if shards[-1] and size + weight.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += weight.nbytes
    return shards


def read_json(path: Path) -> dict[str, Any]:
    """An object of a JSON file. Raises: ValueError when there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A JSON file as diffusers writes it."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def endings(suffixes: tuple[str, ...]) -> str:
    """Suffixes in a message."""
    return " or ".join(suffixes)
