"""Folders of diffusers' transformers: config.json and safetensors, one file or a sharded set."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rcm_mcore.config import ModelConfig
from rcm_mcore.interop.files import MAX_SHARD_BYTES, Progress, open_tensors, read_json, save_shards, write_json
from rcm_mcore.interop.lazy import LazyTensor, Weights
from rcm_mcore.interop.maps import make_model

_log = logging.getLogger(__name__)
WEIGHTS = "diffusion_pytorch_model"


@dataclass(frozen=True, kw_only=True)
class _ModelClass:
    """config.json of one class: keys that say sizes, with the class' defaults, and keys that have one value in our networks."""

    sizes: Mapping[str, Any]
    fixed: Mapping[str, Any]
    fields: Callable[[Mapping[str, Any]], dict[str, Any]]  # sizes -> what make_model takes
    config: Callable[[ModelConfig], dict[str, Any]]  # ModelConfig -> sizes


def _wan_fields(sizes: Mapping[str, Any]) -> dict[str, Any]:
    width, channels = sizes["num_attention_heads"] * sizes["attention_head_dim"], sizes["in_channels"]
    condition, latents, image = "text", channels, {}
    if sizes["image_dim"] is not None:
        condition, latents = "image", (channels - 4) // 2
        image = dict(image_dim=sizes["image_dim"])
        if sizes["added_kv_proj_dim"] != width:
            raise ValueError(f"added_kv_proj_dim={sizes['added_kv_proj_dim']}: must be the width {width}")
        if sizes["pos_embed_seq_len"] is not None:
            condition, image["image_len"] = "first_last", sizes["pos_embed_seq_len"] // 2
    outputs = sizes["out_channels"] or channels
    if outputs != latents:
        raise ValueError(
            f"in_channels={channels}, out_channels={outputs}: must be equal in a text-to-video network, 2 n + 4 and n in one "
            "with image_dim (Wan2.2's image-to-video network, which has none, is not supported)"
        )
    return dict(
        family="wan",
        condition=condition,
        num_layers=sizes["num_layers"],
        hidden_size=width,
        num_attention_heads=sizes["num_attention_heads"],
        ffn_hidden_size=sizes["ffn_dim"],
        in_channels=latents,
        text_dim=sizes["text_dim"],
        freq_dim=sizes["freq_dim"],
        patch_size=list(sizes["patch_size"]),
        **image,
    )


def _wan_config(model: ModelConfig) -> dict[str, Any]:
    image = model.condition != "text"
    return {
        "patch_size": list(model.patch_size),
        "num_attention_heads": model.num_attention_heads,
        "attention_head_dim": model.head_dim,
        "in_channels": model.patch_channels,
        "out_channels": model.in_channels,
        "text_dim": model.text_dim,
        "freq_dim": model.freq_dim,
        "ffn_dim": model.ffn_hidden_size,
        "num_layers": model.num_layers,
        "image_dim": model.image_dim if image else None,
        "added_kv_proj_dim": model.hidden_size if image else None,
        "pos_embed_seq_len": model.image_tokens if model.condition == "first_last" else None,
    }


def _cosmos_fields(sizes: Mapping[str, Any]) -> dict[str, Any]:
    width, channels, outputs = (
        sizes["num_attention_heads"] * sizes["attention_head_dim"],
        sizes["in_channels"],
        sizes["out_channels"],
    )
    if channels - outputs not in (0, 1):
        raise ValueError(
            f"in_channels={channels}, out_channels={outputs}: must be equal (text-to-image), or in_channels one more "
            "(video-to-world)"
        )
    if list(sizes["patch_size"]) != [1, 2, 2]:
        raise ValueError(f"patch_size={sizes['patch_size']}: in a Cosmos-Predict2 network it is [1, 2, 2]")
    ffn = sizes["mlp_ratio"] * width
    if ffn != int(ffn):
        raise ValueError(f"mlp_ratio={sizes['mlp_ratio']}: times the width {width} it is no whole number")
    return dict(
        family="cosmos",
        condition="frames" if channels > outputs else "text",
        num_layers=sizes["num_layers"],
        hidden_size=width,
        num_attention_heads=sizes["num_attention_heads"],
        ffn_hidden_size=int(ffn),
        in_channels=outputs,
        text_dim=sizes["text_embed_dim"],
        adaln_rank=sizes["adaln_lora_dim"],
        patch_size=list(sizes["patch_size"]),
        rope_ratios=list(sizes["rope_scale"]),
    )


def _cosmos_config(model: ModelConfig) -> dict[str, Any]:
    return {
        "in_channels": model.patch_channels - 1,  # the class adds the channel of the padding mask
        "out_channels": model.in_channels,
        "num_attention_heads": model.num_attention_heads,
        "attention_head_dim": model.head_dim,
        "num_layers": model.num_layers,
        "mlp_ratio": model.ffn_hidden_size / model.hidden_size,
        "text_embed_dim": model.text_dim,
        "adaln_lora_dim": model.adaln_rank,
        "patch_size": list(model.patch_size),
        "rope_scale": list(model.rope_ratios),
    }


