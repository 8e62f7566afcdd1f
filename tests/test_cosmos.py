"""The Cosmos network of one rank against diffusers, torch.func.jvp and finite differences."""

import pytest
import torch
from oracle import cosmos_in_fp64, cosmos_names_of_ours, diffusers_cosmos, inputs, small_cosmos

from rcm_mcore.dual import Dual
from rcm_mcore.models.common.parameters import load_full
from rcm_mcore.models.cosmos import build_cosmos


@pytest.fixture(scope="module")
def pair(mesh):
    """Our network and a function of diffusers' with the same weights, float64."""
    model = small_cosmos()
    with cosmos_in_fp64():
        theirs = diffusers_cosmos(model)
        net = build_cosmos(model, mesh.config, mesh.groups)
        load_full(net, cosmos_names_of_ours(model, theirs.state_dict()), mesh.tp_group)

        def run(x, s, text):
            mask = torch.zeros(1, 1, *(8 * n for n in x.shape[3:]), dtype=x.dtype)
            return theirs(x, s, text, padding_mask=mask, return_dict=False)[0]

        yield model, net, theirs, run


def relative(a, b):
    return float((a - b).norm() / b.norm())


def test_output_equals_diffusers(pair):
    model, net, _, run = pair
    x, _, s, _, text = inputs(model)
    with torch.no_grad():
        want, got = run(x, s, text), net(x, s, text)
    assert want.abs().mean() > 0.1
    assert float((got - want).abs().max()) <= 1e-10


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "one_pass"])
def test_tangent_equals_jvp_of_diffusers(pair, grad):
    model, net, _, run = pair
    x, x_dot, s, s_dot, text = inputs(model)
    with torch.no_grad():
        want, want_dot = torch.func.jvp(lambda x, s: run(x, s, text), (x, s), (x_dot, s_dot))
    with torch.set_grad_enabled(grad):
        got = net(Dual(x, x_dot), Dual(s, s_dot), text)
    assert float((got.primal - want).abs().max()) <= 1e-10
    assert relative(got.tangent, want_dot) <= 1e-9
    assert got.primal.requires_grad == grad and not got.tangent.requires_grad


def test_tangent_equals_central_difference(pair):
    model, net, *_ = pair
    x, x_dot, s, s_dot, text = inputs(model)
    h = 1e-5
    with torch.no_grad():
        got = net(Dual(x, x_dot), Dual(s, s_dot), text).tangent
        ahead, behind = (net(x + e * x_dot, s + e * s_dot, text) for e in (h, -h))
    assert relative(got, (ahead - behind) / (2 * h)) <= 1e-7


@pytest.mark.parametrize("mode", ["none", "full", "one_pass"])
def test_gradients_equal_diffusers(pair, mode):
    model, net, theirs, run = pair
    x, x_dot, s, s_dot, text = inputs(model)
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    theirs.zero_grad()
    (run(x, s, text) * weight).sum().backward()
    want = cosmos_names_of_ours(model, {name: p.grad for name, p in theirs.named_parameters()})
    net.zero_grad()
    net.blocks.recompute = "full" if mode == "full" else "none"
    out = net(Dual(x, x_dot), Dual(s, s_dot), text).primal if mode == "one_pass" else net(x, s, text)
    (out * weight).sum().backward()
    got = dict(net.named_parameters())
    assert got.keys() == want.keys()
    wrong = {name: error for name in got if not (error := relative(got[name].grad, want[name])) <= 1e-9}
    assert not wrong, wrong
