"""The Wan2.1 text-to-video network (architectures.md A): a velocity model v(x_s, s, text), tensor or Dual."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from rcm_mcore.config import MeshConfig, ModelConfig
from rcm_mcore.models.common import elementwise as ew
from rcm_mcore.models.common.dit import DiffusionTransformer, transformer_config
from rcm_mcore.models.common.layers import Linear, replicated
from rcm_mcore.models.common.parameters import initialize
from rcm_mcore.models.wan.block import wan_block_spec

TIME_SCALE = 1000.0  # the sinusoid sees 1000 s, s the rectified-flow time in [0, 1]


def build_wan(
    model: ModelConfig, mesh: MeshConfig, groups: ProcessGroupCollection, *, seed: int | None = 0, trainable: bool = True
) -> WanModel:
    """A network with weights that depend on `seed` and not on the mesh, or that are still to be loaded if it is None.

    Frozen unless `trainable`.
    """
    net = WanModel(model, transformer_config(model, mesh), groups)
    if seed is not None:
        initialize(net, partial(_initial_values, model), seed=seed, group=groups.tp)
    return net.requires_grad_(trainable)


class WanModel(DiffusionTransformer):
    """Wan2.1 T2V. Build it with `build_wan`: parameters are uninitialized after construction."""

    def __init__(self, model: ModelConfig, config: TransformerConfig, groups: ProcessGroupCollection) -> None:
        super().__init__(model, config, groups, block_spec=wan_block_spec(model.transformer_impl))
        width, channels = model.hidden_size, model.in_channels * math.prod(model.patch_size)
        if self.pre_process:
            self.patch_embedding = Linear(channels, width, config=config)
        self.text_embedding = _mlp(model.text_dim, width, config=config)
        # The text is whole on every rank and so is its gradient: not to be summed over the sequence.
        for param in self.text_embedding.parameters():
            param.sequence_parallel = False  # type: ignore[attr-defined]
        self.time_embedding = _mlp(model.freq_dim, width, config=config)
        self.time_projection = nn.ModuleDict({"1": Linear(width, 6 * width, config=config)})
        self.mark_embedders(self.text_embedding, self.time_embedding, self.time_projection)
        if self.post_process:
            self.head = _Head(width, channels, config=config)

    def embed_time(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """s [B] -> e [B, M] for the head, e0 [6, B, M] for the blocks; wide from the float64 sinusoid on."""
        time = TIME_SCALE * s
        if self.model.bf16_time:
            time = time.to(torch.bfloat16)
        half = self.model.freq_dim // 2
        freqs = torch.exp(torch.arange(half, dtype=torch.float64, device=time.device) * (-math.log(10000.0) / half))
        angles = time.to(torch.float64)[:, None] * freqs
        f = torch.cat([angles.cos(), angles.sin()], -1).to(ew.island_dtype(self.config.params_dtype))
        e = self.time_embedding["2"](F.silu(self.time_embedding["0"](f)))
        e0 = self.time_projection["1"](F.silu(e)).unflatten(-1, (6, -1)).transpose(0, 1)
        return e, e0

    def embed_text(self, text: Tensor) -> Tensor:
        """text [B, X, text_dim] -> [X, B, M] in the model's dtype."""
        text = text.to(self.config.params_dtype).transpose(0, 1)
        return self.text_embedding["2"](F.gelu(self.text_embedding["0"](text), approximate="tanh"))

    def embed_patches(self, tokens: Tensor) -> Tensor:
        """tokens [s, B, C patch] -> the residual stream [s, B, M]."""
        z = self.patch_embedding(tokens.to(ew.island_dtype(self.config.params_dtype)))
        return z if self.model.fp32_residual else z.to(self.config.params_dtype)


class _Head(nn.Module):
    """Modulated norm and projection to patches, in the dtype of the islands (architectures.md A.1, item 7)."""

    def __init__(self, width: int, channels: int, *, config: TransformerConfig) -> None:
        super().__init__()
        self.modulation = replicated(1, 2, width, config=config)
        self.head = Linear(width, channels, config=config)

    def forward(self, z: Tensor, e: Tensor, *, eps: float) -> Tensor:
        """z [s, B, M], e [B, M] -> [s, B, patch C]."""
        shift, scale = (self.modulation.transpose(0, 1) + e).unbind(0)
        return self.head(ew.modulated_norm(z, shift, scale, eps=eps, dtype=e.dtype))


def _mlp(in_features: int, width: int, *, config: TransformerConfig) -> nn.ModuleDict:
    """Two linears, named as in the released checkpoints."""
    return nn.ModuleDict({"0": Linear(in_features, width, config=config), "2": Linear(width, width, config=config)})


def _initial_values(model: ModelConfig, name: str, full: Tensor) -> None:
    """Wan's initialization (architectures.md A.1, item 8): Xavier linears, MLPs N(0, 0.02), a zero head."""
    if name.endswith("modulation"):
        full.normal_(std=model.hidden_size**-0.5)
    elif name.endswith("bias") or name == "head.head.weight":
        full.zero_()
    elif full.ndim == 1:
        full.fill_(1.0)
    elif name.startswith(("text_embedding", "time_embedding")):
        full.normal_(std=0.02)
    else:
        parts = {"linear_qkv": 3, "linear_kv": 2}.get(name.split(".")[-2], 1)  # fused linears, each with its own fan-out
        bound = math.sqrt(6.0 / (full.shape[1] + full.shape[0] / parts))
        full.uniform_(-bound, bound)
