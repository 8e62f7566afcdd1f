"""diffusers' networks in float64: what ours are measured against, written by others.

`islands_in_fp64`, `Sinusoid`: diffusers computes parts in float32 whatever the model's dtype; these keep them in float64.
"""

import contextlib
import math
from functools import partial
from types import SimpleNamespace
from zlib import crc32

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from rcm_mcore.condition import Condition
from rcm_mcore.config import ModelConfig
from rcm_mcore.models.common.parameters import full_shape


@contextlib.contextmanager
def islands_in_fp64():
    stock = torch.Tensor.float
    torch.Tensor.float = lambda self, *a, **k: self if self.dtype == torch.float64 else stock(self, *a, **k)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.Tensor.float = stock


class Sinusoid(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.width = width

    def forward(self, t):
        half = self.width // 2
        a = t[:, None] * torch.exp(-math.log(1e4) * torch.arange(half, dtype=t.dtype) / half)
        return torch.cat([a.cos(), a.sin()], 1)


def small_model(**changes):
    """A network with head width 32 and three axes of different sizes in mind; float64."""
    fields = dict(
        size="tiny", num_layers=2, hidden_size=128, num_attention_heads=4, ffn_hidden_size=96, in_channels=4, freq_dim=32,
        text_dim=24, text_len=10, dtype="float64", recompute="none",
    )  # fmt: skip
    return ModelConfig(**{**fields, **changes})


def small_cosmos(**changes):
    """A Cosmos network like `small_model`."""
    fields = dict(
        family="cosmos", size="tiny", num_layers=2, hidden_size=128, num_attention_heads=4, ffn_hidden_size=96, in_channels=4,
        text_dim=24, text_len=10, adaln_rank=16, rope_ratios=(1.0, 4.0, 4.0), dtype="float64", recompute="none",
    )  # fmt: skip
    return ModelConfig(**{**fields, **changes})


# diffusers takes all but the last 512 rows of a Wan context for image rows.
_OF_IMAGES = dict(text_len=512, image_dim=20, image_len=6)
VARIANTS = {
    "wan": small_model,
    "wan-image": partial(small_model, condition="image", **_OF_IMAGES),
    "wan-first_last": partial(small_model, condition="first_last", **_OF_IMAGES),
    "cosmos": small_cosmos,
    "cosmos-frames": partial(small_cosmos, condition="frames", rope_ratios=(20 / 24, 2.0, 3.0)),
}


# Students of MeanFlow, as no one else has them.
INTERVALS = {
    "wan-interval": partial(small_model, interval=True),
    "cosmos-interval": partial(VARIANTS["cosmos"], interval=True),
    "cosmos-frames-interval": partial(VARIANTS["cosmos-frames"], interval=True),
}


def diffusers_network(model: ModelConfig, seed: int = 0):
    """diffusers' transformer like `model` with random weights; build and use it in `exact_diffusers`."""
    return (diffusers_wan if model.family == "wan" else diffusers_cosmos)(model, seed)


def interval_weights(model: ModelConfig, seed: int = 7):
    """Random weights of the interval embedding, by our names."""
    generator = torch.Generator().manual_seed(seed)
    width, first = model.hidden_size, model.freq_dim if model.family == "wan" else model.hidden_size
    shapes = {"0.weight": (width, first), "0.bias": (width,), "2.weight": (width, width), "2.bias": (width,)}
    if model.family == "cosmos":
        shapes = {"1.weight": (width, first), "2.weight": (3 * width, width)}
    draw = lambda shape: 0.15 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return {f"interval_embedding.{name}": draw(shape) for name, shape in shapes.items()}


def tell_interval(net, model: ModelConfig, end, weights):
    """diffusers' network, made to see s - end as well: its time embedding plus that of the interval."""
    wan = model.family == "wan"
    place = net.condition_embedder if wan else net.time_embed
    inner, name = (place.time_embedder, "time_embedder") if wan else (place.t_embedder, "t_embedder")
    first, second = ("0", "2") if wan else ("1", "2")
    linear = lambda x, layer: torch.nn.functional.linear(
        x, weights[f"interval_embedding.{layer}.weight"], weights.get(f"interval_embedding.{layer}.bias")
    )
    times = []

    class Seen(torch.nn.Module):
        """The sinusoid of time; the time is kept for the interval."""

        def forward(self, t):
            times[:] = [t]
            return Sinusoid(model.freq_dim if wan else model.hidden_size)(t)

    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, x, *rest):
            interval = times[0] - (1000 if wan else 1) * end
            of_interval = Sinusoid(model.freq_dim if wan else model.hidden_size)(interval)
            return self.inner(x, *rest) + linear(torch.nn.functional.silu(linear(of_interval, first)), second)

    setattr(place, "timesteps_proj" if wan else "time_proj", Seen())
    setattr(place, name, Both())


