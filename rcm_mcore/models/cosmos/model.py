"""The Cosmos-Predict2 networks (architectures.md B): a velocity model v(x_s, s, condition), tensor or Dual."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from rcm_mcore.condition import Condition
from rcm_mcore.config import MeshConfig, ModelConfig
from rcm_mcore.models.common import elementwise as ew
from rcm_mcore.models.common.dit import DiffusionTransformer, frames_given
from rcm_mcore.models.common.layers import Linear, replicated
from rcm_mcore.models.cosmos.block import AdaLN, cosmos_block_spec

GIVEN_TIME = 1e-4 / (1 + 1e-4)  # rectified-flow time of frames that are given (architectures.md B.2)


class CosmosModel(DiffusionTransformer):
    """Cosmos-Predict2 T2I and V2W. Build it with `models.build_model`: parameters are uninitialized after construction."""

    def __init__(self, model: ModelConfig, mesh: MeshConfig, groups: ProcessGroupCollection) -> None:
        super().__init__(model, mesh, groups, block_spec=cosmos_block_spec(model.transformer_impl))
        config, width = self.config, model.hidden_size
        if self.pre_process:
            patch = model.patch_channels * math.prod(model.patch_size)
            self.patch_embedding = Linear(patch, width, config=config, bias=False)
        self.time_embedding = nn.ModuleDict(
            {
                "1": Linear(width, width, config=config, bias=False),
                "2": Linear(width, 3 * width, config=config, bias=False),
            }
        )
        self.time_norm = _Weight(width, config=config)
        self.mark_embedders(self.time_embedding, self.time_norm)
        if model.interval:
            of_interval = (Linear(width, n * width, config=config, bias=False) for n in (1, 3))
            self.interval_embedding = nn.ModuleDict(dict(zip("12", of_interval)))
            self.mark_embedders(self.interval_embedding)
        if self.post_process:
            self.head = _Head(model, config=config)

    def embed_time(self, s: Tensor, *, end: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """s [B] -> twice [4, B, M]: the normalized sinusoid, and three parts that every AdaLN adds to its own.

        With given frames [4, 2, B, M], of s and of the time of these frames.
        """
        interval = None if end is None else s - end
        if self.model.condition == "frames":
            s = torch.stack([s, torch.full_like(s, GIVEN_TIME)])
        f = self._sinusoid(s)
        shared = self.time_embedding["2"](F.silu(self.time_embedding["1"](f)))
        if interval is not None:
            shared = shared + self.interval_embedding["2"](F.silu(self.interval_embedding["1"](self._sinusoid(interval))))
        shared = shared.unflatten(-1, (3, -1)).movedim(-2, 0)
        scale = torch.rsqrt(f.square().mean(-1, keepdim=True) + self.model.eps)
        time = torch.cat([(f * scale * self.time_norm.weight)[None], shared])
        return time, time

    def _sinusoid(self, s: Tensor) -> Tensor:
        """Times [..., B] -> [..., B, M]."""
        half = self.model.hidden_size // 2
        freqs = torch.exp(torch.arange(half, dtype=torch.float64, device=s.device) * (-math.log(10000.0) / half))
        angles = s.to(torch.float64)[..., None] * freqs
        return torch.cat([angles.cos(), angles.sin()], -1).to(ew.island_dtype(self.config.params_dtype))

    def embed_text(self, text: Tensor) -> Tensor:
        """text [B, X, text_dim] -> [X, B, text_dim] in the model's dtype."""
        return text.to(self.config.params_dtype).transpose(0, 1)

    def add_channels(self, x: Tensor, condition: Condition) -> Tensor:
        """Behind x: a channel that marks given frames, which take the place of x's own, and one that marks padding.

        Latents here have no padding: zeros, that the released weights expect.
        """
        padding = torch.zeros_like(x[:, :1])
        if condition.latents is None:
            return torch.cat([x, padding], 1)
        given = frames_given(condition, x)
        x = torch.where(given, condition.latents.to(x.dtype), x)
        return torch.cat([x, given.to(x.dtype).expand_as(padding), padding], 1)

    def initial_values(self, name: str, full: Tensor) -> None:
        """Normal linears of standard deviation 1/sqrt(width), norms of one; zero head and modulation, as adaLN begins."""
        if name in ("head.head.weight", "interval_embedding.2.weight") or (".up." in name and "adaln" in name):
            full.zero_()
        elif full.ndim == 1:
            full.fill_(1.0)
        else:
            full.normal_(std=full.shape[1] ** -0.5)


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

    def forward(self, z: Tensor, time: Tensor, *, eps: float, given: Tensor | None) -> Tensor:
        """z [s, B, M], time as for an AdaLN -> [s, B, patch C]."""
        shift, scale = self.adaln(time)
        return self.head(ew.modulated_norm(z, shift, scale, given, eps=eps, dtype=time.dtype))
