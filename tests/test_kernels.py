"""The kernels behind the attention functions against float64 PyTorch: on a CPU only Triton's, in its interpreter."""

import math
from itertools import product

import pytest
import torch
from attention_oracle import (
    assert_close,
    assert_within_budget,
    draw_dual,
    exact_gradients,
    exact_jvp,
    halves,
    merge,
    plain_gradients,
)
from rcm_kernels import Partial, flash_attention, flash_attention_backward, flash_attention_jvp, reference, use_backends
from rcm_kernels import merge as merge_parts

BF16, FP16 = torch.bfloat16, torch.float16
LENGTHS = [(1, 1), (5, 40), (37, 1), (64, 64), (100, 150), (129, 65)]  # of queries and keys
if torch.cuda.is_available():  # an interpreter would take minutes
    LENGTHS += [(300, 1100), (1000, 2100)]


def on_gpu(*values):
    return pytest.param(*values, marks=pytest.mark.gpu1)


# Backend, dtype, head width
JVP = [
    pytest.param("triton", FP16, 24),
    on_gpu("triton", BF16, 128),
    on_gpu("triton", FP16, 40),
    *(on_gpu("hopper", dtype, width) for dtype, width in product((BF16, FP16), (64, 128))),
]
FORWARD = [
    *JVP,
    *(on_gpu(name, dtype, width) for name, dtype, width in product(("cudnn", "torch_flash"), (BF16, FP16), (32, 64, 128))),
]
BACKWARD = FORWARD[len(JVP) :]


@pytest.fixture
def jvp_of(backend, dtype, width):
    """flash_attention_jvp by one backend, whose results are NaN before they are written; and inputs for it."""
    use_backends(jvp=backend)
    torch.use_deterministic_algorithms(True)
    yield lambda queries, keys, **options: draw(queries, keys, dtype, width, **options)
    torch.use_deterministic_algorithms(False)
    use_backends(jvp="auto")


def draw(queries, keys, dtype, width, **options):
    """As `draw_dual`, on the GPU if there is one: the oracle runs there too."""
    return tuple([moved(x) for x in xs] for xs in draw_dual(queries, keys, dtype=dtype, width=width, **options))


def moved(x):
    """On the GPU, if there is one, with the strides it has."""
    if not torch.cuda.is_available():
        return x
    base = x._base if x._base is not None else x
    return base.cuda().as_strided(x.shape, x.stride(), x.storage_offset())


def jvp(primals, tangents, **options):
    return flash_attention_jvp(*primals, *tangents, **options)


