"""One Wan2.1 block: self-attention, cross-attention onto the text, feed-forward (architectures.md A.1, item 6)."""

from __future__ import annotations

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from rcm_mcore.config import ModelConfig
from rcm_mcore.dual import MaybeDual
from rcm_mcore.models.common import elementwise as ew
from rcm_mcore.models.common.attention import AttentionCache
from rcm_mcore.models.common.blocks import Conditioning
from rcm_mcore.models.common.layers import (
    AffineNorm,
    CrossAttention,
    FeedForward,
    LayerStyle,
    SelfAttention,
    fused_rowwise,
    replicated,
)
from rcm_mcore.models.common.linears import parallel_linears


def wan_block_spec(transformer_impl: str) -> ModuleSpec:
    """The spec of a block whose linears are those of `model.transformer_impl`."""
    style = LayerStyle(
        linears=parallel_linears(transformer_impl),
        bias=True,
        norm_over="all heads",
        rotate=ew.rotate_pairs,
        activation=ew.gelu_tanh,
    )
    return ModuleSpec(module=WanBlock, submodules=style)


class WanBlock(MegatronModule):
    """z += gate1 SelfAttention(mod1 z);  z += CrossAttention(norm3 z);  z += gate2 FFN(mod2 z)."""

    def __init__(
        self, config: TransformerConfig, submodules: LayerStyle, *, model: ModelConfig, groups: ProcessGroupCollection
    ) -> None:
        super().__init__(config=config)
        self.rowwise, self.norm = fused_rowwise(model), dict(eps=model.eps, dtype=config.params_dtype)
        self.modulation = replicated(1, 6, model.hidden_size, config=config)
        self.self_attn = SelfAttention(submodules, model, config=config, groups=groups)
        self.norm3 = AffineNorm(model.hidden_size, config=config)
        self.cross_attn = CrossAttention(submodules, model, context_width=model.hidden_size, config=config, group=groups.tp)
        self.ffn = FeedForward(submodules, model, config=config, group=groups.tp)

    def forward(self, x: MaybeDual, cond: Conditioning, cache: AttentionCache | None = None) -> MaybeDual:
        """Hidden states x [s, B, M] to the like; see blocks.Block."""
        rowwise, norm = self.rowwise, self.norm
        shift1, scale1, gate1, shift2, scale2, gate2 = rowwise(ew.modulation, cond.modulation, self.modulation)

        out = self.self_attn(rowwise(ew.modulated_norm, x, shift1, scale1, **norm), cond, cache)
        x = rowwise(ew.gated_add, x, out, self.self_attn.linear_proj.bias, gate1)

        u = rowwise(ew.affine_norm, x, self.norm3.weight, self.norm3.bias, **norm)
        out = self.cross_attn(u, cond.context, cond.image)
        x = rowwise(ew.biased_add, x, out, self.cross_attn.linear_proj.bias)

        out = self.ffn(rowwise(ew.modulated_norm, x, shift2, scale2, **norm))
        return rowwise(ew.gated_add, x, out, self.ffn.linear_fc2.bias, gate2)
