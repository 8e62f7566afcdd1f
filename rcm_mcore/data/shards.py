"""Samples in WebDataset shards: the public rCM format (read) and our own (read and written).

A shard is an uncompressed tar; the members of a sample stand next to each other and share a key, `<key>.<extension>`
or `<key>/<key>.<extension>`. Members of other extensions are ignored.

- rCM: `latent.pt` and `embed.pt`, torch-saved [C, F, H, W] and [512, D] with zero rows past the prompt; `prompt.txt`.
- Ours: `tensors.safetensors` with `latent` [C, F, H, W] and `embed` [X, D], only the X rows that carry text (half of
  an rCM sample's bytes are its zero rows), and for image-conditioned networks `given` [C, F, H, W] and `image` [Y, E];
  `prompt.txt`.

Letters: C F H W latent channels, frames, height, width; X text tokens; D width of a text embedding; Y rows and E width of an
image embedding.
"""

from __future__ import annotations

import io
import itertools
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor
from webdataset.writer import TarWriter

from rcm_mcore.config import ModelConfig

ShardFormat = Literal["rcm", "safetensors"]
Members = Mapping[str, tarfile.TarInfo]  # the members of one sample by extension

_EXTENSIONS: dict[ShardFormat, tuple[str, ...]] = {
    "rcm": ("latent.pt", "embed.pt", "prompt.txt"),
    "safetensors": ("tensors.safetensors", "prompt.txt"),
}
# What tarfile raises on damaged headers; OverflowError comes from a seek to an absurd offset.
_TAR_ERRORS = (tarfile.TarError, ValueError, OverflowError)
_END_OF_ARCHIVE = bytes(tarfile.BLOCKSIZE)
_RANKS = {"latent": 4, "embed": 2, "given": 4, "image": 2}  # of the tensors of a sample


class BadSample(ValueError):
    """A sample that cannot be used; the message is the reason, in one line."""


class DamagedShard(ValueError):
    """A tar that cannot be read from here on; the message is the reason, in one line."""


@dataclass(frozen=True)
class Sample:
    """One video.

    Attributes:
        latent: [C, F, H, W], floating point.
        embed: [X, D], floating point; the rows that carry text (after `fit_sample`: padded with zero rows).
        prompt: the text itself.
        key: the sample's name within its shard; `write_shards` gives its own.
        given: [C, F, H, W], floating point, for image-conditioned networks (Wan I2V, FLF2V): the latents of a video of
            the given frames, zeros elsewhere.
        image: [Y, E], floating point, likewise: the image encoder's rows of the first given frame, then of the last.
    """

    latent: Tensor
    embed: Tensor
    prompt: str
    key: str = ""
    given: Tensor | None = None
    image: Tensor | None = None


