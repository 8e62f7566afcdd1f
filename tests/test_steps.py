"""Whole microbatches against loops over samples written from method.md, and planted NaN and Inf.

The networks are small MLPs in float64. `Poisoned` spoils the output of samples whose text carries a mark.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from rcm_mcore.condition import Condition
from rcm_mcore.config import parse_config
from rcm_mcore.distill import steps
from rcm_mcore.distill.draws import Draws
from rcm_mcore.distill.phases import Phase
from rcm_mcore.distill.steps import MicroBatch, Roles, consistency_step, critic_step, distillation_step, pretrain_step
from rcm_mcore.dual import Dual, rowwise

B, SHAPE, TEXT = 4, (2, 2, 1, 3), (3, 5)
PHASE = Phase(kind="student", own_step=0, scm=True, dmd=True, warmup=0.6)
MARK, OTHER_MARK = 0.5, 0.25
BAD = [math.nan, math.inf]


class Net:
    """v(x, s, text), different in every argument."""

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        n = math.prod(SHAPE)
        shapes = (n, 8), (8,), (TEXT[1], 8), (8, n)
        self.params = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]

    def value(self, x, s, text):
        w, a, u, out = self.params
        return (torch.tanh(x.flatten(1) @ w / 3 + s[:, None] * a + text.mean(1) @ u) @ out).view_as(x)

    def __call__(self, x, s, condition):
        return rowwise(lambda x, s: self.value(x, s, condition.text), x, s)


class Poisoned:
    """`net`, whose output of marked samples is not finite, in its value (with a graph) or in its tangent alone."""

    def __init__(self, net, bad, *, mark=MARK, part="value"):
        self.net, self.bad, self.mark, self.part = net, bad, mark, part

    def __call__(self, x, s, condition):
        factor = torch.where(condition.text[:, 0, 0] == self.mark, self.bad, 1.0).view(-1, 1, 1, 1, 1)
        out = self.net(x, s, condition)
        if not isinstance(out, Dual):
            return out * factor if self.part == "value" else out
        return Dual(out.primal * factor, out.tangent) if self.part == "value" else Dual(out.primal, out.tangent * factor)


def config(**distill):
    return parse_config(
        {
            "model": {"size": "tiny", "in_channels": 2, "patch_size": [1, 1, 1]},
            "train": {"objective": "distill", "steps": 1, "global_batch_size": 4, "micro_batch_size": 4},
            "data": {"shards": "x.tar", "latent_shape": list(SHAPE)},
            "distill": {"teacher": "t", "guidance": 3.0, "scm_weight": 50.0, "dmd_weight": 2.0, **distill},
            "checkpoint": {"dir": "run"},
        }
    )


@pytest.fixture
def roles(mesh):
    negative = torch.randn(1, *TEXT, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return Roles(
        student=Net(0), teacher=Net(1), fake_score=Net(2), negative=negative, sample_group=mesh.groups.mp
    )  # fmt: skip


def changed(roles, **networks):
    return Roles(**{**vars(roles), **networks})


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    times = lambda *values: torch.tensor(values, dtype=torch.float64)
    levels = times([math.pi / 2] * B, [1.5, 1.2, 1.4, 0.9], [1.0, 1.2, 0.3, 0.8])
    draws = Draws(
        t_g=times(0.2, 0.7, 1.1, 1.5),
        eps_g=draw(B, *SHAPE),
        t_d=times(0.4, 1.3, 0.9, 1.5),
        eps_d=draw(B, *SHAPE),
        rollout_times=levels,
        rollout_noise=draw(3, B, *SHAPE),
        dropped=torch.tensor([False, True, False, True]),
    )
    text = draw(B, *TEXT)
    text[1, 0, 0], text[3, 0, 0] = MARK, OTHER_MARK
    return MicroBatch(latents=draw(B, *SHAPE), condition=Condition(text), draws=draws)


# One sample at a time, from method.md.


def velocity(net, x, t, text):
    """F of method.md 1, for one sample; `net` may be (network, negative, guidance)."""
    cos, sin = torch.cos(t), torch.sin(t)
    x_s, s = (x / (cos + sin))[None], (sin / (cos + sin))[None]
    if isinstance(net, tuple):
        net, negative, guidance = net
        v = (1 - guidance) * net.value(x_s, s, negative) + guidance * net.value(x_s, s, text[None])
    else:
        v = net.value(x_s, s, text[None])
    return ((cos - sin) * x + v[0]) / (cos + sin)


def clean(net, x, t, text):
    return torch.cos(t) * x - torch.sin(t) * velocity(net, x, t, text)


def guided(roles, cfg):
    return roles.teacher, roles.negative, cfg.distill.guidance


def consistency(roles, batch, cfg, i, phase):
    """The term of sample i, |g| before it is normalised, |F - F_T|."""
    t, text = batch.draws.t_g[i], batch.condition.text[i]
    cos, sin, r = torch.cos(t), torch.sin(t), phase.warmup
    x_t = cos * batch.latents[i] + sin * batch.draws.eps_g[i]
    teacher = velocity(guided(roles, cfg), x_t, t, text).detach()
    f = lambda x, t: velocity(roles.student, x, t, text)
    _, f_dot = torch.func.jvp(f, (x_t, t), (cos * sin * teacher, cos * sin))
    trig = f(x_t, t)
    scale = r if cfg.distill.scale_tangent else 1.0
    g = -cos * torch.sqrt(1 - r**2 * sin**2) * (trig - teacher) - r * cos * sin * x_t - scale * f_dot
    g = g.detach()
    unit = g / (g.norm() + cfg.distill.tangent_norm_constant)
    return (trig - trig.detach() - unit).square().sum(), g.norm(), (trig - teacher).norm().detach()


def generate(roles, batch, i):
    """The rollout of sample i; only its last evaluation has a graph."""
    times, noise = batch.draws.rollout_times[:, i], batch.draws.rollout_noise[:, i]
    x = noise[0]
    for k in range(len(times)):
        x0 = clean(roles.student, x, times[k], batch.condition.text[i])
        if k + 1 < len(times):
            x = (torch.cos(times[k + 1]) * x0 + torch.sin(times[k + 1]) * noise[k + 1]).detach()
    return x0


def distillation(roles, batch, cfg, i):
    t, text, x_g = batch.draws.t_d[i], batch.condition.text[i], generate(roles, batch, i)
    x_t = torch.cos(t) * x_g.detach() + torch.sin(t) * batch.draws.eps_d[i]
    fake, teacher = clean(roles.fake_score, x_t, t, text), clean(guided(roles, cfg), x_t, t, text)
    weight = (x_g - teacher).abs().mean().clamp(min=1e-5)
    target = (x_g - (fake - teacher) / weight).detach()
    return (x_g - target).square().sum(), weight.detach(), (fake - teacher).norm().detach()


def critic(roles, batch, i):
    t, text, x_g = batch.draws.t_d[i], batch.condition.text[i], generate(roles, batch, i).detach()
    x_t = torch.cos(t) * x_g + torch.sin(t) * batch.draws.eps_d[i]
    return (x_g - clean(roles.fake_score, x_t, t, text)).square().sum() / torch.sin(t) ** 2


def pretrain(roles, batch, i):
    t, eps = batch.draws.t_g[i], batch.draws.eps_g[i]
    s = torch.sin(t) / (torch.sin(t) + torch.cos(t))
    x_s = (1 - s) * batch.latents[i] + s * eps
    text = roles.negative if batch.draws.dropped[i] else batch.condition.text[i][None]
    return (roles.student.value(x_s[None], s[None], text)[0] - (eps - batch.latents[i])).square().mean()


def gradients(loss, net):
    return [g.detach() for g in torch.autograd.grad(loss, net.params, retain_graph=True)]


def assert_gradients(loss, net, want, others=()):
    """`loss` (whose graph must reach no network of `others`) has the gradients of the scalar `want`."""
    for a, b in zip(gradients(loss, net), gradients(want, net), strict=True):
        assert float((a - b).norm()) <= 1e-10 * float(b.norm()) and float(b.norm()) > 0
    for other in others:
        assert all(g is None for g in torch.autograd.grad(loss, other.params, allow_unused=True))


def assert_metrics(metrics, **want):
    assert metrics.keys() == want.keys()
    for name, value in want.items():
        assert float(metrics[name]) == pytest.approx(float(value), rel=1e-10), name
        assert not metrics[name].requires_grad


@pytest.mark.parametrize("scale_tangent", [True, False])
@pytest.mark.parametrize("warmup", [0.0, 0.6, 1.0])
def test_consistency_step(roles, batch, warmup, scale_tangent):
    cfg, phase = config(scale_tangent=scale_tangent, tangent_norm_constant=0.7), Phase(
        kind="student", own_step=0, scm=True, warmup=warmup
    )  # fmt: skip
    loss, metrics = consistency_step(batch, roles, cfg, phase)
    terms = [consistency(roles, batch, cfg, i, phase) for i in range(B)]
    total, norms, gaps = (sum(column) for column in zip(*terms))
    assert float(loss) == pytest.approx(float(50 * total / B), rel=1e-10)
    assert_metrics(
        metrics, samples=B, nonfinite_output=0, nonfinite_target=0, loss_scm=total, g_norm=norms, teacher_gap=gaps
    )  # fmt: skip
    want = 50 * sum(term for term, *_ in terms) / B
    assert_gradients(loss, roles.student, want, others=[roles.teacher])


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_distillation_step(roles, batch, guidance):
    cfg = config(guidance=guidance)
    loss, metrics = distillation_step(batch, roles, cfg)
    terms = [distillation(roles, batch, cfg, i) for i in range(B)]
    total, weights, gaps = (sum(column) for column in zip(*terms))
    assert float(loss) == pytest.approx(float(2 * total / B), rel=1e-10)
    assert_metrics(
        metrics, samples=B, nonfinite_output=0, nonfinite_target=0, loss_dmd=total, dmd_weight=weights, score_gap=gaps
    )  # fmt: skip
    assert_gradients(loss, roles.student, 2 * total / B, others=[roles.teacher, roles.fake_score])


def test_critic_step(roles, batch):
    loss, metrics = critic_step(batch, roles, config())
    total = sum(critic(roles, batch, i) for i in range(B))
    assert float(loss) == pytest.approx(float(total / B), rel=1e-10)
    assert_metrics(metrics, samples=B, nonfinite_output=0, nonfinite_target=0, loss_critic=total)
    assert_gradients(loss, roles.fake_score, total / B, others=[roles.student, roles.teacher])


class Given:
    """A network that knows the first `frames` frames of each sample, as Cosmos V2W does."""

    def __init__(self, net, latents, frames):
        self.net, self.latents, self.frames = net, latents, frames

    def __call__(self, x, s, condition):
        latents = self.latents.repeat(len(condition.text) // B, 1, 1, 1, 1)  # twice in a guided pair
        towards = lambda v, x, s: torch.cat(
            [((x - latents) / s.view(-1, 1, 1, 1, 1))[:, :, : self.frames], v[:, :, self.frames :]], 2
        )
        return rowwise(towards, self.net(x, s, condition), x, s)


def test_means_are_over_frames_that_are_not_given(roles, batch):
    """Flow matching and the weight of score distillation: given frames add nothing, and do not count."""
    frames, total = 1, SHAPE[1]
    nets = {name: Given(getattr(roles, name), batch.latents, frames) for name in ("student", "teacher", "fake_score")}
    roles = changed(roles, **nets)
    told = batch.condition._replace(latents=batch.latents, frames=torch.full((B,), frames))
    for step, metric in ((pretrain_step, "loss"), (distillation_step, "dmd_weight")):
        plain = step(batch, roles, config())[1][metric]
        other = step(replace(batch, condition=told), roles, config())[1][metric]
        assert float(other / plain) == pytest.approx(total / (total - frames), rel=1e-9)


def test_pretrain_step(roles, batch):
    loss, metrics = pretrain_step(batch, roles, config())
    total = sum(pretrain(roles, batch, i) for i in range(B))
    assert float(loss) == pytest.approx(float(total / B), rel=1e-10)
    assert_metrics(metrics, samples=B, nonfinite_output=0, nonfinite_target=0, loss=total)
    assert_gradients(loss, roles.student, total / B, others=[roles.teacher])


# Planted NaN and Inf. The marked sample must add nothing, and the others count as in the full batch.


def finite(metrics):
    return all(bool(m.isfinite()) for m in metrics.values())


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("where", ["teacher", "tangent", "output", "latents"])
def test_consistency_step_without_a_bad_sample(roles, batch, where, bad):
    cfg, poisoned = config(), roles
    kept = [0, 2, 3]
    want = 50 * sum(consistency(roles, batch, cfg, i, PHASE)[0] for i in kept) / B
    if where == "teacher":
        poisoned = changed(roles, teacher=Poisoned(roles.teacher, bad))
    elif where == "latents":
        batch.latents[1, 0, 0, 0, 0] = bad
    else:
        poisoned = changed(roles, student=Poisoned(roles.student, bad, part="tangent" if where == "tangent" else "value"))
    loss, metrics = consistency_step(batch, poisoned, cfg, PHASE)
    assert_gradients(loss, roles.student, want)
    left_out = where in ("output", "latents")
    norms, gaps = (sum(column) for column in zip(*[consistency(roles, batch, cfg, i, PHASE)[1:] for i in kept]))
    if where == "tangent":  # the gap of the sample itself is finite, but it is not counted
        assert float(metrics["teacher_gap"]) == pytest.approx(float(gaps), rel=1e-10)
    assert_metrics(
        metrics,
        samples=B,
        nonfinite_output=int(left_out),
        nonfinite_target=int(not left_out),
        loss_scm=want * B / 50,
        g_norm=norms,
        teacher_gap=gaps,
    )


def test_consistency_step_with_bad_samples_of_both_kinds(roles, batch):
    """After sample 1 is left out, sample 3's bad target must still be found in its place."""
    cfg = config()
    want = 50 * sum(consistency(roles, batch, cfg, i, PHASE)[0] for i in (0, 2)) / B
    poisoned = changed(
        roles,
        student=Poisoned(roles.student, math.nan),
        teacher=Poisoned(roles.teacher, math.inf, mark=OTHER_MARK),
    )
    loss, metrics = consistency_step(batch, poisoned, cfg, PHASE)
    assert_gradients(loss, roles.student, want)
    assert int(metrics["nonfinite_output"]) == 1 and int(metrics["nonfinite_target"]) == 1 and finite(metrics)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("role", ["student", "teacher", "fake_score"])
