"""What one rank keeps for backward, lower precision against diffusers in the same, initial weights, bad input."""

import copy

import pytest
import torch
from oracle import diffusers_wan, inputs, islands_in_fp64, names_of_ours, small_model

from rcm_mcore.condition import Condition
from rcm_mcore.dual import Dual
from rcm_mcore.models import build_model
from rcm_mcore.models.common.parameters import load_full


def ours(model, mesh, weights):
    net = build_model(model, mesh.config, mesh.groups)
    load_full(net, weights, mesh.tp_group)
    return net


@pytest.fixture(scope="module")
def pair(mesh):
    """Our network and diffusers' with the same weights, float64."""
    model = small_model()
    with islands_in_fp64():
        theirs = diffusers_wan(model)
        weights = names_of_ours(model, theirs.state_dict())
        yield model, ours(model, mesh, weights), theirs


def relative(a, b):
    return float((a - b).norm() / b.norm())


def test_one_pass_keeps_no_tangent_and_calls_attention_once(pair, monkeypatch):
    """Backward of a dual pass must not repeat the self-attention it kept."""
    from rcm_mcore.models.common import attention as cross
    from rcm_mcore.parallel import ring

    model, net, _ = pair
    calls = []
    stock = ring.flash_attention
    for module in (cross, ring):
        monkeypatch.setattr(module, "flash_attention", lambda q, k, v, **o: calls.append(k.shape[1]) or stock(q, k, v, **o))
    x, x_dot, s, s_dot, condition = inputs(model)
    out = net(Dual(x, x_dot), Dual(s, s_dot), condition)
    out.primal.sum().backward()
    assert calls == [model.text_len] * model.num_layers  # only the cross-attentions


@pytest.mark.parametrize(("recompute", "repeated"), [("none", 0), ("selective", 0), ("full", 1)])
def test_selective_recompute_does_not_repeat_the_self_attention(pair, monkeypatch, recompute, repeated):
    from rcm_mcore.parallel import ring

    model, net, _ = pair
    calls = []
    stock = ring.flash_attention
    monkeypatch.setattr(ring, "flash_attention", lambda q, k, v, **o: calls.append(k.shape[1]) or stock(q, k, v, **o))
    monkeypatch.setattr(net.blocks, "recompute", recompute)
    x, _, s, _, condition = inputs(model)
    net(x, s, condition).sum().backward()
    assert len(calls) == (1 + repeated) * model.num_layers


def test_one_pass_keeps_no_doubled_storage(pair):
    """What a dual pass saves for backward must not keep the tangent half of a stacked buffer alive."""
    from rcm_mcore.models.common import blocks

    model, net, _ = pair
    buffer = torch.randn(8, 4, model.hidden_size, dtype=torch.float64)
    half = buffer[:, :2]
    assert blocks._owned(half).untyped_storage().nbytes() == half.numel() * half.element_size()
    assert blocks._owned(buffer) is buffer
    x, x_dot, s, s_dot, condition = inputs(model)
    out = net(Dual(x, x_dot), Dual(s, s_dot), condition).primal
    kept, nodes = [], [out.grad_fn]
    while nodes:
        node = nodes.pop()
        if type(node).__name__ == "_RecomputeBackward":
            kept.append(node.saved_tensors[0])
        nodes += [parent for parent, _ in node.next_functions if parent is not None]
    assert len(kept) == model.num_layers
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_within_budget(pair, mesh, dtype):
    """Errors against float64, of output and tangent, at most twice those of diffusers in the same dtype.

    In bfloat16 diffusers keeps float32 what it keeps when it loads a checkpoint.
    """
    model, exact, theirs = pair
    x, x_dot, s, s_dot, condition = inputs(model)
    with torch.no_grad():
        want = exact(Dual(x, x_dot), Dual(s, s_dot), condition)
    low = copy.deepcopy(theirs).to(dtype).requires_grad_(False)
    for name, module in low.named_modules():
        if any(part in name.split(".") for part in low._keep_in_fp32_modules):
            module.to(torch.float32)
    for name, p in low.named_parameters():
        if "scale_shift_table" in name:
            p.data = p.data.to(torch.float32)
    single = lambda *tensors: [t.to(torch.float32) for t in tensors]
    x32, x_dot32, time, time_dot, text32 = single(x, x_dot, 1000 * s, 1000 * s_dot, condition.text)
    f = lambda x, t: low(x.to(dtype), t, text32.to(dtype), return_dict=False)[0].to(torch.float32)
    with torch.no_grad():
        out, out_dot = torch.func.jvp(f, (x32, time), (x_dot32, time_dot))
    net = ours(small_model(dtype=str(dtype).removeprefix("torch.")), mesh, names_of_ours(model, theirs.state_dict()))
    got = net.requires_grad_(False)(Dual(x32, x_dot32), Dual(s, s_dot), Condition(text32))
    assert got.primal.dtype == got.tangent.dtype == torch.float32
    assert relative(got.primal.double(), want.primal) <= 2 * relative(out.double(), want.primal)
    assert relative(got.tangent.double(), want.tangent) <= 2 * relative(out_dot.double(), want.tangent)