@pytest.mark.parametrize("backend,dtype,width", JVP)
class TestJvp:
    @pytest.mark.parametrize("queries,keys", LENGTHS)
    @pytest.mark.parametrize("given", ["qkv", "q", "qk", "qv"])
    def test_within_the_budget(self, jvp_of, queries, keys, given):
        primals, tangents = jvp_of(queries, keys)
        tangents = [x if name in given else None for name, x in zip("qkv", tangents)]
        zeroed = [torch.zeros_like(p) if x is None else x for p, x in zip(primals, tangents)]
        plain = reference.attention_jvp(primals, tangents)
        got = jvp(primals, tangents)
        assert_within_budget(got, plain, exact_jvp(primals, zeroed), floor=1e-6)
        assert [x.dtype for x in got] == [primals[0].dtype] * 2 + [torch.float32] * 2

    @pytest.mark.parametrize("layout", ["contiguous", "fused", "sequence_first"])
    @pytest.mark.parametrize("given", ["qkv", "q"])
    def test_parts_merge_where_their_lse_dot_differ(self, jvp_of, given, layout):
        """lse_dot_i - lse_dot multiplies the rounding of out_i, which has a mean: only wide parts stay within the budget."""
        (q, k, v), (q_dot, k_dot, v_dot) = jvp_of(90, 512, layout=layout)
        drift = torch.linspace(-4, 4, 512, device=k.device).view(1, -1, 1, 1).to(k.dtype)
        q, v, k_dot = q + 1, v + 4, k_dot + drift
        if given == "q":
            k, q_dot, k_dot, v_dot = k + 0.1 * drift, q_dot + 4, None, None
        cut = lambda x, a: None if x is None else x[:, a : a + 128]
        parts = [
            Partial(*jvp((q, cut(k, a), cut(v, a)), (q_dot, cut(k_dot, a), cut(v_dot, a)), wide_out=True))
            for a in range(0, 512, 128)
        ]
        assert [x.dtype for x in parts[0]] == [torch.float32, q.dtype, torch.float32, torch.float32]
        got = merge_parts(parts, q.dtype)
        assert got.out.dtype == got.out_dot.dtype == q.dtype
        zeroed = [torch.zeros_like(p) if x is None else x for p, x in zip((q, k, v), (q_dot, k_dot, v_dot))]
        plain, exact = reference.attention_jvp((q, k, v), (q_dot, k_dot, v_dot)), exact_jvp((q, k, v), zeroed)
        assert_within_budget(got, plain, exact, factor=1.2, floor=1e-6)

    @pytest.mark.parametrize("layout", ["fused", "sequence_first", "shared"])
    @pytest.mark.parametrize("scale", [None, 0.05, 2.0])
    def test_strides_and_scales(self, jvp_of, layout, scale):
        primals, tangents = jvp_of(70, 90, layout=layout)
        got = jvp(primals, tangents, scale=scale)
        plain = reference.attention_jvp(primals, tangents, scale=scale)
        assert_within_budget(got, plain, exact_jvp(primals, tangents, scale=scale))

    def test_logits_of_ten_thousand(self, jvp_of):
        (q, k, v), tangents = jvp_of(50, 200)
        q = q * 1e4 / torch.einsum("bqnd,bknd->bnqk", q.double(), k.double()).abs().max().to(q.dtype)
        exact = exact_jvp((q, k, v), tangents, scale=1.0)  # below 1, the yardstick's products would overflow float16
        assert exact[2].abs().max() > 5e3
        got = jvp((q, k, v), tangents, scale=1.0)
        assert_within_budget(got, reference.attention_jvp((q, k, v), tangents, scale=1.0), exact)

    def test_sharp_attention(self, jvp_of):
        """S_dot is then a thousand times out_dot: rounded to 16 bits before its mean is taken out, it leaves only noise."""
        (q, k, v), tangents = jvp_of(24, 300)
        q = 100 * q
        exact = exact_jvp((q, k, v), tangents)[1]
        error = (jvp((q, k, v), tangents)[1].double() - exact).abs().median()
        assert error <= 2 * torch.finfo(q.dtype).eps * exact.abs().median()

    def test_a_mean_that_wanders_along_the_keys(self, jvp_of):
        """What the tangent of the scores is centred on must follow: it moves only now and then in the Hopper kernel."""
        (q, k, v), (q_dot, k_dot, v_dot) = jvp_of(20, 1100)
        drift = torch.linspace(-8, 8, 1100, device=k.device).view(1, -1, 1, 1)
        k_dot = (k_dot + drift * q.float().mean(1, keepdim=True)).to(q.dtype)
        exact = exact_jvp((q, k, v), (q_dot, k_dot, v_dot))
        plain = reference.attention_jvp((q, k, v), (q_dot, k_dot, v_dot))
        assert_within_budget(jvp((q, k, v), (q_dot, k_dot, v_dot)), plain, exact)

    def test_rising_scores(self, jvp_of):
        """Every tile of keys beats the one before, by less and by more than the running maximum may lag."""
        (q, k, v), tangents = jvp_of(40, 700)
        k = (k + torch.linspace(0, 6, 700, device=k.device).view(1, -1, 1, 1) * q.float().mean(1, keepdim=True).sign()).to(
            q.dtype
        )
        exact = exact_jvp((q, k, v), tangents)
        assert_within_budget(jvp((q, k, v), tangents), reference.attention_jvp((q, k, v), tangents), exact)

    def test_equal_logits(self, jvp_of):
        (q, k, v), tangents = jvp_of(30, 100)
        q = torch.zeros_like(q)
        exact = exact_jvp((q, k, v), tangents)
        got = jvp((q, k, v), tangents)
        assert_close(got[2:3], [torch.full_like(exact[2], math.log(100))], 1e-6)
        assert_within_budget(got, reference.attention_jvp((q, k, v), tangents), exact, floor=1e-6)

    def test_tangents_of_zero(self, jvp_of):
        primals, tangents = jvp_of(30, 100)
        _, out_dot, _, lse_dot = jvp(primals, [torch.zeros_like(x) for x in tangents])
        assert not out_dot.any() and not lse_dot.any()

    def test_huge_tangents(self, jvp_of):
        primals, tangents = jvp_of(30, 100)
        tangents = [64 * x for x in tangents]
        exact = exact_jvp(primals, tangents)
        assert_within_budget(jvp(primals, tangents), reference.attention_jvp(primals, tangents), exact)

    def test_linear_in_the_tangents(self, jvp_of):
        primals, first = jvp_of(50, 200)
        second = [x.flip(1) / 4 for x in first]
        once, twice = jvp(primals, first), jvp(primals, [2 * x for x in first])
        assert_close([2 * x for x in once[1::2]], twice[1::2], 2 * torch.finfo(primals[0].dtype).eps)
        both = [(a.double() + b.double()).to(a.dtype) for a, b in zip(first, second)]
        total = jvp(primals, both)
        parts = [a.double() + b.double() for a, b in zip(once, jvp(primals, second))]
        assert_within_budget([total[1]], [parts[1].to(total[1].dtype)], [exact_jvp(primals, both)[1]], factor=3)

    def test_lse_dot_is_the_finite_difference_of_lse(self, jvp_of):
        primals, tangents = jvp_of(20, 90)
        step = 1e-5
        ends = [
            reference.attention(*(p.double() + sign * step * t.double() for p, t in zip(primals, tangents)))[1]
            for sign in (1, -1)
        ]
        assert_close(jvp(primals, tangents)[3:], [(ends[0] - ends[1]) / (2 * step)], 1e-4)

    def test_blocks_of_keys_merge_to_the_whole(self, jvp_of):
        (q, k, v), (q_dot, k_dot, v_dot) = jvp_of(40, 300)
        blocks = [jvp((q, a, b), (q_dot, c, d)) for a, b, c, d in halves(k, v, k_dot, v_dot)]
        merged = merge(*([x.float() for x in block] for block in blocks))
        exact = exact_jvp((q, k, v), (q_dot, k_dot, v_dot))
        assert_within_budget(merged, reference.attention_jvp((q, k, v), (q_dot, k_dot, v_dot)), exact)

    def test_runs_agree_bit_by_bit(self, jvp_of):
        primals, tangents = jvp_of(130, 500)
        first = jvp(primals, tangents)
        for _ in range(1 if not torch.cuda.is_available() else 5):
            assert all(torch.equal(a, b) for a, b in zip(first, jvp(primals, tangents)))


