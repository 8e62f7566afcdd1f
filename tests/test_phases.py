"""What each step of a run does, its learning rates and its EMA, against loops that count."""

import math
from itertools import pairwise

import numpy as np
import pytest

from rcm_mcore.config import DistillConfig, OptimConfig
from rcm_mcore.distill.ema import ema_beta, power_gamma
from rcm_mcore.distill.phases import Phase, phase_of, steps_by_kind
from rcm_mcore.training.schedule import learning_rate

STEPS = 60


def counted(method, every, warmup, cycle):
    """method.md 3 with counters: what `phase_of` computes in closed form."""
    done = {"student": 0, "critic": 0}
    since_warmup = 0
    for step in range(STEPS):
        warming = method != "dmd" and step < warmup
        r = 1.0 if warmup == 0 else min(1.0, step / warmup)
        if warming or method == "scm":
            yield Phase(kind="student", own_step=done["student"], scm=True, warmup=r)
            done["student"] += 1
            continue
        kind = "student" if since_warmup % every == 0 else "critic"
        yield Phase(
            kind=kind,
            own_step=done[kind],
            scm=kind == "student" and method == "rcm",
            dmd=kind == "student",
            rollout_steps=1 + done[kind] % cycle,
        )
        done[kind] += 1
        since_warmup += 1


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("every", [1, 2, 5])
@pytest.mark.parametrize("method", ["rcm", "scm", "dmd"])
def test_phases_equal_a_loop_with_counters(method, every, warmup):
    config = DistillConfig(method=method, student_every=every, tangent_warmup=warmup)
    want = list(counted(method, every, warmup, cycle=4))
    got = [phase_of(step, config) for step in range(STEPS)]
    assert got == want
    kinds = [p.kind for p in want]
    for n in range(STEPS + 1):
        assert steps_by_kind(n, config) == (kinds[:n].count("student"), kinds[:n].count("critic"))


def test_one_cycle_in_full():
    config = DistillConfig(student_every=3, tangent_warmup=2)
    got = [phase_of(step, config) for step in range(9)]
    assert [p.kind[0] for p in got] == list("ssscc" + "scc" + "s")
    assert [p.own_step for p in got] == [0, 1, 2, 0, 1, 3, 2, 3, 4]
    assert [p.warmup for p in got] == [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert [p.rollout_steps for p in got] == [0, 0, 3, 1, 2, 4, 3, 4, 1]
    assert [(p.scm, p.dmd) for p in got[:4]] == [(True, False), (True, False), (True, True), (False, False)]


def test_rollout_lengths_cycle_by_the_configured_number():
    config = DistillConfig(student_every=1, rollout_max_steps=3)
    assert [phase_of(step, config).rollout_steps for step in range(7)] == [1, 2, 3, 1, 2, 3, 1]


def test_scm_keeps_ramping_to_one():
    config = DistillConfig(method="scm", tangent_warmup=4)
    assert [phase_of(step, config).warmup for step in range(6)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]


def rates(total=21, **options):
    config = OptimConfig(warmup_steps=5, warmup_start_lr=1e-6, **options)
    return [learning_rate(config, 1e-4, step, total) for step in range(total)]


def test_warm_up_is_linear_then_constant():
    got = rates()
    want = [1e-6 + (1e-4 - 1e-6) * i / 5 for i in range(5)] + [1e-4] * 16
    assert got == pytest.approx(want, rel=1e-12)


def test_warm_up_never_starts_above_the_peak():
    config = OptimConfig(warmup_steps=5, warmup_start_lr=1e-6)
    assert [learning_rate(config, 2e-7, step, 20) for step in range(7)] == pytest.approx([2e-7] * 7, rel=1e-12)


@pytest.mark.parametrize("floor", [0.0, 0.05])
def test_linear_decay_ends_on_the_last_step(floor):
    got = rates(decay="linear", min_lr_ratio=floor)
    assert got[5] == pytest.approx(1e-4, rel=1e-12) and got[-1] == pytest.approx(floor * 1e-4, abs=1e-18)
    drops = [a - b for a, b in pairwise(got[5:])]
    assert drops == pytest.approx([(1 - floor) * 1e-4 / 15] * 15, rel=1e-9)


@pytest.mark.parametrize("floor", [0.0, 0.05])
def test_cosine_decay(floor):
    got = rates(decay="cosine", min_lr_ratio=floor)
    want = [1e-4 * (floor + (1 - floor) * (1 + math.cos(math.pi * i / 15)) / 2) for i in range(16)]
    assert got[5:] == pytest.approx(want, rel=1e-12, abs=1e-18)


def test_rates_stay_at_the_end_beyond_the_last_step():
    config = OptimConfig(warmup_steps=0, decay="cosine", min_lr_ratio=0.1)
    assert learning_rate(config, 1.0, 500, 100) == pytest.approx(0.1)
    assert learning_rate(config, 1.0, 0, 1) == 1.0


LENGTHS = [0.05, 0.10, 0.2, 0.27]


@pytest.mark.parametrize("length", LENGTHS)
def test_gamma_is_the_largest_root(length):
    gamma, inverse = power_gamma(length), length**-2
    cubic = lambda g: g**3 + 7 * g**2 + (16 - inverse) * g + (12 - inverse)
    assert abs(cubic(gamma)) <= 1e-9 * inverse
    assert gamma > 0
    above = np.linspace(gamma * 1.001, gamma + 100, 1000)
    assert (cubic(above) > 0).all()
    # EDM2, arXiv 2312.02696: relative width of the profile tau^gamma.
    assert math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3)) == pytest.approx(length, rel=1e-10)


def test_gamma_of_the_published_lengths():
    """EDM2 gives gamma 16.97 and 6.94 for 5 % and 10 %."""
    assert power_gamma(0.05) == pytest.approx(16.97, abs=5e-3) and power_gamma(0.10) == pytest.approx(6.94, abs=5e-3)


@pytest.mark.parametrize("length", LENGTHS)
def test_ema_averages_with_the_power_profile(length):
    """After k steps the weights j = 1..k + 1 (1: the start) count as the integral of tau^gamma over ((j - 1), j) / (k + 1)."""
    count = 3000
    values = np.random.default_rng(0).normal(size=count)
    betas = [ema_beta(length, step) for step in range(1, count)]
    ema = values[0]
    for beta, value in zip(betas, values[1:]):
        ema = beta * ema + (1 - beta) * value
    powers = (np.arange(count + 1) / count) ** (power_gamma(length) + 1)
    profile = np.diff(powers)
    assert ema == pytest.approx(profile @ values, abs=1e-12)

    weights = np.append(1.0, 1.0 - np.array(betas))
    weights[:-1] *= np.cumprod(np.array(betas)[::-1])[::-1]
    assert weights.sum() == pytest.approx(1.0, abs=1e-12)
    assert np.abs(weights - profile).max() <= 1e-12
    positions = np.arange(1, count + 1) / count
    mean = weights @ positions
    assert math.sqrt(weights @ (positions - mean) ** 2) == pytest.approx(length, rel=0.02)


def test_first_beta_keeps_little_of_the_start():
    assert ema_beta(0.05, 1) == pytest.approx(0.5 ** (power_gamma(0.05) + 1))
    assert 0.99 < ema_beta(0.05, 5000) < 1
