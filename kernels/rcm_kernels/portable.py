"""Attention in Triton, with or without its tangent: for GPUs from Ampere on, and for Triton's interpreter on a CPU.

One program holds a tile of BM queries and walks over the keys, BN at a time. As in `blockwise`, the running maximum m follows
the scores and the running centre c follows the mean of S_dot (docs/adr/0002); kernels/README.md derives the recurrences.
"""

import importlib.util
from typing import Any

import torch
from torch import Tensor

from rcm_kernels.blockwise import empty_results

DTYPES = (torch.float16, torch.bfloat16)
MAX_WIDTH = 256
MAX_PROGRAMS = 2**31 - 1

# (compute capability from, width up to) -> queries and keys in a tile, warps, stages of the pipeline. The first two rows were
# timed on an H200; the others follow from the shared memory that their tiles need and were not timed.
TILES = {
    ((9, 0), 64): (128, 64, 8, 3),
    ((9, 0), 128): (128, 64, 8, 2),
    ((9, 0), 256): (64, 32, 8, 2),
    ((8, 0), 64): (128, 32, 4, 2),
    ((8, 0), 128): (64, 32, 4, 2),
    ((8, 0), 256): (64, 16, 8, 1),
}


def unfit(q: Tensor, *_: Tensor | None) -> str | None:
    """Why this backend cannot take these tensors [B, S, N, D]; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "it needs the package triton"
    if not q.is_cuda and not _interpreting():
        return "it needs a GPU, or TRITON_INTERPRET=1 in the environment"
    if q.is_cuda and torch.cuda.get_device_capability(q.device) < (8, 0):
        return "it needs compute capability 8.0 (Ampere) or newer"
    if q.dtype not in DTYPES:
        return f"it takes bfloat16 and float16, not {q.dtype}"
    if not q.is_cuda and q.dtype == torch.bfloat16:
        return "Triton's interpreter cannot multiply bfloat16"
    if q.shape[3] > MAX_WIDTH:
        return f"it takes head widths up to {MAX_WIDTH}, not {q.shape[3]}"
    return None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
    wide_out: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """As `blockwise.forward`, for tensors that are not `unfit`."""
    from rcm_kernels.portable_kernel import attention_kernel

    q_dot, k_dot, v_dot = tangents
    batch, queries, heads, width = q.shape
    out, out_dot, lse, lse_dot = results = empty_results(q, with_tangent=q_dot is not None, wide_out=wide_out)
    tile_queries, tile_keys, warps, stages = _tile(q)
    programs = -(-queries // tile_queries) * batch * heads
    assert programs <= MAX_PROGRAMS, f"{programs} tiles of queries; a grid holds {MAX_PROGRAMS}"
    tensors = (q, k, v, q_dot, k_dot, v_dot, out, out_dot)
    given = [q if x is None else x for x in tensors]  # a pointer the kernel will not follow must still be one
    strides = [stride for x in given for stride in x.stride()[:3]]
    statistics = [lse, lse if lse_dot is None else lse_dot]
    with torch.cuda.device_of(q):
        attention_kernel[(programs,)](
            *given,
            *statistics,
            *strides,
            queries,
            k.shape[1],
            heads,
            scale,
            D=width,
            BLOCK_D=max(16, 1 << (width - 1).bit_length()),
            BM=tile_queries,
            BN=tile_keys,
            TANGENT=q_dot is not None,
            K_TANGENT=k_dot is not None,
            V_TANGENT=v_dot is not None,
            num_warps=warps,
            num_stages=stages,
        )
    return results


def _tile(q: Tensor) -> tuple[int, int, int, int]:
    """Queries, keys, warps and stages for these tensors."""
    if not q.is_cuda:
        return 64, 64, 1, 1
    capability: Any = torch.cuda.get_device_capability(q.device)
    return next(tile for (least, width), tile in TILES.items() if capability >= least and q.shape[3] <= width)


def _interpreting() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)
