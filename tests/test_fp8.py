"""Linears in float8: rounding, which passes and which linears of a network, and the same over tensor-parallel ranks."""

import threading
from dataclasses import replace
from functools import partial

import pytest
import ranks_fp8
import tiny
import torch
from launch import run_ranks
from oracle import inputs, small_cosmos, small_model
from rcm_kernels import fp8 as kernels
from rcm_kernels.fp8 import quantize_rows, scaled_matmul

from rcm_mcore.config import MeshConfig, ModelConfig, parse_config, validate_mesh
from rcm_mcore.data import Batch
from rcm_mcore.distill.draws import draw
from rcm_mcore.distill.phases import Phase
from rcm_mcore.dual import Dual, primal
from rcm_mcore.models import build_model
from rcm_mcore.models.common import fp8
from rcm_mcore.sampling import request
from rcm_mcore.training import setup
from rcm_mcore.training.setup import build_networks
from rcm_mcore.training.step import StepBatch, run_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # without a GPU through Triton's interpreter
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
needs_hopper = pytest.mark.skipif(torch.cuda.is_available() and not HOPPER, reason="needs a GPU of compute capability 9.0")
SMALL = {"wan": partial(small_model, dtype="bfloat16"), "cosmos": partial(small_cosmos, dtype="bfloat16")}


def rows(*shape, seed=0):
    """Rows of very unlike size."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g) * (3 * torch.randn(*shape[:-1], 1, generator=g)).exp()


def exact(x):
    """What the numbers stand for, [..., K] in float64."""
    return x.values.double() * x.scales.double()


# Rounding


def test_rows_are_rounded_to_the_nearest():
    x = rows(3, 40, 96)
    got = quantize_rows(x)
    assert got.values.dtype == torch.float8_e4m3fn and got.scales.shape == (3, 40, 1) and got.scales.dtype == torch.float32
    assert torch.equal(got.values.float().abs().amax(-1), torch.full((3, 40), 448.0))
    # Half a step: 2^-4 of the number, and 2^-10 of what is smaller than the smallest with all digits.
    budget = torch.maximum(x.double().abs() / 16, got.scales.double() / 1024)
    assert bool(((exact(got) - x.double()).abs() <= 1.0001 * budget).all())


def test_a_row_of_zeros_and_one_that_is_not_finite():
    x = rows(5, 32)
    x[0], x[1, 3], x[2, 4] = 0, torch.nan, torch.inf
    got = exact(quantize_rows(x))
    assert not got[0].any() and got[3:].isfinite().all()
    product = scaled_matmul(quantize_rows(x), quantize_rows(rows(16, 32)), torch.bfloat16)
    assert product.isfinite().all(-1).tolist() == [True, False, False, True, True]


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu1)])
@pytest.mark.parametrize("width", [48, 200, 5120])
def test_the_kernel_equals_pytorch(dtype, width):
    """Of numbers that need no rounding: where a mantissa overflows Triton's interpreter forgets the exponent."""
    g = torch.Generator().manual_seed(0)
    x = torch.randint(-7, 8, (2, 3, width), generator=g) * 2.0 ** torch.randint(0, 6, (2, 3, width), generator=g)
    x[..., -1] = 448
    x[0, 1] = 0
    x = (x * 2.0 ** torch.tensor([[-3], [0], [5]])).to(DEVICE, dtype)
    got, want = kernels._quantize_in_triton(x), quantize_rows(x.cpu())
    assert torch.equal(got.values.cpu().float(), want.values.float())
    assert torch.equal(got.scales.cpu(), want.scales)


