"""Discrete consistency, finite differences and MeanFlow: whole microbatches against loops over samples, and their limits.

The loops are written from the papers (consistency models 2303.01469, sCM 2410.11081, MeanFlow 2505.13447), in float64, and
their gradients are those that autograd finds for the loss as the paper has it: a weighted distance to a target that is stopped.
"""

import math
from dataclasses import replace

import pytest
import scipy.stats
import test_steps
import torch
from test_steps import (
    MARK,
    OTHER_MARK,
    SHAPE,
    B,
    Given,
    Net,
    Poisoned,
    assert_gradients,
    assert_metrics,
    changed,
    clean,
    finite,
    gradients,
    guided,
    velocity,
)  # fmt: skip

from rcm_mcore.config import TimeConfig, parse_config
from rcm_mcore.diffusion.samplers import sample_mean_flow
from rcm_mcore.diffusion.trigflow import draw_time, time_grid
from rcm_mcore.distill.phases import Phase
from rcm_mcore.distill.roles import conditioned
from rcm_mcore.distill.steps import central_difference, consistency_step, discrete_step, mean_flow_step
from rcm_mcore.dual import rowwise
from rcm_mcore.parallel.random import generator

roles, batch = test_steps.roles, test_steps.batch
PHASE = Phase(kind="student", own_step=0, scm=True)
BAD = [math.nan, math.inf]
DISTRIBUTIONS = {"lognormal": {"kind": "lognormal", "mean": -0.3, "std": 1.1}, "shifted": {"kind": "shifted", "shift": 3.0}}


def config(method="scm", **distill):
    return parse_config(
        {
            "model": {"size": "tiny", "in_channels": 2, "patch_size": [1, 1, 1], "interval": method == "meanflow"},
            "train": {"objective": "distill", "steps": 1, "global_batch_size": 4, "micro_batch_size": 4},
            "data": {"shards": "x.tar", "latent_shape": list(SHAPE)},
            "distill": {"teacher": "t", "guidance": 3.0, "scm_weight": 50.0, "method": method, **distill},
            "checkpoint": {"dir": "run"},
        }
    )


def grid_of(distribution, steps):
    """Quantiles of the times that are drawn, and both ends."""
    inner = []
    for u in (k / steps for k in range(1, steps)):
        if distribution["kind"] == "lognormal":
            inner.append(math.atan(math.exp(scipy.stats.norm.ppf(u, distribution["mean"], distribution["std"]))))
        else:
            s = 3 * u / (1 + 2 * u)
            inner.append(math.atan2(s, 1 - s))
    return [0.0, *inner, math.pi / 2]


@pytest.mark.parametrize("steps", [1, 2, 20])
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_the_grid_has_the_quantiles_of_the_times(kind, steps):
    grid = time_grid(TimeConfig(**DISTRIBUTIONS[kind]), steps)
    assert grid.dtype == torch.float64 and float(grid[0]) == 0 and float(grid[-1]) == math.pi / 2
    assert grid.tolist() == pytest.approx(grid_of(DISTRIBUTIONS[kind], steps), rel=1e-9)


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_times_are_equally_likely_in_every_cell_of_the_grid(kind):
    distribution = TimeConfig(**DISTRIBUTIONS[kind])
    drawn = torch.tensor([draw_time(distribution, generator("t", seed=0, step=0, slot=i)) for i in range(2000)])
    counts = torch.bucketize(drawn.double(), time_grid(distribution, 20)).bincount(minlength=21)
    assert int(counts[0]) == 0 and scipy.stats.chisquare(counts[1:].numpy()).pvalue >= 0.01


# Discrete consistency.