_CLASSES = {
    "WanTransformer3DModel": _ModelClass(
        sizes={
            "patch_size": [1, 2, 2],
            "num_attention_heads": 40,
            "attention_head_dim": 128,
            "in_channels": 16,
            "out_channels": 16,
            "text_dim": 4096,
            "freq_dim": 256,
            "ffn_dim": 13824,
            "num_layers": 40,
            "image_dim": None,
            "added_kv_proj_dim": None,
            "pos_embed_seq_len": None,
        },
        fixed={"cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": 1e-6, "rope_max_seq_len": 1024},
        fields=_wan_fields,
        config=_wan_config,
    ),
    "CosmosTransformer3DModel": _ModelClass(
        sizes={
            "in_channels": 16,
            "out_channels": 16,
            "num_attention_heads": 32,
            "attention_head_dim": 128,
            "num_layers": 28,
            "mlp_ratio": 4.0,
            "text_embed_dim": 1024,
            "adaln_lora_dim": 256,
            "patch_size": [1, 2, 2],
            "rope_scale": [2.0, 1.0, 1.0],
        },
        fixed={"max_size": [128, 240, 240], "concat_padding_mask": True, "extra_pos_embed_type": None},
        fields=_cosmos_fields,
        config=_cosmos_config,
    ),
}
_CLASS_OF_FAMILY = {"wan": "WanTransformer3DModel", "cosmos": "CosmosTransformer3DModel"}
# Keys of networks that are none of ours, and the value that they have where they do not matter.
_ABSENT = {"use_crossattn_projection": False, "controlnet_block_every_n": None, "img_context_dim_in": None}
_IGNORED = {
    "crossattn_proj_in_channels",
    "encoder_hidden_states_channels",
    "img_context_num_tokens",
    "img_context_dim_out",
}


def read_diffusers(folder: Path) -> tuple[dict[str, LazyTensor], ModelConfig]:
    """The tensors (diffusers' names) and the network of a diffusers folder: a pipeline's, or the transformer's itself.

    Raises: ValueError for a missing or damaged file, another model class, or a configuration that no such network has.
    """
    home = folder / "transformer" if (folder / "transformer").is_dir() else folder
    path = home / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: not a diffusers folder: no config.json there or in its transformer/")
    config = read_json(path)
    try:
        model = model_of_config(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return open_tensors(home), model


def write_diffusers(
    folder: Path,
    weights: Weights,
    model: ModelConfig,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Makes a folder that diffusers' from_pretrained loads: config.json and one safetensors file or a sharded set.

    weights: under diffusers' names. max_shard_bytes: largest file; a larger tensor gets a file of its own.
    Raises: OSError when writing fails. Not atomic: see `atomic_destination`.
    """
    folder.mkdir()
    write_json(folder / "config.json", diffusers_config(model))
    save_shards(folder, WEIGHTS, weights, max_shard_bytes=max_shard_bytes, progress=progress)


def diffusers_config(model: ModelConfig) -> dict[str, Any]:
    """config.json of the transformer of a network, every key written: a missing one would take a default of the class."""
    name = _CLASS_OF_FAMILY[model.family]
    return {
        "_class_name": name,  # AutoModel needs it
        "_diffusers_version": version("diffusers"),
        **_CLASSES[name].config(model),
        **_CLASSES[name].fixed,
    }


def model_of_config(config: Mapping[str, Any]) -> ModelConfig:
    """The network of a transformer's config.json. Raises: ValueError naming the key that none of our networks has."""
    name = config.get("_class_name", "WanTransformer3DModel")
    if name not in _CLASSES:
        raise ValueError(f"_class_name={name!r}: only {' and '.join(_CLASSES)} can be converted")
    known = _CLASSES[name]
    fixed = {**known.fixed, **_ABSENT}
    for key, value in fixed.items():
        found = config.get(key, value)
        if (list(found) if isinstance(found, tuple) else found) != value:
            raise ValueError(f"{key}={found!r}: in every network that can be converted it is {value!r}")
    if name == "CosmosTransformer3DModel" and "extra_pos_embed_type" not in config:
        raise ValueError("extra_pos_embed_type is missing: the class then has learned positions, which is not supported")
    sizes = {key: config.get(key, default) for key, default in known.sizes.items()}
    ours = sizes.keys() | fixed.keys() | _IGNORED
    if ignored := sorted(key for key in config if key not in ours and not key.startswith("_")):
        _log.warning("config.json: keys that are not known are ignored: %s", ", ".join(ignored))
    for key, value in sizes.items():
        kind = known.sizes[key]
        wanted = (int, float) if isinstance(kind, float) else list | tuple if isinstance(kind, list) else int
        if not isinstance(value, wanted) and not (value is None and (kind is None or key == "out_channels")):
            what = "a list" if isinstance(kind, list) else "a number" if isinstance(kind, float) else "a whole number"
            raise ValueError(f"{key}={value!r}: must be {what}")
    return make_model(**known.fields(sizes))