def exact_diffusers():
    """Where diffusers' networks of both families compute in float64."""
    return cosmos_in_fp64()


def run_diffusers(net, x, s, condition):
    """Velocity [B, C, F, H, W] of diffusers' network at rectified-flow time s, from inputs put together as its pipelines do."""
    if type(net).__name__ == "WanTransformer3DModel":
        if condition.latents is not None:
            x = torch.cat([x, _pixel_mask(x, both_ends=net.config.pos_embed_seq_len is not None), condition.latents], 1)
        image = condition.image
        if net.config.pos_embed_seq_len is not None:  # the two images of a sample one after the other
            image = image.unflatten(1, (2, -1)).flatten(0, 1)
        return net(x, 1000 * s, condition.text, encoder_hidden_states_image=image, return_dict=False)[0]
    padding = torch.zeros(1, 1, *(8 * n for n in x.shape[3:]), dtype=x.dtype)
    if condition.latents is None:
        return net(x, s, condition.text, padding_mask=padding, return_dict=False)[0]
    given = torch.zeros(len(x), 1, x.shape[2], 1, 1, dtype=x.dtype)
    for row, count in zip(given, condition.frames):
        row[:, :count] = 1
    time = given * (1e-4 / (1 + 1e-4)) + (1 - given) * s.view(-1, 1, 1, 1, 1)
    mask = given.expand(-1, -1, -1, *x.shape[3:])
    seen = given * condition.latents + (1 - given) * x
    v = net(seen, time, condition.text, condition_mask=mask, padding_mask=padding, return_dict=False)[0]
    clean = x - s.view(-1, 1, 1, 1, 1) * v  # the pipeline puts the given frames into what is denoised
    clean = given * condition.latents + (1 - given) * clean
    return (x - clean) / s.view(-1, 1, 1, 1, 1)


def _pixel_mask(x, *, both_ends):
    """diffusers' WanImageToVideoPipeline: frames of video that are given, the first four times, in fours as channels."""
    batch, _, frames, height, width = x.shape
    mask = torch.zeros(batch, 1, 4 * (frames - 1) + 1, height, width, dtype=x.dtype)
    mask[:, :, 0] = 1
    if both_ends:
        mask[:, :, -1] = 1
    mask = torch.cat([mask[:, :, :1].repeat_interleave(4, 2), mask[:, :, 1:]], 2)
    return mask.view(batch, -1, 4, height, width).transpose(1, 2)


def names_of_ours(model: ModelConfig, state):
    """diffusers' tensors under our names, written out here independently of rcm_mcore.interop."""
    return (_wan_names if model.family == "wan" else _cosmos_names)(model, state)


def diffusers_wan(model: ModelConfig, seed: int = 0, dtype=torch.float64):
    """diffusers' transformer of the same shape with random weights, none of them zero. Build it inside islands_in_fp64."""
    from diffusers import WanTransformer3DModel

    net = WanTransformer3DModel(
        patch_size=model.patch_size,
        num_attention_heads=model.num_attention_heads,
        attention_head_dim=model.head_dim,
        in_channels=model.in_channels if model.condition == "text" else 2 * model.in_channels + 4,
        out_channels=model.in_channels,
        text_dim=model.text_dim,
        image_dim=model.image_dim if model.image_tokens else None,
        added_kv_proj_dim=model.hidden_size if model.image_tokens else None,
        pos_embed_seq_len=model.image_tokens if model.condition == "first_last" else None,
        freq_dim=model.freq_dim,
        ffn_dim=model.ffn_hidden_size,
        num_layers=model.num_layers,
        eps=model.eps,
    ).to(dtype)
    net.condition_embedder.timesteps_proj = Sinusoid(model.freq_dim)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            values = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.copy_(1 + 0.1 * values if "norm" in name and name.endswith("weight") else 0.15 * values)
    return net


