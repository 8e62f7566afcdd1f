"""Conversion of Wan2.1 and Cosmos-Predict2 weights between file formats, each read into and written from the hub names.

Weights are read, renamed, cast and written one tensor at a time: memory holds a layer's worth, whatever the network.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from rcm_mcore.config import ModelConfig, parse_model
from rcm_mcore.interop import maps
from rcm_mcore.interop.dcp import open_folder
from rcm_mcore.interop.destination import atomic_destination, check_destination, verify
from rcm_mcore.interop.diffusers_folder import WEIGHTS, read_diffusers, write_diffusers
from rcm_mcore.interop.files import (
    MAX_SHARD_BYTES,
    SAFETENSORS_SUFFIX,
    TORCH_SUFFIXES,
    Progress,
    open_tensors,
    read_json,
    save_shards,
    save_tensors,
    write_json,
)
from rcm_mcore.interop.lazy import LazyTensor, Weight, Weights, lazily
from rcm_mcore.interop.pipeline import PipelineOptions, check_base, write_pipeline

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """What a source may need to be told."""

    which: str = "student"  # student, ema or fake_score
    head_dim: int | None = None  # head width, where the source does not tell it; default 128


@dataclass(frozen=True, kw_only=True)
class WriteOptions:
    """What a target may be told."""

    max_shard_bytes: int = MAX_SHARD_BYTES
    pipeline: PipelineOptions | None = None
    progress: Progress | None = None


class Reader(Protocol):
    """Reads (hub weights, network) from a path."""

    def __call__(self, path: Path, options: ReadOptions, /) -> tuple[Weights, ModelConfig]: ...


class Writer(Protocol):
    """Writes hub weights to a path that does not exist yet."""

    def __call__(self, path: Path, hub: Weights, model: ModelConfig, options: WriteOptions, /) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Format:
    """How one format is read and, unless it is only read, written."""

    read: Reader
    write: Writer | None = None
    suffixes: tuple[str, ...] = ()  # endings of the file that it writes; none: it writes a folder
    folder: bool = False  # a destination without one of the suffixes is a folder
    family: str | None = None  # the only family it holds
    several: bool = False  # holds several networks
    fp32_islands: bool = False  # a cast to bfloat16 leaves in float32 what the format's loader keeps there


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a conversion wrote: the network, tensors (by hub names), parameters, bytes of the tensors."""

    model: ModelConfig
    tensors: int
    parameters: int
    bytes: int


def convert(
    src_format: str,
    dst_format: str,
    src: Path,
    dst: Path,
    *,
    dtype: torch.dtype | None = None,
    read: ReadOptions | None = None,
    write: WriteOptions | None = None,
    formats: Mapping[str, Format] | None = None,
) -> Summary:
    """Converts src to dst, bit-exactly unless dtype is given; dst appears when it is complete, or not at all.

    dtype: of the written tensors; None keeps each tensor's. A Wan diffusers folder cast to bfloat16 keeps in float32 what
        diffusers loads in float32: the time embedding, the modulations, the norms with a bias.
    formats: name -> Format; default FORMATS.

    Raises: ValueError for an unknown format, an unreadable source or one that is not what its manifest says, a source that is
        no network of a known kind or not of the sizes that its configuration says, and an existing destination; OSError when
        writing fails.
    """
    known = FORMATS if formats is None else formats
    read, write = read or ReadOptions(), write or WriteOptions()
    for name in (src_format, dst_format):
        if name not in known:
            raise ValueError(f"format {name!r}: must be one of {', '.join(known)}")
    source, target = known[src_format], known[dst_format]
    _check_options(src_format, dst_format, source, target, read=read, write=write)
    check_destination(dst, target.suffixes, folder=target.folder)  # before minutes of reading
    try:
        hub, model = source.read(src, read)
        maps.check_hub(hub, model)
    except ValueError as error:
        raise ValueError(str(error) if str(src) in str(error) else f"{src}: {error}") from error
    if read.head_dim not in (None, model.head_dim):
        raise ValueError(f"head_dim={read.head_dim}: {src} says that its heads are {model.head_dim} wide")
    for name, known_format in ((src_format, source), (dst_format, target)):
        if known_format.family not in (None, model.family):
            raise ValueError(f"{src} holds a network of the family {model.family}, {name} files one of {known_format.family}")
    if write.pipeline is not None:
        check_base(write.pipeline, model)
    verify(src / "transformer" if (src / "transformer").is_dir() else src)  # reads it all, so after every other check
    if dtype is not None:
        hub = {name: _cast(weight, _target_dtype(name, dtype, model, target)) for name, weight in hub.items()}
    assert target.write is not None  # checked above
    with atomic_destination(dst, target.suffixes, folder=target.folder) as unfinished:
        target.write(unfinished, hub, model, write)
    weights = hub.values()
    summary = Summary(
        model=model,
        tensors=len(hub),
        parameters=sum(weight.numel() for weight in weights),
        bytes=sum(weight.nbytes for weight in weights),
    )
    _log.info("%s: %s", dst, summary)
    return summary


