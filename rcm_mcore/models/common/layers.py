"""Layers of the blocks and embedders, for tensors and Duals; what a family does otherwise is in its `LayerStyle`.

Shapes: S tokens of this context-parallel rank, s of this rank (S / tp under sequence parallelism), X text rows, B batch,
M width, N heads of this rank, D head width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from rcm_mcore import dual
from rcm_mcore.config import ModelConfig
from rcm_mcore.dual import Dual, MaybeDual, Rowwise, fused
from rcm_mcore.models.common import elementwise as ew
from rcm_mcore.models.common.attention import AttentionCache, SplitAttention, attention
from rcm_mcore.models.common.blocks import Conditioning
from rcm_mcore.models.common.linears import ParallelLinears, apply, column_linear, row_linear
from rcm_mcore.parallel.sequence import sum_over_ranks


@dataclass(frozen=True)
class LayerStyle:
    """What the layers of a family's blocks do otherwise than another's."""

    linears: ParallelLinears
    bias: bool  # of every linear
    norm_over: Literal["all heads", "each head"]  # RMSNorm of queries and keys
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor]
    activation: Callable[[Tensor, Tensor | None], Tensor]  # of the feed-forward, after adding a bias


def fused_rowwise(model: ModelConfig) -> Rowwise:
    """How the layers of a network apply row-wise functions: fused on GPUs, unless told otherwise."""
    return fused(model.compile and torch.cuda.is_available())


def replicated(*shape: int, config: TransformerConfig) -> nn.Parameter:
    """A parameter held by every rank and used on this rank's tokens: its gradients are summed under sequence parallelism."""
    param = nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=torch.cuda.current_device()))
    param.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return param


