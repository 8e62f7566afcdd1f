"""What the diffusion transformers share: tokens over ranks, layers over pipeline stages, the course of a pass, checks.

Shapes: latents [B, C, F, H, W]; hidden states [S, B, M] with S = F H W / patch tokens ordered by time, height, width;
what a network is told besides: condition.py.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from rcm_mcore import dual
from rcm_mcore.condition import Condition
from rcm_mcore.config import MeshConfig, ModelConfig, chunks_of_stages, tokens_per_sample
from rcm_mcore.dual import Dual, MaybeDual, primal, rowwise
from rcm_mcore.interop.dcp import Pieces
from rcm_mcore.models.common import elementwise as ew
from rcm_mcore.models.common.blocks import BlockStack, Conditioning
from rcm_mcore.models.common.fp8 import fp8_forwards
from rcm_mcore.models.common.parameters import pieces
from rcm_mcore.parallel.sequence import gather_sequence, scatter_sequence

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def transformer_config(model: ModelConfig, mesh: MeshConfig) -> TransformerConfig:
    """megatron-core's view of `model` on `mesh`."""
    dtype = _DTYPES[model.dtype]
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        ffn_hidden_size=model.ffn_hidden_size,
        kv_channels=model.head_dim,
        tensor_model_parallel_size=mesh.tp,
        context_parallel_size=mesh.cp,
        sequence_parallel=mesh.sp,
        params_dtype=dtype,
        pipeline_model_parallel_size=mesh.pp,
        virtual_pipeline_model_parallel_size=mesh.vpp if mesh.vpp > 1 else None,
        overlap_p2p_comm=mesh.vpp > 1,  # the interleaved schedule is silently wrong without one and with the other
        batch_p2p_comm=mesh.vpp == 1,
        # Hidden states that were sent; the interleaved schedule would free them while they are on their way.
        deallocate_pipeline_outputs=mesh.vpp == 1,
        batch_p2p_sync=False,  # for an old PyTorch; would have a stage wait for what others send it beside its passes
        pipeline_dtype=torch.promote_types(dtype, torch.float32) if model.fp32_residual else dtype,  # of hidden states
        bf16=dtype == torch.bfloat16,
        # Gradients of norms of each head are summed over tensor-parallel ranks, each of which has seen its own heads.
        qk_layernorm=model.family == "cosmos",
        gradient_accumulation_fusion=False,  # needs apex
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        transformer_impl=model.transformer_impl,
    )