@pytest.mark.gpu1
@pytest.mark.parametrize("width", [192, 5120, 8960, 13824])
def test_the_kernel_rounds_to_the_nearest(width):
    x = rows(100, width).cuda().bfloat16()
    got = quantize_rows(x)
    budget = torch.maximum(x.double().abs() / 16, got.scales.double() / 1024)
    assert bool(((exact(got) - x.double()).abs() <= 1.001 * budget).all())
    x[3, 5], x[4, 6] = torch.nan, torch.inf
    product = scaled_matmul(quantize_rows(x), quantize_rows(rows(64, width).cuda()), torch.bfloat16)
    assert torch.nonzero(~product.isfinite().all(-1)).flatten().tolist() == [3, 4]


@needs_hopper
@pytest.mark.parametrize("shape, out", [((1, 1, 16), 16), ((5, 3, 96), 32), ((130, 1, 1536), 272)])
def test_products_are_those_of_the_rounded_numbers(shape, out):
    x, weight = quantize_rows(rows(*shape).to(DEVICE)), quantize_rows(rows(out, shape[-1], seed=1).to(DEVICE))
    got, want = scaled_matmul(x, weight, torch.bfloat16), exact(x) @ exact(weight).t()
    assert got.dtype == torch.bfloat16 and got.shape == want.shape
    # A rounding to bfloat16; and on Hopper sums of 14 bits, relative to the largest that can be.
    budget = 2.0**-8 * want.abs() + (2.0**-12 if DEVICE == "cuda" else 1e-6) * (exact(x).abs() @ exact(weight).abs().t())
    assert bool(((got.double() - want).abs() <= budget).all())


# Which passes and which linears


@pytest.fixture
def used(monkeypatch):
    """The layers that were float8, in order."""
    layers, stock = [], fp8.parallel_linear
    monkeypatch.setattr(fp8, "parallel_linear", lambda layer, x: layers.append(layer) or stock(layer, x))
    return layers


@pytest.fixture(params=SMALL)
def nets(request, mesh):
    """The same network with float8 forwards and without, and its inputs."""
    model = SMALL[request.param](fp8_forwards=True)
    pair = [build_model(replace(model, fp8_forwards=on), mesh.config, mesh.groups, seed=0) for on in (True, False)]
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():  # no zeros, and weights that are large enough for every layer to matter
        for a, b in zip(*(net.parameters() for net in pair)):
            a.copy_(0.2 * torch.randn(a.shape, generator=g) if a.ndim > 1 else 1 + 0.1 * torch.randn(a.shape, generator=g))
            b.copy_(a)
    *tensors, condition = inputs(model)
    return *pair, [x.float().to(DEVICE) for x in tensors], condition.map(lambda x: x.float().to(DEVICE))


@needs_hopper
def test_every_large_linear_of_a_block_is_float8_without_gradients(nets, used):
    net, plain, (x, _, s, _), condition = nets
    with torch.no_grad():
        got, want = net(x, s, condition), plain(x, s, condition)
    names = {layer: name for name, layer in net.named_modules()}
    tops = {name.rpartition(".")[0] for name in names.values() if name.endswith("linear_qkv")}
    blocks = {top.rpartition(".")[0] for top in tops}
    large = ("self_attn.linear_qkv", "self_attn.linear_proj", "cross_attn.linear_q", "cross_attn.linear_proj")
    wanted = [f"{block}.{name}" for block in sorted(blocks) for name in (*large, "ffn.linear_fc1", "ffn.linear_fc2")]
    assert [names[layer] for layer in used] == wanted and len(blocks) == 2
    assert 0.003 < float((got - want).norm() / want.norm()) < 0.2


@needs_hopper
def test_weights_are_those_of_now(nets):
    """megatron's optimizer writes them through another view, of which a tensor's version tells nothing."""
    net, _, (x, _, s, _), condition = nets
    with torch.no_grad():
        before = net(x, s, condition)
        net.get_submodule("blocks.0.ffn.linear_fc1").weight.data.mul_(-1)
        assert not torch.allclose(before, net(x, s, condition), rtol=0.05)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "one_pass"])