@pytest.mark.parametrize("backend,dtype,width", [on_gpu("triton", *x) for x in product((BF16, FP16), (16, 32, 64, 96, 256))])
def test_widths(jvp_of):
    primals, tangents = jvp_of(129, 165)
    got = jvp(primals, tangents)
    assert_within_budget(got, reference.attention_jvp(primals, tangents), exact_jvp(primals, tangents))


# The primal


@pytest.mark.parametrize("queries,keys", LENGTHS)
@pytest.mark.parametrize("layout", ["contiguous", "fused"])
@pytest.mark.parametrize("backend,dtype,width", FORWARD)
def test_forward_within_the_budget(backend, dtype, width, queries, keys, layout):  # noqa: PLR0917
    if backend == "cudnn" and 1 in (queries, keys):
        pytest.skip("PyTorch gives cuDNN no sequence of one token")
    (q, k, v), _ = draw(queries, keys, dtype, width, layout=layout)
    use_backends(forward=backend)
    try:
        out, lse = flash_attention(q, k, v, scale=0.3)
    finally:
        use_backends(forward="auto")
    exact = reference.attention(q.double(), k.double(), v.double(), scale=0.3)
    assert_within_budget([out, lse], reference.attention(q, k, v, scale=0.3), exact, floor=1e-5)
    assert out.dtype == dtype and lse.dtype == torch.float32


@pytest.mark.parametrize("queries,keys", LENGTHS[1:])
@pytest.mark.parametrize("layout", ["contiguous", "fused", "shared"])
@pytest.mark.parametrize("backend,dtype,width", BACKWARD)
def test_backward_within_the_budget(backend, dtype, width, queries, keys, layout):  # noqa: PLR0917
    if backend == "cudnn" and 1 in (queries, keys):
        pytest.skip("PyTorch gives cuDNN no sequence of one token")
    primals, (dout, _, _) = draw(queries, keys, dtype, width, layout=layout)
    exact = exact_gradients(dout, primals)
    use_backends(backward=backend)
    try:
        q, k, v = (x.detach().requires_grad_() for x in primals)
        out, _ = flash_attention(q, k, v)
        got = torch.autograd.grad(out, (q, k, v), dout)
    finally:
        use_backends(backward="auto")
    assert_within_budget(got, plain_gradients(dout, primals), exact, floor=1e-5)


