"""Attention in plain PyTorch operations, tile by tile: the path that runs everywhere, at any length.

The largest intermediate is one tile of scores, whose size does not depend on Sq * Skv, or a copy of an input with the
heads in front. Online softmax of FlashAttention-2 (arXiv 2307.08691, algorithms 1 and 2); the tangent rides along in
the same pass over the keys. Short sequences fit in one tile, and then nothing is ever rescaled.

Precision: scores, softmax statistics and accumulators are in max(float32, dtype). On CUDA the matmuls of float16 and
bfloat16 inputs take operands of that dtype (so probabilities are rounded to it) and accumulate in float32, as a fused
kernel does on tensor cores. Elsewhere PyTorch would round the result of such a matmul to 16 bits, so the operands are
widened to float32 first: their products are then exact and the probabilities keep float32, which is at least as
accurate.

Dimensions: B batch, S tokens (Sq queries, Skv keys), N heads, D head width, G = B * N. Inside, tensors are [G, S, D].
"""

from collections.abc import Iterable
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

# A tile has at most `keys` keys and as many queries as keep its G * queries * keys scores within `scores`, but not fewer
# than TILE_MIN_QUERIES. On a CPU a tile should stay in the caches; on a GPU it should be worth its dozen of launches
# (an H200 runs 32,760 tokens 7 times faster with these tiles than with the CPU's).
TILES = {"cpu": {"keys": 512, "scores": 2**20}, "cuda": {"keys": 2048, "scores": 2**26}}
TILE_MIN_QUERIES = 16