def test_passes_with_a_tangent_are_not_float8(nets, used, grad):
    net, plain, (x, x_dot, s, s_dot), condition = nets
    with torch.set_grad_enabled(grad):
        got, want = (one(Dual(x, x_dot), Dual(s, s_dot), condition) for one in (net, plain))
    assert torch.equal(got.primal, want.primal) and torch.equal(got.tangent, want.tangent) and not used
    if grad:
        assert_same_gradients(net, plain, got, want)
        assert not used


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_passes_with_gradients_are_not_float8(nets, used, recompute):
    net, plain, (x, _, s, _), condition = nets
    net.blocks.recompute = plain.blocks.recompute = recompute
    got, want = net(x, s, condition), plain(x, s, condition)
    assert torch.equal(got, want)
    with fp8.fp8_forwards(True):
        net.blocks.recompute = recompute  # a pass that is inside another says for itself what it is
        assert torch.equal(net(x, s, condition), want)
    assert_same_gradients(net, plain, got, want)
    assert not used


def assert_same_gradients(net, plain, got, want):
    for out in (got, want):
        primal(out).square().sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(net.parameters(), plain.parameters()))


def test_the_switch_is_put_back_and_is_of_one_thread():
    with pytest.raises(KeyError), fp8.fp8_forwards(True):
        with fp8.fp8_forwards(False):
            assert not fp8.are_fp8()
        assert fp8.are_fp8()
        seen = []
        thread = threading.Thread(target=lambda: seen.append(fp8.are_fp8()))
        thread.start()
        thread.join()
        assert seen == [False]
        raise KeyError
    assert not fp8.are_fp8()


@needs_hopper
@pytest.mark.parametrize(
    "term, wanted",
    [("scm", {"teacher"}), ("dmd", {"student", "teacher", "fake_score"}), ("critic", {"student"})],
)
def test_which_networks_of_a_step_are_float8(mesh, used, term, wanted):
    """Teacher, rollouts and the evaluated fake score; the trained network in what its gradient comes from is not."""
    model = {**tiny.MODEL, "dtype": "bfloat16", "fp8_forwards": True}
    tree = tiny.config("shards", "run", "distill", model=model, distill={"teacher": "teacher", "guidance": 2.0})
    config = parse_config(tree)
    _, roles, trained = build_networks(config, mesh, starts={"teacher": _fill})
    names = ("student", "teacher", "fake_score")
    owner = {layer: name for name in names for layer in getattr(roles, name).modules()}
    kind, slots = "critic" if term == "critic" else "student", (0, 1, 2, 3)
    phase = Phase(kind=kind, own_step=0, scm=term == "scm", dmd=term == "dmd", rollout_steps=2)
    g = torch.Generator().manual_seed(0)
    batch = Batch(
        latents=torch.randn(4, *tiny.LATENT, generator=g),
        text=torch.randn(4, config.model.text_len, config.model.text_dim, generator=g),
        prompts=("",) * 4, keys=("",) * 4, slots=slots, step=0, state={"bad_samples": 0},
    )  # fmt: skip
    item = StepBatch(batch=batch, phase=phase, draws=draw(config, phase, step=0, slots=slots))
    trained[kind].wake()
    metrics = run_step(trained[kind], item, roles=roles, config=config, mesh=mesh)
    assert metrics["grad_norm"] > 0
    assert {owner[layer] for layer in used} == wanted
    # Of six linears of two blocks in two microbatches; of the two evaluations of a student's rollout the last has a graph.
    evaluations = [sum(owner[layer] == name for layer in used) / 24 for name in sorted(wanted)]
    assert evaluations == [2.0 if kind == "critic" else 1.0] * len(wanted)


def _fill(net):
    g = torch.Generator(DEVICE).manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.1 * torch.randn(p.shape, generator=g, device=DEVICE))


# Over tensor-parallel ranks