def discrete(roles, batch, cfg, grid, i):
    """The loss of sample i (with a graph), |g|, |F - F_T|, and the logged loss."""
    above = next(k for k in range(1, len(grid)) if grid[k] >= float(batch.draws.t_g[i]))
    t, t_next = (torch.tensor(grid[k], dtype=torch.float64) for k in (above, above - 1))
    text = batch.condition.text[i]
    x_t = torch.cos(t) * batch.latents[i] + torch.sin(t) * batch.draws.eps_g[i]
    teacher = velocity(guided(roles, cfg), x_t, t, text).detach()
    x0, noise = torch.cos(t) * x_t - torch.sin(t) * teacher, torch.sin(t) * x_t + torch.cos(t) * teacher
    target = clean(roles.student, torch.cos(t_next) * x0 + torch.sin(t_next) * noise, t_next, text).detach()
    ours = clean(roles.student, x_t, t, text)
    weight = torch.cos((t + t_next) / 2) / (t - t_next)
    g = (weight * (ours - target)).detach().norm()
    constant = cfg.distill.tangent_norm_constant
    loss = weight / (torch.sin(t) * (g + constant)) * (ours - target).square().sum()
    gap = (velocity(roles.student, x_t, t, text) - teacher).norm().detach()
    return loss, g, gap, (g / (g + constant)) ** 2


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_discrete_step(roles, batch, kind, steps):
    cfg = config("dcm", discrete_steps=steps, time_g=DISTRIBUTIONS[kind], tangent_norm_constant=0.7)
    loss, metrics = discrete_step(batch, roles, cfg)
    terms = [discrete(roles, batch, cfg, grid_of(DISTRIBUTIONS[kind], steps), i) for i in range(B)]
    total, norms, gaps, values = (sum(column) for column in zip(*terms))
    assert float(loss) == pytest.approx(float(50 * values / B), rel=1e-9)
    assert_gradients(loss, roles.student, 50 * total / B, others=[roles.teacher])
    assert_metrics(
        metrics, samples=B, nonfinite_output=0, nonfinite_target=0, loss_scm=values, g_norm=norms, teacher_gap=gaps
    )  # fmt: skip


def flat(loss, net):
    return torch.cat([g.flatten() for g in gradients(loss, net)])


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_discrete_consistency_tends_to_the_continuous_one(roles, batch, kind):
    """Its gradient by the first power of the number of steps, at times that are on every grid."""
    times = torch.tensor(grid_of(DISTRIBUTIONS[kind], 8)[3:7], dtype=torch.float64)
    batch = replace(batch, draws=replace(batch.draws, t_g=times))
    cfg = config(time_g=DISTRIBUTIONS[kind])
    want = flat(consistency_step(batch, roles, cfg, PHASE)[0], roles.student)
    batch = replace(batch, draws=replace(batch.draws, t_g=times - 1e-9))  # whatever the rounding of the grid
    errors = []
    for steps in (256, 512, 1024):
        cfg = config("dcm", discrete_steps=steps, time_g=DISTRIBUTIONS[kind])
        errors.append(float((flat(discrete_step(batch, roles, cfg)[0], roles.student) - want).norm() / want.norm()))
    assert errors[-1] <= 0.1 and errors[0] / errors[1] == pytest.approx(2, abs=0.2), errors
    assert errors[1] / errors[2] == pytest.approx(2, abs=0.1), errors


def test_the_step_from_pure_noise_is_learnt(roles, batch):
    """Sampling starts there, where the weight of sCM, cos t, is 0."""
    batch = replace(batch, draws=replace(batch.draws, t_g=torch.full((B,), math.pi / 2, dtype=torch.float64)))
    _, metrics = discrete_step(batch, roles, config("dcm"))
    assert float(metrics["g_norm"]) / B >= 0.1


# Finite differences.


def test_finite_differences_tend_to_the_tangent(roles, batch):
    """By the second power of their step."""
    phase = replace(PHASE, warmup=0.6)
    want = flat(consistency_step(batch, roles, config(), phase)[0], roles.student)
    errors = []
    for h in (2e-2, 1e-2, 5e-3):
        loss, metrics = consistency_step(batch, roles, config(tangent="finite_difference", difference_step=h), phase)
        errors.append(float((flat(loss, roles.student) - want).norm() / want.norm()))
        assert metrics.keys() == consistency_step(batch, roles, config(), phase)[1].keys()
    assert errors[-1] <= 1e-3 and all(a / b == pytest.approx(4, abs=0.2) for a, b in zip(errors, errors[1:])), errors


class Recording:
    """`net`, and the times that it was asked for."""

    def __init__(self, net):
        self.net, self.times = net, []

    def __call__(self, x, s, condition):
        self.times += s.tolist()
        return self.net(x, s, condition)