def test_fp32_residual_is_closer_than_bf16_residual(pair, mesh):
    model, exact, theirs = pair
    x, _, s, _, condition = inputs(model)
    want = exact(x, s, condition).detach()
    weights = names_of_ours(model, theirs.state_dict())
    errors = []
    for fp32_residual in (True, False):
        net = ours(small_model(dtype="bfloat16", fp32_residual=fp32_residual), mesh, weights).requires_grad_(False)
        errors.append(relative(net(x.to(torch.float32), s, condition.map(torch.Tensor.float)).double(), want))
    assert errors[0] < errors[1]


def test_bf16_time_rounds_the_time(pair, mesh):
    model, exact, theirs = pair
    x, _, s, _, condition = inputs(model)
    rounding = ours(small_model(bf16_time=True), mesh, names_of_ours(model, theirs.state_dict()))
    rounded = (1000 * s).to(torch.bfloat16).double() / 1000
    with torch.no_grad():
        assert torch.equal(rounding(x, s, condition), exact(x, rounded, condition))
        assert not torch.allclose(rounding(x, s, condition), exact(x, s, condition), rtol=1e-3)


def test_initial_weights_depend_on_the_seed_alone(mesh):
    model = small_model(dtype="float32")
    a, b, c = (dict(build_model(model, mesh.config, mesh.groups, seed=s).named_parameters()) for s in (0, 0, 1))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not torch.equal(a["blocks.0.ffn.linear_fc1.weight"], c["blocks.0.ffn.linear_fc1.weight"])
    assert not torch.equal(a["blocks.0.ffn.linear_fc1.weight"], a["blocks.1.ffn.linear_fc1.weight"])
    assert a["head.head.weight"].abs().max() == 0


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(2, 4, 3, 8)), r"\[B, C, F, H, W\]"),
        (dict(x=torch.zeros(2, 5, 3, 8, 12)), "5 channels.*model.in_channels=4"),
        (dict(x=torch.zeros(2, 4, 3, 7, 12)), "H=7 is not a multiple of the patch 2"),
        (dict(s=torch.zeros(3)), r"s has shape \[3\]: must be \[2\]"),
        (dict(s=torch.zeros(2, dtype=torch.long)), "s has dtype torch.int64: must be floating-point"),
        (dict(x=torch.zeros(2, 4, 3, 8, 12, device="meta")), "x is on meta: the network is on cpu"),
    ],
)
def test_bad_inputs_are_named(pair, change, message):
    _, net, _ = pair
    args = dict(x=torch.zeros(2, 4, 3, 8, 12), s=torch.zeros(2), condition=Condition(torch.zeros(2, 10, 24)))
    with pytest.raises(ValueError, match=message):
        net(**{**args, **change})


def test_transformer_engine_is_refused_where_it_is_missing(mesh):
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if HAVE_TE:
        pytest.skip("transformer-engine is installed here")
    with pytest.raises(ValueError, match=r"model\.transformer_impl=transformer_engine needs transformer-engine"):
        build_model(small_model(transformer_impl="transformer_engine"), mesh.config, mesh.groups)


def test_load_full_lists_what_does_not_fit(mesh):
    model = small_model()
    net = build_model(model, mesh.config, mesh.groups)
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    before = net.head.head.bias.clone()
    with pytest.raises(ValueError, match=r"missing \['head.head.bias'\], unknown \['extra'\]"):
        load_full(net, {**{n: w + 1 for n, w in weights.items() if n != "head.head.bias"}, "extra": before}, mesh.tp_group)
    with pytest.raises(ValueError, match=r"time_embedding.0.weight is \[1, 2\]"):
        load_full(net, {n: w + 1 for n, w in weights.items()} | {"time_embedding.0.weight": torch.zeros(1, 2)}, mesh.tp_group)
    assert torch.equal(net.head.head.bias, before)
