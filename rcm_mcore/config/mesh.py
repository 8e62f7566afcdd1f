"""How ranks are laid out, and what a model allows; needs no process group."""

from __future__ import annotations

from dataclasses import dataclass

from rcm_mcore.config.model import ModelConfig


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the process mesh; the data-parallel size is what remains of the world."""

    tp: int = 1  # tensor-parallel size: heads and ffn are split over it
    sp: bool = False  # sequence parallelism over the tensor-parallel ranks, between the parallel linears


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

    `tokens`: tokens of a sample, checked against the sequence-parallel split when given.
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
    if mesh.sp and mesh.tp == 1:
        raise ValueError("mesh.sp=true with mesh.tp=1: sequence parallelism splits over tensor-parallel ranks; set mesh.tp > 1")
    if world_size % mesh.tp:
        raise ValueError(f"mesh.tp={mesh.tp} does not divide the {world_size} ranks that were launched")
    if mesh.sp and tokens is not None and tokens % mesh.tp:
        fits = [n for n in works if tokens % n == 0 and n > 1]
        raise ValueError(
            f"mesh.sp=true cannot split the {tokens} tokens of a sample over mesh.tp={mesh.tp}: "
            f"use mesh.tp in {fits} or mesh.sp=false"
        )
    return world_size // mesh.tp
