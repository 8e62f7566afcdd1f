"""Conversion of Wan2.1 text-to-video weights between file formats, each read into and written from the hub names."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from rcm_mcore.config import SIZES
from rcm_mcore.interop import files, wan_names
from rcm_mcore.interop.files import Progress
from rcm_mcore.interop.wan_names import RELEASED_HEAD_DIM, Tensors, WanShape

_log = logging.getLogger(__name__)

# field of a run's `model` section -> field of WanShape; channels out are channels in
_MODEL_FIELDS = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_heads",
    "ffn_hidden_size": "ffn_hidden_size",
    "in_channels": "in_channels",
    "patch_size": "patch_size",
    "freq_dim": "freq_dim",
    "text_dim": "text_dim",
    "text_len": "text_len",
}


class Reader(Protocol):
    """Reads (hub tensors, sizes) from a path; head_dim is used by formats that do not tell it."""

    def __call__(self, path: Path, head_dim: int, /) -> tuple[Tensors, WanShape]: ...


class Writer(Protocol):
    """Writes hub tensors to a path that does not exist yet."""

    def __call__(self, path: Path, hub: Tensors, shape: WanShape, progress: Progress | None, /) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Format:
    """How one format is read and written."""

    read: Reader
    write: Writer
    suffixes: tuple[str, ...] = ()  # endings of the file that it writes; none: it writes a folder
    fp32_islands: bool = False  # a cast to bfloat16 leaves in float32 what the format's loader keeps there


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a conversion wrote: sizes of the network, tensors (by hub names), parameters, bytes of the tensors."""

    shape: WanShape
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
    head_dim: int | None = None,
    formats: Mapping[str, Format] | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Converts src to dst, bit-exactly unless dtype is given; dst appears when it is complete, or not at all.

    dtype: of the written tensors; None keeps each tensor's. A diffusers folder cast to bfloat16 keeps in float32 what
        diffusers loads in float32: the time embedding, the modulations and the cross-attention norms.
    head_dim: head width, where the source does not tell it (`wan`, `rcm`); default 128, that of the released networks.
    formats: name -> Format; default FORMATS.
    progress: called with (bytes done, bytes in all) as tensors are written.

    Raises: ValueError for an unknown format, an unreadable source, a source that is not a Wan2.1 text-to-video network
        or not of the sizes that its configuration says, and an existing destination; OSError when writing fails.
    """
    known = FORMATS if formats is None else formats
    for name in (src_format, dst_format):
        if name not in known:
            raise ValueError(f"format {name!r}: must be one of {', '.join(known)}")
    source, target = known[src_format], known[dst_format]
    if head_dim is not None and head_dim < 1:
        raise ValueError(f"head_dim={head_dim}: must be at least 1")
    files.check_destination(dst, target.suffixes)  # before minutes of reading
    try:
        hub, shape = source.read(src, RELEASED_HEAD_DIM if head_dim is None else head_dim)
        wan_names.check_hub(hub, shape)
    except ValueError as error:
        raise ValueError(str(error) if str(src) in str(error) else f"{src}: {error}") from error
    if head_dim is not None and head_dim != shape.head_dim:
        raise ValueError(f"head_dim={head_dim}: {src} says that its heads are {shape.head_dim} wide")
    if dtype is not None:
        hub = {name: tensor.to(_target_dtype(name, dtype, target)) for name, tensor in hub.items()}
    with files.atomic_destination(dst, target.suffixes) as partial:
        target.write(partial, hub, shape, progress)
    tensors = hub.values()
    summary = Summary(
        shape=shape,
        tensors=len(hub),
        parameters=sum(tensor.numel() for tensor in tensors),
        bytes=sum(tensor.nbytes for tensor in tensors),
    )
    _log.info("%s: %s", dst, summary)
    return summary


def network_format(
    read_network: Callable[[Path], tuple[Tensors, Mapping[str, Any]]],
    write_network: Callable[[Path, Tensors, Mapping[str, Any]], None],
) -> Format:
    """The format `mcore`, from the functions that read and write our checkpoints, which live in a layer above.

    read_network: path -> (full tensors under our names, `model` section of the configuration).
    write_network: makes a checkpoint of full tensors under our names, with a `model` section, at a new path.
    """

    def read(path: Path, head_dim: int) -> tuple[Tensors, WanShape]:
        tensors, model = read_network(path)
        shape = shape_of_model(model)
        return wan_names.mcore_to_hub(tensors, shape), shape

    def write(path: Path, hub: Tensors, shape: WanShape, progress: Progress | None) -> None:
        write_network(path, wan_names.hub_to_mcore(hub, shape), model_of_shape(shape))
        if progress is not None:
            total = sum(tensor.nbytes for tensor in hub.values())
            progress(total, total)

    return Format(read=read, write=write)


def shape_of_model(model: Mapping[str, Any]) -> WanShape:
    """The sizes in a resolved `model` section of a run's configuration.

    Raises: ValueError when a size is missing, or eps is not 1e-6, which the other formats take for granted.
    """
    if model.get("eps", 1e-6) != 1e-6:
        raise ValueError(f"model.eps={model['eps']}: only networks with 1e-6 can be converted")
    names = {field: ours for ours, field in _MODEL_FIELDS.items()}
    missing = [ours for field, ours in names.items() if ours not in model]
    if missing:
        raise ValueError(f"the checkpoint's model section lacks {', '.join(missing)}")
    sizes = {field: model[ours] for field, ours in names.items()}
    sizes["patch_size"] = tuple(sizes["patch_size"])
    return WanShape(**sizes, out_channels=sizes["in_channels"])


def model_of_shape(shape: WanShape) -> dict[str, Any]:
    """A `model` section with these sizes, the rest left to its defaults.

    Raises: ValueError when there are not as many channels out as in, which our network cannot be.
    """
    if shape.in_channels != shape.out_channels:
        raise ValueError(
            f"in_channels={shape.in_channels}, out_channels={shape.out_channels}: must be equal in a mcore network"
        )
    model = {ours: getattr(shape, field) for ours, field in _MODEL_FIELDS.items()}
    model["patch_size"] = list(shape.patch_size)
    named = (name for name, sizes in SIZES["wan"].items() if sizes.items() <= model.items())
    return {"size": next(named, "tiny"), **model}  # the size is a name only: every field is given


def _target_dtype(name: str, dtype: torch.dtype, target: Format) -> torch.dtype:
    island = name.endswith("modulation") or name.startswith("time_embedding.") or ".norm3." in name
    return torch.float32 if island and target.fp32_islands and dtype == torch.bfloat16 else dtype


def _read_diffusers(path: Path, head_dim: int) -> tuple[Tensors, WanShape]:
    tensors, shape = files.read_diffusers(path)
    return wan_names.diffusers_to_hub(tensors), shape


def _write_diffusers(path: Path, hub: Tensors, shape: WanShape, progress: Progress | None) -> None:
    files.write_diffusers(path, wan_names.hub_to_diffusers(hub), shape, progress=progress)


def _read_wan(path: Path, head_dim: int) -> tuple[Tensors, WanShape]:
    hub = wan_names.wan_to_hub(files.load_tensors(path))
    return hub, wan_names.infer_shape(hub, head_dim=head_dim)


def _write_wan(path: Path, hub: Tensors, shape: WanShape, progress: Progress | None) -> None:
    files.save_tensors(path, hub, progress=progress)


def _read_rcm(path: Path, head_dim: int) -> tuple[Tensors, WanShape]:
    hub = wan_names.rcm_to_hub(files.load_tensors(path))
    return hub, wan_names.infer_shape(hub, head_dim=head_dim)


def _write_rcm(path: Path, hub: Tensors, shape: WanShape, progress: Progress | None) -> None:
    if shape.patch_size != (1, 2, 2):
        raise ValueError(f"patch_size={shape.patch_size}: an rCM file can only hold networks with (1, 2, 2)")
    files.save_tensors(path, wan_names.hub_to_rcm(hub), progress=progress)


FORMATS: Mapping[str, Format] = {
    "diffusers": Format(read=_read_diffusers, write=_write_diffusers, fp32_islands=True),
    "wan": Format(read=_read_wan, write=_write_wan, suffixes=(*files.TORCH_SUFFIXES, files.SAFETENSORS_SUFFIX)),
    "rcm": Format(read=_read_rcm, write=_write_rcm, suffixes=files.TORCH_SUFFIXES),
}
