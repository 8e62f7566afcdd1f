"""Attention over blocks of keys, merged, against attention over all of them."""

import pytest
import torch
from attention_oracle import draw_dual, exact_jvp
from rcm_kernels import Partial, merge, reference
from rcm_kernels.merge import _merge_in_torch, _merge_in_triton

CUTS = {"one": [0, 50], "two": [0, 1, 50], "five": [0, 10, 20, 21, 40, 50]}
NAMES = ("out", "out_dot", "lse", "lse_dot")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # without a GPU through Triton's interpreter


def parts(primals, tangents, cuts, dtype, device="cpu"):
    """Attention over each block of keys, results in `dtype` but for lse and lse_dot."""
    (q, k, v), (q_dot, k_dot, v_dot) = ([x.to(device) for x in xs] for xs in (primals, tangents))
    found = []
    for a, b in zip(cuts, cuts[1:]):
        block = [x[:, a:b] for x in (k, v, k_dot, v_dot)]
        out, out_dot, lse, lse_dot = exact_jvp((q, *block[:2]), (q_dot, *block[2:]))
        wide = torch.promote_types(dtype, torch.float32)
        found.append(Partial(out.to(dtype), out_dot.to(dtype), lse.to(wide), lse_dot.to(wide)))
    return found


@pytest.mark.parametrize("sharpness", [1, 30])
@pytest.mark.parametrize("cuts", CUTS)
def test_equals_the_whole(cuts, sharpness):
    primals, tangents = draw_dual(37, 50)
    primals = (sharpness * primals[0], *primals[1:])  # blocks of very unlike weight
    got = merge(parts(primals, tangents, CUTS[cuts], torch.float64))
    for name, g, w in zip(NAMES, got, exact_jvp(primals, tangents), strict=True):
        assert (g - w).norm() <= 1e-12 * w.norm(), name


@pytest.mark.parametrize("width", [16, 20])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu1)])
def test_the_kernel_equals_pytorch(dtype, width):
    primals, tangents = draw_dual(37, 50, width=width)
    found = parts(primals, tangents, CUTS["five"], dtype, DEVICE)
    eps = torch.finfo(dtype).eps
    for with_tangents in (True, False):
        some = found if with_tangents else [Partial(p.out, None, p.lse, None) for p in found]
        for name, got, want in zip(NAMES, _merge_in_triton(some, dtype), _merge_in_torch(some, dtype), strict=True):
            assert (got is None) == (want is None) == (not with_tangents and name.endswith("dot"))
            if got is not None:
                assert got.dtype == want.dtype
                torch.testing.assert_close(got, want, rtol=max(2 * eps, 2e-5), atol=max(2 * eps, 1e-6))


def test_rows_of_any_strides(width=16):
    """Tokens first, as megatron lays them out."""
    primals, tangents = draw_dual(37, 50, width=width, layout="sequence_first")
    found = [
        Partial(
            *reference.attention_jvp(
                *([x.float().to(DEVICE) for x in (xs[0], *(y[:, a:b] for y in xs[1:]))] for xs in (primals, tangents))
            )
        )
        for a, b in [(0, 20), (20, 50)]
    ]
    found = [p._replace(lse=p.lse.contiguous(), lse_dot=p.lse_dot.contiguous()) for p in found]
    for got, want in zip(_merge_in_triton(found, torch.float32), _merge_in_torch(found, torch.float32), strict=True):
        torch.testing.assert_close(got, want)


def test_nothing_to_merge_is_an_error():
    with pytest.raises(ValueError, match="at least one part"):
        merge([])
