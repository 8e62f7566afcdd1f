"""The TrigFlow wrapper against data whose optimal velocity is known, and its tangent against torch.func.jvp and differences.

Gaussian data, x0 ~ N(mu, c^2) in every element: the posterior means of x0 and eps given x_t are linear in x_t.
"""

import math

import pytest
import scipy.stats
import torch

from rcm_mcore.config import TimeConfig
from rcm_mcore.diffusion.trigflow import denoised, diffuse, draw_time, over_sample, rf_time, trig_time, trig_velocity
from rcm_mcore.dual import Dual, rowwise

MU, C = 0.7, 0.4

# compatibility.md 4.6: sigma, TrigFlow time, rectified-flow time, each with the digits printed there.
TABLE = [
    (80, 1.558297, 0.987654, 6), (120, 1.562463, 0.991736, 6), (200, 1.565796, 0.995025, 6), (800, 1.569546, 0.998752, 6),
    (1600, 1.570171, 0.999375, 6), (5000, 1.570596, 0.999800, 6), (14.1014, 1.5, 0.93378, 5), (5.7979, 1.4, 0.85290, 5),
    (3.6021, 1.3, 0.78271, 5), (1.5574, 1.0, 0.60898, 5), (0.6841, 0.6, 0.40622, 5), (0.3093, 0.3, 0.23625, 5),
]  # fmt: skip


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def states():
    """x and t of six samples, the ends of the time interval among them."""
    return draw(6, 2, 3, 4, 5), torch.tensor([0.0, 0.2, math.pi / 4, 1.1, 1.5, math.pi / 2], dtype=torch.float64)


def gaussian_network(x, s):
    """v = E[eps - x0 | x_s]: x_s = (1 - s) x0 + s eps has variance (1 - s)^2 c^2 + s^2."""
    s = over_sample(s)
    centred = (x - (1 - s) * MU) / ((1 - s) ** 2 * C**2 + s**2)
    return s * centred - (MU + (1 - s) * C**2 * centred)


def gaussian_means(x, t):
    """E[x0 | x_t], E[eps | x_t]: x_t = cos t x0 + sin t eps has variance cos^2 t c^2 + sin^2 t."""
    t = over_sample(t)
    centred = (x - t.cos() * MU) / (t.cos() ** 2 * C**2 + t.sin() ** 2)
    return MU + t.cos() * C**2 * centred, t.sin() * centred


def nonlinear(x, s):
    """Mixes elements, and x with s."""
    s = over_sample(s)
    return torch.tanh(x * (1 + s**2) + x.flip(-1) * torch.sin(3 * s)) + x.mean((2, 3, 4), keepdim=True) ** 2 * s


def wrapped(network, x, t):
    """F as method.md 1 has it, sample by sample."""
    samples = []
    for xi, ti in zip(x, t):
        scale = torch.cos(ti) + torch.sin(ti)
        v = network((xi / scale)[None], (torch.sin(ti) / scale)[None])[0]
        samples.append(((torch.cos(ti) - torch.sin(ti)) * xi + v) / scale)
    return torch.stack(samples)


def worst(a, b):
    return float((a - b).abs().max())


@pytest.mark.parametrize("sigma, t, s, digits", TABLE)
def test_time_maps_reproduce_the_published_table(sigma, t, s, digits):
    as_tensor = lambda value: torch.tensor(value, dtype=torch.float64)
    exact_t = as_tensor(t) if digits == 5 else as_tensor(float(sigma)).atan()  # the mid times are exact, else the sigmas
    half = 0.5000001 * 10.0**-digits
    assert abs(float(exact_t) - t) <= 0.5000001e-6
    assert abs(float(exact_t.tan()) - sigma) <= 0.5000001e-4
    assert abs(float(rf_time(exact_t)) - s) <= half
    assert abs(float(trig_time(rf_time(exact_t))) - float(exact_t)) <= 1e-12


def test_time_maps_are_inverses():
    t = torch.linspace(0, math.pi / 2, 101, dtype=torch.float64)
    s = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert worst(trig_time(rf_time(t)), t) <= 1e-14
    assert worst(rf_time(trig_time(s)), s) <= 1e-14
    assert float(rf_time(t[-1])) == 1.0 and float(trig_time(s[-1])) == math.pi / 2
    assert worst((rf_time(t) / (1 - rf_time(t)))[:-1], t.tan()[:-1]) <= 1e-10


def test_diffuse_is_float64_and_scales_the_rectified_flow_state():
    (x0, t), eps = states(), draw(6, 2, 3, 4, 5, seed=1)
    x_t = diffuse(x0.float(), eps.float(), t.float())
    assert x_t.dtype == torch.float64
    for i, ti in enumerate(t.float().tolist()):
        want = math.cos(ti) * x0[i].float().double() + math.sin(ti) * eps[i].float().double()
        assert worst(x_t[i], want) <= 1e-14
    x_t, s = diffuse(x0, eps, t), over_sample(rf_time(t))
    assert worst(x_t / over_sample(t.cos() + t.sin()), (1 - s) * x0 + s * eps) <= 1e-14


