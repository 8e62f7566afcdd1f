"""The Triton kernel of `merge`, in a module of its own because importing it needs triton."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows", "heads"])
def merge_kernel(  # noqa: PLR0917 (a kernel's arguments are pointers, strides and sizes)
    outs, out_dots, lses, lse_dots, out, out_dot, lse, lse_dot, stride_b, stride_s, stride_n, rows, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, TANGENT: tl.constexpr,
):  # fmt: skip
    """TILE rows of one head; the tuples hold the parts. The last dimension of out and out_dot is contiguous."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    here = row < rows
    at = (batch * heads + head) * rows + row
    columns = tl.arange(0, BLOCK_D)
    place = batch * stride_b + head * stride_n + row.to(tl.int64)[:, None] * stride_s + columns[None, :]
    inside = here[:, None] & (columns < D)[None, :]

    highest = tl.full([TILE], float("-inf"), tl.float32)
    for i in tl.static_range(len(lses)):
        highest = tl.maximum(highest, tl.load(lses[i] + at, mask=here, other=0.0))
    total = tl.zeros([TILE], tl.float32)
    rate = tl.zeros([TILE], tl.float32)
    for i in tl.static_range(len(lses)):
        weight = tl.exp(tl.load(lses[i] + at, mask=here, other=0.0) - highest)
        total += weight
        if TANGENT:
            rate += weight * tl.load(lse_dots[i] + at, mask=here, other=0.0)
    rate /= total

    O = tl.zeros([TILE, BLOCK_D], tl.float32)
    T = tl.zeros([TILE, BLOCK_D], tl.float32)
    for i in tl.static_range(len(lses)):
        weight = tl.exp(tl.load(lses[i] + at, mask=here, other=0.0) - highest) / total
        part = tl.load(outs[i] + place, mask=inside, other=0.0).to(tl.float32)
        O += weight[:, None] * part
        if TANGENT:
            change = weight * (tl.load(lse_dots[i] + at, mask=here, other=0.0) - rate)
            T += weight[:, None] * tl.load(out_dots[i] + place, mask=inside, other=0.0).to(tl.float32) + change[:, None] * part
    tl.store(out + place, O.to(out.dtype.element_ty), mask=inside)
    tl.store(lse + at, highest + tl.log(total), mask=here)
    if TANGENT:
        tl.store(out_dot + place, T.to(out_dot.dtype.element_ty), mask=inside)
        tl.store(lse_dot + at, rate, mask=here)
