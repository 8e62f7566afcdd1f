"""Reading and writing files of weights: torch files, safetensors, diffusers folders.

Writing is all or nothing: it goes to a hidden sibling of the destination, which takes the destination's name when it is
complete, and is removed when anything fails. Nothing that exists is overwritten.
"""

import contextlib
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from rcm_mcore.interop.wan_names import Tensors, WanShape

Progress = Callable[[int, int], None]  # told (bytes done, bytes in all) after every tensor

TORCH_SUFFIXES = (".pt", ".pth")
SAFETENSORS_SUFFIX = ".safetensors"
MAX_SHARD_BYTES = 10_000_000_000  # diffusers' own default

_WEIGHTS = "diffusion_pytorch_model"
_INDEX = f"{_WEIGHTS}{SAFETENSORS_SUFFIX}.index.json"
_MODEL_CLASS = "WanTransformer3DModel"
_log = logging.getLogger(__name__)

# config.json of diffusers' WanTransformer3DModel: what a WanShape says, by diffusers' names and with its defaults ...
_CONFIG_DEFAULTS: dict[str, Any] = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "num_layers": 40,
}
# ... and what is the same in every text-to-video network
_CONFIG_FIXED: dict[str, Any] = {
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "rope_max_seq_len": 1024,
    "pos_embed_seq_len": None,
}


def load_tensors(path: Path) -> Tensors:
    """The tensors of a .pt, .pth or .safetensors file, or of a folder with one safetensors file or a sharded set.

    Tensors are on the CPU and, where the file allows, mapped into memory rather than read. A torch file may hold the
    dict itself or {"model": dict}; `_extra_state` is left out whatever it is. No code of a file is run.

    Raises: ValueError for a missing, damaged or unsafe file, and for content that is not a dict of tensors.
    """
    if path.is_dir():
        return _load_folder(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file or folder")
    if path.suffix == SAFETENSORS_SUFFIX:
        return _load_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return _load_torch(path)
    raise ValueError(f"{path}: expected a name ending in {_endings((*TORCH_SUFFIXES, SAFETENSORS_SUFFIX))}, or a folder")


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], *, progress: Progress | None = None) -> None:
    """Writes a .pt, .pth or .safetensors file, by the ending of the path. Not atomic: see `atomic_destination`.

    Raises: OSError when writing fails, as on a full disk.
    """
    total = _nbytes(tensors)
    own = dict(_owned(tensors, total, progress))
    if path.suffix == SAFETENSORS_SUFFIX:
        _save_safetensors(path, own)
        return
    try:
        torch.save(own, path)
    except RuntimeError as error:  # torch's writer has no OSError for a full disk
        raise OSError(f"{path}: writing failed (is the disk full?): {error}") from error


