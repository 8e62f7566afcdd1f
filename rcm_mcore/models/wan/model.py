"""The Wan2.1 networks (architectures.md A): a velocity model v(x_s, s, condition), tensor or Dual."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from rcm_mcore.condition import Condition
from rcm_mcore.config import MeshConfig, ModelConfig
from rcm_mcore.models.common import elementwise as ew
from rcm_mcore.models.common.dit import DiffusionTransformer
from rcm_mcore.models.common.layers import AffineNorm, Linear, replicated
from rcm_mcore.models.wan.block import wan_block_spec

TIME_SCALE = 1000.0  # the sinusoid sees 1000 s, s the rectified-flow time in [0, 1]
IMAGE_EPS = 1e-5  # of the norms of the image embedder


class WanModel(DiffusionTransformer):
    """Wan2.1 T2V, I2V and FLF2V. Build it with `models.build_model`: parameters are uninitialized after construction."""

    def __init__(self, model: ModelConfig, mesh: MeshConfig, groups: ProcessGroupCollection) -> None:
        super().__init__(model, mesh, groups, block_spec=wan_block_spec(model.transformer_impl))
        config, width, patch = self.config, model.hidden_size, math.prod(model.patch_size)
        if self.pre_process:
            self.patch_embedding = Linear(model.patch_channels * patch, width, config=config)
        self.text_embedding = _mlp(model.text_dim, width, config=config)
        self.time_embedding = _mlp(model.freq_dim, width, config=config)
        self.time_projection = nn.ModuleDict({"1": Linear(width, 6 * width, config=config)})
        self.mark_embedders(self.text_embedding, self.time_embedding, self.time_projection)
        if model.interval:
            self.interval_embedding = _mlp(model.freq_dim, width, config=config)
            self.mark_embedders(self.interval_embedding)
        whole = [*self.text_embedding.parameters()]
        if model.image_tokens:
            self.img_emb = _ImageEmbedding(model, config=config)
            self.mark_embedders(self.img_emb)
            whole += self.img_emb.parameters()
        # Text and image are whole on every rank and so are their gradients: not to be summed over the sequence.
        for param in whole:
            param.sequence_parallel = False  # type: ignore[attr-defined]
        if self.post_process:
            self.head = _Head(width, model.in_channels * patch, config=config)

    def embed_time(self, s: Tensor, *, end: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """s [B] -> e [B, M] for the head, e0 [6, B, M] for the blocks; wide from the float64 sinusoid on."""
        e = self._embed_number(s, self.time_embedding)
        if end is not None:
            e = e + self._embed_number(s - end, self.interval_embedding)
        e0 = self.time_projection["1"](F.silu(e)).unflatten(-1, (6, -1)).transpose(0, 1)
        return e, e0

    def _embed_number(self, s: Tensor, mlp: nn.ModuleDict) -> Tensor:
        time = TIME_SCALE * s
        if self.model.bf16_time:
            time = time.to(torch.bfloat16)
        half = self.model.freq_dim // 2
        freqs = torch.exp(torch.arange(half, dtype=torch.float64, device=time.device) * (-math.log(10000.0) / half))
        angles = time.to(torch.float64)[:, None] * freqs
        f = torch.cat([angles.cos(), angles.sin()], -1).to(ew.island_dtype(self.config.params_dtype))
        return mlp["2"](F.silu(mlp["0"](f)))

    def embed_text(self, text: Tensor) -> Tensor:
        """text [B, X, text_dim] -> [X, B, M] in the model's dtype."""
        text = text.to(self.config.params_dtype).transpose(0, 1)
        return self.text_embedding["2"](F.gelu(self.text_embedding["0"](text), approximate="tanh"))

    def embed_image(self, image: Tensor | None) -> Tensor | None:
        """image [B, n, image_dim] -> [n, B, M] in the model's dtype."""
        return None if image is None else self.img_emb(image.to(self.config.params_dtype).transpose(0, 1))

    def add_channels(self, x: Tensor, condition: Condition) -> Tensor:
        """Behind x: four channels that are one for each frame of video that is given, and the latents of these frames.

        A latent frame stands for four frames of video; the first for one, as if it were there four times (A.2).
        """
        if condition.latents is None:
            return x
        mask = x.new_zeros(len(x), 4, *x.shape[2:])
        mask[:, :, 0] = 1
        if self.model.condition == "first_last":
            mask[:, -1, -1] = 1
        return torch.cat([x, mask, condition.latents.to(x.dtype)], 1)

    def initial_values(self, name: str, full: Tensor) -> None:
        """Wan's initialization (architectures.md A.1, item 8): Xavier linears, MLPs N(0, 0.02), a zero head."""
        if name.endswith("modulation"):
            full.normal_(std=self.model.hidden_size**-0.5)
        elif name.endswith(("bias", "emb_pos")) or name in ("head.head.weight", "interval_embedding.2.weight"):
            full.zero_()
        elif full.ndim == 1:
            full.fill_(1.0)
        elif name.startswith(("text_embedding", "time_embedding", "interval_embedding")):
            full.normal_(std=0.02)
        else:  # fused linears, each with its own fan-out
            parts = {"linear_qkv": 3, "linear_kv": 2, "linear_kv_img": 2}.get(name.split(".")[-2], 1)
            bound = math.sqrt(6.0 / (full.shape[1] + full.shape[0] / parts))
            full.uniform_(-bound, bound)


class _Head(nn.Module):
    """Modulated norm and projection to patches, in the dtype of the islands (architectures.md A.1, item 7)."""

    def __init__(self, width: int, channels: int, *, config: TransformerConfig) -> None:
        super().__init__()
        self.modulation = replicated(1, 2, width, config=config)
        self.head = Linear(width, channels, config=config)

    def forward(self, z: Tensor, e: Tensor, *, eps: float, given: None = None) -> Tensor:
        """z [s, B, M], e [B, M] -> [s, B, patch C]."""
        shift, scale = (self.modulation.transpose(0, 1) + e).unbind(0)
        return self.head(ew.modulated_norm(z, shift, scale, eps=eps, dtype=e.dtype))


class _ImageEmbedding(nn.Module):
    """LN, linear, GELU, linear, LN, after adding positions if there are two images (architectures.md A.1, item 4)."""

    def __init__(self, model: ModelConfig, *, config: TransformerConfig) -> None:
        super().__init__()
        if model.condition == "first_last":
            self.emb_pos = replicated(1, model.image_tokens, model.image_dim, config=config)
        self.proj = nn.ModuleDict(
            {
                "0": AffineNorm(model.image_dim, config=config),
                "1": Linear(model.image_dim, model.image_dim, config=config),
                "3": Linear(model.image_dim, model.hidden_size, config=config),
                "4": AffineNorm(model.hidden_size, config=config),
            }
        )

    def forward(self, image: Tensor) -> Tensor:
        """image [n, B, image_dim] -> [n, B, M]."""
        if hasattr(self, "emb_pos"):
            image = image + self.emb_pos.transpose(0, 1)
        x = self.proj["3"](F.gelu(self.proj["1"](self._norm("0", image))))
        return self._norm("4", x)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        norm: Any = self.proj[name]
        return ew.affine_norm(x, norm.weight, norm.bias, eps=IMAGE_EPS, dtype=x.dtype)


def _mlp(in_features: int, width: int, *, config: TransformerConfig) -> nn.ModuleDict:
    """Two linears, named as in the released checkpoints."""
    return nn.ModuleDict({"0": Linear(in_features, width, config=config), "2": Linear(width, width, config=config)})
