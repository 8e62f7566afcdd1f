"""The Cosmos-Predict2 text-to-image network (architectures.md B): a velocity model v(x_s, s, text), tensor or Dual."""

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
from rcm_mcore.models.cosmos.block import AdaLN, cosmos_block_spec


def build_cosmos(
    model: ModelConfig, mesh: MeshConfig, groups: ProcessGroupCollection, *, seed: int | None = 0, trainable: bool = True
) -> CosmosModel:
    """A network with weights that depend on `seed` and not on the mesh, or that are still to be loaded if it is None.

    Frozen unless `trainable`.
    """
    config = transformer_config(model, mesh)
    config.qk_layernorm = True  # their gradients are summed over tensor-parallel ranks: each has seen its own heads
    net = CosmosModel(model, config, groups)
    if seed is not None:
        initialize(net, partial(_initial_values, model), seed=seed, group=groups.tp)
    return net.requires_grad_(trainable)


class CosmosModel(DiffusionTransformer):
    """Cosmos-Predict2 T2I. Build it with `build_cosmos`: parameters are uninitialized after construction."""

    def __init__(self, model: ModelConfig, config: TransformerConfig, groups: ProcessGroupCollection) -> None:
        super().__init__(model, config, groups, block_spec=cosmos_block_spec(model.transformer_impl))
        self.rope_ratios = model.rope_ratios
        width, patch = model.hidden_size, math.prod(model.patch_size)
        if self.pre_process:
            # The last channel marks padding, of which latents have none: zeros, that the released weights expect.
            self.patch_embedding = Linear((model.in_channels + 1) * patch, width, config=config, bias=False)
        self.time_embedding = nn.ModuleDict(
            {
                "1": Linear(width, width, config=config, bias=False),
                "2": Linear(width, 3 * width, config=config, bias=False),
            }
        )
        self.time_norm = _Weight(width, config=config)
        self.mark_embedders(self.time_embedding, self.time_norm)
        if self.post_process:
            self.head = _Head(model, config=config)

    def embed_time(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """s [B] -> twice [4, B, M]: the normalized sinusoid, and three parts that every AdaLN adds to its own."""
        half = self.model.hidden_size // 2
        freqs = torch.exp(torch.arange(half, dtype=torch.float64, device=s.device) * (-math.log(10000.0) / half))
        angles = s.to(torch.float64)[:, None] * freqs
        f = torch.cat([angles.cos(), angles.sin()], -1).to(ew.island_dtype(self.config.params_dtype))
        shared = self.time_embedding["2"](F.silu(self.time_embedding["1"](f))).unflatten(-1, (3, -1)).transpose(0, 1)
        scale = torch.rsqrt(f.square().mean(-1, keepdim=True) + self.model.eps)
        time = torch.cat([(f * scale * self.time_norm.weight)[None], shared])
        return time, time

    def embed_text(self, text: Tensor) -> Tensor:
        """text [B, X, text_dim] -> [X, B, text_dim] in the model's dtype."""
        return text.to(self.config.params_dtype).transpose(0, 1)

    def embed_patches(self, tokens: Tensor) -> Tensor:
        """tokens [s, B, C patch] -> the residual stream [s, B, M]."""
        tokens = F.pad(tokens, (0, math.prod(self.model.patch_size)))  # channels come first within a patch
        z = self.patch_embedding(tokens.to(ew.island_dtype(self.config.params_dtype)))
        return z if self.model.fp32_residual else z.to(self.config.params_dtype)


class _Weight(nn.Module):
    """Of a norm."""

    def __init__(self, width: int, *, config: TransformerConfig) -> None:
        super().__init__()
        self.weight = replicated(width, config=config)


class _Head(nn.Module):
    """Modulated norm and projection to patches, in the dtype of the islands (architectures.md B.1, item 6)."""

    def __init__(self, model: ModelConfig, *, config: TransformerConfig) -> None:
        super().__init__()
        self.adaln = AdaLN(model.hidden_size, model.adaln_rank, 2, config=config)
        self.head = Linear(model.hidden_size, model.in_channels * math.prod(model.patch_size), config=config, bias=False)

    def forward(self, z: Tensor, time: Tensor, *, eps: float) -> Tensor:
        """z [s, B, M], time [4, B, M] -> [s, B, patch C]."""
        shift, scale = self.adaln(time)
        return self.head(ew.modulated_norm(z, shift, scale, eps=eps, dtype=time.dtype))


def _initial_values(model: ModelConfig, name: str, full: Tensor) -> None:
    """Normal linears of standard deviation 1/sqrt(width), norms of one; a zero head and zero modulation, as adaLN begins."""
    if name == "head.head.weight" or (".up." in name and "adaln" in name):
        full.zero_()
    elif full.ndim == 1:
        full.fill_(1.0)
    else:
        full.normal_(std=full.shape[1] ** -0.5)
