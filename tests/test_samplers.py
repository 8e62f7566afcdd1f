"""Samplers against loops written from compatibility.md 4.6, against diffusers' schedulers, and on Gaussian data.

For x0 ~ N(mu, c^2) the exact velocity is known, and along its flow (x_s - (1 - s) mu) / sqrt((1 - s)^2 c^2 + s^2) is constant:
noise z at s = 1 ends as mu + c z.
"""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from rcm_mcore.config import MID_TIMES
from rcm_mcore.diffusion.samplers import few_step_times, sample_few_step, sample_ode, shifted_sigmas

SHAPE = (3, 2, 2, 4, 4)
MU, C = 0.7, 0.4


def view(s):
    return s.view(-1, 1, 1, 1, 1)


def gaussian_velocity(x, s):
    s = view(s)
    clean = MU + (1 - s) * C**2 * (x - (1 - s) * MU) / ((1 - s) ** 2 * C**2 + s**2)
    return (x - clean) / s


def nonlinear(x, s):
    return torch.tanh(x * (1 + view(s)) + x.flip(-1)) + 0.3 * torch.cos(5 * view(s)) * x


def noises(count, dtype=torch.float64):
    torch.manual_seed(5)
    return [torch.randn(SHAPE, dtype=dtype) for _ in range(count)]


def worst(a, b):
    return float((a - b).abs().max())


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_few_step_times(steps):
    assert few_step_times(steps) == [math.atan(80), *[1.5, 1.4, 1.0][: steps - 1], 0.0]
    paper = few_step_times(steps, sigma_max=1600, mid_times=MID_TIMES["cosmos"])
    assert paper == [math.atan(1600), *[1.3, 1.0, 0.6][: steps - 1], 0.0]


def test_repeated_mid_times_are_allowed():
    """The published 8-step list repeats its times."""
    times = few_step_times(8, mid_times=[1.3, 1.0, 1.0, 0.6, 0.6, 0.3, 0.3])
    assert times[1:] == [1.3, 1.0, 1.0, 0.6, 0.6, 0.3, 0.3, 0.0]


@pytest.mark.parametrize(
    "steps, options, message",
    [
        (0, {}, r"steps=0: must be from 1 to 4, one more than the mid times \[1.5, 1.4, 1.0\]"),
        (5, {}, "steps=5: must be from 1 to 4"),
        (3, dict(mid_times=[1.0, 1.4]), r"must fall from arctan\(sigma_max=80.0\) to 0"),
        (2, dict(sigma_max=5.0), "must fall from"),
        (2, dict(mid_times=[0.0]), "must fall from"),
        (1, dict(sigma_max=-3.0), "must fall from"),
    ],
)
def test_bad_times_are_named(steps, options, message):
    with pytest.raises(ValueError, match=message):
        few_step_times(steps, **options)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_few_step_equals_a_loop_in_rectified_flow_time(steps):
    draws = noises(steps)
    sigmas = [80 / 81, *[math.tan(t) / (1 + math.tan(t)) for t in (1.5, 1.4, 1.0)][: steps - 1]]
    x = sigmas[0] * draws[0]
    for i, s in enumerate(sigmas):
        x0 = x - s * nonlinear(x, torch.full((3,), s, dtype=torch.float64))
        if i + 1 < steps:
            x = (1 - sigmas[i + 1]) * x0 + sigmas[i + 1] * draws[i + 1]
    got = sample_few_step(nonlinear, draws, few_step_times(steps))
    assert got.dtype == torch.float64 and not got.requires_grad
    assert worst(got, x0) <= 1e-13


def test_few_step_of_gaussian_data():
    """One step gives the posterior mean."""
    draws, times = noises(1), few_step_times(1)
    cos, sin = math.cos(times[0]), math.sin(times[0])
    want = MU + cos * C**2 * (sin * draws[0] - cos * MU) / (cos**2 * C**2 + sin**2)
    assert worst(sample_few_step(gaussian_velocity, draws, times), want) <= 1e-13


def test_few_step_state_is_float64_for_low_precision_noise_and_network():
    draws = noises(4, torch.float32)
    seen = []

    def network(x, s):
        seen.append((x.dtype, s.dtype, tuple(s.shape)))
        return nonlinear(x, s).to(torch.bfloat16)

    got = sample_few_step(network, draws, few_step_times(4))
    assert got.dtype == torch.float64
    assert seen == [(torch.float64, torch.float64, (3,))] * 4
    assert worst(got, sample_few_step(nonlinear, [d.double() for d in draws], few_step_times(4))) <= 0.05


def test_few_step_takes_one_noise_per_step():
    with pytest.raises(StopIteration):
        sample_few_step(nonlinear, noises(3), few_step_times(4))


