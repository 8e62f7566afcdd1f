"""One Wan2.1 block: self-attention, cross-attention onto the text, feed-forward (architectures.md A.1, item 6).

Shapes: S tokens of this context-parallel rank, s of this rank (S / tp under sequence parallelism), X text rows, B batch,
M width, N heads of this rank, D head width.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, overload

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from rcm_mcore import dual
from rcm_mcore.config import ModelConfig
from rcm_mcore.dual import Dual, MaybeDual, rowwise
from rcm_mcore.models.common import elementwise as ew
from rcm_mcore.models.common.attention import AttentionCache, SplitAttention, attention
from rcm_mcore.models.common.blocks import Conditioning
from rcm_mcore.models.common.linears import ParallelLinears, apply, column_linear, parallel_linears, row_linear
from rcm_mcore.parallel.sequence import sum_over_ranks


def wan_block_spec(transformer_impl: str) -> ModuleSpec:
    """The spec of a block whose linears are those of `model.transformer_impl`."""
    return ModuleSpec(module=WanBlock, submodules=parallel_linears(transformer_impl))


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


class _RMSWeight(nn.Module):
    """Holds the weight of an RMSNorm over all heads (named as in the released checkpoints)."""

    def __init__(self, width: int, *, config: TransformerConfig, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.weight = over_heads(width, config=config, group=group)


class SelfAttention(nn.Module):
    """Attention among the tokens, RMSNorm of q and k over the full width, rotary positions."""

    def __init__(
        self, linears: ParallelLinears, model: ModelConfig, *, config: TransformerConfig, groups: ProcessGroupCollection
    ) -> None:
        super().__init__()
        width, group = model.hidden_size, groups.tp
        self.width, self.head_dim, self.eps, self.group = width, model.head_dim, model.eps, group
        self.attend = SplitAttention(*groups.hcp)
        # Rows per head as [N, 3, D]: any tensor-parallel size then splits the first dimension.
        self.linear_qkv = column_linear(linears, width, 3 * width, config=config, group=group)
        self.linear_proj = row_linear(linears, width, width, config=config, group=group)
        self.norm_q = _RMSWeight(width, config=config, group=group)
        self.norm_k = _RMSWeight(width, config=config, group=group)

    def forward(self, u: MaybeDual, cond: Conditioning, cache: AttentionCache | None) -> MaybeDual:
        """u [s, B, M] -> [s, B, M], the bias of the projection left out."""
        qkv = rowwise(ew.add, apply(self.linear_qkv, u), self.linear_qkv.bias)
        q, k, v = rowwise(partial(_split_heads, parts=3, head_dim=self.head_dim), qkv)
        sums = rowwise(ew.square_sums, q, k)
        sums = _sum_over_heads(sums, self.group)
        q, k = rowwise(self._normalize_and_rotate, q, k, sums, cond.cos, cond.sin)
        return apply(self.linear_proj, self.attend(q, k, v, tokens=cond.tokens, cache=cache))

    def _normalize_and_rotate(self, q: Tensor, k: Tensor, sums: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        rotated = [
            ew.rotate_pairs(ew.rms_norm(x, total, norm.weight, width=self.width, eps=self.eps), cos, sin).to(x.dtype)
            for x, total, norm in ((q, sums[0], self.norm_q), (k, sums[1], self.norm_k))
        ]
        return rotated[0], rotated[1]


class CrossAttention(nn.Module):
    """Attention of the tokens onto the text rows, all of them, padding included."""

    def __init__(
        self, linears: ParallelLinears, model: ModelConfig, *, config: TransformerConfig, group: dist.ProcessGroup
    ) -> None:
        super().__init__()
        width = model.hidden_size
        self.width, self.head_dim, self.eps, self.group = width, model.head_dim, model.eps, group
        # The text is whole on every rank: with sequence parallelism on, this linear would gather copies of it.
        text_config = copy.copy(config)
        text_config.sequence_parallel = False
        self.linear_q = column_linear(linears, width, width, config=config, group=group)
        self.linear_kv: Any = column_linear(linears, width, 2 * width, config=text_config, group=group)
        self.linear_proj = row_linear(linears, width, width, config=config, group=group)
        self.norm_q = _RMSWeight(width, config=config, group=group)
        self.norm_k = _RMSWeight(width, config=config, group=group)

    def forward(self, u: MaybeDual, context: Tensor) -> MaybeDual:
        """u [s, B, M], context [X, B, M] -> [s, B, M], the bias of the projection left out."""
        q = rowwise(ew.add, apply(self.linear_q, u), self.linear_q.bias)
        q = rowwise(lambda x: x.unflatten(-1, (-1, self.head_dim)), q)
        kv = ew.add(apply(self.linear_kv, context), self.linear_kv.bias)
        k, v = _split_heads(kv, parts=2, head_dim=self.head_dim)
        q = rowwise(partial(self._normalize, norm=self.norm_q), q, _sum_over_heads(rowwise(ew.square_sum, q), self.group))
        k = self._normalize(k, _sum_over_heads(ew.square_sum(k), self.group), norm=self.norm_k)
        return apply(self.linear_proj, attention(q, k, v))

    def _normalize(self, x: Tensor, total: Tensor, *, norm: _RMSWeight) -> Tensor:
        return ew.rms_norm(x, total, norm.weight, width=self.width, eps=self.eps).to(x.dtype)


class FeedForward(nn.Module):
    """Linear, GELU (tanh), linear."""

    def __init__(
        self, linears: ParallelLinears, model: ModelConfig, *, config: TransformerConfig, group: dist.ProcessGroup
    ) -> None:
        super().__init__()
        self.linear_fc1 = column_linear(linears, model.hidden_size, model.ffn_hidden_size, config=config, group=group)
        self.linear_fc2 = row_linear(linears, model.ffn_hidden_size, model.hidden_size, config=config, group=group)

    def forward(self, u: MaybeDual) -> MaybeDual:
        """u [s, B, M] -> [s, B, M], the last bias left out."""
        return apply(self.linear_fc2, rowwise(ew.gelu_tanh, apply(self.linear_fc1, u), self.linear_fc1.bias))


class AffineNorm(nn.Module):
    """Weight and bias of a LayerNorm."""

    def __init__(self, width: int, *, config: TransformerConfig) -> None:
        super().__init__()
        self.weight = replicated(width, config=config)
        self.bias = replicated(width, config=config)


class WanBlock(MegatronModule):
    """z += gate1 SelfAttention(mod1 z);  z += CrossAttention(norm3 z);  z += gate2 FFN(mod2 z)."""

    def __init__(
        self, config: TransformerConfig, submodules: ParallelLinears, *, model: ModelConfig, groups: ProcessGroupCollection
    ) -> None:
        super().__init__(config=config)
        self.eps, self.dtype = model.eps, config.params_dtype
        self.modulation = replicated(1, 6, model.hidden_size, config=config)
        self.self_attn = SelfAttention(submodules, model, config=config, groups=groups)
        self.norm3 = AffineNorm(model.hidden_size, config=config)
        self.cross_attn = CrossAttention(submodules, model, config=config, group=groups.tp)
        self.ffn = FeedForward(submodules, model, config=config, group=groups.tp)

    def forward(self, x: MaybeDual, cond: Conditioning, cache: AttentionCache | None = None) -> MaybeDual:
        """Hidden states x [s, B, M] to the like; see blocks.Block."""
        shift1, scale1, gate1, shift2, scale2, gate2 = rowwise(self._modulate, cond.modulation)
        norm = partial(ew.modulated_norm, eps=self.eps, dtype=self.dtype)

        out = self.self_attn(rowwise(norm, x, shift1, scale1), cond, cache)
        x = rowwise(ew.gated_add, x, out, self.self_attn.linear_proj.bias, gate1)

        affine = partial(ew.affine_norm, eps=self.eps, dtype=self.dtype)
        out = self.cross_attn(rowwise(affine, x, self.norm3.weight, self.norm3.bias), cond.context)
        x = rowwise(ew.biased_add, x, out, self.cross_attn.linear_proj.bias)

        out = self.ffn(rowwise(norm, x, shift2, scale2))
        return rowwise(ew.gated_add, x, out, self.ffn.linear_fc2.bias, gate2)

    def _modulate(self, e0: Tensor) -> tuple[Tensor, ...]:
        return (e0 + self.modulation.transpose(0, 1)).unbind(0)


def _split_heads(x: Tensor, *, parts: int, head_dim: int) -> tuple[Tensor, ...]:
    """[S, B, N parts D] -> `parts` views [S, B, N, D]."""
    return x.unflatten(-1, (-1, parts, head_dim)).unbind(-2)


@overload
def _sum_over_heads(sums: Tensor, group: dist.ProcessGroup) -> Tensor: ...
@overload
def _sum_over_heads(sums: MaybeDual, group: dist.ProcessGroup) -> MaybeDual: ...
def _sum_over_heads(sums: MaybeDual, group: dist.ProcessGroup) -> MaybeDual:
    """Sums over the heads of all ranks, value and tangent in one collective."""
    if group.size() == 1:
        return sums
    if isinstance(sums, Dual):
        return dual.unstack(sum_over_ranks(dual.stack(sums, 0), group), 0)
    return sum_over_ranks(sums, group)