def read_diffusers(folder: Path) -> tuple[Tensors, WanShape]:
    """The tensors (diffusers' names) and sizes of a diffusers folder: a pipeline's, or the transformer's itself.

    Raises: ValueError for a missing or damaged file, another model class, or a configuration that no Wan2.1
        text-to-video network has.
    """
    home = folder / "transformer" if (folder / "transformer").is_dir() else folder
    path = home / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: not a diffusers folder: no config.json there or in its transformer/")
    config = _read_json(path)
    try:
        shape = _shape_of_config(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return _load_folder(home), shape


def write_diffusers(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    shape: WanShape,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Makes a folder that diffusers' from_pretrained loads: config.json and one safetensors file or a sharded set.

    tensors: under diffusers' names. max_shard_bytes: largest file; a larger tensor gets a file of its own.
    Raises: OSError when writing fails. Not atomic: see `atomic_destination`.
    """
    folder.mkdir()
    _write_json(folder / "config.json", diffusers_config(shape))
    shards = _shards(tensors, max_shard_bytes)
    total = _nbytes(tensors)
    stream = _owned(tensors, total, progress)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file_name = f"{_WEIGHTS}{part}{SAFETENSORS_SUFFIX}"
        _save_safetensors(folder / file_name, dict(next(stream) for _ in names))
        weight_map |= dict.fromkeys(names, file_name)
    if len(shards) > 1:
        _write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def diffusers_config(shape: WanShape) -> dict[str, Any]:
    """config.json of a WanTransformer3DModel, every key written: a missing one would take the default of the 14B."""
    return {
        "_class_name": _MODEL_CLASS,  # AutoModel needs it
        "_diffusers_version": version("diffusers"),
        "patch_size": list(shape.patch_size),
        "num_attention_heads": shape.num_heads,
        "attention_head_dim": shape.head_dim,
        "in_channels": shape.in_channels,
        "out_channels": shape.out_channels,
        "text_dim": shape.text_dim,
        "freq_dim": shape.freq_dim,
        "ffn_dim": shape.ffn_hidden_size,
        "num_layers": shape.num_layers,
        **_CONFIG_FIXED,
    }


def check_destination(path: Path, suffixes: tuple[str, ...]) -> None:
    """Checks that path can be written: a new file with one of the suffixes or, with none, a new or empty folder.

    Raises: ValueError saying what stands in the way.
    """
    if suffixes and path.suffix not in suffixes:
        raise ValueError(f"{path}: the destination is a file, give a name ending in {_endings(suffixes)}")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: the folder {path.parent} does not exist")
    empty_folder = path.is_dir() and not path.is_symlink() and not any(path.iterdir())
    if os.path.lexists(path) and (suffixes or not empty_folder):
        raise ValueError(f"{path}: exists already and is not overwritten; give another destination or remove it")


@contextlib.contextmanager
def atomic_destination(path: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """A path beside `path` to write to, which is renamed to `path` when the body ends and removed when it raises.

    suffixes: as for `check_destination`. Raises: ValueError when the destination cannot be written.
    """
    check_destination(path, suffixes)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)  # an empty folder is replaced too
    except BaseException:  # an interruption as well must leave nothing
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)
        raise


def _load_torch(path: Path) -> Tensors:
    try:
        # Only the zip format of torch >= 1.6 can be mapped into memory.
        content = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
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
    return {name: tensor.detach() for name, tensor in content.items()}


def _load_safetensors(path: Path) -> Tensors:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as safetensors: {error}") from error


def _load_folder(folder: Path) -> Tensors:
    """Tensors of the one safetensors file, or of the one sharded set, in a folder."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    files = sorted(folder.glob("*.safetensors"))
    if len(indices) == 1:
        return _load_shards(indices[0])
    if not indices and len(files) == 1:
        return _load_safetensors(files[0])
    found = ", ".join(path.name for path in indices or files) or "none"
    raise ValueError(f"{folder}: expected one .safetensors file or one .safetensors.index.json, found {found}")


def _load_shards(index: Path) -> Tensors:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: has no weight_map")
    tensors: Tensors = {}
    for name in sorted({str(file_name) for file_name in weight_map.values()}):
        path = index.parent / name
        if Path(name).name != name or not path.is_file():
            raise ValueError(f"{index}: names the file {name!r}, which is not in the folder")
        tensors |= _load_safetensors(path)
    if differing := sorted(tensors.keys() ^ weight_map.keys()):
        raise ValueError(f"{index}: {len(differing)} tensors are not in both index and files: {differing[:20]}")
    return tensors


def _save_safetensors(path: Path, tensors: Tensors) -> None:
    path.touch()
    mode = path.stat().st_mode
    try:
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    except (safetensors.SafetensorError, RuntimeError) as error:
        raise OSError(f"{path}: writing failed (is the disk full?): {error}") from error
    path.chmod(mode)  # save_file replaces the file by one that only its owner may read


def _owned(tensors: Mapping[str, torch.Tensor], total: int, progress: Progress | None) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) one by one, each contiguous with a storage of its own, as both file formats want it."""
    done = 0
    for name, tensor in tensors.items():
        own = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        # clone() of a tensor with holes keeps them
        yield name, tensor if own else tensor.clone(memory_format=torch.contiguous_format)
        done += tensor.nbytes
        if progress is not None:
            progress(done, total)


def _shards(tensors: Mapping[str, torch.Tensor], max_shard_bytes: int) -> list[list[str]]:
    """Names in order, cut into runs of at most max_shard_bytes."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def _nbytes(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _shape_of_config(config: dict[str, Any]) -> WanShape:
    model_class = config.get("_class_name", _MODEL_CLASS)
    if model_class != _MODEL_CLASS:
        raise ValueError(f"_class_name={model_class!r}: only {_MODEL_CLASS} can be converted")
    if config.get("image_dim") is not None or config.get("added_kv_proj_dim") is not None:
        raise ValueError("an image-to-video network, which is not supported yet; only text-to-video is")
    for key, value in _CONFIG_FIXED.items():
        if config.get(key, value) != value:
            raise ValueError(f"{key}={config[key]!r}: in a Wan2.1 text-to-video network it is {value!r}")
    sizes = {key: config.get(key, default) for key, default in _CONFIG_DEFAULTS.items()}
    if ignored := sorted(key for key in config if key not in sizes | _CONFIG_FIXED and not key.startswith("_")):
        _log.warning("config.json: keys that WanTransformer3DModel does not have are ignored: %s", ", ".join(ignored))
    try:
        return WanShape(
            num_layers=sizes["num_layers"],
            hidden_size=sizes["num_attention_heads"] * sizes["attention_head_dim"],
            num_heads=sizes["num_attention_heads"],
            ffn_hidden_size=sizes["ffn_dim"],
            in_channels=sizes["in_channels"],
            out_channels=sizes["out_channels"] or sizes["in_channels"],
            text_dim=sizes["text_dim"],
            freq_dim=sizes["freq_dim"],
            patch_size=tuple(sizes["patch_size"]),
        )
    except TypeError as error:
        raise ValueError(f"sizes of the wrong type: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _endings(suffixes: tuple[str, ...]) -> str:
    return " or ".join(suffixes)
