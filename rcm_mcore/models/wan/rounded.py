"""A Wan block whose roundings are chosen one by one: what each costs a tangent, for tools/benchmark_tangent.py.

It computes in the dtype of its weights (float32) and rounds where a bfloat16 network does. With `Roundings()` it stands for the
bfloat16 block of block.py, with every format `wide` it is that block in its own dtype; the tests hold it against both. Products
of operands that were rounded are exact before they are added up in float32, as on tensor cores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from rcm_kernels import flash_attention_jvp
from torch import Tensor, nn

from rcm_mcore.dual import Dual, MaybeDual, primal, rowwise
from rcm_mcore.models.common import elementwise as ew
from rcm_mcore.models.common.attention import AttentionCache
from rcm_mcore.models.common.blocks import Conditioning

# `split`: the sum of two bfloat16 numbers, 16 bits of precision at the price of two matmuls; `wide`: left as it is.
Format = Literal["bf16", "fp16", "split", "wide"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Formats(NamedTuple):
    """Of a value and of its tangent."""

    primal: Format
    tangent: Format


BF16, FP16, WIDE = Formats("bf16", "bf16"), Formats("fp16", "fp16"), Formats("wide", "wide")


@dataclass(frozen=True)
class Roundings:
    """What is rounded to what; the defaults are those of a bfloat16 network."""

    residual: Formats = BF16  # the stream, after every addition to it
    operands: Formats = BF16  # what linears multiply
    products: Formats = BF16  # what linears return
    attention: Formats = BF16  # q, k and v
    attention_out: Formats = BF16  # what attention returns and the projection after it multiplies
    modulation: Format = "wide"  # shift, scale and gate, and every operation with them


ALL_WIDE = Roundings(residual=WIDE, operands=WIDE, products=WIDE, attention=WIDE, attention_out=WIDE)


class RoundedBlock(nn.Module):
    """A stand-in for `block`, a WanBlock in float32 or float64 on one rank, for Duals without a graph.

    After a call `logit_rms` holds the RMS of the logits of its self-attention, over some queries and all keys.
    """

    def __init__(self, block: Any, *, head_dim: int, roundings: Roundings) -> None:
        super().__init__()
        self.block, self.head_dim, self.roundings = block, head_dim, roundings
        self.eps, self.logit_rms = block.norm["eps"], float("nan")

    def forward(self, x: Dual, cond: Conditioning, cache: AttentionCache | None = None) -> Dual:
        """Hidden states [S, B, M] to the like, in the dtype of the weights; see blocks.Block."""
        block, r = self.block, self.roundings
        parameters = rowwise(lambda e0: (e0 + block.modulation.transpose(0, 1)).unbind(0), cond.modulation)
        shift1, scale1, gate1, shift2, scale2, gate2 = (rounded(p, Formats(r.modulation, r.modulation)) for p in parameters)
        # Written in bfloat16, every operation with these three rounds.
        narrow = DTYPES.get(r.modulation, block.modulation.dtype)

        def norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
            x, shift, scale = (t.to(narrow) for t in (F.layer_norm(x, x.shape[-1:], eps=self.eps), shift, scale))
            return (x * (1 + scale) + shift).to(block.modulation.dtype)

        def add(x: Tensor, out: Tensor, bias: Tensor, gate: Tensor) -> Tensor:
            return (x.to(narrow) + gate.to(narrow) * (out + bias).to(narrow)).to(x.dtype)

        def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return F.layer_norm(x, x.shape[-1:], weight, bias, self.eps)

        x = rounded(x, r.residual)
        out = self._self_attention(rounded(rowwise(norm, x, shift1, scale1), r.operands), cond)
        x = rounded(rowwise(add, x, out, block.self_attn.linear_proj.bias, gate1), r.residual)

        u = rounded(rowwise(affine, x, block.norm3.weight, block.norm3.bias), r.operands)
        out = self._cross_attention(u, rounded(cond.context, r.operands))
        x = rounded(rowwise(lambda x, out: x + (out + block.cross_attn.linear_proj.bias), x, out), r.residual)

        out = self._linear(block.ffn.linear_fc1, rounded(rowwise(norm, x, shift2, scale2), r.operands), r.operands)
        out = rowwise(lambda h: F.gelu(h + block.ffn.linear_fc1.bias, approximate="tanh"), out)
        out = self._linear(block.ffn.linear_fc2, rounded(out, r.operands), r.operands)
        return rounded(rowwise(add, x, out, block.ffn.linear_fc2.bias, gate2), r.residual)

    def _self_attention(self, u: Dual, cond: Conditioning) -> Dual:
        attn = self.block.self_attn

        def heads(qkv: Tensor) -> tuple[Tensor, ...]:
            q, k, v = (qkv + attn.linear_qkv.bias).unflatten(-1, (-1, 3, self.head_dim)).unbind(-2)
            q, k = (self._rms(x, norm.weight) for x, norm in ((q, attn.norm_q), (k, attn.norm_k)))
            return ew.rotate_pairs(q, cond.cos, cond.sin), ew.rotate_pairs(k, cond.cos, cond.sin), v

        q, k, v = rowwise(heads, self._linear(attn.linear_qkv, u, self.roundings.operands))
        some = q.primal[:: max(1, len(q.primal) // 64)]
        logits = torch.einsum("sbnd,kbnd->bnsk", some, k.primal) * self.head_dim**-0.5
        self.logit_rms = float(logits.square().mean().sqrt())
        return self._linear(attn.linear_proj, self._attend(q, k, v), self.roundings.attention_out)

    def _cross_attention(self, u: Dual, context: Tensor) -> Dual:
        attn, r = self.block.cross_attn, self.roundings
        q = rowwise(
            lambda q: self._rms((q + attn.linear_q.bias).unflatten(-1, (-1, self.head_dim)), attn.norm_q.weight),
            self._linear(attn.linear_q, u, r.operands),
        )
        kv = self._linear(attn.linear_kv, context, r.operands) + attn.linear_kv.bias
        k, v = kv.unflatten(-1, (-1, 2, self.head_dim)).unbind(-2)
        return self._linear(attn.linear_proj, self._attend(q, self._rms(k, attn.norm_k.weight), v), r.attention_out)

    def _rms(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm of x [S, B, N, D] over all heads."""
        scale = torch.rsqrt(x.square().mean((-2, -1), keepdim=True) + self.eps)
        return x * scale * weight.unflatten(0, (-1, self.head_dim))

    def _linear(self, layer: Any, x: Any, operands: Formats) -> Any:
        """`layer` without its bias, of a tensor or a Dual that was rounded to `operands`."""
        products = [_matmul(part, layer.weight, fmt) for part, fmt in zip(_halves(x), operands)]
        return rounded(Dual(*products) if isinstance(x, Dual) else products[0], self.roundings.products)

    def _attend(self, q: Dual, k: Any, v: Any) -> Dual:
        """q [S, B, N, D], k and v [S', B, N, D], the latter tensors or Duals -> [S, B, N D]."""
        r = self.roundings
        # Kernels of 16 bits give 16 bits; what they cannot do goes through float32.
        kernel = r.attention in (BF16, FP16) and r.attention_out in (BF16, r.attention)
        dtype = DTYPES[r.attention.primal] if kernel else primal(q).dtype
        halves = [[part.transpose(0, 1).to(dtype) for part in _halves(rounded(x, r.attention))] for x in (q, k, v)]
        tangents: Any = [parts[1] if len(parts) == 2 else None for parts in halves]
        out, out_dot, *_ = flash_attention_jvp(halves[0][0], halves[1][0], halves[2][0], *tangents)
        merge = lambda t: t.transpose(0, 1).flatten(2).to(primal(q).dtype)
        return rounded(Dual(merge(out), merge(out_dot)), r.attention_out)


def rounded(x: Any, formats: Formats) -> Any:
    """A tensor or a Dual whose values fit the formats, in the dtype it had."""
    if isinstance(x, Dual):
        return Dual(*(_round(part, fmt) for part, fmt in zip(x, formats)))
    return _round(x, formats.primal)


def _halves(x: MaybeDual) -> tuple[Tensor, ...]:
    return tuple(x) if isinstance(x, Dual) else (x,)


def _round(x: Tensor, fmt: Format) -> Tensor:
    if fmt == "wide":
        return x
    high = x.to(DTYPES.get(fmt, torch.bfloat16)).to(x.dtype)
    return high + (x - high).to(torch.bfloat16).to(x.dtype) if fmt == "split" else high


def _matmul(x: Tensor, weight: Tensor, fmt: Format) -> Tensor:
    """x [S, B, in] W^T, added up in float32: on a GPU by tensor cores where the operands fit bfloat16."""
    if fmt == "bf16" and x.is_cuda and x.dtype == torch.float32:
        narrow = x.flatten(0, 1).to(torch.bfloat16), weight.to(torch.bfloat16)
        return torch.mm(narrow[0], narrow[1].T, out_dtype=torch.float32).unflatten(0, x.shape[:2])
    return F.linear(x, weight)
