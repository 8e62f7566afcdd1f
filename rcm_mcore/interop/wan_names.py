"""Names and shapes of Wan2.1 weights: text-to-video (T2V), and with image embeddings I2V and FLF2V (architectures.md A, C.1).

D model width, C latent channels, d head width, (pt, ph, pw) patch. Hub: the official names, patch_embedding.weight
[D, channels, pt, ph, pw]; ours flattens it and fuses q, k, v of self-attention, k, v of each cross-attention per head
([heads, 3 or 2, d, D]), so that a tensor-parallel split of dimension 0 is a split by heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from rcm_mcore.config import ModelConfig
from rcm_mcore.interop.lazy import Weights
from rcm_mcore.interop.tables import Table

RELEASED_HEAD_DIM = 128  # head width of every released Wan network; the weights do not tell it
PATCH = "patch_embedding.weight"
_TITLES = {"text": "text-to-video", "image": "image-to-video", "first_last": "first-and-last-frame-to-video"}

_OUTER = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
}
_OUTER_IMAGE = {
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
}
_OUTER_POSITIONS = {"img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed"}
_BLOCK = {
    "modulation": "scale_shift_table",
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "self_attn.norm_q": "attn1.norm_q",
    "self_attn.norm_k": "attn1.norm_k",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "cross_attn.norm_q": "attn2.norm_q",
    "cross_attn.norm_k": "attn2.norm_k",
    "norm3": "norm2",  # the norm before cross-attention, the only one of a block with parameters
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
_BLOCK_IMAGE = {
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
}
_MCORE_BLOCK = {
    "modulation": ("modulation",),
    "self_attn.linear_qkv": ("self_attn.q", "self_attn.k", "self_attn.v"),
    "self_attn.linear_proj": ("self_attn.o",),
    "self_attn.norm_q": ("self_attn.norm_q",),
    "self_attn.norm_k": ("self_attn.norm_k",),
    "cross_attn.linear_q": ("cross_attn.q",),
    "cross_attn.linear_kv": ("cross_attn.k", "cross_attn.v"),
    "cross_attn.linear_proj": ("cross_attn.o",),
    "cross_attn.norm_q": ("cross_attn.norm_q",),
    "cross_attn.norm_k": ("cross_attn.norm_k",),
    "norm3": ("norm3",),
    "ffn.linear_fc1": ("ffn.0",),
    "ffn.linear_fc2": ("ffn.2",),
}
_MCORE_BLOCK_IMAGE = {
    "cross_attn.linear_kv_img": ("cross_attn.k_img", "cross_attn.v_img"),
    "cross_attn.norm_k_img": ("cross_attn.norm_k_img",),
}


def _leaves(stem: str) -> tuple[str, ...]:
    if stem.endswith(("modulation", "emb_pos")):
        return ("",)
    return (".weight",) if stem.endswith(("norm_q", "norm_k", "norm_k_img")) else (".weight", ".bias")


def table(condition: str) -> Table:
    """The names of a network with this `model.condition`."""
    image = condition != "text"
    outer = {**_OUTER, **(_OUTER_IMAGE if image else {}), **(_OUTER_POSITIONS if condition == "first_last" else {})}
    return Table(
        title=f"Wan2.1 {_TITLES[condition]}",
        scheme="wan",
        outer=outer,
        block={**_BLOCK, **(_BLOCK_IMAGE if image else {})},
        mcore_outer={stem: (stem,) for stem in outer},
        mcore_block={**_MCORE_BLOCK, **(_MCORE_BLOCK_IMAGE if image else {})},
        diffusers_blocks="blocks",
        leaves=_leaves,
    )


def expected_shapes(model: ModelConfig) -> dict[str, torch.Size]:
    """Hub name -> shape of every tensor: T2V 15 outside the blocks and 27 in each, I2V 8 and 5 more, FLF2V one more."""
    width, ffn, image = model.hidden_size, model.ffn_hidden_size, model.condition != "text"
    sizes: dict[str, tuple[int, ...]] = {
        PATCH: (width, model.patch_channels, *model.patch_size),
        "patch_embedding.bias": (width,),
        "head.modulation": (1, 2, width),
    }
    linears = {  # name -> (outputs, inputs)
        "text_embedding.0": (width, model.text_dim),
        "text_embedding.2": (width, width),
        "time_embedding.0": (width, model.freq_dim),
        "time_embedding.2": (width, width),
        "time_projection.1": (6 * width, width),
        "head.head": (math.prod(model.patch_size) * model.in_channels, width),
    }
    norms: dict[str, int] = {}  # name -> width
    if image:
        linears["img_emb.proj.1"] = (model.image_dim, model.image_dim)
        linears["img_emb.proj.3"] = (width, model.image_dim)
        norms |= {"img_emb.proj.0": model.image_dim, "img_emb.proj.4": width}
    if model.condition == "first_last":
        sizes["img_emb.emb_pos"] = (1, model.image_tokens, model.image_dim)
    for i in range(model.num_layers):
        block = f"blocks.{i}."
        sizes[block + "modulation"] = (1, 6, width)
        norms[block + "norm3"] = width
        for attention in ("self_attn.", "cross_attn."):
            with_image = image and attention == "cross_attn."
            for norm in ("norm_q", "norm_k", *(("norm_k_img",) if with_image else ())):
                sizes[f"{block}{attention}{norm}.weight"] = (width,)
            for linear in (*"qkvo", *(("k_img", "v_img") if with_image else ())):
                linears[block + attention + linear] = (width, width)
        linears[block + "ffn.0"] = (ffn, width)
        linears[block + "ffn.2"] = (width, ffn)
    for name, (outputs, inputs) in linears.items():
        sizes[name + ".weight"], sizes[name + ".bias"] = (outputs, inputs), (outputs,)
    for name, size in norms.items():
        sizes[name + ".weight"] = sizes[name + ".bias"] = (size,)
    return {name: torch.Size(size) for name, size in sizes.items()}


def infer_fields(hub: Weights, condition: str, *, num_layers: int, head_dim: int | None) -> Mapping[str, Any]:
    """The sizes that a hub dict with the names of `table(condition)` has.

    head_dim: head width, default 128. Raises: ValueError for shapes that no such network has.
    """
    head_dim = RELEASED_HEAD_DIM if head_dim is None else head_dim
    for name, dimensions in ((PATCH, 5), ("head.head.weight", 2), ("blocks.0.ffn.0.weight", 2)):
        if hub[name].ndim != dimensions:
            hint = "; flattened like this it is an rCM file" if name == PATCH and hub[name].ndim == 2 else ""
            raise ValueError(f"{name} has shape {list(hub[name].shape)}, must have {dimensions} dimensions{hint}")
    width, patch_channels, *patch = hub[PATCH].shape
    outputs = hub["head.head.weight"].shape[0]
    if outputs % math.prod(patch):
        raise ValueError(f"head.head.weight has {outputs} rows, not a multiple of the patch {patch}")
    channels = outputs // math.prod(patch)
    if condition == "text" and patch_channels != channels:
        raise ValueError(
            f"{PATCH} takes {patch_channels} channels and head.head.weight gives {channels}: a Wan2.1 text-to-video network "
            "has as many in as out, and an image-to-video network has img_emb (Wan2.2's, which has none, is not supported)"
        )
    if width % head_dim:
        raise ValueError(f"head width {head_dim} does not divide the model width {width}: give the right head_dim (--head-dim)")
    fields: dict[str, Any] = dict(
        num_layers=num_layers,
        hidden_size=width,
        num_attention_heads=width // head_dim,
        ffn_hidden_size=hub["blocks.0.ffn.0.weight"].shape[0],
        in_channels=channels,
        patch_size=patch,
        text_dim=hub["text_embedding.0.weight"].shape[-1],
        freq_dim=hub["time_embedding.0.weight"].shape[-1],
    )
    if condition != "text":
        fields["image_dim"] = hub["img_emb.proj.1.weight"].shape[-1]
    if condition == "first_last":
        fields["image_len"] = hub["img_emb.emb_pos"].shape[1] // 2
    return fields