def test_velocity_of_gaussian_data():
    x, t = states()
    clean, noise = gaussian_means(x, t)
    trig = trig_velocity(gaussian_network, x, t)
    assert worst(trig, over_sample(t.cos()) * noise - over_sample(t.sin()) * clean) <= 1e-12
    assert worst(denoised(x, t, trig), clean) <= 1e-12


def test_velocity_of_the_true_endpoints():
    """A network that knows eps - x0 gives cos t eps - sin t x0, and back x0."""
    (x0, t), eps = states(), draw(6, 2, 3, 4, 5, seed=1)
    x_t = diffuse(x0, eps, t)
    trig = trig_velocity(lambda x, s: eps - x0, x_t, t)
    assert worst(trig, over_sample(t.cos()) * eps - over_sample(t.sin()) * x0) <= 1e-14
    assert worst(denoised(x_t, t, trig), x0) <= 1e-14


def test_network_output_of_lower_precision_is_widened():
    x, t = states()
    trig = trig_velocity(lambda x, s: nonlinear(x, s).to(torch.bfloat16), x, t)
    assert trig.dtype == torch.float64
    assert 1e-5 < worst(trig, wrapped(nonlinear, x, t)) <= 2**-7


@pytest.mark.parametrize("network", [gaussian_network, nonlinear])
def test_tangent_equals_jvp_and_central_difference(network):
    x, t = states()
    x_dot, t_dot = draw(*x.shape, seed=2), draw(len(t), seed=3)
    duals = Dual(x, x_dot), Dual(t, t_dot)
    got = trig_velocity(lambda x, s: rowwise(network, x, s), *duals)
    want, want_dot = torch.func.jvp(lambda x, t: wrapped(network, x, t), (x, t), (x_dot, t_dot))
    assert worst(got.primal, want) <= 1e-12
    assert worst(got.tangent, want_dot) <= 1e-11
    h = 1e-6
    ahead, behind = (wrapped(network, x + e * x_dot, t + e * t_dot) for e in (h, -h))
    assert worst(got.tangent, (ahead - behind) / (2 * h)) <= 1e-7
    assert float(want_dot.abs().mean()) > 0.1


def test_tangent_in_time_alone_and_in_state_alone():
    x, t = states()
    x_dot, t_dot = draw(*x.shape, seed=2), draw(len(t), seed=3)
    network = lambda x, s: rowwise(nonlinear, x, s)
    both = trig_velocity(network, Dual(x, x_dot), Dual(t, t_dot)).tangent
    state = trig_velocity(network, Dual(x, x_dot), t).tangent
    time = trig_velocity(network, x, Dual(t, t_dot)).tangent
    assert worst(state + time, both) <= 1e-12
    assert float(state.abs().mean()) > 0.1 and float(time.abs().mean()) > 0.1


def test_gradients_flow_through_the_network():
    x, t = states()
    weight = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    pull = draw(*x.shape, seed=4)
    got = torch.autograd.grad((trig_velocity(lambda x, s: weight**2 * nonlinear(x, s), x, t) * pull).sum(), weight)[0]
    want = torch.autograd.grad((wrapped(lambda x, s: weight**2 * nonlinear(x, s), x, t) * pull).sum(), weight)[0]
    assert abs(float(got - want)) <= 1e-12 * abs(float(want))


def drawn(distribution, count=4000):
    generator = torch.Generator().manual_seed(0)
    times = torch.tensor([draw_time(distribution, generator) for _ in range(count)], dtype=torch.float64)
    assert float(times.min()) >= 0 and float(times.max()) <= math.pi / 2
    return times


def test_lognormal_times():
    log_sigma = drawn(TimeConfig(kind="lognormal", mean=-0.8, std=1.6)).tan().log()
    count = len(log_sigma)
    assert abs(float(log_sigma.mean()) + 0.8) <= 3 * 1.6 / math.sqrt(count)
    assert abs(float(log_sigma.std()) - 1.6) <= 3 * 1.6 / math.sqrt(2 * count)
    assert scipy.stats.kstest(log_sigma.numpy(), "norm", args=(-0.8, 1.6)).pvalue >= 0.01


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_shifted_times(shift):
    """P(s <= a) = P(u <= a / (shift - (shift - 1) a)), u uniform."""
    s = rf_time(drawn(TimeConfig(kind="shifted", shift=shift))).numpy()
    assert scipy.stats.kstest(s, lambda a: a / (shift - (shift - 1) * a)).pvalue >= 0.01
