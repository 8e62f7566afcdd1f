"""How ranks are laid out, and what a model allows; needs no process group."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from rcm_mcore.config.model import ModelConfig


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the process mesh; the data-parallel size is what remains of the world.

    Ranks are numbered with tensor parallelism fastest, then context, then data, then pipeline parallelism.
    """

    tp: int = 1  # tensor-parallel size: heads and ffn are split over it
    sp: bool = False  # sequence parallelism over the tensor-parallel ranks, between the parallel linears
    cp: int = 1  # context-parallel size: the tokens of a sample are split over it
    # How attention reaches the tokens of other ranks: keys travel round a ring; heads are exchanged for tokens; or heads within
    # groups of cp_inner ranks, and rings between groups. auto: a ring within a node, two levels beyond it if the heads allow.
    cp_mode: Literal["auto", "ring", "all_to_all", "two_level"] = "auto"
    cp_inner: int | None = None  # two_level: ranks that exchange heads; none: as many as can
    pp: int = 1  # pipeline-parallel size: the layers are split over it
    vpp: int = 1  # chunks of layers of each pipeline rank (interleaved schedule): a smaller bubble, more messages
    timeout_minutes: float = 30.0  # a collective that waits longer for another rank fails


def tokens_per_sample(model: ModelConfig, latent_shape: tuple[int, ...]) -> int:
    """Tokens the network sees for one latent [C, F, H, W].

    Raises ValueError when the patches do not divide the latent or its channels are not the model's.
    """
    if len(latent_shape) != 4:
        raise ValueError(f"data.latent_shape={list(latent_shape)}: must have four entries, [C, F, H, W]")
    channels, *sizes = latent_shape
    if channels != model.in_channels:
        raise ValueError(
            f"data.latent_shape={list(latent_shape)}: {channels} channels, but model.in_channels={model.in_channels}"
        )
    tokens = 1
    for axis, size, patch in zip(("F", "H", "W"), sizes, model.patch_size):
        if size < 1 or size % patch:
            raise ValueError(f"data.latent_shape={list(latent_shape)}: {axis}={size} is not a multiple of the patch {patch}")
        tokens *= size // patch
    return tokens