def _wan_names(model: ModelConfig, state):
    n, d = model.num_attention_heads, model.head_dim

    def fuse(*parts):
        return torch.stack([p.unflatten(0, (n, d)) for p in parts], 1).flatten(0, 2)

    get = lambda name: (state[name + ".weight"], state[name + ".bias"])
    out = {
        "patch_embedding.weight": state["patch_embedding.weight"].flatten(1),
        "patch_embedding.bias": state["patch_embedding.bias"],
        "head.modulation": state["scale_shift_table"],
    }
    pairs = {
        "text_embedding.0": get("condition_embedder.text_embedder.linear_1"),
        "text_embedding.2": get("condition_embedder.text_embedder.linear_2"),
        "time_embedding.0": get("condition_embedder.time_embedder.linear_1"),
        "time_embedding.2": get("condition_embedder.time_embedder.linear_2"),
        "time_projection.1": get("condition_embedder.time_proj"),
        "head.head": get("proj_out"),
    }
    if model.image_tokens:
        image = "condition_embedder.image_embedder."
        for ours, theirs in (("0", "norm1"), ("1", "ff.net.0.proj"), ("3", "ff.net.2"), ("4", "norm2")):
            pairs["img_emb.proj." + ours] = get(image + theirs)
        if model.condition == "first_last":
            out["img_emb.emb_pos"] = state[image + "pos_embed"]
    for i in range(model.num_layers):
        b, a = f"blocks.{i}.", f"blocks.{i}."
        q, k, v = (get(f"{b}attn1.to_{x}") for x in "qkv")
        pairs[a + "self_attn.linear_qkv"] = tuple(fuse(*x) for x in zip(q, k, v))
        pairs[a + "self_attn.linear_proj"] = get(b + "attn1.to_out.0")
        pairs[a + "cross_attn.linear_q"] = get(b + "attn2.to_q")
        pairs[a + "cross_attn.linear_kv"] = tuple(fuse(*x) for x in zip(get(b + "attn2.to_k"), get(b + "attn2.to_v")))
        pairs[a + "cross_attn.linear_proj"] = get(b + "attn2.to_out.0")
        pairs[a + "norm3"] = get(b + "norm2")
        pairs[a + "ffn.linear_fc1"] = get(b + "ffn.net.0.proj")
        pairs[a + "ffn.linear_fc2"] = get(b + "ffn.net.2")
        if model.image_tokens:
            added = zip(get(b + "attn2.add_k_proj"), get(b + "attn2.add_v_proj"))
            pairs[a + "cross_attn.linear_kv_img"] = tuple(fuse(*x) for x in added)
            out[a + "cross_attn.norm_k_img.weight"] = state[b + "attn2.norm_added_k.weight"]
        out[a + "modulation"] = state[b + "scale_shift_table"]
        for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2")):
            for x in "qk":
                out[f"{a}{ours}.norm_{x}.weight"] = state[f"{b}{theirs}.norm_{x}.weight"]
    for name, (weight, bias) in pairs.items():
        out[name + ".weight"], out[name + ".bias"] = weight, bias
    return out


class _TorchWithoutFloat32:
    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def _rms_norm_in_its_dtype(self, x):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


@contextlib.contextmanager
def cosmos_in_fp64():
    """As `islands_in_fp64`, for diffusers' Cosmos: its angles too, and torchvision's resize, which its masks need."""
    from diffusers.models import normalization
    from diffusers.models.transformers import transformer_cosmos

    nearest = lambda x, size, interpolation: torch.nn.functional.interpolate(x, size=tuple(size), mode="nearest")
    shim = SimpleNamespace(functional=SimpleNamespace(resize=nearest), InterpolationMode=SimpleNamespace(NEAREST="nearest"))
    with pytest.MonkeyPatch.context() as patch, islands_in_fp64():
        patch.setattr(normalization.RMSNorm, "forward", _rms_norm_in_its_dtype)
        patch.setattr(transformer_cosmos, "transforms", shim, raising=False)
        patch.setattr(transformer_cosmos, "torch", _TorchWithoutFloat32())
        yield


