"""Layers of the blocks and embedders, for tensors and Duals; what a family does otherwise is in its `LayerStyle`.

Shapes: S tokens of this context-parallel rank, s of this rank (S / tp under sequence parallelism), X text rows, B batch,
M width, N heads of this rank, D head width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
from rcm_mcore.dual import Dual, MaybeDual, primal, rowwise
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
    """What self- and cross-attention share: norms of queries and keys."""

    def __init__(self, style: LayerStyle, model: ModelConfig, *, config: TransformerConfig, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.style, self.head_dim, self.eps, self.group = style, model.head_dim, model.eps, group
        self.over = model.hidden_size if style.norm_over == "all heads" else model.head_dim
        # By these names megatron sums gradients over tensor-parallel ranks, each of which has seen its own heads.
        names = ("norm_q", "norm_k") if style.norm_over == "all heads" else ("q_layernorm", "k_layernorm")
        for name in names:
            self.add_module(name, _RMSWeight(style, model, config=config, group=group))
        self._norms = names

    def weights(self) -> tuple[Tensor, Tensor]:
        """Of the norms of queries and keys."""
        q, k = (self.get_submodule(name) for name in self._norms)
        return q.weight, k.weight  # type: ignore[return-value]

    def normalize(self, x: Tensor, total: Tensor, weight: Tensor) -> Tensor:
        """x [S, B, N, D], whose squares sum to `total` -> wide."""
        return ew.rms_norm(x, total, weight, width=self.over, eps=self.eps)

    def square_sums(self, *xs: MaybeDual) -> MaybeDual:
        """Of each of xs [S, B, N, D]: over all heads of all ranks [n, S, B, 1], or of each head [n, S, B, N]."""
        if self.style.norm_over == "each head":
            return rowwise(ew.square_sums_of_heads, *xs)
        return _sum_over_ranks(rowwise(ew.square_sums, *xs), self.group)


class SelfAttention(_Attention):
    """Attention among the tokens, RMSNorm of q and k, rotary positions."""

    def __init__(
        self, style: LayerStyle, model: ModelConfig, *, config: TransformerConfig, groups: ProcessGroupCollection
    ) -> None:
        super().__init__(style, model, config=config, group=groups.tp)
        width, options = model.hidden_size, dict(config=config, group=groups.tp, bias=style.bias)
        self.attend = SplitAttention(*groups.hcp)
        # Rows per head as [N, 3, D]: any tensor-parallel size then splits the first dimension.
        self.linear_qkv = column_linear(style.linears, width, 3 * width, **options)
        self.linear_proj = row_linear(style.linears, width, width, **options)

    def forward(self, u: MaybeDual, cond: Conditioning, cache: AttentionCache | None) -> MaybeDual:
        """u [s, B, M] -> [s, B, M], the bias of the projection left out."""
        qkv = rowwise(ew.add, apply(self.linear_qkv, u), self.linear_qkv.bias)
        q, k, v = rowwise(partial(_split_heads, parts=3, head_dim=self.head_dim), qkv)
        q, k = rowwise(self._normalize_and_rotate, q, k, self.square_sums(q, k), cond.cos, cond.sin)
        return apply(self.linear_proj, self.attend(q, k, v, tokens=cond.tokens, cache=cache))

    def _normalize_and_rotate(self, q: Tensor, k: Tensor, sums: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        rotated = [
            self.style.rotate(self.normalize(x, total, weight), cos, sin).to(x.dtype)
            for x, total, weight in zip((q, k), sums, self.weights())
        ]
        return rotated[0], rotated[1]


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
        self.linear_q = column_linear(style.linears, width, width, config=config, **options)
        self.linear_kv: Any = column_linear(style.linears, context_width, 2 * width, config=text_config, **options)
        if model.image_tokens:
            self.linear_kv_img: Any = column_linear(style.linears, context_width, 2 * width, config=text_config, **options)
            self.norm_k_img = _RMSWeight(style, model, config=config, group=group)
        self.linear_proj = row_linear(style.linears, width, width, config=config, **options)

    def forward(self, u: MaybeDual, context: Tensor, image: Tensor | None = None) -> MaybeDual:
        """u [s, B, M], context [X, B, ...], image [n, B, ...] -> [s, B, M], the bias of the projection left out."""
        q = rowwise(ew.add, apply(self.linear_q, u), self.linear_q.bias)
        q = rowwise(lambda x: x.unflatten(-1, (-1, self.head_dim)), q)
        q_weight, k_weight = self.weights()
        q = rowwise(partial(self._normalize, weight=q_weight), q, self.square_sums(q))
        out = attention(q, *self._keys(context, self.linear_kv, k_weight))
        if image is not None:
            out = rowwise(torch.add, out, attention(q, *self._keys(image, self.linear_kv_img, self.norm_k_img.weight)))
        return apply(self.linear_proj, out)

    def _keys(self, context: Tensor, linear: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [X, B, N, D] of context [X, B, ...]."""
        # Never float8: few rows, whose rounding every token would see.
        k, v = _split_heads(ew.add(linear(context)[0], linear.bias), parts=2, head_dim=self.head_dim)
        return self._normalize(k, primal(self.square_sums(k)), weight=weight), v

    def _normalize(self, x: Tensor, sums: Tensor, *, weight: Tensor) -> Tensor:
        return self.normalize(x, sums[0], weight).to(x.dtype)


class FeedForward(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, style: LayerStyle, model: ModelConfig, *, config: TransformerConfig, group: dist.ProcessGroup) -> None:
        super().__init__()
        options: dict[str, Any] = dict(config=config, group=group, bias=style.bias)
        self.activation = style.activation
        self.linear_fc1 = column_linear(style.linears, model.hidden_size, model.ffn_hidden_size, **options)
        self.linear_fc2 = row_linear(style.linears, model.ffn_hidden_size, model.hidden_size, **options)

    def forward(self, u: MaybeDual) -> MaybeDual:
        """u [s, B, M] -> [s, B, M], the last bias left out."""
        return apply(self.linear_fc2, rowwise(self.activation, apply(self.linear_fc1, u), self.linear_fc1.bias))


def _split_heads(x: Tensor, *, parts: int, head_dim: int) -> tuple[Tensor, ...]:
    """[S, B, N parts D] -> `parts` views [S, B, N, D]."""
    return x.unflatten(-1, (-1, parts, head_dim)).unbind(-2)


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