def test_finite_differences_stay_within_time(roles, batch):
    """One-sided at noise, with an error of the first order; shorter at data, never at 0."""
    t = torch.tensor([1e-4, 5e-3, math.pi / 2 - 5e-3, math.pi / 2], dtype=torch.float64)
    x, x_dot, student = batch.latents, batch.draws.eps_g, Recording(roles.student)
    f = lambda x, t: torch.stack([velocity(roles.student, *of_one) for of_one in zip(x, t, batch.condition.text)])
    want = torch.func.jvp(f, (x, t), (x_dot, torch.ones_like(t)))[1]
    errors = [
        (central_difference(conditioned(student, batch.condition), x, t, x_dot, h) - want).flatten(1).norm(dim=1)
        / want.flatten(1).norm(dim=1)
        for h in (1e-2, 5e-3)
    ]
    assert len(student.times) == 4 * B and min(student.times) > 0 and max(student.times) <= 1
    assert (errors[0] <= 0.02).all() and (errors[1][[1, 2, 3]] <= 0.6 * errors[0][[1, 2, 3]]).all(), errors


@pytest.mark.parametrize("method", ["dcm", "scm"])
def test_given_frames_have_targets_down_to_the_data(roles, batch, method):
    """The velocity towards them is 0 / 0 there. They add nothing to the gradient."""
    nets = {name: Given(getattr(roles, name), batch.latents, 1) for name in ("student", "teacher")}
    times = torch.tensor([1e-5, 1e-3, 4e-3, 1e-2], dtype=torch.float64)
    batch = replace(batch, draws=replace(batch.draws, t_g=times))
    if method == "dcm":
        loss, metrics = discrete_step(batch, changed(roles, **nets), config("dcm", discrete_steps=3))
    else:
        run = config(tangent="finite_difference")
        loss, metrics = consistency_step(batch, changed(roles, **nets), run, PHASE)
    assert int(metrics["nonfinite_output"]) == int(metrics["nonfinite_target"]) == 0 and finite(metrics)
    assert float(flat(loss, roles.student).norm()) > 0


# MeanFlow.


class MeanNet(Net):
    """u(x, s, text, end)."""

    def average(self, x, s, text, end):
        w, a, u, out = self.params
        return (torch.tanh(x.flatten(1) @ w / 3 + (s * (1 + 2 * end))[:, None] * a + text.mean(1) @ u) @ out).view_as(x)

    def __call__(self, x, s, condition):
        return rowwise(lambda x, s: self.average(x, s, condition.text, condition.end), x, s)


@pytest.fixture
def mean_roles(roles):
    return changed(roles, student=MeanNet(5))


@pytest.fixture
def mean_batch(batch):
    """The third interval is empty; the fourth ends at the data."""
    ends = torch.tensor([0.1, 0.35, 1.1, 0.0], dtype=torch.float64)
    return replace(batch, draws=replace(batch.draws, t_end=ends))


def mean_flow(roles, batch, cfg, i):
    """The loss of sample i (with a graph), |error|, |u - v|, and the logged loss (2505.13447, eq. 9, 10 and 22)."""
    s, end = (torch.tan(time) / (1 + torch.tan(time)) for time in (batch.draws.t_g[i], batch.draws.t_end[i]))
    text = batch.condition.text[i][None]
    x_s = ((1 - s) * batch.latents[i] + s * batch.draws.eps_g[i])[None]
    teacher = lambda text: roles.teacher.value(x_s, s[None], text).detach()
    g = cfg.distill.guidance
    v = teacher(roles.negative) + g * (teacher(text) - teacher(roles.negative))
    average = lambda x, s: roles.student.average(x, s, text, end[None])
    _, u_dot = torch.func.jvp(average, (x_s, s[None]), (v, torch.ones_like(s)[None]))
    u = average(x_s, s[None])
    target = (v - (s - end) * u_dot).detach()
    error = (u - target).square().sum()
    weight = 1 / (error.detach() + cfg.distill.tangent_norm_constant)
    return weight * error, error.detach().sqrt(), (u - v).norm().detach(), (weight * error.detach().sqrt()) ** 2


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_mean_flow_step(mean_roles, mean_batch, guidance):
    cfg = config("meanflow", guidance=guidance, tangent_norm_constant=0.7)
    loss, metrics = mean_flow_step(mean_batch, mean_roles, cfg)
    terms = [mean_flow(mean_roles, mean_batch, cfg, i) for i in range(B)]
    total, norms, gaps, values = (sum(column) for column in zip(*terms))
    assert float(loss) == pytest.approx(float(50 * values / B), rel=1e-10)
    assert_gradients(loss, mean_roles.student, 50 * total / B, others=[mean_roles.teacher])
    assert_metrics(
        metrics, samples=B, nonfinite_output=0, nonfinite_target=0, loss_scm=values, g_norm=norms, teacher_gap=gaps
    )  # fmt: skip


