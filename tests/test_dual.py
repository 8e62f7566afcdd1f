"""Dual numbers against torch.func.jvp of the same computation on tensors."""

import pytest
import torch

from rcm_mcore.dual import Dual, linear, primal, rowwise, stack, unstack

S, B, M = 5, 3, 4


def draws(count, *shape):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape or (S, B, M), generator=generator, dtype=torch.float64) for _ in range(count)]


def worst(a, b):
    return float((a - b).abs().max())


def mixed(x, y, scale):
    """Two outputs, both nonlinear in all arguments."""
    return torch.tanh(x * y + scale), (x.square() * scale).sum(-1, keepdim=True) * y.exp()


@pytest.mark.parametrize("which", ["x", "y", "xy"])
def test_rowwise_equals_jvp_with_zero_tangents_for_tensors(which):
    x, x_dot, y, y_dot, scale = draws(5)
    args = (Dual(x, x_dot) if "x" in which else x, Dual(y, y_dot) if "y" in which else y, scale)
    tangents = (x_dot if "x" in which else torch.zeros_like(x), y_dot if "y" in which else torch.zeros_like(y))
    want, want_dot = torch.func.jvp(lambda x, y: mixed(x, y, scale), (x, y), tangents)
    for got, value, tangent in zip(rowwise(mixed, *args), want, want_dot, strict=True):
        assert worst(got.primal, value) <= 1e-14 and worst(got.tangent, tangent) <= 1e-13


def test_rowwise_of_one_output_is_one_dual():
    x, x_dot = draws(2)
    got = rowwise(torch.sin, Dual(x, x_dot))
    assert isinstance(got, Dual)
    assert worst(got.primal, x.sin()) == 0 and worst(got.tangent, x.cos() * x_dot) <= 1e-15


def test_rowwise_of_tensors_is_the_plain_call():
    x, y, scale = draws(3)
    for got, want in zip(rowwise(mixed, x, y, scale), mixed(x, y, scale), strict=True):
        assert isinstance(got, torch.Tensor) and torch.equal(got, want)


def test_bias_reaches_the_primal_alone():
    x, x_dot = draws(2)
    (bias,) = draws(1, M)
    got = rowwise(torch.add, Dual(x, x_dot), bias)
    assert worst(got.primal, x + bias) == 0 and worst(got.tangent, x_dot) == 0


@pytest.mark.parametrize("dim", [0, 1])
def test_stack_and_unstack(dim):
    x, x_dot = draws(2)
    both = stack(Dual(x, x_dot), dim)
    assert torch.equal(both, torch.cat([x, x_dot], dim))
    got = unstack(both, dim)
    assert torch.equal(got.primal, x) and torch.equal(got.tangent, x_dot)
    assert got.primal.untyped_storage().data_ptr() == both.untyped_storage().data_ptr()  # views
    assert stack(x, dim) is x
    assert primal(x) is x and primal(got) is got.primal


def test_linear_copies_nothing_and_equals_jvp():
    x, x_dot = draws(2)
    (weight,) = draws(1, M, M)
    given = []
    fn = lambda z: given.append(z.data_ptr()) or z @ weight
    got = linear(fn, Dual(x, x_dot))
    assert given == [x.data_ptr(), x_dot.data_ptr()]
    want, want_dot = torch.func.jvp(lambda x: x @ weight, (x,), (x_dot,))
    assert worst(got.primal, want) <= 1e-14 and worst(got.tangent, want_dot) <= 1e-14
    assert torch.equal(linear(fn, x), x @ weight)


def network(x, weight, bias):
    """A linear map, its bias, a nonlinearity; for tensors and Duals."""
    z = linear(lambda z: z @ weight, x)
    return rowwise(lambda z, b: torch.tanh(z + b) * weight.mean(), z, bias)


def test_gradients_are_those_of_the_plain_call_and_tangents_have_no_graph():
    """Through the argument, and through parameters that functions close over."""
    x, x_dot, pull = draws(3)
    parameters = [p.requires_grad_() for p in (x, *draws(1, M, M), *draws(1, M))]
    x.requires_grad_()
    _, weight, bias = parameters
    want = torch.autograd.grad((network(x, weight, bias) * pull).sum(), parameters)
    out = network(Dual(x, x_dot), weight, bias)
    assert out.primal.requires_grad and not out.tangent.requires_grad
    got = torch.autograd.grad((out.primal * pull).sum(), parameters)
    assert all(worst(a, b) <= 1e-14 for a, b in zip(got, want, strict=True))
    assert all(float(g.abs().max()) > 1e-3 for g in want)


def test_a_tangent_that_has_a_graph_is_cut_off():
    x, x_dot = draws(2)
    x_dot.requires_grad_()
    assert not rowwise(torch.sin, Dual(x, x_dot)).tangent.requires_grad
    assert not unstack(torch.cat([x, x_dot], 1)).tangent.requires_grad
    assert not linear(lambda z: 2 * z, Dual(x, x_dot)).tangent.requires_grad
    assert all(not d.tangent.requires_grad for d in rowwise(lambda z: (z.sin(), z.cos()), Dual(x, x_dot)))


def test_no_graph_without_gradients():
    x, x_dot = draws(2)
    (weight,) = draws(1, M, M)
    with torch.no_grad():
        out = network(Dual(x, x_dot), weight.requires_grad_(), weight[0])
    assert not out.primal.requires_grad and not out.tangent.requires_grad