@pytest.mark.skipif(torch.cuda.is_available(), reason="of CPU ranks")
def test_tensor_parallel_ranks(tmp_path):
    errors = run_ranks(2, "ranks_fp8.py", tmp_path)
    for name in ranks_fp8.MESHES:
        # A layer: a rounding to bfloat16 of each rank's part, and of their sum.
        assert errors[name]["column"] <= 2**-8 and errors[name]["row"] <= 2**-7, errors
        # A network: the rounding of activations split otherwise, no more than that of one rank.
        assert 0.003 < errors[name]["network"] <= 1.3 * errors["one"] + 1e-3, errors


# What cannot be


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dtype": "float32"}, r"model\.fp8_forwards=true with model\.dtype=float32"),
        ({"transformer_impl": "transformer_engine"}, r"fp8_forwards=true with model\.transformer_impl=transformer_engine"),
    ],
)
def test_models_that_cannot_be_float8_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{**tiny.MODEL, "dtype": "bfloat16", "fp8_forwards": True, **changes})


def test_widths_of_a_rank_must_be_multiples_of_16():
    model = ModelConfig(**{**tiny.MODEL, "dtype": "bfloat16", "fp8_forwards": True})
    assert validate_mesh(model, MeshConfig(), 1) == 1
    with pytest.raises(ValueError, match=r"hidden_size=48 .* multiples of 16 on each of mesh\.tp=2 ranks"):
        validate_mesh(model, MeshConfig(tp=2), 2)
    with pytest.raises(ValueError, match=r"ffn_hidden_size=72 to be multiples of 16 on each of mesh\.tp=1"):
        validate_mesh(replace(model, ffn_hidden_size=72), MeshConfig(), 1)
    assert validate_mesh(replace(model, fp8_forwards=False), MeshConfig(tp=2), 2) == 1


@pytest.mark.parametrize("capability, refused", [((8, 0), True), ((8, 9), True), ((9, 0), False), ((10, 0), False)])
def test_gpus_before_hopper_are_refused(monkeypatch, capability, refused):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    model = ModelConfig(**{**tiny.MODEL, "dtype": "bfloat16", "fp8_forwards": True})
    fp8.require_fp8(replace(model, fp8_forwards=False))
    if refused:
        with pytest.raises(ValueError, match=rf"model\.fp8_forwards=true needs .* a GPU has {capability[0]}\.{capability[1]}"):
            fp8.require_fp8(model)
    else:
        fp8.require_fp8(model)


def test_a_run_is_checked_for_it(monkeypatch):
    def refuse(model):
        raise ValueError(f"float8 is {model.fp8_forwards}")

    monkeypatch.setattr(setup, "require_fp8", refuse)
    with pytest.raises(ValueError, match="float8 is False"):
        setup.check(parse_config(tiny.config("shards", "run")), 1)


def test_a_teacher_may_have_been_trained_without(monkeypatch):
    stored = {**tiny.MODEL, "dtype": "bfloat16"}
    monkeypatch.setattr(setup, "model_of", lambda path: stored)
    monkeypatch.setattr(setup, "require_network", lambda path, which: None)
    tree = tiny.config("shards", "run", "distill", model={**stored, "fp8_forwards": True}, distill={"teacher": "t"})
    setup.check_starts(parse_config(tree))
    with pytest.raises(ValueError, match=r"model\.text_len"):
        setup.check_starts(parse_config({**tree, "model": {**tree["model"], "text_len": 6}}))


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_samples_are_made_without(monkeypatch, dtype):
    stored = {**tiny.MODEL, "dtype": "bfloat16", "fp8_forwards": True}
    monkeypatch.setattr(request, "model_of", lambda path: stored)
    monkeypatch.setattr(request, "require_network", lambda path, which: None)
    config = request.SamplerConfig(checkpoint="run", text_encoder="none", latent_shape=tuple(tiny.LATENT), dtype=dtype)
    model = request.check(config, 1)
    assert not model.fp8_forwards and model.dtype == (dtype or "bfloat16")
