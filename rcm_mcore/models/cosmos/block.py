"""One Cosmos-Predict2 block: self-attention, cross-attention onto the text, feed-forward (architectures.md B.1, item 5)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from rcm_mcore.config import ModelConfig
from rcm_mcore.dual import MaybeDual, rowwise
from rcm_mcore.models.common import elementwise as ew
from rcm_mcore.models.common.attention import AttentionCache
from rcm_mcore.models.common.blocks import Conditioning
from rcm_mcore.models.common.layers import CrossAttention, FeedForward, LayerStyle, Linear, SelfAttention
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

    def forward(self, time: Tensor, given: Tensor | None) -> tuple[Tensor, ...]:
        """time [4, B, M], the normalized sinusoid and three parts that are shared -> `parts` of [B, M], wide.

        With given frames: time [4, 2, B, M], of the others and of those that given [s, B, 1] marks -> `parts` of [s, B, M].
        """
        own = self.up(self.down(F.silu(time[0]))).unflatten(-1, (self.parts, -1)).unbind(-2)
        parts = tuple(x + shared for x, shared in zip(own, time[1:]))
        return parts if given is None else tuple(torch.where(given, x[1], x[0]) for x in parts)


class CosmosBlock(MegatronModule):
    """z += gate f(LN(z) (1 + scale) + shift), f self-attention, cross-attention, feed-forward, each with its own AdaLN."""

    def __init__(
        self, config: TransformerConfig, submodules: LayerStyle, *, model: ModelConfig, groups: ProcessGroupCollection
    ) -> None:
        super().__init__(config=config)
        self.eps, self.dtype = model.eps, config.params_dtype
        for name in ("self_attn", "cross_attn", "ffn"):
            self.add_module(f"adaln_{name}", AdaLN(model.hidden_size, model.adaln_rank, 3, config=config))
        self.self_attn = SelfAttention(submodules, model, config=config, groups=groups)
        self.cross_attn = CrossAttention(submodules, model, context_width=model.text_dim, config=config, group=groups.tp)
        self.ffn = FeedForward(submodules, model, config=config, group=groups.tp)

    def forward(self, x: MaybeDual, cond: Conditioning, cache: AttentionCache | None = None) -> MaybeDual:
        """Hidden states x [s, B, M] to the like; see blocks.Block."""
        norm = partial(ew.modulated_norm, eps=self.eps, dtype=self.dtype)
        sublayers: dict[str, Callable[[MaybeDual], MaybeDual]] = {
            "self_attn": lambda u: self.self_attn(u, cond, cache),
            "cross_attn": lambda u: self.cross_attn(u, cond.context),
            "ffn": self.ffn,
        }
        for name, sublayer in sublayers.items():
            shift, scale, gate = rowwise(self.get_submodule(f"adaln_{name}"), cond.modulation, cond.given)
            x = rowwise(ew.gated_add, x, sublayer(rowwise(norm, x, shift, scale)), None, gate)
        return x