def test_distillation_step_without_a_bad_sample(roles, batch, role, bad):
    cfg = config()
    want = 2 * sum(distillation(roles, batch, cfg, i)[0] for i in (0, 2, 3)) / B
    loss, metrics = distillation_step(batch, changed(roles, **{role: Poisoned(getattr(roles, role), bad)}), cfg)
    assert_gradients(loss, roles.student, want)
    left_out = role == "student"
    assert float(loss) == pytest.approx(float(want), rel=1e-10) and finite(metrics)
    gap = sum(distillation(roles, batch, cfg, i)[2] for i in (0, 2, 3))
    assert float(metrics["score_gap"]) == pytest.approx(float(gap), rel=1e-10)
    assert int(metrics["nonfinite_output"]) == left_out and int(metrics["nonfinite_target"]) == (not left_out)


def test_distillation_step_with_bad_samples_of_both_kinds(roles, batch):
    cfg = config()
    want = 2 * sum(distillation(roles, batch, cfg, i)[0] for i in (0, 2)) / B
    poisoned = changed(
        roles, student=Poisoned(roles.student, math.nan), fake_score=Poisoned(roles.fake_score, math.nan, mark=OTHER_MARK)
    )
    loss, metrics = distillation_step(batch, poisoned, cfg)
    assert_gradients(loss, roles.student, want)
    assert int(metrics["nonfinite_output"]) == 1 and int(metrics["nonfinite_target"]) == 1 and finite(metrics)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("role", ["student", "fake_score"])