def test_empty_intervals_are_flow_matching_with_the_teacher(mean_roles, mean_batch):
    batch = replace(mean_batch, draws=replace(mean_batch.draws, t_end=mean_batch.draws.t_g))
    cfg, text = config("meanflow"), mean_batch.condition.text
    loss, metrics = mean_flow_step(batch, mean_roles, cfg)
    s = batch.draws.t_g.tan() / (1 + batch.draws.t_g.tan())
    s_wide = s.view(-1, 1, 1, 1, 1)
    x_s = (1 - s_wide) * batch.latents + s_wide * batch.draws.eps_g
    unconditional, conditional = (
        mean_roles.teacher.value(x_s, s, text).detach() for text in (mean_roles.negative.expand_as(text), text)
    )
    v = -2.0 * unconditional + 3.0 * conditional
    errors = (mean_roles.student.average(x_s, s, text, s) - v).square().flatten(1).sum(1)
    assert_gradients(loss, mean_roles.student, 50 * (errors / (errors.detach() + 0.1)).sum() / B)
    assert float(metrics["g_norm"]) == pytest.approx(float(metrics["teacher_gap"]), rel=1e-12)


class Gaussian:
    """Independent elements of different means and variances: velocity, flow and average velocity in closed form."""

    mean = torch.linspace(-1, 2, math.prod(SHAPE), dtype=torch.float64).view(SHAPE)
    variance = torch.linspace(0.2, 1.7, math.prod(SHAPE), dtype=torch.float64).view(SHAPE)

    def at(self, s):
        s = s.view(-1, 1, 1, 1, 1)
        return (1 - s) * self.mean, (1 - s) ** 2 * self.variance + s**2

    def velocity(self, x, s, condition=None):
        (mean, variance), wide = self.at(s), s.view(-1, 1, 1, 1, 1)
        return (wide - (1 - wide) * self.variance) / variance * (x - mean) - self.mean

    def flow(self, x, s, end):
        """Where the flow takes x from s to end."""
        (mean, variance), (mean_end, variance_end) = self.at(s), self.at(end)
        return mean_end + (variance_end / variance).sqrt() * (x - mean)

    def average(self, x, s, end):
        return (x - self.flow(x, s, end)) / (s - end).view(-1, 1, 1, 1, 1)

    def __call__(self, x, s, condition):
        return rowwise(lambda x, s: self.average(x, s, condition.end), x, s)


def test_the_average_velocity_has_no_error(mean_batch, mean_roles):
    """MeanFlow's identity along the teacher's flow; a student that is told another interval has one."""
    ends = torch.tensor([0.1, 0.35, 0.2, 0.0], dtype=torch.float64)
    batch, exact = replace(mean_batch, draws=replace(mean_batch.draws, t_end=ends)), Gaussian()
    cfg = config("meanflow", guidance=1.0)
    of = lambda student: mean_flow_step(batch, changed(mean_roles, teacher=exact.velocity, student=student), cfg)[1]
    assert float(of(exact)["g_norm"]) <= 1e-10
    other = lambda x, s, condition: exact(x, s, condition._replace(end=condition.end / 2))
    assert float(of(other)["g_norm"]) >= 0.1


def test_average_velocities_are_sampled_exactly():
    """In any number of steps: each goes where the flow goes."""
    exact, times = Gaussian(), [1.5, 1.2, 0.7, 0.0]
    noise = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s = torch.full((5,), math.tan(1.5) / (1 + math.tan(1.5)), dtype=torch.float64)
    want = exact.flow(float(s[0]) * noise, s, torch.zeros_like(s))
    for used in (times, [times[0], times[2], 0.0], [times[0], 0.0]):
        got = sample_mean_flow(exact.average, noise.float(), used)
        assert got.dtype == torch.float64 and float((got - want).abs().max()) <= 1e-6
    seen = []
    sample_mean_flow(lambda x, s, end: (seen.append((s.tolist(), end.tolist())), x)[1], noise[:2], [math.pi / 4, 0.3, 0.0])
    middle = math.tan(0.3) / (1 + math.tan(0.3))
    assert seen == [([0.5] * 2, [pytest.approx(middle)] * 2), ([pytest.approx(middle)] * 2, [0.0] * 2)]