@pytest.mark.parametrize("backend,dtype,width", BACKWARD)
def test_backward_of_blocks_with_the_global_lse(backend, dtype, width):
    (q, k, v), (dout, _, _) = draw(70, 200, dtype, width)
    out, lse = flash_attention(q, k, v)
    use_backends(backward=backend)
    try:
        first, second = (flash_attention_backward(dout, q, *kv, out, lse) for kv in halves(k, v))
    finally:
        use_backends(backward="auto")
    got = [first[0].float() + second[0].float(), *(torch.cat((first[i], second[i]), dim=1) for i in (1, 2))]
    assert_within_budget(got, plain_gradients(dout, (q, k, v)), exact_gradients(dout, (q, k, v)))


# What only a GPU can show


@pytest.mark.parametrize("backend,dtype,width", [on_gpu("hopper", BF16, 128), on_gpu("triton", BF16, 128)])
def test_more_than_two_to_the_31_elements(jvp_of):
    queries, width = 2**24 + 70, 128
    q, q_dot = (torch.empty(1, queries, 1, width, dtype=BF16, device="cuda") for _ in range(2))
    for x in (q, q_dot):
        x[:, :: 2**20] = torch.randn_like(x[:, :: 2**20])
        x[:, -200:] = torch.randn_like(x[:, -200:])
    (_, k, v), (_, k_dot, v_dot) = draw(1, 16, BF16, width)
    k, v, k_dot, v_dot = (x[:1, :, :1] for x in (k, v, k_dot, v_dot))
    got = flash_attention_jvp(q, k, v, q_dot, k_dot, v_dot)
    rows = [*range(0, queries, 2**20), *range(queries - 200, queries)]
    got = [x[:, rows] for x in got[:2]] + [x[..., rows] for x in got[2:]]
    primals, tangents = (q[:, rows], k, v), (q_dot[:, rows], k_dot, v_dot)
    assert_within_budget(got, reference.attention_jvp(primals, tangents), exact_jvp(primals, tangents))


@pytest.mark.parametrize("backend,dtype,width", [on_gpu("hopper", BF16, 128), on_gpu("triton", BF16, 128)])
def test_rows_two_to_the_31_elements_apart(jvp_of):
    """Views into a large buffer: the strides count, not the size of the tensors."""
    _, tangents = jvp_of(4, 5)
    stride, count = 2**29 + 64, 5
    base = torch.empty(stride * count + 128, dtype=BF16, device="cuda")  # 5.4 GB
    far = base.as_strided((1, count, 1, 128), (0, stride, 128, 1))
    far.copy_(torch.randn(1, count, 1, 128))
    near = far.contiguous()
    q_dot, k_dot, v_dot = (x[:1, :count, :1] for x in (tangents[1], *tangents[1:]))
    want = flash_attention_jvp(near, near, near, q_dot, k_dot, v_dot)
    got = flash_attention_jvp(far, far, far, q_dot, k_dot, v_dot)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("backend,dtype,width", [on_gpu("hopper", BF16, 64), on_gpu("hopper", BF16, 128)])
def test_the_host_never_waits_and_a_graph_can_be_captured(jvp_of):
    primals, tangents = jvp_of(300, 400)
    want = flash_attention_jvp(*primals, *tangents)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        flash_attention_jvp(*primals, *tangents)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = flash_attention_jvp(*primals, *tangents)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("backend,dtype,width", [on_gpu("hopper", BF16, 128)])
def test_a_thread_without_a_context(jvp_of):
    from threading import Thread

    primals, tangents = jvp_of(30, 40)
    results = []
    thread = Thread(target=lambda: results.append(flash_attention_jvp(*primals, *tangents)))
    thread.start()
    thread.join()
    assert all(torch.equal(a, b) for a, b in zip(results[0], flash_attention_jvp(*primals, *tangents)))


@pytest.mark.gpu2
@pytest.mark.parametrize("backend", ["hopper", "triton"])
def test_tensors_on_another_gpu_than_the_current_one(backend):
    use_backends(jvp=backend)
    try:
        primals, tangents = draw(130, 140, BF16, 128)
        want = jvp(primals, tangents)
        got = jvp([x.to("cuda:1") for x in primals], [x.to("cuda:1") for x in tangents])
    finally:
        use_backends(jvp="auto")
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(a, b.to("cuda:0")) and b.device.index == 1 for a, b in zip(want, got))
