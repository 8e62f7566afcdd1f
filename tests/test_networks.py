"""Every network of one rank against diffusers, torch.func.jvp and finite differences."""

import pytest
import torch
from oracle import VARIANTS, diffusers_network, exact_diffusers, inputs, names_of_ours, random_weights, run_diffusers

from rcm_mcore.condition import Condition
from rcm_mcore.config import DistillConfig
from rcm_mcore.diffusion.trigflow import trig_time, trig_velocity
from rcm_mcore.distill.roles import conditioned
from rcm_mcore.distill.steps import central_difference
from rcm_mcore.dual import Dual
from rcm_mcore.models import build_model
from rcm_mcore.models.common.parameters import load_full


@pytest.fixture(scope="module", params=VARIANTS)
def pair(mesh, request):
    """Our network and diffusers' with the same weights, float64."""
    model = VARIANTS[request.param]()
    with exact_diffusers():
        theirs = diffusers_network(model)
        net = build_model(model, mesh.config, mesh.groups)
        load_full(net, names_of_ours(model, theirs.state_dict()), mesh.tp_group)
        yield model, net, theirs


def relative(a, b):
    return float((a - b).norm() / b.norm())


def test_output_equals_diffusers(pair):
    model, net, theirs = pair
    x, _, s, _, condition = inputs(model)
    with torch.no_grad():
        want, got = run_diffusers(theirs, x, s, condition), net(x, s, condition)
    assert want.abs().mean() > 0.1
    assert float((got - want).abs().max()) <= 1e-10


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "one_pass"])
def test_tangent_equals_jvp_of_diffusers(pair, grad):
    model, net, theirs = pair
    x, x_dot, s, s_dot, condition = inputs(model)
    with torch.no_grad():
        want, want_dot = torch.func.jvp(lambda x, s: run_diffusers(theirs, x, s, condition), (x, s), (x_dot, s_dot))
    with torch.set_grad_enabled(grad):
        got = net(Dual(x, x_dot), Dual(s, s_dot), condition)
    assert float((got.primal - want).abs().max()) <= 1e-10
    assert relative(got.tangent, want_dot) <= 1e-9
    assert got.primal.requires_grad == grad and not got.tangent.requires_grad


def test_tangent_equals_central_difference(pair):
    model, net, _ = pair
    x, x_dot, s, s_dot, condition = inputs(model)
    h = 1e-7 if model.family == "wan" else 1e-5  # Wan sees 1000 s
    with torch.no_grad():
        got = net(Dual(x, x_dot), Dual(s, s_dot), condition).tangent
        ahead, behind = (net(x + e * x_dot, s + e * s_dot, condition) for e in (h, -h))
    assert relative(got, (ahead - behind) / (2 * h)) <= 1e-6


@pytest.mark.parametrize("name", ["wan", "cosmos"])
def test_differences_of_the_default_step_are_the_tangent(mesh, name):
    """In float32: of the networks' own error, by rounding and by a step that is too long for their sinusoids of time."""
    model = VARIANTS[name](dtype="float32")
    net = build_model(model, mesh.config, mesh.groups)
    load_full(net, random_weights(net), mesh.tp_group)
    x, x_dot, s, _, condition = inputs(model, batch=4)
    t, velocity = trig_time(s), conditioned(net, condition)
    with torch.no_grad():
        want = trig_velocity(velocity, Dual(x, x_dot), Dual(t, torch.ones_like(t))).tangent
    got = central_difference(velocity, x, t, x_dot, DistillConfig.difference_step)
    assert relative(got, want) <= 0.01  # seen: 8e-4 and 2e-3; with 1e-2 of Wan 1.01


@pytest.mark.parametrize("mode", ["none", "full", "selective", "one_pass"])
def test_gradients_equal_diffusers(pair, mode):
    model, net, theirs = pair
    x, x_dot, s, s_dot, condition = inputs(model)
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    theirs.zero_grad()
    (run_diffusers(theirs, x, s, condition) * weight).sum().backward()
    want = names_of_ours(model, {name: p.grad for name, p in theirs.named_parameters()})
    net.zero_grad()
    net.blocks.recompute = mode if mode in ("full", "selective") else "none"
    out = net(Dual(x, x_dot), Dual(s, s_dot), condition).primal if mode == "one_pass" else net(x, s, condition)
    (out * weight).sum().backward()
    got = dict(net.named_parameters())
    assert got.keys() == want.keys()
    wrong = {name: error for name in got if not (error := relative(got[name].grad, want[name])) <= 1e-9}
    assert not wrong, wrong


def test_given_frames_are_denoised_to_themselves(mesh):
    """Whatever the weights and the state: x_s - s v holds them, and v has no gradient there."""
    model = VARIANTS["cosmos-frames"]()
    net = build_model(model, mesh.config, mesh.groups)
    x, _, s, _, condition = inputs(model)
    v = net(x, s, condition)
    clean = x - s.view(-1, 1, 1, 1, 1) * v
    for row, latents, count in zip(clean, condition.latents, condition.frames):
        assert torch.allclose(row[:, :count], latents[:, :count], rtol=0, atol=1e-12)
        assert not torch.allclose(row[:, count:], latents[:, count:], atol=0.1)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(
    "field, change, message",
    [
        ("text", lambda y: y[:, 1:], r"text has shape .* must be .*, padded with zero rows"),
        ("latents", lambda y: y[:, :, 1:], r"latents has shape"),
        ("latents", lambda y: None, r"condition without latents: a network of model\.condition=\w+ takes \[2, 4, 3, 8, 12\]"),
        ("frames", lambda y: y[1:], r"frames has shape \[1\]: must be \[2\]"),
        ("image", lambda y: y[:, 1:], r"image has shape \[2, (5|11), 20\]: must be \[2, (6|12), 20\]"),
    ],
)
def test_bad_conditions_are_named(mesh, name, field, change, message):
    model = VARIANTS[name]()
    net = build_model(model, mesh.config, mesh.groups)
    x, _, s, _, condition = inputs(model)
    value = getattr(condition, field)
    changed = condition._replace(**{field: torch.zeros(2) if value is None else change(value)})
    if value is None:
        message = f"condition with {field}: a network of model.condition={model.condition} takes none"
    with pytest.raises(ValueError, match=message):
        net(x, s, changed)


def test_rows_and_batches_of_conditions():
    condition = inputs(VARIANTS["cosmos-frames"](), batch=3)[-1]
    parts = [condition.rows(slice(i, i + 1)) for i in range(3)]
    whole = Condition.cat(parts)
    assert whole.image is None and all(torch.equal(a, b) for a, b in zip(whole[:3], condition[:3]))
