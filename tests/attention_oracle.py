"""Inputs for attention and its exact values: float64, by PyTorch's own attention and differentiation."""

import torch
import torch.nn.functional as F
from rcm_kernels import reference
from torch.nn.attention import SDPBackend, sdpa_kernel

BATCH, HEADS, WIDTH = 2, 3, 16


def draw(length, count, *, layout="contiguous", dtype=torch.float64, seed=0):
    """`count` normal tensors [BATCH, length, HEADS, WIDTH]."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
    if layout == "fused":
        return list(normal(BATCH, length, HEADS, count, WIDTH).unbind(3))
    if layout == "sequence_first":
        return [normal(length, BATCH, HEADS, WIDTH).transpose(0, 1) for _ in range(count)]
    if layout == "shared":  # one text for the whole batch
        return [normal(1, length, HEADS, WIDTH).expand(BATCH, -1, -1, -1) for _ in range(count)]
    return [normal(BATCH, length, HEADS, WIDTH) for _ in range(count)]


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


def plain_gradients(dout, primals):
    """dq, dk, dv by autograd of the definition in the inputs' own dtype."""
    leaves = [x.detach().requires_grad_() for x in primals]
    return torch.autograd.grad(reference.attention(*leaves)[0], leaves, dout)
