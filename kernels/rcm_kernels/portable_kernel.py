"""The Triton kernel of `portable`, in a module of its own because importing it needs triton."""

import triton
import triton.language as tl


@triton.jit
def _load(tensor, rows, stride, count, D: tl.constexpr, BLOCK_D: tl.constexpr):  # noqa: PLR0917
    """Rows of a [count, D] matrix, zeros beyond its ends."""
    columns = tl.arange(0, BLOCK_D)
    at = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(tensor + at, mask=(rows < count)[:, None] & (columns < D)[None, :], other=0.0)


@triton.jit
def _store(tensor, x, rows, stride, count, D: tl.constexpr, BLOCK_D: tl.constexpr):  # noqa: PLR0917
    columns = tl.arange(0, BLOCK_D)
    at = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(tensor + at, x.to(tensor.dtype.element_ty), mask=(rows < count)[:, None] & (columns < D)[None, :])


@triton.jit(do_not_specialize=["queries", "keys", "heads"])  # or every length would be compiled for
def attention_kernel(  # noqa: PLR0915, PLR0917 (a kernel's arguments are pointers, strides and sizes)
    q, k, v, q_dot, k_dot, v_dot, out, out_dot, lse, lse_dot,
    q_b, q_s, q_n, k_b, k_s, k_n, v_b, v_s, v_n,
    q_dot_b, q_dot_s, q_dot_n, k_dot_b, k_dot_s, k_dot_n, v_dot_b, v_dot_s, v_dot_n,
    out_b, out_s, out_n, out_dot_b, out_dot_s, out_dot_n,
    queries, keys, heads, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    TANGENT: tl.constexpr, K_TANGENT: tl.constexpr, V_TANGENT: tl.constexpr,
):  # fmt: skip
    """O = P V and T = P V_dot + (P * (S_dot - c)) V of one tile of queries, then out, out_dot, lse and lse_dot."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    tiles = tl.cdiv(queries, BM)
    index = tl.program_id(0)
    head_index = index // tiles
    head = (head_index % heads).to(tl.int64)
    batch = (head_index // heads).to(tl.int64)
    rows = index % tiles * BM + tl.arange(0, BM)
    q_tile = _load(q + batch * q_b + head * q_n, rows, q_s, queries, D, BLOCK_D)
    k += batch * k_b + head * k_n
    v += batch * v_b + head * v_n
    O = tl.zeros([BM, BLOCK_D], tl.float32)
    l = tl.zeros([BM], tl.float32)
    m = tl.full([BM], float("-inf"), tl.float32)
    if TANGENT:
        q_dot_tile = _load(q_dot + batch * q_dot_b + head * q_dot_n, rows, q_dot_s, queries, D, BLOCK_D)
        T = tl.zeros([BM, BLOCK_D], tl.float32)
        r = tl.zeros([BM], tl.float32)
        c = tl.zeros([BM], tl.float32)
    if K_TANGENT:
        k_dot += batch * k_dot_b + head * k_dot_n
    if V_TANGENT:
        v_dot += batch * v_dot_b + head * v_dot_n
    for start in range(0, keys, BN):
        columns = start + tl.arange(0, BN)
        k_tile = _load(k, columns, k_s, keys, D, BLOCK_D)
        S = tl.dot(q_tile, tl.trans(k_tile)) * (scale * LOG2_E)
        S = tl.where((columns < keys)[None, :], S, float("-inf"))
        to = tl.maximum(m, tl.max(S, 1))
        shrink = tl.exp2(m - to)
        m = to
        P = tl.exp2(S - m[:, None])
        l_before = l * shrink
        l = l_before + tl.sum(P, 1)
        v_tile = _load(v, columns, v_s, keys, D, BLOCK_D)
        P_low = P.to(v_tile.dtype)
        O *= shrink[:, None]
        if TANGENT:
            S_dot = tl.dot(q_dot_tile, tl.trans(k_tile))
            if K_TANGENT:
                S_dot = tl.dot(q_tile, tl.trans(_load(k_dot, columns, k_dot_s, keys, D, BLOCK_D)), S_dot)
            S_dot *= scale
            center = (c * l_before + tl.sum(P * S_dot, 1)) / l
            back = c - center
            c = center
            H = P * (S_dot - c[:, None])
            r = r * shrink + back * l_before + tl.sum(H, 1)
            T = T * shrink[:, None] + back[:, None] * O
            T = tl.dot(H.to(v_tile.dtype), v_tile, T)
            if V_TANGENT:
                T = tl.dot(P_low, _load(v_dot, columns, v_dot_s, keys, D, BLOCK_D), T)
        O = tl.dot(P_low, v_tile, O)
    O /= l[:, None]
    _store(out + batch * out_b + head * out_n, O, rows, out_s, queries, D, BLOCK_D)
    at = head_index.to(tl.int64) * queries + rows
    tl.store(lse + at, (m + tl.log2(l)) / LOG2_E, mask=rows < queries)
    if TANGENT:
        rest = r / l
        _store(
            out_dot + batch * out_dot_b + head * out_dot_n,
            T / l[:, None] - rest[:, None] * O,
            rows, out_dot_s, queries, D, BLOCK_D,
        )  # fmt: skip
        tl.store(lse_dot + at, c + rest, mask=rows < queries)
