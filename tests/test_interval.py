"""Networks that are told of an interval (`model.interval`) against the networks that are not, and against diffusers' with the
interval's embedding put into it.
"""

import copy
import json
from dataclasses import asdict, replace

import pytest
import tiny
import torch
from oracle import (
    INTERVALS,
    VARIANTS,
    diffusers_network,
    exact_diffusers,
    inputs,
    interval_weights,
    names_of_ours,
    random_weights,
    run_diffusers,
    tell_interval,
)

from rcm_mcore import interop
from rcm_mcore.checkpoint import load_network, write_network
from rcm_mcore.condition import Condition
from rcm_mcore.config import parse_config, parse_model
from rcm_mcore.dual import Dual
from rcm_mcore.models import build_model
from rcm_mcore.models.common.parameters import load_full
from rcm_mcore.training.estimate import estimate
from rcm_mcore.training.networks import INTERVAL, build_network
from rcm_mcore.training.setup import checkpoint_bytes, count_parameters

WHOLE = ["wan-interval", "cosmos-interval"]  # for which diffusers can be told


def relative(a, b):
    return float((a - b).norm() / b.norm())


def section_of(model):
    """As it is written into a checkpoint."""
    return json.loads(json.dumps(asdict(model)))


def network(mesh, name):
    """A network with random weights, none of them zero."""
    model = INTERVALS[name]()
    net = build_model(model, mesh.config, mesh.groups)
    load_full(net, random_weights(net), mesh.tp_group)
    return model, net


@pytest.mark.parametrize("name", INTERVALS)
def test_a_student_begins_as_its_teacher(mesh, name, tmp_path):
    """Whatever the interval: the embedding begins with a linear of zeros. The teacher's checkpoint has no such weights."""
    model = INTERVALS[name]()
    teacher = build_model(replace(model, interval=False), mesh.config, mesh.groups)
    load_full(teacher, random_weights(teacher), mesh.tp_group)
    weights = {name: p.detach() for name, p in teacher.named_parameters()}
    write_network(tmp_path / "teacher", weights, section_of(teacher.model))
    student = build_network(model, mesh, trainable=True)
    with pytest.raises(ValueError, match=r"missing \['interval_embedding"):
        load_network(student, tmp_path / "teacher", which="student")
    load_network(student, tmp_path / "teacher", which="student", new=INTERVAL)
    x, x_dot, s, s_dot, condition = inputs(model)
    want = teacher(Dual(x, x_dot), Dual(s, s_dot), condition._replace(end=None))
    for end in (condition.end, torch.zeros_like(s), s):
        got = student(Dual(x, x_dot), Dual(s, s_dot), condition._replace(end=end))
        assert relative(got.primal, want.primal) <= 1e-14 and relative(got.tangent, want.tangent) <= 1e-14

    # Of the interval the zeros learn first, and then all of it.
    ours = {name: p for name, p in student.named_parameters() if name.startswith(INTERVAL)}
    zero = {name for name, p in ours.items() if not p.any()}
    assert ours.keys() == interval_weights(model).keys() and "interval_embedding.2.weight" in zero
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    for trains in (
        ours.keys() - {"interval_embedding.0.weight", "interval_embedding.0.bias", "interval_embedding.1.weight"},
        ours,
    ):
        student.zero_grad()
        (student(Dual(x, x_dot), Dual(s, s_dot), condition).primal * weight).sum().backward()
        assert {name for name, p in ours.items() if p.grad.any()} == set(trains)
        with torch.no_grad():
            for p in ours.values():
                p -= 0.1 * p.grad
    other = student(x, s, condition._replace(end=condition.end / 2))
    assert relative(other, student(x, s, condition)) > 1e-6

    # A checkpoint of a student has them, and they are read.
    weights = {name: p.detach() for name, p in student.named_parameters()}
    write_network(tmp_path / "student", weights, section_of(model))
    again = build_network(model, mesh, trainable=False)
    load_network(again, tmp_path / "student", which="student", new=INTERVAL)
    assert all(torch.equal(p, weights[name]) for name, p in again.named_parameters())


