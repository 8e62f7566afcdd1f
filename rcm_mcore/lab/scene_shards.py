"""Shards of latents of scenes, for training: rendered, encoded and written by several processes, restartable (data/build.py).

OUT/shard_*.tar, OUT/dataset.json      of scenes without held-out combinations
OUT/text_encoder/                      tokenizer and encoder (scene_text.py)
OUT/negative_embedding.safetensors     of the empty prompt
"""

import copy
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rcm_mcore.data.build import NEGATIVE_EMBEDDING, Outcome, ShardFolder, write_embedding
from rcm_mcore.data.shards import Sample
from rcm_mcore.data.text import TextEncoder
from rcm_mcore.lab.codec import LATENT_FRAMES
from rcm_mcore.lab.scene_text import build_scene_text_encoder
from rcm_mcore.lab.scenes import draw_scenes, prompt_of, render

logger = logging.getLogger(__name__)

TEXT_ENCODER = "text_encoder"
_FILES = (NEGATIVE_EMBEDDING, f"{TEXT_ENCODER}/spiece.model", f"{TEXT_ENCODER}/model.safetensors")
_PACKAGES = ("torch", "transformers", "sentencepiece", "scikit-learn", "pillow", "numpy")


class Codec(Protocol):
    """A module with a method that gives latents [n, C, F, H, W] of videos [n, 3, 17, 64, 64] in [0, 1]."""

    def encode(self, videos: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class _Job:
    folder: ShardFolder
    codec: nn.Module
    seed: int
    device: str
    dtype: torch.dtype
    single_frames: bool
    processes: int
    show: bool


def write_dataset(
    out: str | os.PathLike[str],
    codec: nn.Module,
    *,
    count: int,
    seed: int,
    samples_per_shard: int = 256,
    processes: int = 1,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    single_frames: bool = False,
    text_encoder: str | os.PathLike[str] | None = None,
    show: bool = True,
) -> dict[str, Any]:
    """Writes the data set, or what an interrupted run left of it, and returns the manifest. Each shard has scenes of its own
    seed, so that any number of processes writes the same.

    Args:
        out: a folder that is missing, empty, or was begun with the same arguments.
        codec: with a method `encode` (``Codec``); for several processes it must be picklable.
        count: of samples.
        seed: of scenes, and of a text encoder that is built.
        processes: which render, encode and write.
        device: of renderer, codec and text encoder; "cuda": all GPUs, to which the processes are dealt.
        dtype: of the tensors in the shards.
        single_frames: each latent frame of a video is a sample [C, 1, H, W] of its own.
        text_encoder: a folder that one was built in, to be copied; none: it is built. One that other versions of its packages
            build has other tokens and weights.
        show: a progress bar, of the first process.
    Raises: ValueError for a count or number of processes below 1, a codec that cannot encode, no text encoder,
        another folder; OSError.
    """
    if count < 1 or processes < 1:
        raise ValueError(f"count={count}, processes={processes}: both must be at least 1")
    if not isinstance(codec, nn.Module) or not callable(getattr(codec, "encode", None)):
        raise ValueError(f"codec is a {type(codec).__name__}: must be a torch module with a method encode")
    root = Path(out)
    arguments: dict[str, Any] = {
        "dataset": "scenes",
        "count": count,
        "seed": seed,
        "codec_sha256": _digest(codec),
        "dtype": str(dtype).removeprefix("torch."),
    }
    if single_frames:
        arguments["single_frames"] = True
    if text_encoder is not None:
        arguments["text_encoder_sha256"] = _digest_of_files(Path(text_encoder))
    folder = ShardFolder(root, arguments=arguments, items=count, samples_per_shard=samples_per_shard, files=_FILES)
    manifest = folder.complete()
    if manifest is not None:
        logger.info("%s is complete: nothing to do", root)
        return manifest
    folder.begin()
    _write_text_encoder(root, seed, text_encoder)
    processes = min(processes, len(folder.pending(0, 1)) or 1)
    # On the CPU while it travels: a GPU's memory is not to be shared between processes.
    still = copy.deepcopy(codec).cpu().eval()
    own: dict[str, Any] = dict(seed=seed, device=str(device), dtype=dtype, single_frames=single_frames)
    job = _Job(folder=folder, codec=still, processes=processes, show=show, **own)
    if processes == 1:
        _write_rank(0, job)
    else:
        torch.multiprocessing.spawn(_write_alone, (job,), nprocs=processes)
    manifest = folder.finish(versions={package: version(package) for package in _PACKAGES})
    assert manifest is not None, f"{root}: every process ended, and blocks are missing"
    return manifest


def _write_text_encoder(root: Path, seed: int, given: str | os.PathLike[str] | None) -> None:
    """Text encoder and negative embedding, unless they are there."""
    if all((root / name).is_file() for name in _FILES):
        return
    shutil.rmtree(root / TEXT_ENCODER, ignore_errors=True)  # a tokenizer that is half there would be taken for the new one
    if given is None:
        build_scene_text_encoder(root / TEXT_ENCODER, seed=seed)
    else:
        shutil.copytree(given, root / TEXT_ENCODER)
    (embed,) = TextEncoder(root / TEXT_ENCODER).encode([""])
    write_embedding(root / NEGATIVE_EMBEDDING, embed)


def _write_alone(rank: int, job: _Job) -> None:
    """One of several processes."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // job.processes))
    _write_rank(rank, replace(job, device=_device_of(rank, job.device)))


def _device_of(rank: int, device: str) -> str:
    """Where one of several processes works."""
    return f"cuda:{rank % torch.cuda.device_count()}" if device == "cuda" else device


def _write_rank(rank: int, job: _Job) -> None:
    blocks = job.folder.pending(rank, job.processes)
    items = sum(len(job.folder.items_of(block)) for block in blocks)
    label = f"scenes, process {rank + 1} of {job.processes}"
    job.folder.write_all(_outcomes(blocks, job), items=items, label=label, show=job.show and rank == 0)


@torch.no_grad()
def _outcomes(blocks: list[int], job: _Job) -> Iterator[Outcome]:
    """The samples of these blocks, in order."""
    codec: Any = job.codec.to(job.device)
    text = TextEncoder(job.folder.root / TEXT_ENCODER, device=job.device)
    for block in blocks:
        items = job.folder.items_of(block)
        times = LATENT_FRAMES if job.single_frames else 1
        scenes = draw_scenes(-(-len(items) // times), (job.seed, block))
        prompts = prompt_of(scenes)
        latents = codec.encode(render(scenes, job.device)).to(job.dtype).cpu()
        rows = text.encode(prompts, batch_size=len(prompts))
        if job.single_frames:  # the frames of a video far from one another: a batch takes neighbours
            latents, rows, prompts = torch.cat(latents.split(1, dim=2)), list(rows) * times, list(prompts) * times
        for index, latent, embed, prompt in zip(items, latents, rows, prompts):
            yield Outcome(index, prompt, Sample(latent=latent.clone(), embed=embed.to(job.dtype), prompt=prompt))


def _digest_of_files(folder: Path) -> str:
    """SHA-256 of a folder's files, names and bytes; ValueError if it lacks one of those that a text encoder consists of."""
    parts = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    for name in ("config.json", "model.safetensors", "spiece.model", "tokenizer.json"):
        if folder / name not in parts:
            raise ValueError(f"text_encoder={folder}: no {name} in it; expected a folder of build_scene_text_encoder")
    digest = hashlib.sha256()
    for path in parts:
        digest.update(f"{path.name} {path.stat().st_size} ".encode() + path.read_bytes())
    return digest.hexdigest()


def _digest(codec: nn.Module) -> str:
    """SHA-256 of the codec's weights, names and bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(codec.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
