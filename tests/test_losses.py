"""Every loss against loops written from method.md 2 and 3, in float64; gradients through autograd."""

import math

import pytest
import torch

from rcm_mcore.distill.losses import (
    consistency_loss,
    consistency_tangent,
    finite_samples,
    normalize_tangent,
    score_distillation_loss,
    score_target,
    squared_error,
)

SHAPE = (3, 2, 2, 3, 4)
T = torch.tensor([0.3, 1.0, 1.5], dtype=torch.float64)


def draws(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(count)]


def worst(a, b):
    return float((a - b).abs().max())


def test_squared_error_sums_over_each_sample():
    a, b = draws(2)
    want = [sum((x - y) ** 2 for x, y in zip(p.flatten().tolist(), q.flatten().tolist())) for p, q in zip(a, b)]
    assert worst(squared_error(a, b), torch.tensor(want, dtype=torch.float64)) <= 1e-12


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_finite_samples(bad):
    (x,) = draws(1)
    x[1, 0, 1, 2, 3] = bad
    assert finite_samples(x.requires_grad_()).tolist() == [True, False, True]


@pytest.mark.parametrize("scale_tangent", [True, False])
@pytest.mark.parametrize("r", [0.0, 0.5, 1.0])
def test_consistency_tangent(r, scale_tangent):
    trig, trig_dot, teacher, x_t = draws(4)
    got = consistency_tangent(trig, trig_dot, teacher, x_t, t=T, warmup=r, scale_tangent=scale_tangent)
    for i, t in enumerate(T.tolist()):
        cos, sin = math.cos(t), math.sin(t)
        want = -cos * math.sqrt(1 - r * r * sin * sin) * (trig[i] - teacher[i])
        if scale_tangent:
            want = want - r * (cos * sin * x_t[i] + trig_dot[i])
        else:
            want = want - r * cos * sin * x_t[i] - trig_dot[i]
        assert worst(got[i], want) <= 1e-14
    assert got.isfinite().all()


def test_consistency_tangent_ends_of_the_warm_up():
    """r = 0 regresses the teacher's velocity; r = 1 is sCM's tangent, -cos^2 t (F - F_T) - (cos t sin t x_t + F_dot)."""
    trig, trig_dot, teacher, x_t = draws(4)
    cos, sin = (f.view(-1, 1, 1, 1, 1) for f in (T.cos(), T.sin()))
    options = dict(t=T, scale_tangent=True)
    start = consistency_tangent(trig, trig_dot, teacher, x_t, warmup=0.0, **options)
    assert worst(start, cos * (teacher - trig)) <= 1e-14
    end = consistency_tangent(trig, trig_dot, teacher, x_t, warmup=1.0, **options)
    assert worst(end, -(cos**2) * (trig - teacher) - cos * sin * x_t - trig_dot) <= 1e-14


def test_consistency_tangent_is_finite_at_the_ends_of_time():
    trig, trig_dot, teacher, x_t = draws(4)
    t = torch.tensor([0.0, math.pi / 4, math.pi / 2], dtype=torch.float64)
    g = consistency_tangent(trig, trig_dot, teacher, x_t, t=t, warmup=1.0, scale_tangent=True)
    assert worst(g[0], teacher[0] - trig[0] - trig_dot[0]) <= 1e-14
    assert worst(g[2], -trig_dot[2]) <= 1e-14


@pytest.mark.parametrize("constant", [0.1, 2.0])
def test_normalize_tangent(constant):
    (g,) = draws(1)
    g = g * torch.tensor([1e-3, 1.0, 1e3], dtype=torch.float64).view(-1, 1, 1, 1, 1)
    normal, norm = normalize_tangent(g, constant)
    for i in range(3):
        length = math.sqrt(sum(v * v for v in g[i].flatten().tolist()))
        assert abs(float(norm[i]) - length) <= 1e-12 * length
        assert worst(normal[i], g[i] / (length + constant)) <= 1e-14
        assert abs(float(normal[i].norm()) - length / (length + constant)) <= 1e-12
    zero, norm = normalize_tangent(torch.zeros(SHAPE), constant)
    assert zero.abs().max() == 0 and norm.tolist() == [0.0, 0.0, 0.0]