class Shard:
    """An open shard, read once from front to back. Headers are read one ahead; payloads only when asked for.

    Raises: DamagedShard where the file is no tar, OSError where it cannot be opened. Every reading method may raise OSError.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._file = open(path, "rb")  # noqa: SIM115
        try:
            self._tar = tarfile.open(fileobj=self._file, mode="r:")  # noqa: SIM115
        except _TAR_ERRORS as error:
            self._file.close()
            raise DamagedShard(f"not a readable tar ({_one_line(error)})") from error
        except OSError:
            self._file.close()
            raise

    def samples(self) -> Iterator[tuple[str, Members]]:
        """The key and the members of each sample, in the order of the file.

        Raises: DamagedShard where the file is cut off or corrupt; the sample in which that happens is not yielded.
        """
        for key, members in itertools.groupby(self._members(), key=lambda named: named[0]):
            yield key, {extension: member for _, extension, member in members}

    def skip(self, count: int) -> Iterator[tuple[str, Members]]:
        """`samples()` without the first `count`, whose headers alone are read."""
        return itertools.islice(self.samples(), count, None)

    def read(self, key: str, members: Members) -> Sample:
        """The sample in its stored dtypes, without trailing zero rows of text.

        Raises: BadSample; DamagedShard where the file ends within it, cut after its header was read.
        """
        extensions = _EXTENSIONS[sample_format(members)]
        missing = [extension for extension in extensions if extension not in members]
        if missing:
            raise BadSample(f"missing member {', '.join(missing)} (found {', '.join(sorted(members))})")
        return _decode(key, {extension: self._payload(members[extension]) for extension in extensions})

    def close(self) -> None:
        self._tar.close()
        self._file.close()

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _members(self) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
        """Key, extension and header of every file in the tar that has both a key and an extension."""
        while (member := self._next_header()) is not None:
            key, extension = _split_name(member.name)
            if member.isreg() and key and extension:
                yield key, extension, member
        # tarfile takes a corrupt or missing header for the end; a tar that was written to its end has zeros there.
        self._file.seek(self._tar.offset)
        if self._file.read(tarfile.BLOCKSIZE) != _END_OF_ARCHIVE:
            raise DamagedShard(f"truncated or corrupt at byte {self._tar.offset}")

    def _next_header(self) -> tarfile.TarInfo | None:
        try:
            return self._tar.next()
        except _TAR_ERRORS as error:
            raise DamagedShard(_one_line(error)) from error

    def _payload(self, member: tarfile.TarInfo) -> bytes:
        stream = self._tar.extractfile(member)
        assert stream is not None, f"{member.name} is not a regular file"
        try:
            return stream.read()
        except _TAR_ERRORS as error:
            raise DamagedShard(f"{_one_line(error)} in {member.name}") from error


def sample_format(members: Members) -> ShardFormat:
    """Which format a sample with these members has. Raises: BadSample for neither."""
    if "tensors.safetensors" in members:
        return "safetensors"
    if "latent.pt" in members or "embed.pt" in members:
        return "rcm"
    found = ", ".join(sorted(members))
    raise BadSample(f"missing member tensors.safetensors, or latent.pt and embed.pt (found {found})")


def as_float32(sample: Sample) -> Sample:
    """The sample with float32 tensors. Raises: BadSample if one has another rank or a value is not finite in float32."""
    tensors: dict[str, Any] = {}
    for name, rank in _RANKS.items():
        value = getattr(sample, name)
        if value is None and name in ("given", "image"):
            continue
        tensors[name] = _checked(value, name, rank).float()
        # A sum is finite only if its terms are, and five times quicker than looking at each.
        if not tensors[name].sum().isfinite() and (bad := int((~torch.isfinite(tensors[name])).sum())):
            raise BadSample(f"{name} holds {bad} NaN or infinite values")
    return replace(sample, **tensors)


def fit_sample(sample: Sample, *, latent_shape: tuple[int, int, int, int], model: ModelConfig) -> Sample:
    """The sample as a network takes it: float32, latents cut to F frames, text padded to [text_len, text_dim].

    `given` and `image` are None unless `model.condition` is image or first_last.

    Raises: BadSample where a shape does not fit, a value is not finite (frames past the cut included), or the network takes
        `given` and `image` and the sample lacks one.
    """
    channels, frames, height, width = latent_shape
    c, f, h, w = sample.latent.shape
    if (c, h, w) != (channels, height, width) or f < frames:
        raise BadSample(f"latent is {list(sample.latent.shape)}, data.latent_shape is {list(latent_shape)}")
    rows, embed_width = sample.embed.shape
    if embed_width != model.text_dim:
        raise BadSample(f"text rows are {embed_width} wide, the model takes {model.text_dim}")
    if rows > model.text_len:
        raise BadSample(f"text has {rows} rows, the model takes {model.text_len}")
    if model.condition in ("image", "first_last"):
        _check_images(sample, frames, model)
    else:
        sample = replace(sample, given=None, image=None)
    sample = as_float32(sample)
    given = None if sample.given is None else sample.given[:, :frames]
    return replace(sample, latent=sample.latent[:, :frames], given=given, embed=pad_text(sample.embed, model.text_len))


def _check_images(sample: Sample, frames: int, model: ModelConfig) -> None:
    """Whether a sample, whose latent fits, brings what model.condition=image or first_last takes."""
    rows = [model.image_tokens, model.image_dim]
    for name, shape in (("given", list(sample.latent.shape)), ("image", rows)):
        value = getattr(sample, name)
        if value is None:
            raise BadSample(f"{name} is missing, model.condition={model.condition} takes {shape}")
        if list(value.shape) != shape:
            raise BadSample(f"{name} is {list(value.shape)}, model.condition={model.condition} takes {shape}")
    if model.condition == "first_last" and sample.latent.shape[1] > frames:
        raise BadSample(
            f"latent has {sample.latent.shape[1]} frames, data.latent_shape {frames}: a cut would lose the given last frame"
        )


def pad_text(embed: Tensor, text_len: int) -> Tensor:
    """Text rows [X, D] with zero rows appended to [text_len, D]. Raises: ValueError if X > text_len."""
    rows = embed.shape[0]
    if rows > text_len:
        raise ValueError(f"text has {rows} rows: more than text_len={text_len}")
    return torch.nn.functional.pad(embed, (0, 0, 0, text_len - rows))


def write_shards(samples: Iterable[Sample], folder: str | os.PathLike[str], *, samples_per_shard: int) -> list[Path]:
    """Writes `samples` in our format as shard_000000.tar, shard_000001.tar, ... and returns their paths.

    A sample's key is its 9-digit running index. Trailing zero rows of text are dropped. The same samples give the
    same bytes. A shard appears under its name only when it is complete, so an interrupted run can be repeated.

    Raises: ValueError for no samples, samples_per_shard below 1, a sample that could not be read back (wrong rank,
        not finite), and, after writing, for shards of an earlier, longer run in the same folder.
    """
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard={samples_per_shard}: must be at least 1")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    numbered = enumerate(samples)
    while chunk := next(numbered, None):
        path = folder / f"shard_{len(paths):06d}.tar"
        _write_shard(itertools.chain([chunk], itertools.islice(numbered, samples_per_shard - 1)), path)
        paths.append(path)
    if not paths:
        raise ValueError("samples is empty: there is nothing to write")
    stale = sorted(set(folder.glob("shard_*.tar")) - set(paths))
    if stale:
        raise ValueError(
            f"{folder} also holds {len(stale)} shards of an earlier run, from {stale[0].name} on: remove them, "
            "or write into an empty folder"
        )
    return paths


class ShardWriter:
    """A shard in our format, under a partial name until `commit`; leaving the context without it removes what was written."""

    def __init__(self, path: Path) -> None:
        self.path, self.samples = path, 0
        self._temporary = path.with_name(f".{path.name}.partial")
        self._temporary.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._temporary, "wb")  # noqa: SIM115
        self._tar = TarWriter(self._file, encoder=False, mtime=0)

    def add(self, index: int, sample: Sample) -> None:
        """Appends a sample, whose key is the 9-digit index. Raises: ValueError if it could not be read back; OSError."""
        self._tar.write({"__key__": f"{index:09d}", **_encode(sample, index)})
        self.samples += 1

    def commit(self) -> None:
        """Ends the shard and gives it its name."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())  # a name must not outlive its contents in a crash
        self._file.close()
        os.replace(self._temporary, self.path)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)