@pytest.mark.parametrize("name", WHOLE)
def test_output_tangent_and_gradients_equal_diffusers(mesh, name):
    """One pass; the tangent is that of time, the interval's end stands still."""
    model = INTERVALS[name]()
    x, x_dot, s, s_dot, condition = inputs(model, batch=3)
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    of_interval = {key: value.requires_grad_() for key, value in interval_weights(model).items()}
    with exact_diffusers():
        theirs = diffusers_network(model)
        weights = names_of_ours(model, copy.deepcopy(theirs.state_dict()))
        tell_interval(theirs, model, condition.end, of_interval)
        with torch.no_grad():
            run = lambda x, s: run_diffusers(theirs, x, s, condition)
            want, want_dot = torch.func.jvp(run, (x, s), (x_dot, s_dot))
        (run_diffusers(theirs, x, s, condition) * weight).sum().backward()
    net = build_model(model, mesh.config, mesh.groups)
    load_full(net, weights | {key: value.detach() for key, value in of_interval.items()}, mesh.tp_group)
    got = net(Dual(x, x_dot), Dual(s, s_dot), condition)
    (got.primal * weight).sum().backward()
    assert float((got.primal - want).abs().max()) <= 1e-10 and relative(got.tangent, want_dot) <= 1e-9
    assert not got.tangent.requires_grad
    params = dict(net.named_parameters())
    time = {key: p.grad for key, p in params.items() if key.startswith("time_embedding")}
    assert time and all(grad.any() for grad in time.values())
    assert all(relative(params[key].grad, value.grad) <= 1e-9 for key, value in of_interval.items())


@pytest.mark.parametrize("name", INTERVALS)
def test_tangent_equals_central_difference(mesh, name):
    model, net = network(mesh, name)
    x, x_dot, s, s_dot, condition = inputs(model)
    h = 1e-7 if model.family == "wan" else 1e-5  # Wan sees 1000 s
    with torch.no_grad():
        got = net(Dual(x, x_dot), Dual(s, s_dot), condition).tangent
        ahead, behind = (net(x + e * x_dot, s + e * s_dot, condition) for e in (h, -h))
    assert relative(got, (ahead - behind) / (2 * h)) <= 1e-6


@pytest.mark.parametrize("name", INTERVALS)
def test_conditions_without_an_interval_are_refused(mesh, name):
    model, net = network(mesh, name)
    x, _, s, _, condition = inputs(model)
    for end, says in (
        (None, r"condition without end: a network of model\.interval=True takes \[2\]"),
        (condition.end[:1], r"end has shape \[1\]: must be \[2\]$"),
        (torch.zeros(2, dtype=torch.int64), r"end has dtype torch\.int64: must be floating-point"),
    ):
        with pytest.raises(ValueError, match=says):
            net(x, s, condition._replace(end=end))
    plain = VARIANTS[name.removesuffix("-interval")]()
    with pytest.raises(ValueError, match=r"condition with end: a network of model\.interval=False takes none"):
        build_model(plain, mesh.config, mesh.groups)(x, s, condition)
    parts = [condition.rows(slice(i, i + 1)) for i in range(2)]
    assert torch.equal(Condition.cat(parts).end, condition.end)


@pytest.mark.parametrize("family", ["wan", "cosmos"])
def test_its_parameters_are_counted(mesh, family):
    """In estimates, which have their shapes from released networks, and these have no interval."""
    model = {**tiny.MODEL, "family": family, "interval": True} | ({"adaln_rank": 8} if family == "cosmos" else {})
    config = parse_config(tiny.config("s", "r", "distill", model=model, distill={"teacher": "t", "method": "meanflow"}))
    net = build_model(config.model, mesh.config, mesh.groups)
    count = sum(p.numel() for p in net.parameters())
    embedders = sum(p.numel() for p in net.parameters() if not getattr(p, "allreduce", True))
    assert count_parameters(config) == count and checkpoint_bytes(config) == 16 * count
    found = estimate(config, 1)
    assert (found.embedders, found.layers) == (embedders, count - embedders)


def test_no_other_format_takes_them(mesh):
    model, net = network(mesh, "wan-interval")
    weights = {name: p.detach() for name, p in net.named_parameters()}
    with pytest.raises(ValueError, match=r"model\.interval=true: no other format .* --sampler mean_flow"):
        interop.mcore_to_hub(weights, parse_model(asdict(model)))
