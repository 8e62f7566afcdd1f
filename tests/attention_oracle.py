"""Inputs for attention, its exact values (float64, by PyTorch's own attention and differentiation), and comparisons."""

import torch
import torch.nn.functional as F
from rcm_kernels import reference
from torch.nn.attention import SDPBackend, sdpa_kernel

BATCH, HEADS, WIDTH = 2, 3, 16


def draw(length, count, *, layout="contiguous", dtype=torch.float64, seed=0, width=WIDTH):
    """`count` normal tensors [BATCH, length, HEADS, width]."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
    if layout == "fused":
        return list(normal(BATCH, length, HEADS, count, width).unbind(3))
    if layout == "sequence_first":
        return [normal(length, BATCH, HEADS, width).transpose(0, 1) for _ in range(count)]
    if layout == "shared":  # one text for the whole batch
        return [normal(1, length, HEADS, width).expand(BATCH, -1, -1, -1) for _ in range(count)]
    return [normal(BATCH, length, HEADS, width) for _ in range(count)]


def draw_dual(queries, keys, **options):
    """q, k, v and their tangents."""
    q, q_dot = draw(queries, 2, **options, seed=1)
    k, v, k_dot, v_dot = draw(keys, 4, **options, seed=2)
    return (q, k, v), (q_dot, k_dot, v_dot)


def exact_jvp(primals, tangents, scale=None):
    """out, out_dot, lse, lse_dot in float64 by forward-mode differentiation of the definition."""
    primals, tangents = ([x.double() for x in xs] for xs in (primals, tangents))
    attend = lambda q, k, v: reference.attention(q, k, v, scale=scale)
    (out, lse), (out_dot, lse_dot) = torch.func.jvp(attend, tuple(primals), tuple(tangents))
    return out, out_dot, lse, lse_dot


def sdpa(q, k, v, scale=None):
    with sdpa_kernel(SDPBackend.MATH):
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale)
    return out.transpose(1, 2)


def exact_gradients(dout, primals, scale=None):
    """dq, dk, dv in float64 by autograd of PyTorch's attention."""
    leaves = [x.detach().double().requires_grad_() for x in primals]
    return torch.autograd.grad(sdpa(*leaves, scale=scale), leaves, dout.double())


def plain_gradients(dout, primals, scale=None):
    """dq, dk, dv by autograd of the definition in the inputs' own dtype."""
    leaves = [x.detach().requires_grad_() for x in primals]
    return torch.autograd.grad(reference.attention(*leaves, scale=scale)[0], leaves, dout)


def assert_close(got, want, tol):
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        err = (g.double().to(w.device) - w.double()).abs().max() / w.double().abs().max().clamp(min=1)
        assert err <= tol, f"result {i}: relative error {err:.1e}"


def assert_within_budget(got, plain, exact, factor=2.0, floor=0.0):
    """At most `factor` times the error (root mean square) of plain PyTorch in the same dtype, and `floor`."""
    for i, (g, p, e) in enumerate(zip(got, plain, exact, strict=True)):
        ours, theirs = (float((x.double().to(e.device) - e).square().mean().sqrt()) for x in (g, p))
        assert ours <= factor * theirs + floor, f"result {i}: error {ours:.2e}, plain PyTorch {theirs:.2e}"


def halves(*tensors):
    """The keys of each tensor cut in two uneven blocks."""
    middle = tensors[0].shape[1] // 3
    return [x[:, :middle] for x in tensors], [x[:, middle:] for x in tensors]


def merge(a, b):
    """Merges (out, out_dot, lse, lse_dot) over disjoint sets of keys."""
    w = torch.sigmoid(b[2] - a[2])
    w_dot = w * (1 - w) * (b[3] - a[3])
    on_out = lambda x: x.transpose(1, 2).unsqueeze(-1)
    out = torch.lerp(a[0], b[0], on_out(w))
    out_dot = torch.lerp(a[1], b[1], on_out(w)) + on_out(w_dot) * (b[0] - a[0])
    return out, out_dot, torch.logaddexp(a[2], b[2]), torch.lerp(a[3], b[3], w)