@pytest.mark.parametrize("mid", ["wan", "cosmos"])
def test_few_step_equals_the_stock_stochastic_scheduler(mid):
    """architectures.md E.2; the scheduler computes in float32 and draws its noise from the global generator."""
    times = few_step_times(4, mid_times=MID_TIMES[mid])
    sigmas = [math.sin(t) / (math.sin(t) + math.cos(t)) for t in times[:-1]]
    draws = noises(4, torch.float32)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0, stochastic_sampling=True)
    scheduler.set_timesteps(sigmas=sigmas)
    torch.manual_seed(5)
    x = torch.randn(SHAPE) * sigmas[0]
    for timestep in scheduler.timesteps:
        v = nonlinear(x.double(), torch.full((3,), float(timestep) / 1000, dtype=torch.float64))
        x = scheduler.step(v.float(), timestep, x, return_dict=False)[0]
    assert worst(sample_few_step(nonlinear, draws, times), x.double()) <= 5e-6


def test_shifted_sigmas():
    assert shifted_sigmas(4, 1.0) == [1.0, 0.75, 0.5, 0.25, 0.0]
    want = [1.0, 5 * 0.75 / 4, 5 * 0.5 / 3, 5 * 0.25 / 2, 0.0]
    assert max(abs(a - b) for a, b in zip(shifted_sigmas(4, 5.0), want, strict=True)) <= 1e-15
    for bad in ((0, 3.0), (4, 0.0)):
        with pytest.raises(ValueError, match=rf"steps={bad[0]} must be at least 1 and shift={bad[1]} positive"):
            shifted_sigmas(*bad)


def final(velocity, noise, **options):
    *_, x = sample_ode(velocity, noise, **options)
    return x


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_equals_the_stock_scheduler(shift):
    """diffusers' Euler scheduler with the sigmas that the shift makes of uniform times."""
    (noise,) = noises(1, torch.float32)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    scheduler.set_timesteps(sigmas=[1 - i / 10 for i in range(10)])
    x = noise
    states = sample_ode(nonlinear, noise, steps=10, shift=shift)
    for timestep, state in zip(scheduler.timesteps, states, strict=True):
        v = nonlinear(x.double(), torch.full((3,), float(timestep) / 1000, dtype=torch.float64))
        x = scheduler.step(v.float(), timestep, x, return_dict=False)[0]
        assert state.dtype == torch.float64
        assert worst(state, x.double()) <= 5e-6


def test_unipc_equals_a_direct_use_of_the_scheduler():
    (noise,) = noises(1)
    scheduler = UniPCMultistepScheduler(
        num_train_timesteps=1000, solver_order=2, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    scheduler.set_timesteps(8)
    x = noise
    states = sample_ode(nonlinear, noise, steps=8, shift=3.0, solver="unipc")
    for sigma, timestep, state in zip(scheduler.sigmas[:-1], scheduler.timesteps, states, strict=True):
        v = nonlinear(x, torch.full((3,), float(sigma), dtype=torch.float64))
        x = scheduler.step(v, timestep, x, return_dict=False)[0]
        assert state.dtype == torch.float64
        assert worst(state, x) <= 1e-12


def test_euler_converges_to_the_exact_flow_at_first_order():
    (noise,) = noises(1)
    errors = [worst(final(gaussian_velocity, noise, steps=n, shift=3.0), MU + C * noise) for n in (50, 100, 200)]
    assert errors[2] <= 0.02
    assert all(1.8 <= a / b <= 2.2 for a, b in pairwise(errors))


def test_unipc_beats_euler_at_equal_steps():
    (noise,) = noises(1)
    for steps in (10, 20, 40):
        euler, unipc = (
            worst(final(gaussian_velocity, noise, steps=steps, shift=1.0, solver=s), MU + C * noise) for s in ("euler", "unipc")
        )
        assert unipc <= euler / 8


@pytest.mark.parametrize("solver, steps", [("euler", 200), ("unipc", 40)])
def test_many_steps_give_the_distribution_of_the_data(solver, steps):
    noise = torch.randn(4, 4, 4, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = final(gaussian_velocity, noise, steps=steps, shift=3.0, solver=solver)
    count = x.numel()
    assert abs(float(x.mean()) - MU) <= 4 * C / math.sqrt(count) + 0.005
    assert abs(float(x.std()) - C) <= 4 * C / math.sqrt(2 * count) + 0.005


def test_few_steps_give_the_mean_and_spread_that_the_recursion_predicts():
    """Posterior means shrink the spread of x0: V' = a^2 (cos^2 V + sin^2) with a = cos c^2 / (cos^2 c^2 + sin^2)."""
    generator = torch.Generator().manual_seed(0)
    times = few_step_times(4, mid_times=MID_TIMES["cosmos"])
    draws = (torch.randn(4, 4, 4, 16, 16, generator=generator) for _ in times)
    x = sample_few_step(gaussian_velocity, draws, times)
    variance = mean = 0.0  # of x0 - mu; the first state, sin(t_0) z, lacks cos(t_0) mu
    for i, t in enumerate(times[:-1]):
        cos, sin = math.cos(t), math.sin(t)
        shrink = cos * C**2 / (cos**2 * C**2 + sin**2)
        mean = shrink * cos * (mean if i else -MU)
        variance = shrink**2 * (cos**2 * variance + sin**2)
    count = x.numel()
    assert abs(float(x.mean()) - MU - mean) <= 4 * math.sqrt(variance / count)
    assert abs(float(x.std()) - math.sqrt(variance)) <= 4 * math.sqrt(variance / (2 * count))