def test_critic_step_without_a_bad_sample(roles, batch, role, bad):
    want = sum(critic(roles, batch, i) for i in (0, 2, 3)) / B
    loss, metrics = critic_step(batch, changed(roles, **{role: Poisoned(getattr(roles, role), bad)}), config())
    assert_gradients(loss, roles.fake_score, want)
    left_out = role == "fake_score"
    assert float(loss) == pytest.approx(float(want), rel=1e-10) and finite(metrics)
    assert int(metrics["nonfinite_output"]) == left_out and int(metrics["nonfinite_target"]) == (not left_out)


def test_critic_step_with_bad_samples_of_both_kinds(roles, batch):
    want = sum(critic(roles, batch, i) for i in (0, 2)) / B
    poisoned = changed(
        roles, student=Poisoned(roles.student, math.nan, mark=OTHER_MARK), fake_score=Poisoned(roles.fake_score, math.nan)
    )
    loss, metrics = critic_step(batch, poisoned, config())
    assert_gradients(loss, roles.fake_score, want)
    assert int(metrics["nonfinite_output"]) == 1 and int(metrics["nonfinite_target"]) == 1 and finite(metrics)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("where", ["output", "latents"])
def test_pretrain_step_without_a_bad_sample(roles, batch, where, bad):
    batch.draws.dropped[:] = False  # so that the student sees the mark
    want = sum(pretrain(roles, batch, i) for i in (0, 2, 3)) / B
    poisoned = roles
    if where == "latents":
        batch.latents[1, 0, 0, 0, 0] = bad
    else:
        poisoned = changed(roles, student=Poisoned(roles.student, bad))
    loss, metrics = pretrain_step(batch, poisoned, config())
    assert_gradients(loss, roles.student, want)
    target = where == "latents"
    assert_metrics(metrics, samples=B, nonfinite_output=not target, nonfinite_target=target, loss=want * B)


