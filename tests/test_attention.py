"""Attention and its tangent in plain PyTorch, against float64: torch.func.jvp, scaled_dot_product_attention, autograd."""

import math
import weakref

import pytest
import torch
from attention_oracle import (
    BATCH,
    HEADS,
    WIDTH,
    assert_close,
    assert_within_budget,
    draw_dual,
    exact_gradients,
    exact_jvp,
    halves,
    merge,
    plain_gradients,
    sdpa,
)
from rcm_kernels import (
    blockwise,
    flash_attention,
    flash_attention_backward,
    flash_attention_jvp,
    reference,
    use_backends,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LENGTHS = [(1, 1), (8, 8), (5, 40), (37, 1), (37, 45), (64, 32)]  # tiles of 8 queries and 16 keys where they are small
LAYOUTS = ["contiguous", "fused", "sequence_first", "shared"]


@pytest.fixture(autouse=True)
def plain_pytorch():
    """The backend under test here; test_kernels.py has the others."""
    use_backends(jvp="blockwise", forward="blockwise", backward="blockwise")
    yield
    use_backends(jvp="auto", forward="auto", backward="auto")


@pytest.fixture(autouse=True)
def nan_poisoned():
    """Every torch.empty is full of NaN, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_tiles(monkeypatch):
    limits = {"keys": 16, "scores": BATCH * HEADS * 16 * 8}
    monkeypatch.setattr(blockwise, "TILES", dict.fromkeys(("cpu", "cuda"), limits))
    monkeypatch.setattr(blockwise, "TILE_MIN_QUERIES", 1)


# The reference itself


def test_reference_is_pytorchs_attention():
    (q, k, v), _ = draw_dual(7, 9)
    out, lse = reference.attention(q, k, v, scale=0.3)
    assert_close([out], [sdpa(q, k, v, scale=0.3)], 1e-13)
    brute = [
        [[math.log(sum(math.exp(0.3 * (q[b, i, n] @ k[b, j, n])) for j in range(9))) for i in range(7)] for n in range(3)]
        for b in range(2)
    ]
    assert_close([lse], [torch.tensor(brute, dtype=torch.float64)], 1e-13)


def test_reference_jvp_is_the_derivative_of_the_reference():
    primals, tangents = draw_dual(7, 9)
    assert_close(reference.attention_jvp(primals, tangents), exact_jvp(primals, tangents), 1e-13)


# Tangents


@pytest.mark.parametrize("queries,keys", LENGTHS)
def test_jvp_equals_forward_mode_in_one_tile(queries, keys):
    primals, tangents = draw_dual(queries, keys)
    assert_close(flash_attention_jvp(*primals, *tangents), exact_jvp(primals, tangents), 1e-12)


@pytest.mark.parametrize("queries,keys", LENGTHS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_jvp_equals_forward_mode_in_many_tiles(queries, keys, layout, small_tiles):
    primals, tangents = draw_dual(queries, keys, layout=layout)
    got = flash_attention_jvp(*primals, *tangents, scale=0.4)
    assert_close(got, exact_jvp(primals, tangents, scale=0.4), 1e-12)
    out, out_dot, lse, lse_dot = got
    assert out.stride(-1) == out_dot.stride(-1) == 1
    assert lse.shape == lse_dot.shape == (BATCH, HEADS, queries)
    assert {x.dtype for x in got} == {torch.float64}


@pytest.mark.parametrize("missing", ["k", "v", "kv"])
@pytest.mark.parametrize("keys", [9, 45])
def test_missing_tangents_are_zero(missing, keys, small_tiles):
    primals, (q_dot, k_dot, v_dot) = draw_dual(21, keys)
    given = (q_dot, None if "k" in missing else k_dot, None if "v" in missing else v_dot)
    zeroed = [torch.zeros_like(like) if x is None else x for x, like in zip(given, (q_dot, k_dot, v_dot))]
    exact = exact_jvp(primals, zeroed)
    assert_close(flash_attention_jvp(*primals, *given), exact, 1e-12)
    assert_close(reference.attention_jvp(primals, given), exact, 1e-12)


class Matmuls(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "mm" in func.__name__
        return func(*args, **(kwargs or {}))


def test_number_of_matmuls():
    """Also proves that nothing is recomputed, and that missing tangents cost nothing."""
    (q, k, v), (q_dot, k_dot, v_dot) = draw_dual(8, 8)
    out, lse = flash_attention(q, k, v)
    calls = {
        2: lambda: flash_attention(q, k, v),
        4: lambda: flash_attention_jvp(q, k, v, q_dot),
        5: lambda: flash_attention_jvp(q, k, v, q_dot, None, v_dot),
        6: lambda: flash_attention_jvp(q, k, v, q_dot, k_dot, v_dot),
    }
    for expected, call in calls.items():
        with Matmuls() as matmuls:
            call()
        assert matmuls.count == expected
    with Matmuls() as matmuls:
        flash_attention_backward(out, q, k, v, out, lse)
    assert matmuls.count == 5


def test_queries_and_keys_are_tiled(small_tiles):
    primals, tangents = draw_dual(37, 45)
    with Matmuls() as matmuls:
        flash_attention_jvp(*primals, *tangents)
    assert matmuls.count == 5 * 3 * 6


def test_jvp_builds_no_graph():
    primals, tangents = draw_dual(5, 6)
    for x in (*primals, *tangents):
        x.requires_grad_()
    for result in flash_attention_jvp(*primals, *tangents):
        assert result.grad_fn is None and not result.requires_grad


# Gradients


@pytest.mark.parametrize("queries,keys", LENGTHS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scale", [None, 0.4])
def test_gradients_equal_autograd(queries, keys, layout, scale, small_tiles):
    primals, (dout, _, _) = draw_dual(queries, keys, layout=layout)
    q, k, v = (x.detach().requires_grad_() for x in primals)
    out, lse = flash_attention(q, k, v, scale=scale)
    assert_close([out, lse], reference.attention(*primals, scale=scale), 1e-12)
    got = torch.autograd.grad(out, (q, k, v), dout)
    assert_close(got, exact_gradients(dout, primals, scale), 1e-12)


def test_gradcheck(small_tiles):
    q, k, v = (x[:1, :, :1, :3].detach().contiguous().requires_grad_() for x in draw_dual(9, 18)[0])
    assert torch.autograd.gradcheck(lambda *x: flash_attention(*x)[0], (q, k, v))


def test_expanded_gradient_of_a_sum():
    primals, _ = draw_dual(5, 6)
    q, k, v = (x.requires_grad_() for x in primals)
    flash_attention(q, k, v)[0].sum().backward()
    assert_close([q.grad, k.grad, v.grad], exact_gradients(torch.ones_like(q), primals), 1e-12)


def test_lse_carries_no_gradient():
    q, k, v = (x.requires_grad_() for x in draw_dual(5, 6)[0])
    out, lse = flash_attention(q, k, v)
    assert out.requires_grad and not lse.requires_grad
    with torch.no_grad():
        assert not flash_attention(q, k, v)[0].requires_grad


def test_what_is_not_differentiable_is_refused():
    (q, k, v), (q_dot, _, _) = draw_dual(5, 6)
    q.requires_grad_()
    (dq,) = torch.autograd.grad(flash_attention(q, k, v)[0].square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()
    with pytest.raises(RuntimeError):  # a silently lost tangent would be worse
        torch.func.jvp(lambda q: flash_attention(q, k, v)[0], (q.detach(),), (q_dot,))


# Blocks of keys, as in a ring


def test_backward_of_blocks_adds_up_to_the_whole(small_tiles):
    (q, k, v), (dout, _, _) = draw_dual(21, 45)
    out, lse = flash_attention(q, k, v)
    first, second = (flash_attention_backward(dout, q, *kv, out, lse) for kv in halves(k, v))
    whole = flash_attention_backward(dout, q, k, v, out, lse)
    assert_close(whole, exact_gradients(dout, (q, k, v)), 1e-12)
    assert_close([first[0] + second[0]], [whole[0]], 1e-12)
    assert_close([torch.cat((first[i], second[i]), dim=1) for i in (1, 2)], whole[1:], 1e-12)


def test_blocks_merge_to_the_whole_but_not_without_lse_dot(small_tiles):
    (q, k, v), (q_dot, k_dot, v_dot) = draw_dual(21, 45)
    exact = exact_jvp((q, k, v), (q_dot, k_dot, v_dot))
    blocks = [flash_attention_jvp(q, k_, v_, q_dot, k_dot_, v_dot_) for k_, v_, k_dot_, v_dot_ in halves(k, v, k_dot, v_dot)]
    assert_close(merge(*blocks), exact, 1e-12)
    without = [(out, out_dot, lse, torch.zeros_like(lse_dot)) for out, out_dot, lse, lse_dot in blocks]
    assert (merge(*without)[1] - exact[1]).abs().max() > 0.1 * exact[1].abs().max()


# Precision


def budget_case(primals, tangents, device="cpu"):
    """Checks out, out_dot, lse, lse_dot, dq, dk and dv of low-precision inputs against the budget."""
    dout = tangents[0]
    exact = exact_jvp(primals, tangents)
    exact_grads = exact_gradients(dout, primals)
    primals, tangents = ([x.to(device) for x in xs] for xs in (primals, tangents))
    dout = tangents[0]
    (out, lse), (out_dot, lse_dot) = torch.func.jvp(reference.attention, tuple(primals), tuple(tangents))
    got = flash_attention_jvp(*primals, *tangents)
    assert_within_budget(got, (out, out_dot, lse, lse_dot), exact)
    grads = flash_attention_backward(dout, *primals, got[0], got[2])
    assert_within_budget(grads, plain_gradients(dout, primals), exact_grads)
    stats_dtype = torch.promote_types(dout.dtype, torch.float32)
    assert [x.dtype for x in got] == [dout.dtype, dout.dtype, stats_dtype, stats_dtype]
    assert {x.dtype for x in grads} == {dout.dtype}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("queries,keys", [(8, 8), (100, 150)])
def test_low_precision_is_within_the_budget(dtype, queries, keys, small_tiles):
    budget_case(*draw_dual(queries, keys, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_logits_of_ten_thousand(dtype, small_tiles):
    (q, k, v), tangents = draw_dual(24, 50, dtype=dtype)
    q = q * (1e4 / (WIDTH**-0.5 * torch.einsum("bqnd,bknd->bnqk", q, k).abs().max()))
    exact = exact_jvp((q, k, v), tangents)
    assert exact[2].abs().max() > 5e3
    got = flash_attention_jvp(q, k, v, *tangents)
    grads = flash_attention_backward(tangents[0], q, k, v, got[0], got[2])
    if dtype == torch.float64:
        assert_close(got, exact, 1e-11)
        assert_close(grads, exact_gradients(tangents[0], (q, k, v)), 1e-10)
    else:
        assert_within_budget(got, reference.attention_jvp((q, k, v), tangents), exact)
        assert all(x.isfinite().all() for x in grads)


def test_a_large_mean_of_the_scores_tangent_costs_no_precision(small_tiles):
    """It cancels in out_dot, so over hundreds of tiles it must be taken out better than plain PyTorch's softmax does."""
    (q, k, v), (q_dot, k_dot, v_dot) = draw_dual(8, 3000, dtype=torch.float32)
    v, k_dot = v + 3, k_dot + 100 * q.mean(1, keepdim=True)
    primals, tangents = (q, k, v), (q_dot, k_dot, v_dot)
    exact = exact_jvp(primals, tangents)
    assert exact[3].abs().mean() > 20
    got, plain = flash_attention_jvp(*primals, *tangents), reference.attention_jvp(primals, tangents)
    assert_within_budget(got[1:2], plain[1:2], exact[1:2], factor=0.1)
    assert_within_budget(got[3:], plain[3:], exact[3:], factor=1)


def test_all_scores_equal_and_far_below_zero(small_tiles):
    _, k, v = draw_dual(3, 40)[0]
    k = k[:, :1].expand(-1, 40, -1, -1)
    q = -1e3 * k[:, :3]
    out, _ = flash_attention(q, k, v)
    assert_close([out], [v.mean(1, keepdim=True).expand(-1, 3, -1, -1)], 1e-12)


# Memory


class LiveBytes(TorchDispatchMode):
    """Peak of the bytes held by tensors made while it is on."""

    def __init__(self):
        super().__init__()
        self.live, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(result) if isinstance(x, torch.Tensor)):
            if storage._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.release, storage._cdata)
        return result

    def release(self, key):
        self.now -= self.live.pop(key)


