"""The Triton kernel of `quantize_rows`, in a module of its own because importing it needs triton."""

import triton
import triton.language as tl


@triton.jit
def quantize_rows_kernel(  # noqa: PLR0917 (a kernel's arguments are pointers and sizes)
    x, values, scales, WIDTH: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    """One row a program, read once."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    wide = tl.load(x + row * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    # A maximum passes over NaN, which stays NaN among the values.
    largest = tl.maximum(tl.max(tl.abs(wide)), SMALLEST)
    tl.store(values + row * WIDTH + columns, (wide * (LARGEST / largest)).to(values.dtype.element_ty), mask=inside)
    tl.store(scales + row, largest / LARGEST)