def diffusers_cosmos(model: ModelConfig, seed: int = 0):
    """diffusers' transformer of the same shape with random weights, none of them zero. Build and use it in cosmos_in_fp64."""
    from diffusers import CosmosTransformer3DModel

    net = CosmosTransformer3DModel(
        in_channels=model.in_channels + (model.condition == "frames"),
        out_channels=model.in_channels,
        num_attention_heads=model.num_attention_heads,
        attention_head_dim=model.head_dim,
        num_layers=model.num_layers,
        mlp_ratio=model.ffn_hidden_size / model.hidden_size,
        text_embed_dim=model.text_dim,
        adaln_lora_dim=model.adaln_rank,
        max_size=(128, 240, 240),
        patch_size=model.patch_size,
        rope_scale=model.rope_ratios,
        concat_padding_mask=True,
        extra_pos_embed_type=None,
    ).to(torch.float64)
    net.time_embed.time_proj = Sinusoid(model.hidden_size)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            values = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.copy_(1 + 0.1 * values if p.ndim == 1 else 0.15 * values)
    for block in net.transformer_blocks:
        for attn in (block.attn1, block.attn2):
            attn.norm_q.eps = attn.norm_k.eps = model.eps  # diffusers' default is ten times the official one
    return net


def _cosmos_names(model: ModelConfig, state):
    n, d = model.num_attention_heads, model.head_dim

    def fuse(*names):
        return torch.stack([state[name].unflatten(0, (n, d)) for name in names], 1).flatten(0, 2)

    out = {
        "patch_embedding.weight": state["patch_embed.proj.weight"],
        "time_embedding.1.weight": state["time_embed.t_embedder.linear_1.weight"],
        "time_embedding.2.weight": state["time_embed.t_embedder.linear_2.weight"],
        "time_norm.weight": state["time_embed.norm.weight"],
        "head.adaln.down.weight": state["norm_out.linear_1.weight"],
        "head.adaln.up.weight": state["norm_out.linear_2.weight"],
        "head.head.weight": state["proj_out.weight"],
    }
    for i in range(model.num_layers):
        a, b = f"blocks.{i}.", f"transformer_blocks.{i}."
        for ours, norm in (("self_attn", "norm1"), ("cross_attn", "norm2"), ("ffn", "norm3")):
            out[f"{a}adaln_{ours}.down.weight"] = state[f"{b}{norm}.linear_1.weight"]
            out[f"{a}adaln_{ours}.up.weight"] = state[f"{b}{norm}.linear_2.weight"]
        for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2")):
            for x in "qk":
                out[f"{a}{ours}.{x}_layernorm.weight"] = state[f"{b}{theirs}.norm_{x}.weight"]
            out[f"{a}{ours}.linear_proj.weight"] = state[f"{b}{theirs}.to_out.0.weight"]
        out[a + "self_attn.linear_qkv.weight"] = fuse(*(f"{b}attn1.to_{x}.weight" for x in "qkv"))
        out[a + "cross_attn.linear_q.weight"] = state[b + "attn2.to_q.weight"]
        out[a + "cross_attn.linear_kv.weight"] = fuse(*(f"{b}attn2.to_{x}.weight" for x in "kv"))
        out[a + "ffn.linear_fc1.weight"] = state[b + "ff.net.0.proj.weight"]
        out[a + "ffn.linear_fc2.weight"] = state[b + "ff.net.2.weight"]
    return out


def inputs(model: ModelConfig, batch=2, grid=(3, 8, 12), seed=1, dtype=torch.float64):
    """x, x_dot, s, s_dot and a condition: latents with three different axes, times that are not whole numbers."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
    x, x_dot = (draw(batch, model.in_channels, *grid) for _ in range(2))
    s = torch.linspace(0.13, 0.91, batch, dtype=dtype)
    s_dot, condition = draw(batch) * 0.1, Condition(draw(batch, model.text_len, model.text_dim))
    if model.condition != "text":
        condition = condition._replace(latents=draw(*x.shape))
    if model.condition == "frames":
        condition = condition._replace(frames=torch.arange(batch) % 2 + 1)
    if model.image_tokens:
        condition = condition._replace(image=draw(batch, model.image_tokens, model.image_dim))
    if model.interval:
        condition = condition._replace(end=s * torch.linspace(0.7, 0.2, batch, dtype=dtype))
    return x, x_dot, s, s_dot, condition


def random_weights(net):
    """By name, none of them zero; the same on every rank."""
    weights = {}
    for name, p in net.named_parameters():
        generator = torch.Generator().manual_seed(crc32(name.encode()))
        values = torch.randn(full_shape(p, net.tp_group), generator=generator, dtype=torch.float64)
        weights[name] = 1 + 0.1 * values if "norm" in name and name.endswith("weight") else 0.08 * values
    return weights