def validate_mesh(model: ModelConfig, mesh: MeshConfig, world_size: int, *, tokens: int | None = None) -> int:
    """Check that `model` can run on `world_size` ranks laid out as `mesh`; returns the data-parallel size.

    `tokens`: tokens of a sample, which must suffice for every rank, when given.
    Raises ValueError naming the field, its value and the values that would work.
    """
    if mesh.tp < 1:
        raise ValueError(f"mesh.tp={mesh.tp}: must be at least 1")
    heads, ffn = model.num_attention_heads, model.ffn_hidden_size
    works = [n for n in range(1, heads + 1) if heads % n == 0 and ffn % n == 0]
    if mesh.tp not in works:
        raise ValueError(
            f"mesh.tp={mesh.tp} must divide model.num_attention_heads={heads} and model.ffn_hidden_size={ffn}: "
            f"use one of {works}"
        )
    if model.fp8_forwards and (model.hidden_size % (16 * mesh.tp) or ffn % (16 * mesh.tp)):
        raise ValueError(
            f"model.fp8_forwards=true needs model.hidden_size={model.hidden_size} and model.ffn_hidden_size={ffn} to be "
            f"multiples of 16 on each of mesh.tp={mesh.tp} ranks: use a smaller mesh.tp, or model.fp8_forwards=false"
        )
    if mesh.sp and mesh.tp == 1:
        raise ValueError("mesh.sp=true with mesh.tp=1: sequence parallelism splits over tensor-parallel ranks; set mesh.tp > 1")
    if mesh.cp < 1:
        raise ValueError(f"mesh.cp={mesh.cp}: must be at least 1")
    if not 1 <= mesh.pp <= model.num_layers:
        raise ValueError(f"mesh.pp={mesh.pp}: must lie between 1 and model.num_layers={model.num_layers}")
    if mesh.vpp < 1 or (mesh.vpp > 1 and mesh.pp == 1):
        raise ValueError(f"mesh.vpp={mesh.vpp} with mesh.pp={mesh.pp}: chunks of layers are interleaved over 2 or more stages")
    if mesh.pp * mesh.vpp > model.num_layers:
        raise ValueError(
            f"mesh.vpp={mesh.vpp} with mesh.pp={mesh.pp} makes {mesh.pp * mesh.vpp} chunks of "
            f"model.num_layers={model.num_layers} layers: use mesh.vpp of at most {model.num_layers // mesh.pp}"
        )
    if not 0 < mesh.timeout_minutes < math.inf:
        raise ValueError(f"mesh.timeout_minutes={mesh.timeout_minutes}: must be a positive number")
    if tokens is not None and mesh.cp > tokens:
        raise ValueError(f"mesh.cp={mesh.cp} exceeds the {tokens} tokens of a sample: use at most {tokens}")
    if world_size % mesh.tp:
        raise ValueError(f"mesh.tp={mesh.tp} does not divide the {world_size} ranks that were launched")
    if world_size % (mesh.tp * mesh.cp):
        raise ValueError(
            f"mesh.cp={mesh.cp} with mesh.tp={mesh.tp} does not divide the {world_size} ranks that were launched: "
            f"use mesh.cp in {_divisors(world_size // mesh.tp)}"
        )
    if world_size % (mesh.tp * mesh.cp * mesh.pp):
        works = [n for n in _divisors(world_size // (mesh.tp * mesh.cp)) if n <= model.num_layers]
        raise ValueError(
            f"mesh.pp={mesh.pp} with mesh.tp={mesh.tp} and mesh.cp={mesh.cp} does not divide the {world_size} ranks that were "
            f"launched: use mesh.pp in {works}"
        )
    _check_exchange(mesh, heads // mesh.tp)
    return world_size // (mesh.tp * mesh.cp * mesh.pp)


def layers_of_stages(num_layers: int, stages: int) -> list[range]:
    """The layers of each pipeline stage; where they do not divide, the outer stages have one fewer, the first of all.

    These also embed patches and have the head, and the first keeps the most microbatches in flight.
    """
    least, more = divmod(num_layers, stages)
    fuller = sorted(range(stages), key=lambda stage: (min(stage, stages - 1 - stage), stage), reverse=True)[:more]
    ends = [0]
    for stage in range(stages):
        ends.append(ends[-1] + least + (stage in fuller))
    return [range(a, b) for a, b in zip(ends, ends[1:])]


def chunks_of_stages(num_layers: int, stages: int, chunks: int) -> list[list[range]]:
    """The layers of each chunk of each stage: data pass through the first chunk of every stage, then through the second."""
    ranges = layers_of_stages(num_layers, stages * chunks)
    return [ranges[stage::stages] for stage in range(stages)]


def microbatches_of_a_chunk(mesh: MeshConfig, microbatches: int) -> int:
    """Microbatches that pass through a chunk of layers before those of the next: the fewest that leave no group smaller than
    the stages (megatron's interleaved schedule takes no other).
    """
    sizes = range(mesh.pp, microbatches + 1)
    return next((n for n in sizes if microbatches % n == 0 or microbatches % n >= mesh.pp), mesh.pp)


def _check_exchange(mesh: MeshConfig, heads: int) -> None:
    """That `heads` of a tensor-parallel rank can be exchanged as mesh.cp_mode and mesh.cp_inner say."""
    inner = _inner_sizes(mesh.cp, heads)
    if mesh.cp_mode == "all_to_all" and mesh.cp not in inner:
        works = _divisors(heads)
        raise ValueError(
            f"mesh.cp={mesh.cp} with mesh.cp_mode=all_to_all must divide the {heads} heads of a tensor-parallel rank: "
            f"use mesh.cp in {works}, or mesh.cp_mode=ring or two_level"
        )
    if mesh.cp_mode != "two_level":
        if mesh.cp_inner is not None:
            raise ValueError(f"mesh.cp_inner={mesh.cp_inner} is for mesh.cp_mode=two_level, not {mesh.cp_mode}")
        return
    levels = [n for n in inner if 1 < n < mesh.cp]
    if mesh.cp_inner not in (None, *levels) or not levels:
        raise ValueError(
            f"mesh.cp_inner={mesh.cp_inner} with mesh.cp_mode=two_level must lie between 1 and mesh.cp={mesh.cp} and divide it "
            f"and the {heads} heads of a tensor-parallel rank: "
            + (
                f"use one of {levels}"
                if levels
                else "none does; use mesh.cp_mode=ring" + (" or all_to_all" if mesh.cp in inner else "")
            )
        )


def resolve_mesh(model: ModelConfig, mesh: MeshConfig, *, ranks_per_node: int) -> tuple[MeshConfig, str]:
    """`mesh` with cp_mode and cp_inner decided (1 for a ring, cp for all-to-all), and a sentence that says why.

    `mesh` must be valid (`validate_mesh`).
    """
    heads = model.num_attention_heads // mesh.tp
    inner = _inner_sizes(mesh.cp, heads)
    near = [n for n in inner if ranks_per_node % (n * mesh.tp) == 0]
    facts = f"{heads} heads a tensor-parallel rank, {mesh.cp} context-parallel ranks, {ranks_per_node} ranks a node"
    mode, size, why = mesh.cp_mode, 1, "as configured"
    if mode == "all_to_all":
        size = mesh.cp
    elif mode == "two_level":
        between = [n for n in near if 1 < n < mesh.cp] or [n for n in inner if 1 < n < mesh.cp][:1]
        size = mesh.cp_inner or between[-1]
    elif mode == "auto" and ranks_per_node % (mesh.cp * mesh.tp) == 0:
        mode, why = "ring", "the ranks are within a node, where keys travel beside the kernels"
    elif mode == "auto":
        size = max((n for n in near if n < mesh.cp), default=1)
        mode = "ring" if size == 1 else "two_level"
        why = "fewest transfers between nodes" if size > 1 else "no number of ranks within a node divides the heads"
    if mesh.cp == 1:
        return replace(mesh, cp_mode="ring", cp_inner=1), "one rank holds all tokens"
    text = {"ring": "ring", "all_to_all": "all_to_all", "two_level": f"two_level, {size} ranks exchange heads"}[mode]
    return replace(mesh, cp_mode=mode, cp_inner=size), f"{text} ({why}; {facts})"


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _inner_sizes(cp: int, heads: int) -> list[int]:
    """Numbers of ranks, ascending, that can exchange heads."""
    return _divisors(math.gcd(cp, heads))