class DiffusionTransformer(MegatronModule):
    """A velocity network. Families add their embedders, which every pipeline stage has, the first stage's `patch_embedding` and
    the last stage's `head`, and say how they embed.
    """

    def __init__(self, model: ModelConfig, mesh: MeshConfig, groups: ProcessGroupCollection, *, block_spec: ModuleSpec) -> None:
        config = transformer_config(model, mesh)
        super().__init__(config=config)
        self.model, self.groups, self.tp_group, self.cp_group = model, groups, groups.tp, groups.cp
        stage, stages = groups.pp.rank(), groups.pp.size()
        self.num_chunks: int = config.virtual_pipeline_model_parallel_size or 1
        self.chunk_layers = chunks_of_stages(model.num_layers, stages, self.num_chunks)[stage]
        self.model_type, self.share_embeddings_and_output_weights = ModelType.encoder_or_decoder, False
        self.pre_process, self.post_process = stage == 0, stage == stages - 1
        self.output_dtype = ew.island_dtype(config.params_dtype)
        self._from_stage_before: Tensor | None = None
        self.blocks = BlockStack(
            {
                i: build_module(block_spec, config=config, model=model, groups=groups)
                for layers in self.chunk_layers
                for i in layers
            },
            recompute=model.recompute,
        )

    @staticmethod
    def mark_embedders(*embedders: nn.Module) -> None:
        """Tell the optimizer that every stage has these: see parallel/mesh.py."""
        for embedder in embedders:
            for param in embedder.parameters():
                param.allreduce = False  # type: ignore[attr-defined]

    def initial_values(self, name: str, full: Tensor) -> None:
        """Fill `full`, the whole of the parameter `name`, with the values that training from scratch begins with."""
        raise NotImplementedError

    def embed_time(self, s: Tensor, *, end: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """s [B] -> what the head and what the blocks see of it, [..., B, M] in the dtype of the islands.

        With `end` [B] (`Condition.end`) also of s - end, through a linear that begins at zero.
        """
        raise NotImplementedError

    def embed_text(self, text: Tensor) -> Tensor:
        """text [B, X, text_dim] -> the context of the blocks, [X, B, ...] in the model's dtype."""
        raise NotImplementedError

    def embed_image(self, image: Tensor | None) -> Tensor | None:
        """image [B, n, image_dim] -> a context of its own, [n, B, M]; nothing for networks that see none."""
        return None

    def add_channels(self, x: Tensor, condition: Condition) -> Tensor:
        """x [B, C, F, H, W] -> what the patches are cut from, [B, patch_channels, F, H, W]."""
        return x

    def embed_patches(self, tokens: Tensor) -> Tensor:
        """tokens [s, B, patch_channels patch] -> the residual stream [s, B, M]."""
        z = self.patch_embedding(tokens.to(ew.island_dtype(self.config.params_dtype)))
        return z if self.model.fp32_residual else z.to(self.config.params_dtype)

    def forward(self, x: MaybeDual, s: MaybeDual, condition: Condition, *, chunk: int = 0) -> MaybeDual:
        """Velocity at x [B, C, F, H, W] and rectified-flow time s [B] (any float dtype).

        Returns [B, C, F, H, W] in max(float32, model dtype), a Dual if `x` or `s` is one (a missing tangent is zero);
        its tangent has no graph. Raises ValueError for inputs the network does not take.

        On pipeline stages, all called with the same arguments, once for each of their chunks of layers: hidden states come from
        `set_input_tensor` and go to the next stage as one tensor, [s, B, M], or [s, 2 B, M] for a Dual.
        """
        self._check(primal(x), primal(s), condition)
        if isinstance(x, Dual) or isinstance(s, Dual):
            x, s = _as_dual(x), _as_dual(s)
        model, patch = self.model, self.model.patch_size
        frames, height, width = (n // p for n, p in zip(primal(x).shape[2:], patch))

        e, e0 = rowwise(partial(self.embed_time, end=condition.end), s)
        tokens = frames * height * width
        cos, sin = rotary_table((frames, height, width), model.head_dim, model.rope_ratios, primal(e0).dtype, primal(x).device)
        places = self._cp_rank_rows(cos), self._cp_rank_rows(sin)
        given = None
        if condition.frames is not None:
            frame = torch.arange(tokens, device=primal(x).device) // (height * width)
            given = self._scatter((frame[:, None] < condition.frames)[..., None])
        cond = Conditioning(e0, self.embed_text(condition.text), self.embed_image(condition.image), *places, tokens, given)

        split = self.cp_group.size() > 1 or self.config.sequence_parallel
        y: MaybeDual
        if self.pre_process and chunk == 0:
            y = rowwise(lambda latents: patchify(self.add_channels(latents, condition), patch=patch), x)
            y = rowwise(self.embed_patches, dual.linear(self._scatter, y) if split else y)
        else:
            hidden, self._from_stage_before = self._from_stage_before, None
            assert hidden is not None, "set_input_tensor comes first"
            y = dual.unstack(hidden) if isinstance(x, Dual) else hidden
        with fp8_forwards(model.fp8_forwards and not torch.is_grad_enabled() and not isinstance(y, Dual)):
            y = self.blocks(y, cond, self.chunk_layers[chunk])
        if not (self.post_process and chunk == self.num_chunks - 1):
            return dual.stack(y)
        y = rowwise(partial(self.head, eps=model.eps, given=given), y, e)
        y = dual.linear(lambda rows: self._gather(rows)[:tokens], y) if split else y
        y = rowwise(partial(unpatchify, grid=(frames, height, width), patch=patch), y)
        return y if given is None else rowwise(partial(_towards_given, condition=condition), y, x, s)

    def _padded(self, x: Tensor) -> Tensor:
        """x [S, ...] with zero rows up to a number that its ranks divide."""
        missing = -len(x) % self._token_ranks
        return F.pad(x, (0, 0) * (x.ndim - 1) + (0, missing)) if missing else x

    def _cp_rank_rows(self, x: Tensor) -> Tensor:
        """The rows of x [S, ...] that this context-parallel rank holds, a view unless padded."""
        return self._padded(x).chunk(self.cp_group.size())[self.cp_group.rank()]

    def _scatter(self, x: Tensor) -> Tensor:
        """This rank's rows of x [S, ...], split over context-parallel and then, if so configured, tensor-parallel ranks."""
        x = scatter_sequence(self._padded(x), self.cp_group)
        return scatter_sequence(x, self.tp_group) if self.config.sequence_parallel else x

    def _gather(self, x: Tensor) -> Tensor:
        """The inverse of `_scatter`, padding included."""
        if self.config.sequence_parallel:
            x = gather_sequence(x, self.tp_group)
        return gather_sequence(x, self.cp_group)

    def pieces(self) -> dict[str, Pieces]:
        """This rank's part of every parameter by name; names and full tensors are the same for every mesh."""
        return pieces(self, self.groups.tp)

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Called by megatron's schedules: what the stage before sent; nothing on the first stage."""
        if isinstance(input_tensor, list):
            (input_tensor,) = input_tensor
        self._from_stage_before = input_tensor

    def is_of_another_stage(self, name: str) -> bool:
        """Whether a parameter of the network, by its name, is held by other pipeline stages alone."""
        first, _, rest = name.partition(".")
        if first == "blocks":
            layer = rest.partition(".")[0]
            return layer not in self.blocks and layer in map(str, range(self.model.num_layers))
        return not hasattr(self, first) and first in ("patch_embedding", "head")

    def hidden_shape(self, x: MaybeDual) -> tuple[int, int, int]:
        """Of the message to the next stage for latents x [B, C, F, H, W]: [s, B, M], or [s, 2 B, M] for a Dual."""
        batch, *latent = primal(x).shape
        tokens = tokens_per_sample(self.model, tuple(latent))
        return -(-tokens // self._token_ranks), batch * (2 if isinstance(x, Dual) else 1), self.model.hidden_size

    @property
    def _token_ranks(self) -> int:
        """Ranks that the tokens of a sample are split over."""
        return self.cp_group.size() * (self.tp_group.size() if self.config.sequence_parallel else 1)

    def _check(self, x: Tensor, s: Tensor, condition: Condition) -> None:
        model, device = self.model, next(self.parameters()).device
        if x.ndim != 5:
            raise ValueError(f"x has shape {list(x.shape)}: must be [B, C, F, H, W]")
        tokens = tokens_per_sample(model, tuple(x.shape[1:]))
        if self.cp_group.size() > tokens:
            raise ValueError(
                f"x has shape {list(x.shape)}: its {tokens} tokens are fewer than mesh.cp={self.cp_group.size()} ranks"
            )
        if s.shape != x.shape[:1]:
            raise ValueError(f"s has shape {list(s.shape)}: must be [{x.shape[0]}], one per sample")
        condition.check(model, tuple(x.shape))
        there = {name: value for name, value in condition._asdict().items() if value is not None}
        for name, value in (("x", x), ("s", s), *there.items()):
            if name != "frames" and not value.is_floating_point():
                raise ValueError(f"{name} has dtype {value.dtype}: must be floating-point")
            if value.device != device:
                raise ValueError(f"{name} is on {value.device}: the network is on {device}")


def frames_given(condition: Condition, like: Tensor) -> Tensor:
    """[B, 1, F, 1, 1]: which latent frames of `like` [B, C, F, H, W] are given."""
    assert condition.frames is not None
    return (torch.arange(like.shape[2], device=like.device) < condition.frames[:, None])[:, None, :, None, None]


def _towards_given(v: Tensor, x: Tensor, s: Tensor, *, condition: Condition) -> Tensor:
    """The velocity v [B, C, F, H, W], at frames that are given that which leads to them: x_s - s v is the given frame.

    Sampled and denoised states then hold them, and no loss sees these frames.
    """
    assert condition.latents is not None
    exact = (x - condition.latents) / s.view(-1, 1, 1, 1, 1)
    return torch.where(frames_given(condition, x), exact.to(v.dtype), v)


def _as_dual(x: MaybeDual) -> Dual:
    return x if isinstance(x, Dual) else Dual(x, torch.zeros_like(x))


def patchify(x: Tensor, *, patch: tuple[int, int, int]) -> Tensor:
    """[B, C, F, H, W] -> [S, B, C pt ph pw], tokens by time, height, width."""
    b, c, f, h, w = x.shape
    pt, ph, pw = patch
    x = x.reshape(b, c, f // pt, pt, h // ph, ph, w // pw, pw).permute(2, 4, 6, 0, 1, 3, 5, 7)
    return x.reshape((f // pt) * (h // ph) * (w // pw), b, -1)


def unpatchify(y: Tensor, *, grid: tuple[int, int, int], patch: tuple[int, int, int]) -> Tensor:
    """[S, B, pt ph pw C] -> [B, C, F, H, W] (channels last within a patch, unlike `patchify`)."""
    b = y.shape[1]
    y = y.reshape(*grid, b, *patch, -1).permute(3, 7, 0, 4, 1, 5, 2, 6)
    return y.reshape(b, -1, *(n * p for n, p in zip(grid, patch)))


@lru_cache(maxsize=8)
def rotary_table(
    grid: tuple[int, int, int], head_dim: int, ratios: tuple[float, float, float], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin [S, 1, 1, D/2] of the rotary angles (architectures.md A.1, item 5; B.1, item 3); computed in float64."""
    spatial = 2 * (head_dim // 6)
    widths = (head_dim - 2 * spatial, spatial, spatial)
    positions = torch.meshgrid(*[torch.arange(n, dtype=torch.float64) for n in grid], indexing="ij")
    bases = [10000.0 * ratio ** (n / (n - 2)) if n > 2 else 10000.0 for n, ratio in zip(widths, ratios)]
    angles = [
        p.reshape(-1, 1) * base ** (-torch.arange(0, n, 2, dtype=torch.float64) / n)
        for p, n, base in zip(positions, widths, bases)
    ]
    table = torch.cat(angles, -1)[:, None, None]
    return table.cos().to(device, dtype), table.sin().to(device, dtype)