def test_consistency_loss_has_gradient_minus_2_g():
    trig, g = draws(2)
    trig.requires_grad_()
    losses = consistency_loss(trig, g)
    assert worst(losses.detach(), g.square().sum((1, 2, 3, 4))) <= 1e-12
    (grad,) = torch.autograd.grad(losses.sum(), trig)
    assert worst(grad, -2 * g) <= 1e-14


def test_score_distillation_loss_where_frames_are_given():
    """They are the same in all three: the loss is that of the other frames alone."""
    generated, fake, teacher = draws(3)
    frames = SHAPE[2]
    cut = [x[:, :, 1:] for x in (generated, fake, teacher)]
    for x in (fake, teacher):
        x[:, :, :1] = generated[:, :, :1]
    share = torch.full((SHAPE[0],), (frames - 1) / frames, dtype=torch.float64)
    for whole, part in zip(score_distillation_loss(generated, fake, teacher, share=share), score_distillation_loss(*cut)):
        assert worst(whole, part) <= 1e-12


def test_score_distillation_loss():
    generated, fake, teacher = draws(3)
    generated.requires_grad_()
    losses, weight = score_distillation_loss(generated, fake, teacher)
    (got,) = torch.autograd.grad(losses.sum(), generated)
    for i in range(3):
        pairs = zip(generated[i].flatten().tolist(), teacher[i].flatten().tolist())
        w = sum(abs(a - b) for a, b in pairs) / generated[i].numel()
        grad = (fake[i] - teacher[i]) / w
        assert abs(float(weight[i]) - w) <= 1e-14
        assert abs(float(losses[i]) - float(grad.square().sum())) <= 1e-10
        assert worst(got[i], 2 * grad) <= 1e-13


def test_score_distillation_weight_is_at_least_1e_5():
    generated, noise = draws(2)
    fake = generated + 1e-7 * noise
    losses, weight = score_distillation_loss(generated, fake, generated)
    assert weight.tolist() == [1e-5] * 3
    assert worst(losses, ((fake - generated) / 1e-5).square().sum((1, 2, 3, 4))) <= 1e-12


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["fake", "teacher"])
def test_score_distillation_gives_no_gradient_where_a_prediction_is_not_finite(where, bad):
    generated, fake, teacher = draws(3)
    generated.requires_grad_()
    whole, _ = score_distillation_loss(generated, fake, teacher)
    (whole_grad,) = torch.autograd.grad(whole.sum(), generated)
    {"fake": fake, "teacher": teacher}[where][1, 0, 0, 0, 0] = bad
    losses, _ = score_distillation_loss(generated, fake, teacher)
    (grad,) = torch.autograd.grad(losses.sum(), generated)
    assert float(losses[1].detach()) == 0 and grad[1].abs().max() == 0
    for i in (0, 2):
        assert float(losses[i].detach()) == float(whole[i].detach()) and torch.equal(grad[i], whole_grad[i])


def test_score_target_is_the_denoising_loss_without_its_singularity():
    """|F - (cos t eps - sin t x_G)|^2 = |x_G - x0|^2 / sin^2 t, x0 = cos t x_t - sin t F, for any F."""
    generated, eps, trig = draws(3)
    losses = squared_error(trig, score_target(generated, eps, T))
    for i, t in enumerate(T.tolist()):
        cos, sin = math.cos(t), math.sin(t)
        x0 = cos * (cos * generated[i] + sin * eps[i]) - sin * trig[i]
        want = float((generated[i] - x0).square().sum()) / sin**2
        assert abs(float(losses[i]) - want) <= 1e-12 * want


def test_score_target_at_time_zero_is_the_noise():
    generated, eps = draws(2)
    assert worst(score_target(generated, eps, torch.zeros(3, dtype=torch.float64)), eps) == 0