def test_no_loss_when_every_sample_is_bad(roles, batch):
    batch.condition.text[:, 0, 0] = MARK
    batch.draws.dropped[:] = False
    spoilt = changed(roles, student=Poisoned(roles.student, math.nan))
    for outcome in (
        consistency_step(batch, spoilt, config(), PHASE),
        distillation_step(batch, spoilt, config()),
        pretrain_step(batch, spoilt, config()),
        critic_step(batch, changed(roles, fake_score=Poisoned(roles.fake_score, math.nan)), config()),
    ):
        loss, metrics = outcome
        assert loss is None
        assert int(metrics["samples"]) == int(metrics["nonfinite_output"]) == B and finite(metrics)


def test_bad_targets_alone_leave_a_loss_without_gradient(roles, batch):
    batch.condition.text[:, 0, 0] = MARK
    spoilt = changed(roles, teacher=Poisoned(roles.teacher, math.nan))
    for loss, metrics in (consistency_step(batch, spoilt, config(), PHASE), distillation_step(batch, spoilt, config())):
        assert float(loss.detach()) == 0 and int(metrics["nonfinite_target"]) == B
        assert all(float(g.abs().max()) == 0 for g in gradients(loss, roles.student))


def test_ranks_of_a_model_agree_on_what_they_leave_out(roles, batch, monkeypatch):
    """What another rank of the model-parallel group finds bad, in the output and then in the target, is bad here too."""

    class TwoRanks:
        size = staticmethod(lambda: 2)

    elsewhere = [torch.tensor([1, 0, 1, 1]), torch.tensor([1, 1, 0])]  # votes on samples 0..3, then on those left: 0, 2, 3

    def all_reduce(votes, op, group):
        assert op == dist.ReduceOp.MIN and isinstance(group, TwoRanks)
        votes.copy_(torch.minimum(votes, elsewhere.pop(0)))

    monkeypatch.setattr(steps.dist, "all_reduce", all_reduce)
    cfg = config()
    want = 50 * sum(consistency(roles, batch, cfg, i, PHASE)[0] for i in (0, 2)) / B
    loss, metrics = consistency_step(batch, changed(roles, sample_group=TwoRanks()), cfg, PHASE)
    assert_gradients(loss, roles.student, want)
    assert not elsewhere and int(metrics["nonfinite_output"]) == 1 and int(metrics["nonfinite_target"]) == 1