# Planted NaN and Inf.


class PoisonedAside:
    """`net`, whose output of marked samples is not finite where it is asked without a graph."""

    def __init__(self, net, bad, *, mark=MARK):
        self.net, self.poisoned = net, Poisoned(net, bad, mark=mark)

    def __call__(self, x, s, condition):
        return (self.net if torch.is_grad_enabled() else self.poisoned)(x, s, condition)


def steps_of(name, roles, batch):
    """Roles and batch for a step, and the step as a function of batch and roles."""
    if name == "meanflow":
        roles = changed(roles, student=MeanNet(5))
        batch = replace(batch, draws=replace(batch.draws, t_end=batch.draws.t_g / 2))
        return roles, batch, lambda batch, roles: mean_flow_step(batch, roles, config("meanflow"))
    if name == "dcm":
        return roles, batch, lambda batch, roles: discrete_step(batch, roles, config("dcm"))
    run = config(tangent="finite_difference")
    return roles, batch, lambda batch, roles: consistency_step(batch, roles, run, PHASE)


STEPS = ["dcm", "finite_difference", "meanflow"]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("where", ["teacher", "tangent", "output", "latents"])
@pytest.mark.parametrize("name", STEPS)
def test_steps_without_a_bad_sample(roles, batch, name, where, bad):
    """The others have the gradient that they have without it; `tangent`: what the student is asked beside its output."""
    roles, batch, step = steps_of(name, roles, batch)
    kept = torch.tensor([0, 2, 3])
    rest = replace(batch, latents=batch.latents[kept], condition=batch.condition.rows(kept), draws=batch.draws.rows(kept))
    loss, want = step(rest, roles)
    want_gradient = flat(loss, roles.student) * len(kept) / B
    student, poisoned = roles.student, roles
    if where == "teacher":
        poisoned = changed(roles, teacher=Poisoned(roles.teacher, bad))
    elif where == "latents":
        batch.latents[1, 0, 0, 0, 0] = bad
    elif where == "output":
        poisoned = changed(roles, student=Poisoned(student, bad))
    else:
        aside = PoisonedAside(student, bad) if name != "meanflow" else Poisoned(student, bad, part="tangent")
        poisoned = changed(roles, student=aside)
    loss, metrics = step(batch, poisoned)
    got = flat(loss, student)
    assert float((got - want_gradient).norm()) <= 1e-10 * float(want_gradient.norm()) and float(got.norm()) > 0
    left_out = where == "output" or (where == "latents" and name != "meanflow")  # an average velocity does not contain x
    same = {key: want[key] for key in ("loss_scm", "g_norm", "teacher_gap")}
    assert_metrics(metrics, samples=B, nonfinite_output=int(left_out), nonfinite_target=int(not left_out), **same)


@pytest.mark.parametrize("name", STEPS)
def test_steps_with_bad_samples_of_both_kinds(roles, batch, name):
    """After sample 1 is left out, sample 3's bad target must still be found in its place."""
    roles, batch, step = steps_of(name, roles, batch)
    kept = torch.tensor([0, 2])
    rest = replace(batch, latents=batch.latents[kept], condition=batch.condition.rows(kept), draws=batch.draws.rows(kept))
    want = flat(step(rest, roles)[0], roles.student) / 2
    spoilt = changed(
        roles, student=Poisoned(roles.student, math.nan), teacher=Poisoned(roles.teacher, math.inf, mark=OTHER_MARK)
    )
    loss, metrics = step(batch, spoilt)
    assert float((flat(loss, roles.student) - want).norm()) <= 1e-10 * float(want.norm())
    assert int(metrics["nonfinite_output"]) == 1 and int(metrics["nonfinite_target"]) == 1 and finite(metrics)


@pytest.mark.parametrize("name", STEPS)
def test_no_loss_when_every_sample_is_bad(roles, batch, name):
    roles, batch, step = steps_of(name, roles, batch)
    batch.condition.text[:, 0, 0] = MARK
    loss, metrics = step(batch, changed(roles, student=Poisoned(roles.student, math.nan)))
    assert loss is None and int(metrics["samples"]) == int(metrics["nonfinite_output"]) == B