def _check_options(
    src_format: str, dst_format: str, source: Format, target: Format, *, read: ReadOptions, write: WriteOptions
) -> None:
    if target.write is None:
        raise ValueError(f"format {dst_format!r}: it can only be read")
    if read.which != "student" and not source.several:
        raise ValueError(f"--which {read.which}: a {src_format} source holds one network only")
    if read.head_dim is not None and read.head_dim < 1:
        raise ValueError(f"head_dim={read.head_dim}: must be at least 1")
    if write.max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={write.max_shard_bytes}: must be at least 1")
    if write.pipeline is not None and dst_format != "diffusers":
        raise ValueError(f"--pipeline {write.pipeline.base}: only a diffusers destination can be a whole pipeline")


def network_format(
    read_network: Callable[[Path, str], tuple[Weights, Mapping[str, Any]]],
    write_network: Callable[[Path, Weights, Mapping[str, Any], Progress | None], None],
) -> Format:
    """The format `mcore`, from the functions that read and write our checkpoints, which live in a layer above.

    read_network: path, which -> (whole weights under our names, `model` section of the configuration).
    write_network: makes a checkpoint of whole weights under our names, with a `model` section, at a new path.
    """

    def read(path: Path, options: ReadOptions) -> tuple[Weights, ModelConfig]:
        weights, section = read_network(path, options.which)
        model = model_of_section(section)
        return maps.mcore_to_hub(weights, model), model

    def write(path: Path, hub: Weights, model: ModelConfig, options: WriteOptions) -> None:
        write_network(path, maps.hub_to_mcore(hub, model), section_of_model(model), options.progress)

    return Format(read=read, write=write, several=True)


def model_of_section(section: Mapping[str, Any]) -> ModelConfig:
    """The network of a resolved `model` section of a run's configuration.

    Raises: ValueError for a section that is none, or an eps other than 1e-6, which the other formats take for granted.
    """
    model = parse_model(dict(section))
    if model.eps != 1e-6:
        raise ValueError(f"model.eps={model.eps}: only networks with 1e-6 can be converted")
    return model