def test_memory_does_not_grow_with_the_square():
    """With the real tile sizes, 4096 tokens: a full matrix of scores would be 16 tiles or 128 times an input."""
    B, S, N, D = 1, 4096, 1, 32
    generator = torch.Generator().manual_seed(0)
    q, k, v, q_dot, k_dot, v_dot = (torch.randn(B, S, N, D, generator=generator) for _ in range(6))
    tile_bytes, input_bytes = 4 * blockwise.TILES["cpu"]["scores"], q.nbytes
    full_bytes = 4 * B * N * S * S
    with LiveBytes() as naive:
        reference.attention(q, k, v)
    assert naive.peak >= full_bytes  # the meter works
    with LiveBytes() as meter:
        out, out_dot, lse, lse_dot = flash_attention_jvp(q, k, v, q_dot, k_dot, v_dot)
    assert meter.peak <= 3 * tile_bytes + 12 * input_bytes < full_bytes / 2
    with LiveBytes() as meter:
        dq, _, _ = flash_attention_backward(q_dot, q, k, v, out, lse)
    assert meter.peak <= 3 * tile_bytes + 12 * input_bytes
    some = slice(None, None, 500)  # rows of queries do not depend on each other
    rows = exact_jvp((q[:, some], k, v), (q_dot[:, some], k_dot, v_dot))
    assert_close((out[:, some], out_dot[:, some], lse[..., some], lse_dot[..., some]), rows, 1e-5)
    assert_close([dq[:, some]], exact_gradients(q_dot[:, some], (q[:, some], k, v))[:1], 1e-5)