def _write_shard(samples: Iterable[tuple[int, Sample]], path: Path) -> None:
    with ShardWriter(path) as shard:
        for index, sample in samples:
            shard.add(index, sample)
        shard.commit()


def _encode(sample: Sample, index: int) -> dict[str, bytes]:
    try:
        latent, embed = _checked(sample.latent, "latent", 4), _checked(sample.embed, "embed", 2)
        as_float32(sample)
    except BadSample as error:
        raise ValueError(f"sample {index}: {error}") from error
    tensors = {"latent": latent.contiguous(), "embed": _text_rows(embed).contiguous()}
    for name in ("given", "image"):
        if (value := getattr(sample, name)) is not None:
            tensors[name] = value.detach().clone(memory_format=torch.contiguous_format)  # it may share memory with another
    return {"tensors.safetensors": safetensors.torch.save(tensors), "prompt.txt": sample.prompt.encode()}


def _decode(key: str, payloads: Mapping[str, bytes]) -> Sample:
    # Bytes from a stranger can make the decoders raise nearly anything; whatever it is, the sample is bad.
    tensors: Mapping[str, Any]
    try:
        prompt = payloads["prompt.txt"].decode()
        if "tensors.safetensors" in payloads:
            tensors = safetensors.torch.load(payloads["tensors.safetensors"])
        else:
            tensors = {name: _load_tensor(payloads[f"{name}.pt"]) for name in ("latent", "embed")}
    except Exception as error:
        raise BadSample(f"cannot be decoded: {type(error).__name__}: {_one_line(error)}") from error
    latent, embed = (_checked(tensors.get(name), name, _RANKS[name]) for name in ("latent", "embed"))
    # The other two are checked where a network takes them (`fit_sample`).
    return Sample(latent, _text_rows(embed), prompt, key, given=tensors.get("given"), image=tensors.get("image"))


def _load_tensor(data: bytes) -> object:
    # weights_only: a pickle that asks for anything but tensors is refused, not run.
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _checked(tensor: object, name: str, rank: int) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise BadSample(f"{name} is {'missing' if tensor is None else type(tensor).__name__}, not a tensor")
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or not tensor.is_floating_point():
        raise BadSample(f"{name} is {tensor.dtype}, {tensor.layout}, {tensor.device}, not dense floating point on cpu")
    if tensor.ndim != rank:
        raise BadSample(f"{name} has {tensor.ndim} dimensions, not {rank}: {list(tensor.shape)}")
    return tensor.detach()


def _text_rows(embed: Tensor) -> Tensor:
    """[X, D] without its trailing zero rows."""
    carries_text = (embed != 0).any(dim=1).nonzero()
    return embed[: int(carries_text[-1]) + 1 if len(carries_text) else 0]


def _split_name(name: str) -> tuple[str, str]:
    """Key and extension: `a/1.latent.pt` -> (a/1, latent.pt); the merge tool's `1/1.latent.pt` -> (1, latent.pt)."""
    folder, _, file = re.sub(r"^(\./)+", "", name).rpartition("/")
    stem, _, extension = file.partition(".")
    if not stem:  # a hidden file
        return "", extension
    if folder.rpartition("/")[2] == stem:
        folder = folder.rpartition("/")[0]
    return f"{folder}/{stem}" if folder else stem, extension


def _one_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