def over_heads(width: int, *, config: TransformerConfig, group: dist.ProcessGroup) -> nn.Parameter:
    """A weight per channel of all heads, split over the ranks like the heads."""
    param = nn.Parameter(torch.empty(width // group.size(), dtype=config.params_dtype, device=torch.cuda.current_device()))
    set_tensor_model_parallel_attributes(param, True, 0, 1)
    return param


class Linear(nn.Module):
    """x W^T + b in the dtype of x, with replicated parameters."""

    def __init__(self, in_features: int, out_features: int, *, config: TransformerConfig, bias: bool = True) -> None:
        super().__init__()
        self.weight = replicated(out_features, in_features, config=config)
        self.bias = replicated(out_features, config=config) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class AffineNorm(nn.Module):
    """Weight and bias of a LayerNorm, [M] each."""

    def __init__(self, width: int, *, config: TransformerConfig) -> None:
        super().__init__()
        self.weight = replicated(width, config=config)
        self.bias = replicated(width, config=config)


class _RMSWeight(nn.Module):
    """Holds the weight of an RMSNorm of queries or keys: over all heads, split like them, or one for each head alike."""

    def __init__(self, style: LayerStyle, model: ModelConfig, *, config: TransformerConfig, group: dist.ProcessGroup) -> None:
        super().__init__()
        if style.norm_over == "all heads":
            self.weight = over_heads(model.hidden_size, config=config, group=group)
        else:
            self.weight = replicated(model.head_dim, config=config)


class _Attention(nn.Module):
    """What self- and cross-attention share: from the outputs of linears to queries, keys and values of this rank's heads."""

    def __init__(self, style: LayerStyle, model: ModelConfig, *, config: TransformerConfig, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.rowwise, self.head_dim, self.group = fused_rowwise(model), model.head_dim, group
        all_heads = style.norm_over == "all heads"
        self.options = dict(head_dim=model.head_dim, over=model.hidden_size if all_heads else model.head_dim, eps=model.eps)
        self.sums_over_ranks = all_heads and group.size() > 1
        # By these names megatron sums gradients over tensor-parallel ranks, each of which has seen its own heads.
        names = ("norm_q", "norm_k") if all_heads else ("q_layernorm", "k_layernorm")
        for name in names:
            self.add_module(name, _RMSWeight(style, model, config=config, group=group))
        self._norms = names

    def weights(self) -> tuple[Tensor, Tensor]:
        """Of the norms of queries and keys."""
        q, k = (self.get_submodule(name) for name in self._norms)
        return q.weight, k.weight  # type: ignore[return-value]

    def heads(self, x: MaybeDual, bias: Tensor | None, weights: tuple[Tensor, ...], parts: int, **options: Any) -> Any:
        """x [S, B, N parts D] -> `parts` of [S, B, N, D], normed with as many weights as there are; see elementwise.heads."""
        sums = None
        if self.sums_over_ranks:
            sizes = dict(parts=parts, normed=len(weights), head_dim=self.head_dim)
            sums = _sum_over_ranks(self.rowwise(ew.square_sums, x, bias, **sizes), self.group)
        return self.rowwise(ew.heads, x, bias, sums, weights, parts=parts, **self.options, **options)


class SelfAttention(_Attention):
    """Attention among the tokens, RMSNorm of q and k, rotary positions."""

    def __init__(
        self, style: LayerStyle, model: ModelConfig, *, config: TransformerConfig, groups: ProcessGroupCollection
    ) -> None:
        super().__init__(style, model, config=config, group=groups.tp)
        width, options = model.hidden_size, dict(config=config, group=groups.tp, bias=style.bias)
        self.rotate = style.rotate
        self.attend = SplitAttention(*groups.hcp)
        # Rows per head as [N, 3, D]: any tensor-parallel size then splits the first dimension.
        self.linear_qkv: Any = column_linear(style.linears, width, 3 * width, **options)
        self.linear_proj = row_linear(style.linears, width, width, **options)

    def forward(self, u: MaybeDual, cond: Conditioning, cache: AttentionCache | None) -> MaybeDual:
        """u [s, B, M] -> [s, B, M], the bias of the projection left out."""
        qkv, positions = apply(self.linear_qkv, u), (cond.cos, cond.sin)
        q, k, v = self.heads(qkv, self.linear_qkv.bias, self.weights(), 3, positions=positions, rotate=self.rotate)
        return apply(self.linear_proj, self.attend(q, k, v, tokens=cond.tokens, cache=cache))


class CrossAttention(_Attention):
    """Attention of the tokens onto the text rows, all of them, padding included; and onto image rows, for themselves."""

    def __init__(
        self, style: LayerStyle, model: ModelConfig, *, context_width: int, config: TransformerConfig, group: dist.ProcessGroup
    ) -> None:
        super().__init__(style, model, config=config, group=group)
        width = model.hidden_size
        options: dict[str, Any] = dict(group=group, bias=style.bias)
        # The text is whole on every rank: with sequence parallelism on, this linear would gather copies of it.
        text_config = copy.copy(config)
        text_config.sequence_parallel = False
        self.linear_q: Any = column_linear(style.linears, width, width, config=config, **options)
        self.linear_kv: Any = column_linear(style.linears, context_width, 2 * width, config=text_config, **options)
        if model.image_tokens:
            self.linear_kv_img: Any = column_linear(style.linears, context_width, 2 * width, config=text_config, **options)
            self.norm_k_img = _RMSWeight(style, model, config=config, group=group)
        self.linear_proj = row_linear(style.linears, width, width, config=config, **options)

    def forward(self, u: MaybeDual, context: Tensor, image: Tensor | None = None) -> MaybeDual:
        """u [s, B, M], context [X, B, ...], image [n, B, ...] -> [s, B, M], the bias of the projection left out."""
        q_weight, k_weight = self.weights()
        (q,) = self.heads(apply(self.linear_q, u), self.linear_q.bias, (q_weight,), 1)
        out = attention(q, *self._keys(context, self.linear_kv, k_weight))
        if image is not None:
            of_image = attention(q, *self._keys(image, self.linear_kv_img, self.norm_k_img.weight))
            out = self.rowwise(ew.add, out, of_image)
        return apply(self.linear_proj, out)

    def _keys(self, context: Tensor, linear: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [X, B, N, D] of context [X, B, ...]."""
        # Never float8: few rows, whose rounding every token would see.
        return self.heads(linear(context)[0], linear.bias, (weight,), 2)


class FeedForward(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, style: LayerStyle, model: ModelConfig, *, config: TransformerConfig, group: dist.ProcessGroup) -> None:
        super().__init__()
        options: dict[str, Any] = dict(config=config, group=group, bias=style.bias)
        self.rowwise, self.activation = fused_rowwise(model), style.activation
        self.linear_fc1 = column_linear(style.linears, model.hidden_size, model.ffn_hidden_size, **options)
        self.linear_fc2 = row_linear(style.linears, model.ffn_hidden_size, model.hidden_size, **options)

    def forward(self, u: MaybeDual) -> MaybeDual:
        """u [s, B, M] -> [s, B, M], the last bias left out."""
        return apply(self.linear_fc2, self.rowwise(self.activation, apply(self.linear_fc1, u), self.linear_fc1.bias))


@overload
def _sum_over_ranks(sums: Tensor, group: dist.ProcessGroup) -> Tensor: ...
@overload
def _sum_over_ranks(sums: MaybeDual, group: dist.ProcessGroup) -> MaybeDual: ...
def _sum_over_ranks(sums: MaybeDual, group: dist.ProcessGroup) -> MaybeDual:
    """Sums over the heads of all ranks, value and tangent in one collective."""
    if group.size() == 1:
        return sums
    if isinstance(sums, Dual):
        return dual.unstack(sum_over_ranks(dual.stack(sums, 0), group), 0)
    return sum_over_ranks(sums, group)
