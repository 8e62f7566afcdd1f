"""Latents that a teacher makes of a list of prompts, in shards (rCM's data recipe); restartable (data/build.py)."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from rcm_mcore.checkpoint.network import resolve
from rcm_mcore.data import text
from rcm_mcore.data.build import NEGATIVE_EMBEDDING, Outcome, ShardFolder, write_embedding
from rcm_mcore.data.shards import BadSample, Sample, as_float32
from rcm_mcore.sampling.request import MESH_FIELDS, SamplerConfig, check
from rcm_mcore.sampling.sampler import Sampler

logger = logging.getLogger(__name__)

_PACKAGES = ("torch", "megatron-core", "transformers", "ftfy")


@dataclass(frozen=True, kw_only=True)
class SynthesizeRequest(SamplerConfig):
    """How to sample, and what becomes of it.

    Attributes:
        prompts: a text file, one prompt a line; sample i is of line i, counted from 0, and has the noise of number i.
        out: folder of the shards.
        long_prompts: skip prompts of more tokens than the network takes, or cut them.
        store_dtype: of the tensors in the shards.
    """

    prompts: Path
    out: Path
    batch_size: int = 1
    samples_per_shard: int = 64
    long_prompts: Literal["skip", "cut"] = "skip"
    store_dtype: torch.dtype = torch.bfloat16

    def arguments(self, lines: Sequence[str]) -> dict[str, Any]:
        """What the shards depend on, for `ShardFolder`: not the mesh and the batch, which change rounding alone."""
        names = [field.name for field in fields(SamplerConfig) if field.name not in (*MESH_FIELDS, "checkpoint")]
        checkpoint = resolve(self.checkpoint)
        manifest = checkpoint / "manifest.json"
        return {
            "dataset": "synthesize",
            "prompts_sha256": hashlib.sha256("\n".join(lines).encode()).hexdigest(),
            "checkpoint": str(checkpoint),
            "checkpoint_sha256": hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else None,
            **{name: getattr(self, name) for name in names},
            "long_prompts": self.long_prompts,
            "store_dtype": str(self.store_dtype).removeprefix("torch."),
        }


def read_prompts(path: Path) -> list[str]:
    """The lines of a file, empty ones included. Raises: ValueError when there is none, or it is not UTF-8; OSError."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.strip() for line in file]
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts {path}: is not UTF-8 text ({error})") from None
    if not any(lines):
        raise ValueError(f"prompts {path}: there is no prompt in it; write one a line")
    return lines


def synthesize(request: SynthesizeRequest) -> dict[str, Any] | None:
    """Collective over all ranks at its start alone: data-parallel groups then sample and write their blocks by themselves.

    Returns the manifest on a rank that finds everything done. Raises: ValueError for what cannot work, before anything is
    loaded; OSError.
    """
    model = check(request, int(os.environ.get("WORLD_SIZE", "1")))
    if model.condition != "text":
        raise ValueError(f"the network of {request.checkpoint} has model.condition={model.condition}: it must be text")
    if request.batch_size < 1:
        raise ValueError(f"batch_size={request.batch_size}: must be at least 1")
    lines = read_prompts(request.prompts)
    files = [] if request.negative_prompt is None else [NEGATIVE_EMBEDDING]
    folder = ShardFolder(
        request.out,
        arguments=request.arguments(lines),
        items=len(lines),
        samples_per_shard=request.samples_per_shard,
        files=files,
    )
    manifest = folder.complete()
    if manifest is not None:
        logger.info("%s is complete: nothing to do", request.out)
        return manifest
    with Sampler(request) as sampler:
        sampler.free_text_encoder()  # that of the negative prompt
        mesh = sampler.mesh
        dtype = min(getattr(torch, model.dtype), torch.float32, key=lambda d: d.itemsize)
        encoder = text.TextEncoder(request.text_encoder, device=mesh.device, dtype=dtype)
        plan: list[Any] = [None]
        if mesh.is_main:
            folder.begin()
            for name in files:
                (embed,) = encoder.encode([request.negative_prompt or ""])
                write_embedding(request.out / name, embed.to(request.store_dtype))
            plan = [[folder.pending(group, mesh.dp_size) for group in range(mesh.dp_size)]]
        dist.broadcast_object_list(plan)  # the ranks of a group must agree, and file systems may show one less than another
        blocks = [folder.items_of(block) for block in plan[0][mesh.dp_rank]]
        # Batches end with their block, so that a continued run has the same ones.
        size = request.batch_size
        batches = [block[start : start + size] for block in blocks for start in range(0, len(block), size)]
        outcomes = _outcomes(request, sampler, encoder, batches, lines)
        if mesh.reads:
            label = f"data-parallel group {mesh.dp_rank} of {mesh.dp_size}"
            folder.write_all(outcomes, items=sum(map(len, blocks)), label=label, show=mesh.is_main)
        else:
            for _ in outcomes:
                pass
        # No barrier: a group may finish hours after another.
        return folder.finish(versions={package: version(package) for package in _PACKAGES}) if mesh.reads else None


def _outcomes(
    request: SynthesizeRequest, sampler: Sampler, encoder: text.TextEncoder, batches: Sequence[range], lines: Sequence[str]
) -> Iterator[Outcome]:
    """The outcome of each item, in order; collective over the ranks that work on the same samples."""
    limit = min(text.MAX_TOKENS, sampler.model.text_len)
    for batch in batches:
        reasons = {item: _why_not(request, encoder, lines[item], limit) for item in batch}
        good = [item for item in batch if reasons[item] is None]
        rows = [row[:limit] for row in encoder.encode([lines[item] for item in good])]
        latents = dict(zip(good, sampler.latents(good, rows))) if good else {}
        embeds = dict(zip(good, rows))
        for item in batch:
            name, reason = f"line {item + 1}", reasons[item]
            if reason is not None:
                yield Outcome(item, name, reason=reason)
                continue
            dtype = request.store_dtype
            sample = Sample(latent=latents[item].to(dtype), embed=embeds[item].to(dtype), prompt=lines[item])
            try:
                as_float32(sample)
            except BadSample as error:
                yield Outcome(item, name, reason=str(error))
            else:
                yield Outcome(item, name, sample)


def _why_not(request: SynthesizeRequest, encoder: text.TextEncoder, prompt: str, limit: int) -> str | None:
    if not prompt:
        return "the prompt is empty"
    (tokens,) = encoder.token_counts([prompt])
    if tokens > limit and request.long_prompts == "skip":
        return f"the prompt has {tokens} tokens, the network takes {limit}"
    return None
