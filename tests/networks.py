"""Tiny networks of every kind that is converted, built by diffusers with random weights."""

import torch
from diffusers import CosmosTransformer3DModel, WanTransformer3DModel

from rcm_mcore.config import ModelConfig

# Sizes differ wherever they can, so that no two can be mixed up; the patch is the released one.
_WAN = dict(
    size="tiny", num_layers=2, hidden_size=64, num_attention_heads=2, ffn_hidden_size=96, in_channels=5, text_dim=24,
    freq_dim=32, image_dim=40,
)  # fmt: skip
_COSMOS = dict(
    family="cosmos", size="tiny", num_layers=2, hidden_size=64, num_attention_heads=2, ffn_hidden_size=96, in_channels=5,
    text_dim=24, adaln_rank=8,
)  # fmt: skip
MODELS = {
    "wan": ModelConfig(**_WAN | dict(image_dim=1280)),
    "wan image": ModelConfig(**_WAN, condition="image"),
    "wan first_last": ModelConfig(**_WAN, condition="first_last", image_len=7),
    "cosmos": ModelConfig(**_COSMOS, rope_ratios=(1.0, 4.0, 4.0)),
    "cosmos frames": ModelConfig(**_COSMOS, condition="frames", rope_ratios=(1.0, 3.0, 3.0)),
}
OFFICIAL = {kind: kind.split()[0] for kind in MODELS}  # the format of the official names


def random_transformer(kind, seed=0):
    """diffusers' network, no weight zero."""
    model = MODELS[kind]
    common = dict(num_attention_heads=model.num_attention_heads, attention_head_dim=model.head_dim, num_layers=model.num_layers)
    if model.family == "cosmos":
        net = CosmosTransformer3DModel(
            in_channels=6 if kind == "cosmos frames" else 5,
            out_channels=5,
            mlp_ratio=1.5,
            text_embed_dim=24,
            adaln_lora_dim=8,
            rope_scale=model.rope_ratios,
            extra_pos_embed_type=None,
            **common,
        )
    else:
        image = dict(in_channels=14, image_dim=40, added_kv_proj_dim=64) if kind != "wan" else dict(in_channels=5)
        positions = dict(pos_embed_seq_len=14) if kind == "wan first_last" else {}
        net = WanTransformer3DModel(
            out_channels=5, text_dim=24, freq_dim=32, ffn_dim=96, **image, **positions, **common
        )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return net


def same(a, b):
    """Equal names, dtypes and values; lazy weights are loaded."""
    read = lambda x: x if isinstance(x, torch.Tensor) else x.load()
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(read(a[n]), read(b[n])) for n in a)
