"""A stack of transformer blocks with recompute, for tensors and for Duals."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from rcm_mcore.dual import Dual, MaybeDual, primal
from rcm_mcore.models.common.attention import AttentionCache


class Conditioning(NamedTuple):
    """What every block sees besides the hidden states."""

    modulation: MaybeDual  # [..., B, M], wide
    context: Tensor  # [X, B, M]
    image: Tensor | None  # [n, B, M], of image-conditioned networks
    cos: Tensor  # [S, 1, 1, D/2], of this context-parallel rank's tokens
    sin: Tensor
    tokens: int  # of a whole sample, without padding
    given: Tensor | None  # [s, B, 1], which of this rank's tokens are of frames that are given (see Condition.frames)


class Block(Protocol):
    """A block maps hidden states [s, B, M] to the like, a Dual to a Dual; it fills or uses `cache`."""

    def __call__(self, x: MaybeDual, cond: Conditioning, cache: AttentionCache | None = None) -> MaybeDual: ...


class _Recompute(torch.autograd.Function):
    """Run a block without a graph and keep only what its backward needs to run the primal again.

    That is the primal input and, with `keep_attention`, the output and lse of the self-attention, which backward then does not
    redo. A tangent (the one-pass dual) is returned without a gradient.
    """

    @staticmethod
    def forward(ctx: Any, block: Block, keep_attention: bool, cond: Conditioning, *tensors: Tensor) -> Any:
        x, x_dot, modulation, modulation_dot, context, image = tensors
        is_dual = x_dot is not None
        ctx.cache = AttentionCache() if keep_attention else None
        ctx.block, ctx.places = block, (cond.cos, cond.sin, cond.tokens, cond.given)
        y = block(
            Dual(x, x_dot) if is_dual else x,
            Conditioning(Dual(modulation, modulation_dot) if is_dual else modulation, context, image, *ctx.places),
            ctx.cache,
        )
        ctx.save_for_backward(_owned(x), modulation, context, image)
        if not isinstance(y, Dual):
            return y
        ctx.mark_non_differentiable(y.tangent)
        return y.primal, y.tangent

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        needs = [ctx.needs_input_grad[i] for i in (3, 5, 7, 8)]
        inputs: list[Any] = [
            None if t is None else t.detach().requires_grad_(need) for t, need in zip(ctx.saved_tensors, needs)
        ]
        x, modulation, context, image = inputs
        with torch.enable_grad():
            y = ctx.block(x, Conditioning(modulation, context, image, *ctx.places), ctx.cache)
        ctx.cache = None  # the graph lives as long as its loss, which may be until after the next forward
        torch.autograd.backward(y, grads[0])
        of_image = None if image is None else image.grad
        return None, None, None, x.grad, None, modulation.grad, None, context.grad, of_image


def _owned(x: Tensor) -> Tensor:
    """`x`, copied if it is a part of a larger storage that keeping it would keep alive."""
    return x if x.untyped_storage().nbytes() == x.numel() * x.element_size() else x.clone()


class BlockStack(nn.ModuleDict):
    """Blocks in order. Parameters are named by position in the whole network: `0.`, `1.`, ..."""

    def __init__(self, blocks: dict[int, nn.Module], *, recompute: Literal["none", "selective", "full"]) -> None:
        super().__init__({str(i): block for i, block in blocks.items()})
        self.recompute = recompute

    def forward(self, x: MaybeDual, cond: Conditioning, layers: range) -> MaybeDual:
        """Hidden states [s, B, M] through the blocks at `layers`.

        With gradients on, a Dual always goes the one-pass way: its primal output has a graph, its tangent none.
        """
        recompute = torch.is_grad_enabled() and (isinstance(x, Dual) or self.recompute != "none")
        keep_attention = isinstance(x, Dual) or self.recompute == "selective"
        for block in (self[str(i)] for i in layers):
            x = _run_recomputed(block, x, cond, keep_attention) if recompute else block(x, cond)
        return x


def _run_recomputed(block: Any, x: MaybeDual, cond: Conditioning, keep_attention: bool) -> MaybeDual:
    x_dot = modulation_dot = None
    if isinstance(x, Dual):
        assert isinstance(cond.modulation, Dual), "a dual pass needs a dual modulation"
        x_dot, modulation_dot = x.tangent, cond.modulation.tangent
    modulation = primal(cond.modulation)
    y = _Recompute.apply(block, keep_attention, cond, primal(x), x_dot, modulation, modulation_dot, cond.context, cond.image)
    return Dual(*y) if isinstance(x, Dual) else y
