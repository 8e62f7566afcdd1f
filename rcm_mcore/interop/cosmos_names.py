"""Names and shapes of Cosmos-Predict2 weights, text-to-image and video-to-world (architectures.md B, C.2).

D model width, C latent channels, d head width, R rank of the AdaLN. Hub: the official names. No tensor has a bias and none is
permuted; ours fuses q, k, v of self-attention and k, v of cross-attention per head ([heads, 3 or 2, d, D]).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import torch

from rcm_mcore.config import ModelConfig
from rcm_mcore.interop.lazy import Weights
from rcm_mcore.interop.tables import Table

T = TypeVar("T")

PATCH_SIZE = (1, 2, 2)  # of every Cosmos-Predict2 network; a flat patch does not tell it
_DROPPED = ("accum_", "pos_embedder.")  # counters and tables of positions: no parameters
_REFUSED = {
    "extra_pos_embedder.": "learned positions (Cosmos-Predict1 and some post-trained networks)",
    "learnable_pos_embed.": "learned positions (Cosmos-Predict1 and some post-trained networks)",
    "crossattn_proj.": "a projection of the text (Cosmos-Predict2.5)",
    "img_context_proj.": "an image context (Cosmos-Predict2.5)",
}

_OUTER = {
    "x_embedder.proj.1": "patch_embed.proj",
    "t_embedder.1.linear_1": "time_embed.t_embedder.linear_1",
    "t_embedder.1.linear_2": "time_embed.t_embedder.linear_2",
    "t_embedding_norm": "time_embed.norm",
    "final_layer.adaln_modulation.1": "norm_out.linear_1",
    "final_layer.adaln_modulation.2": "norm_out.linear_2",
    "final_layer.linear": "proj_out",
}
_BLOCK = {
    **{
        f"adaln_modulation_{part}.{i}": f"norm{n}.linear_{i}"
        for n, part in enumerate(("self_attn", "cross_attn", "mlp"), start=1)
        for i in (1, 2)
    },
    **{
        f"{ours}.{name}": f"{theirs}.{their_name}"
        for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for name, their_name in {
            "q_proj": "to_q",
            "k_proj": "to_k",
            "v_proj": "to_v",
            "output_proj": "to_out.0",
            "q_norm": "norm_q",
            "k_norm": "norm_k",
        }.items()
    },
    "mlp.layer1": "ff.net.0.proj",
    "mlp.layer2": "ff.net.2",
}
_MCORE_OUTER = {
    "patch_embedding": ("x_embedder.proj.1",),
    "time_embedding.1": ("t_embedder.1.linear_1",),
    "time_embedding.2": ("t_embedder.1.linear_2",),
    "time_norm": ("t_embedding_norm",),
    "head.adaln.down": ("final_layer.adaln_modulation.1",),
    "head.adaln.up": ("final_layer.adaln_modulation.2",),
    "head.head": ("final_layer.linear",),
}
_MCORE_BLOCK = {
    **{
        f"adaln_{ours}.{half}": (f"adaln_modulation_{theirs}.{i}",)
        for ours, theirs in (("self_attn", "self_attn"), ("cross_attn", "cross_attn"), ("ffn", "mlp"))
        for i, half in ((1, "down"), (2, "up"))
    },
    **{f"{a}.{x}_layernorm": (f"{a}.{x}_norm",) for a in ("self_attn", "cross_attn") for x in "qk"},
    "self_attn.linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.linear_proj": ("self_attn.output_proj",),
    "cross_attn.linear_q": ("cross_attn.q_proj",),
    "cross_attn.linear_kv": ("cross_attn.k_proj", "cross_attn.v_proj"),
    "cross_attn.linear_proj": ("cross_attn.output_proj",),
    "ffn.linear_fc1": ("mlp.layer1",),
    "ffn.linear_fc2": ("mlp.layer2",),
}
_TABLE = Table(
    title="Cosmos-Predict2",
    scheme="cosmos",
    outer=_OUTER,
    block=_BLOCK,
    mcore_outer=_MCORE_OUTER,
    mcore_block=_MCORE_BLOCK,
    diffusers_blocks="transformer_blocks",
    leaves=lambda stem: (".weight",),
)


def table(condition: str) -> Table:
    """The names of a network, the same for every `model.condition`."""
    return _TABLE


def without_residue(weights: Mapping[str, T]) -> dict[str, T]:
    """The weights without what official files hold besides parameters.

    Raises: ValueError for parameters of networks that are none of Cosmos-Predict2's.
    """
    for name in weights:
        for start, what in _REFUSED.items():
            if name.startswith(start):
                raise ValueError(f"{name}: a Cosmos network with {what}, which is not supported; Cosmos-Predict2 has none")
    return {name: weight for name, weight in weights.items() if not name.startswith(_DROPPED)}


def expected_shapes(model: ModelConfig) -> dict[str, torch.Size]:
    """Hub name -> shape of every tensor: 7 outside the blocks and 20 in each."""
    width, ffn, rank, head = model.hidden_size, model.ffn_hidden_size, model.adaln_rank, model.head_dim
    patch = math.prod(model.patch_size)
    sizes: dict[str, tuple[int, ...]] = {
        "x_embedder.proj.1": (width, model.patch_channels * patch),
        "t_embedder.1.linear_1": (width, width),
        "t_embedder.1.linear_2": (3 * width, width),
        "t_embedding_norm": (width,),
        "final_layer.adaln_modulation.1": (rank, width),
        "final_layer.adaln_modulation.2": (2 * width, rank),
        "final_layer.linear": (model.in_channels * patch, width),
    }
    for i in range(model.num_layers):
        block = f"blocks.{i}."
        for part in ("self_attn", "cross_attn", "mlp"):
            sizes[f"{block}adaln_modulation_{part}.1"] = (rank, width)
            sizes[f"{block}adaln_modulation_{part}.2"] = (3 * width, rank)
        for attention, inputs in (("self_attn", width), ("cross_attn", model.text_dim)):
            name = f"{block}{attention}."
            sizes[name + "q_proj"] = sizes[name + "output_proj"] = (width, width)
            sizes[name + "k_proj"] = sizes[name + "v_proj"] = (width, inputs)
            sizes[name + "q_norm"] = sizes[name + "k_norm"] = (head,)
        sizes[block + "mlp.layer1"] = (ffn, width)
        sizes[block + "mlp.layer2"] = (width, ffn)
    return {name + ".weight": torch.Size(size) for name, size in sizes.items()}


def infer_fields(hub: Weights, condition: str, *, num_layers: int, head_dim: int | None) -> Mapping[str, Any]:
    """The sizes that a hub dict with the names of `table` has, and its condition; the rotary ratios are those of the size.

    head_dim: must be what the weights say, if given. Raises: ValueError for shapes that no such network has.
    """
    shapes = {
        name: hub[name + ".weight"].shape
        for name in ("x_embedder.proj.1", "final_layer.linear", "blocks.0.mlp.layer1", "blocks.0.cross_attn.k_proj")
    }
    for name, shape in shapes.items():
        if len(shape) != 2:
            raise ValueError(f"{name}.weight has shape {list(shape)}, must have 2 dimensions")
    width, patch_inputs = shapes["x_embedder.proj.1"]
    (found_head_dim,) = hub["blocks.0.self_attn.q_norm.weight"].shape
    if width % found_head_dim:
        raise ValueError(
            f"blocks.0.self_attn.q_norm.weight has {found_head_dim} entries, which do not divide the width {width}"
        )
    patch = math.prod(PATCH_SIZE)
    channels, rest = divmod(shapes["final_layer.linear"][0], patch)
    conditions = {channels + 1: "text", channels + 2: "frames"}
    if rest or patch_inputs % patch or patch_inputs // patch not in conditions:
        raise ValueError(
            f"x_embedder.proj.1.weight has {patch_inputs} columns and final_layer.linear.weight "
            f"{shapes['final_layer.linear'][0]} rows: a patch of {patch} takes one channel more than it gives "
            "(text-to-image) or two (video-to-world)"
        )
    return dict(
        condition=conditions[patch_inputs // patch],
        num_layers=num_layers,
        hidden_size=width,
        num_attention_heads=width // found_head_dim,
        ffn_hidden_size=shapes["blocks.0.mlp.layer1"][0],
        in_channels=channels,
        patch_size=list(PATCH_SIZE),
        text_dim=shapes["blocks.0.cross_attn.k_proj"][1],
        adaln_rank=hub["blocks.0.adaln_modulation_mlp.1.weight"].shape[0],
    )