def section_of_model(model: ModelConfig) -> dict[str, Any]:
    """The `model` section of a network, every field given."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(model).items()}


def _cast(weight: Weight, dtype: torch.dtype) -> Weight:
    return weight if weight.dtype == dtype else lazily(lambda tensor: tensor.to(dtype), weight)


def _target_dtype(name: str, dtype: torch.dtype, model: ModelConfig, target: Format) -> torch.dtype:
    norms = ("img_emb.proj.0.", "img_emb.proj.4.")
    island = name.endswith("modulation") or name.startswith(("time_embedding.", *norms)) or ".norm3." in name
    keep = island and model.family == "wan" and target.fp32_islands and dtype == torch.bfloat16
    return torch.float32 if keep else dtype


def _read_diffusers(path: Path, options: ReadOptions) -> tuple[Weights, ModelConfig]:
    weights, model = read_diffusers(path)
    return maps.diffusers_to_hub(weights), model


def _write_diffusers(path: Path, hub: Weights, model: ModelConfig, options: WriteOptions) -> None:
    weights = maps.hub_to_diffusers(hub)
    place = path
    if options.pipeline is not None:
        write_pipeline(path, options.pipeline, model)
        place = path / "transformer"
    write_diffusers(place, weights, model, max_shard_bytes=options.max_shard_bytes, progress=options.progress)


def _read_files(
    to_hub: Callable[..., dict[str, Weight]],
    open_source: Callable[[Path], Mapping[str, LazyTensor]],
    path: Path,
    options: ReadOptions,
) -> tuple[Weights, ModelConfig]:
    """Files that tell nothing but tensors."""
    hub = to_hub(open_source(path), which=options.which)
    return hub, maps.infer_model(hub, head_dim=options.head_dim)


def _read_wan(path: Path, options: ReadOptions) -> tuple[Weights, ModelConfig]:
    """The official config.json of a folder, where it has one, tells the width of a head."""
    if options.head_dim is None and path.is_dir() and (path / "config.json").is_file():
        config = read_json(path / "config.json")
        if isinstance(dim := config.get("dim"), int) and isinstance(heads := config.get("num_heads"), int) and heads > 0:
            options = ReadOptions(which=options.which, head_dim=dim // heads)
    return _read_files(maps.official_to_hub, open_tensors, path, options)


def _write_wan(path: Path, hub: Weights, model: ModelConfig, options: WriteOptions) -> None:
    if path.suffix in (*TORCH_SUFFIXES, SAFETENSORS_SUFFIX):
        save_tensors(path, hub, progress=options.progress)
        return
    path.mkdir()
    write_json(path / "config.json", _official_config(model))
    save_shards(path, WEIGHTS, hub, max_shard_bytes=options.max_shard_bytes, progress=options.progress)


def _official_config(model: ModelConfig) -> dict[str, Any]:
    """config.json of the official WanModel."""
    return {
        "_class_name": "WanModel",
        "model_type": {"text": "t2v", "image": "i2v", "first_last": "flf2v"}[model.condition],
        "dim": model.hidden_size,
        "eps": model.eps,
        "ffn_dim": model.ffn_hidden_size,
        "freq_dim": model.freq_dim,
        "in_dim": model.patch_channels,
        "num_heads": model.num_attention_heads,
        "num_layers": model.num_layers,
        "out_dim": model.in_channels,
        "text_len": model.text_len,
    }


def _write_rcm(path: Path, hub: Weights, model: ModelConfig, options: WriteOptions) -> None:
    if model.patch_size != (1, 2, 2):
        raise ValueError(f"patch_size={model.patch_size}: an rCM file can only hold networks with (1, 2, 2)")
    save_tensors(path, maps.hub_to_rcm(hub), progress=options.progress)


def _open_rcm_dcp(path: Path) -> Mapping[str, LazyTensor]:
    """Tensors of a training checkpoint of rCM: a folder of tensors, an iteration's, or a run's with iterations."""
    iterations = sorted(p for p in path.glob("iter_*") if p.is_dir() and p.name.removeprefix("iter_").isdigit())
    tried = (path, path / "model", *((iterations[-1] / "model",) if iterations else ()))
    folder = next((place for place in tried if (place / ".metadata").is_file()), None)
    if folder is None:
        raise ValueError(f"{path}: no checkpoint of rCM's training: no .metadata in {', '.join(str(place) for place in tried)}")
    return open_folder(folder)


FORMATS: Mapping[str, Format] = {
    "diffusers": Format(read=_read_diffusers, write=_write_diffusers, fp32_islands=True),
    "wan": Format(read=_read_wan, write=_write_wan, suffixes=(*TORCH_SUFFIXES, SAFETENSORS_SUFFIX), folder=True, family="wan"),
    "cosmos": Format(
        read=partial(_read_files, maps.official_to_hub, open_tensors),
        write=_write_rcm,
        suffixes=TORCH_SUFFIXES,
        family="cosmos",
        several=True,
    ),
    "rcm": Format(
        read=partial(_read_files, maps.rcm_to_hub, open_tensors), write=_write_rcm, suffixes=TORCH_SUFFIXES, several=True
    ),
    "rcm_dcp": Format(read=partial(_read_files, maps.rcm_to_hub, _open_rcm_dcp), several=True),
}
