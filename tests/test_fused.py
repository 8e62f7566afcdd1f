"""Row-wise functions fused by torch.compile against the same run one operation at a time."""

import pytest
import torch
from oracle import VARIANTS, inputs, random_weights

from rcm_mcore.dual import Dual, compiled_rowwise, rowwise, unstack
from rcm_mcore.models import build_model
from rcm_mcore.models.common.parameters import load_full


def on_its_device(net, model, dtype=torch.float64):
    """Inputs of oracle.py, where the network is."""
    device = next(net.parameters()).device
    *numbers, condition = inputs(model)
    return *(z.to(device, dtype) for z in numbers), type(condition)(*(z if z is None else z.to(device) for z in condition))


def results(net, model, dtype=torch.float64):
    """Output and tangent of a dual pass, output of a plain one and of one without gradients, and gradients of both."""
    x, x_dot, s, s_dot, condition = on_its_device(net, model, dtype)
    with torch.no_grad():
        found = {"no_grad": net(x, s, condition)}
    for mode in ("one_pass", "plain"):
        net.zero_grad()
        out = net(Dual(x, x_dot), Dual(s, s_dot), condition) if mode == "one_pass" else net(x, s, condition)
        if isinstance(out, Dual):
            found["tangent"] = out.tangent
            out = out.primal
        found[mode] = out.detach()
        (out * x_dot).sum().backward()
        found |= {f"{mode} {name}": p.grad.clone() for name, p in net.named_parameters()}
    return found


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


class Counter:
    """A compiler that counts what it is given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, examples):
        from torch._dynamo.backends.debugging import aot_eager

        self.graphs += 1
        return aot_eager(graph, examples)


@pytest.mark.parametrize("variant", ["wan", "wan-image", "cosmos", "cosmos-frames"])
def test_equals_eager_and_compiles_nothing_again(mesh, variant):
    """Every function is traced with its tangent, once for all layers: a closure or a number that changes would show here."""
    model = VARIANTS[variant](num_layers=2)
    net = build_model(model, mesh.config, mesh.groups)
    load_full(net, random_weights(net), mesh.tp_group)
    want = results(net, model)
    compiler = Counter()
    torch._dynamo.reset()
    for module in net.modules():
        if hasattr(module, "rowwise"):
            module.rowwise = compiled_rowwise(compiler)
    of_one_layer = None
    net.chunk_layers = [range(1)]
    with torch.no_grad():
        x, x_dot, s, s_dot, condition = on_its_device(net, model)
        net(Dual(x, x_dot), Dual(s, s_dot), condition)
        of_one_layer = compiler.graphs
        net.chunk_layers = [range(2)]
        net(Dual(x, x_dot), Dual(s, s_dot), condition)
    assert 0 < of_one_layer == compiler.graphs
    got = results(net, model)
    assert got.keys() == want.keys()
    wrong = {name: error for name in got if not (error := relative(got[name], want[name])) <= 1e-12}
    assert not wrong, wrong


def test_halves_of_one_buffer(mesh):
    """Such are a message between pipeline stages and a sum over tensor-parallel ranks: the tangent lies behind its primal."""
    x = unstack(torch.randn(3, 8, 4, dtype=torch.float64))
    want = rowwise(first_and_rest, x)
    got = compiled_rowwise(Counter())(first_and_rest, x)
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a.primal, b.primal) and torch.allclose(a.tangent, b.tangent)


def first_and_rest(x):
    return x[0].sin() * x[1:], x.reshape(*x.shape[:-1], 2, 2).unbind(-1)[0].exp()


@pytest.mark.gpu1
@pytest.mark.parametrize("variant", ["wan", "wan-image", "cosmos", "cosmos-frames"])
def test_in_bfloat16_no_worse_than_eager(mesh, variant):
    """Errors against float64, of Inductor's kernels and of PyTorch's own."""
    found = {}
    for name, dtype, options in (
        ("exact", "float64", dict(compile=False)),
        ("eager", "bfloat16", dict(compile=False)),
        ("fused", "bfloat16", {}),
    ):
        model = VARIANTS[variant](num_layers=2, hidden_size=256, num_attention_heads=4, dtype=dtype, **options)
        net = build_model(model, mesh.config, mesh.groups)
        load_full(net, random_weights(net), mesh.tp_group)
        found[name] = results(net, model, torch.float64 if dtype == "float64" else torch.float32)
    wrong = {
        key: (ours, theirs)
        for key in found["exact"]
        if not (ours := relative(found["fused"][key], found["exact"][key]))
        <= 2 * (theirs := relative(found["eager"][key], found["exact"][key])) + 1e-4
    }
    assert not wrong, wrong
