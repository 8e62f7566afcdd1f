"""One Cosmos-Predict2 block: self-attention, cross-attention onto the text, feed-forward (architectures.md B.1, item 5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from rcm_mcore.config import ModelConfig
from rcm_mcore.dual import MaybeDual, Rowwise, rowwise
from rcm_mcore.models.common import elementwise as ew
from rcm_mcore.models.common.attention import AttentionCache
from rcm_mcore.models.common.blocks import Conditioning
from rcm_mcore.models.common.layers import CrossAttention, FeedForward, LayerStyle, Linear, SelfAttention, fused_rowwise
from rcm_mcore.models.common.linears import parallel_linears


def cosmos_block_spec(transformer_impl: str) -> ModuleSpec:
    """The spec of a block whose linears are those of `model.transformer_impl`."""
    style = LayerStyle(
        linears=parallel_linears(transformer_impl),
        bias=False,
        norm_over="each head",
        rotate=ew.rotate_halves,
        activation=ew.gelu_erf,
    )
    return ModuleSpec(module=CosmosBlock, submodules=style)


class AdaLN(nn.Module):
    """Shift, scale and, with three parts, gate from the time: two linears of low rank, and what every sublayer shares."""

    def __init__(self, width: int, rank: int, parts: int, *, config: TransformerConfig) -> None:
        super().__init__()
        self.down = Linear(width, rank, config=config, bias=False)
        self.up = Linear(rank, parts * width, config=config, bias=False)
        self.parts = parts

    def forward(self, time: MaybeDual, rowwise: Rowwise = rowwise) -> Any:
        """time [4, B, M], the normalized sinusoid and three parts that are shared -> `parts` of [B, M], wide.

        With given frames [4, 2, B, M] -> [2, B, M], of the other frames and of those that are given.
        """
        return rowwise(_low_rank, time, self.down.weight, self.up.weight, parts=self.parts)


def _low_rank(time: Tensor, down: Tensor, up: Tensor, *, parts: int) -> tuple[Tensor, ...]:
    own = F.linear(F.linear(F.silu(time[0]), down.to(time.dtype)), up.to(time.dtype))
    return tuple(x + shared for x, shared in zip(own.chunk(parts, -1), time[1:]))


class CosmosBlock(MegatronModule):
    """z += gate f(LN(z) (1 + scale) + shift), f self-attention, cross-attention, feed-forward, each with its own AdaLN."""

    def __init__(
        self, config: TransformerConfig, submodules: LayerStyle, *, model: ModelConfig, groups: ProcessGroupCollection
    ) -> None:
        super().__init__(config=config)
        self.rowwise, self.norm = fused_rowwise(model), dict(eps=model.eps, dtype=config.params_dtype)
        for name in ("self_attn", "cross_attn", "ffn"):
            self.add_module(f"adaln_{name}", AdaLN(model.hidden_size, model.adaln_rank, 3, config=config))
        self.self_attn = SelfAttention(submodules, model, config=config, groups=groups)
        self.cross_attn = CrossAttention(submodules, model, context_width=model.text_dim, config=config, group=groups.tp)
        self.ffn = FeedForward(submodules, model, config=config, group=groups.tp)

    def forward(self, x: MaybeDual, cond: Conditioning, cache: AttentionCache | None = None) -> MaybeDual:
        """Hidden states x [s, B, M] to the like; see blocks.Block."""
        rowwise, given = self.rowwise, cond.given
        sublayers: dict[str, Callable[[MaybeDual], MaybeDual]] = {
            "self_attn": lambda u: self.self_attn(u, cond, cache),
            "cross_attn": lambda u: self.cross_attn(u, cond.context),
            "ffn": self.ffn,
        }
        for name, sublayer in sublayers.items():
            shift, scale, gate = self.get_submodule(f"adaln_{name}")(cond.modulation, rowwise)
            u = rowwise(ew.modulated_norm, x, shift, scale, given, **self.norm)
            x = rowwise(ew.gated_add, x, sublayer(u), None, gate, given)
        return x