# On a GPU


@pytest.mark.gpu1
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("queries,keys", [(8, 8), (100, 150)])
def test_budget_on_cuda(dtype, queries, keys, small_tiles):
    budget_case(*draw_dual(queries, keys, dtype=dtype), device="cuda")


@pytest.mark.gpu1
def test_float64_on_cuda(small_tiles):
    primals, tangents = draw_dual(100, 150)
    on_gpu = [x.cuda() for x in (*primals, *tangents)]
    got = [x.cpu() for x in flash_attention_jvp(*on_gpu)]
    assert_close(got, exact_jvp(primals, tangents), 1e-12)
    grads = flash_attention_backward(on_gpu[3], *on_gpu[:3], got[0].cuda(), got[2].cuda())
    assert_close([x.cpu() for x in grads], exact_gradients(tangents[0], primals), 1e-12)


@pytest.mark.gpu1
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sharp_attention_on_cuda(dtype, small_tiles):
    """S_dot is then a thousand times out_dot: rounding it to 16 bits before the mean is taken out leaves only noise."""
    (q, k, v), tangents = draw_dual(24, 50, dtype=dtype)
    q = 1000 * q
    exact = exact_jvp((q, k, v), tangents)[1]
    out_dot = flash_attention_jvp(*(x.cuda() for x in (q, k, v, *tangents)))[1]
    err = (out_dot.double().cpu() - exact).abs().median()
    assert err <= 2 * torch.finfo(dtype).eps * exact.abs().median()


@pytest.mark.gpu1
def test_the_host_never_waits_for_cuda(small_tiles):
    primals, tangents = ([x.cuda() for x in xs] for xs in draw_dual(100, 150, dtype=torch.bfloat16))
    q, k, v = (x.requires_grad_() for x in primals)
    torch.cuda.set_sync_debug_mode("error")
    try:
        flash_attention_jvp(q, k, v, *tangents)
        flash_attention(q, k, v)[0].backward(tangents[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