# Since 2.8, on CUDA, a matmul of 16-bit operands can return the float32 it accumulated.
_MATMUL_RETURNS_FLOAT32 = torch.torch_version.TorchVersion(torch.__version__) >= "2.8"


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The dtype of scores, softmax statistics and accumulators: float64 for float64 inputs, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def empty_results(
    q: Tensor, *, with_tangent: bool, wide_out: bool = False
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Uninitialized out, out_dot [B, Sq, N, D], strides ordered as q's, and lse, lse_dot [B, N, Sq].

    wide_out: out in the dtype of lse.
    """
    batch, queries, heads, _ = q.shape
    out = torch.empty_like(q, dtype=accumulation_dtype(q) if wide_out else q.dtype)
    lse = torch.empty(batch, heads, queries, dtype=accumulation_dtype(q), device=q.device)
    return (out, torch.empty_like(q), lse, torch.empty_like(lse)) if with_tangent else (out, None, lse, None)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
    wide_out: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Returns out, out_dot [B, Sq, N, D], strides ordered as q's, and lse, lse_dot [B, N, Sq].

    `tangents` are those of q, k and v; out_dot and lse_dot are None if q has none. wide_out: out in lse's dtype.

    Expects grad mode to be off and the
    arguments to be valid.
    """
    q_dot, k_dot, v_dot = tangents
    rows, keys = _tile_size(q, k)
    out, out_dot, lse, lse_dot = empty_results(q, with_tangent=q_dot is not None, wide_out=wide_out)
    kv_tiles = list(zip(*(_tiles(x, keys) for x in (k, v, k_dot, v_dot))))
    results = zip(
        _head_views(out, rows),
        _head_views(out_dot, rows),
        _column_views(lse, rows),
        _column_views(lse_dot, rows),
    )
    for q_tile, q_dot_tile, result in zip(_tiles(q, rows), _tiles(q_dot, rows), results):
        softmax = _OnlineSoftmax(q_tile, q_dot_tile, scale)
        for kv_tile in kv_tiles:
            softmax.add_keys(*kv_tile)
        softmax.write(*result)
    return out, out_dot, lse, lse_dot


def backward(  # noqa: PLR0917 (as in flash_attention_backward)
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dq [B, Sq, N, D] and dk, dv [B, Skv, N, D], strides ordered as those of q, k and v.

    Expects grad mode to be off and the arguments to be valid.
    """
    rows, keys = _tile_size(q, k)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    # rowsum(dout * out) = rowsum(P * dP) over all keys that `out` saw, also those that are not here.
    mean_dprobs = (dout.to(accumulation_dtype(q)) * out).sum(-1).transpose(1, 2)
    statistics = [list(_columns(x, rows)) for x in (lse, mean_dprobs)]
    q_tiles = list(zip(_tiles(q, rows), _tiles(dout, rows), *statistics))
    dq_tiles: list[Tensor | None] = [None] * len(q_tiles)
    kv_tiles = zip(_tiles(k, keys), _tiles(v, keys), _head_views(dk, keys), _head_views(dv, keys))
    for k_tile, v_tile, dk_view, dv_view in kv_tiles:
        dk_tile = dv_tile = None
        for i, (q_tile, dout_tile, lse_tile, mean_tile) in enumerate(q_tiles):
            probs = _product(q_tile, k_tile.mT, scale=scale).sub_(lse_tile).exp_()
            dscores = _product(dout_tile, v_tile.mT).sub_(mean_tile).mul_(probs).to(q_tile.dtype)
            dv_tile = _product(probs.to(q_tile.dtype).mT, dout_tile, plus=dv_tile)
            dk_tile = _product(dscores.mT, q_tile, scale=scale, plus=dk_tile)
            dq_tiles[i] = _product(dscores, k_tile, scale=scale, plus=dq_tiles[i])
        assert dk_tile is not None and dv_tile is not None, "no queries: the public functions refuse that"
        dk_view.copy_(dk_tile.view(dk_view.shape))
        dv_view.copy_(dv_tile.view(dv_view.shape))
    for dq_view, dq_tile in zip(_head_views(dq, rows), dq_tiles):
        assert dq_tile is not None, "no keys: the public functions refuse that"
        dq_view.copy_(dq_tile.view(dq_view.shape))
    return dq, dk, dv


class _OnlineSoftmax:
    """Attention of one tile of queries, and its tangent if these have one, over keys that arrive tile by tile.

    With P the exponentials relative to the highest score so far and H = P * (S_dot - c), it holds l = rowsum(P),
    r = rowsum(H), A = P v and B = P v_dot + H v: one accumulator for both tangent products. Then lse_dot = c + r / l and
    out_dot = B / l - r / l * out, for every c constant in a row. c = 0 would do but for rounding: where attention is
    sharp, H v and lse_dot * out cancel, and in a 16-bit H every digit of the difference is lost. So c follows the mean
    of S_dot as the maximum follows the scores, and r stays near 0.
    """

    def __init__(self, q: Tensor, q_dot: Tensor | None, scale: float) -> None:
        self.q, self.q_dot, self.scale = q, q_dot, scale
        self.highest: Tensor | None = None
        self.l: Tensor | None = None
        self.A: Tensor | None = None
        self.c: Tensor | None = None
        self.r: Tensor | None = None
        self.B: Tensor | None = None

    def add_keys(self, k: Tensor, v: Tensor, k_dot: Tensor | None, v_dot: Tensor | None) -> None:
        scores = _product(self.q, k.mT, scale=self.scale)
        probs = scores.sub_(self._raise_highest(scores.amax(-1, keepdim=True))).exp_()
        weights = probs.to(v.dtype)
        row_sum = probs.sum(-1, keepdim=True)
        total = row_sum if self.l is None else row_sum.add_(self.l)
        if self.q_dot is not None:
            scores_dot = _product(self.q_dot, k.mT, scale=self.scale)
            if k_dot is not None:
                _product(self.q, k_dot.mT, scale=self.scale, plus=scores_dot)
            center = self._move_center((probs * scores_dot).sum(-1, keepdim=True), total)
            probs_dot = scores_dot.sub_(center).mul_(probs)
            row_sum_dot = probs_dot.sum(-1, keepdim=True)
            self.r = row_sum_dot if self.r is None else self.r.add_(row_sum_dot)
            self.B = _product(probs_dot.to(v.dtype), v, plus=self.B)
            if v_dot is not None:
                _product(weights, v_dot, plus=self.B)
        self.l = total
        self.A = _product(weights, v, plus=self.A)

    def _raise_highest(self, highest: Tensor) -> Tensor:
        """Takes the highest scores of the next keys into account: all sums become relative to the higher ones."""
        if self.highest is not None:
            highest = torch.maximum(highest, self.highest)
            shrink = self.highest.sub_(highest).exp_()
            for x in (self.l, self.A, self.r, self.B):
                if x is not None:
                    x.mul_(shrink)
        self.highest = highest
        return highest

    def _move_center(self, weighted_sum: Tensor, total: Tensor) -> Tensor:
        """Moves c to the mean of S_dot, given rowsum(P * S_dot) of the next keys and the l that includes them."""
        if self.c is None or self.r is None or self.B is None or self.l is None or self.A is None:
            self.c = weighted_sum.div_(total)
            return self.c
        center = weighted_sum.addcmul_(self.c, self.l).div_(total)
        back = self.c.sub_(center)
        self.r.addcmul_(self.l, back)
        self.B.addcmul_(self.A, back)
        self.c = center
        return center

    def write(self, out: Tensor, out_dot: Tensor | None, lse: Tensor, lse_dot: Tensor | None) -> None:
        """Fills views of the results: out, out_dot [B, N, rows, D] and lse, lse_dot [B, N, rows, 1]."""
        assert self.highest is not None and self.l is not None and self.A is not None, "no keys were added"
        A, l = self.A.view(out.shape), self.l.view(lse.shape)
        torch.div(A, l, out=out)
        torch.add(self.highest.view(lse.shape), l.log(), out=lse)
        if out_dot is not None and lse_dot is not None:
            assert self.c is not None and self.r is not None and self.B is not None, "results for a tangent q lacks"
            rest = self.r.view(lse.shape).div_(l)
            torch.add(self.c.view(lse.shape), rest, out=lse_dot)
            torch.div(self.B.view(out.shape).addcmul_(A, rest, value=-1), l, out=out_dot)


def _tile_size(q: Tensor, k: Tensor) -> tuple[int, int]:
    """Queries and keys in a tile."""
    limits = TILES.get(q.device.type, TILES["cpu"])
    keys = min(limits["keys"], k.shape[1])
    return max(TILE_MIN_QUERIES, limits["scores"] // (q.shape[0] * q.shape[2] * keys)), keys


def _tiles(x: Tensor | None, size: int) -> Iterable[Any]:
    """[B, S, N, D] as matmul operands [G, <= size, D]: views where strides allow, else of one copy. None repeats."""
    if x is None:
        return repeat(None)
    keep = x.is_cuda and _MATMUL_RETURNS_FLOAT32
    operand = x.transpose(1, 2)
    if not keep:
        operand = operand.to(accumulation_dtype(x), memory_format=torch.contiguous_format)
    return operand.flatten(0, 1).split(size, dim=1)


def _columns(x: Tensor, size: int) -> tuple[Tensor, ...]:
    """[B, N, S] as [G, <= size, 1]."""
    return x.flatten(0, 1).unsqueeze(-1).split(size, dim=1)


def _head_views(x: Tensor | None, size: int) -> Iterable[Any]:
    """[B, S, N, D] as views [B, N, <= size, D] to write to. None repeats."""
    return repeat(None) if x is None else x.transpose(1, 2).split(size, dim=2)


def _column_views(x: Tensor | None, size: int) -> Iterable[Any]:
    """[B, N, S] as views [B, N, <= size, 1] to write to. None repeats."""
    return repeat(None) if x is None else x.unsqueeze(-1).split(size, dim=2)


def _product(a: Tensor, b: Tensor, *, scale: float = 1.0, plus: Tensor | None = None) -> Tensor:
    """scale * a @ b + plus, in the accumulation dtype; written to `plus` if there is one."""
    beta = 1
    if plus is None:
        plus = torch.empty(a.shape[0], a.shape[1], b.shape[2], dtype=accumulation_dtype(a), device=a.device)
        beta = 0  # what `plus` holds, NaN perhaps, is then ignored
    if a.dtype == plus.dtype:
        return plus.baddbmm_(a, b, beta=beta, alpha=scale)
    return torch.baddbmm(plus, a, b, out_dtype=plus.dtype, beta=beta, alpha=scale, out=plus)
