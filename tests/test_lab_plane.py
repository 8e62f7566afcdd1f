"""Distributions on a grid in the plane against samples, closed forms, and each other."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from rcm_mcore.condition import Condition
from rcm_mcore.diffusion.samplers import few_step_times, sample_few_step, sample_mean_flow
from rcm_mcore.distill.roles import conditioned
from rcm_mcore.lab.density import Grid, map_error, student_maps, teacher_maps
from rcm_mcore.lab.plane import Mixture, Net, flow_endpoint, gaussian, ring, seeded

GRID = Grid(size=160)


def moments(weights):
    """Mean and covariance of a distribution on GRID."""
    points, w = GRID.points.view(-1, 2), weights.flatten() / weights.sum()
    mean = w @ points
    return mean, (points - mean).T @ (w[:, None] * (points - mean))


def test_density_of_a_mixture():
    data, x = ring(), torch.randn(50, 2, generator=seeded(0), dtype=torch.float64)
    parts = zip(data.weights, data.means, data.covariances, strict=True)
    want = sum(float(w) * multivariate_normal(m.numpy(), c.numpy()).pdf(x.numpy()) for w, m, c in parts)
    assert np.allclose(data.density(x), want, rtol=1e-10)


def test_a_linear_map_of_noise():
    """x0 = A x + b of pure noise is N(b, A A^T)."""
    matrix, offset = (
        torch.tensor([[0.7, 0.2], [-0.1, 0.5]], dtype=torch.float64),
        torch.tensor([0.4, -0.3], dtype=torch.float64),
    )
    made = GRID.generated([lambda x: (x.flatten(1) @ matrix.T + offset).view_as(x)])
    mean, covariance = moments(made)
    assert float(made.sum()) == pytest.approx(1)
    assert torch.allclose(mean, offset, atol=1e-4)
    assert torch.allclose(covariance, matrix @ matrix.T, atol=GRID.spacing**2 / 2)


def test_fresh_noise_between_two_maps():
    """x = cos t A z + sin t z', then A x: N(0, cos^2 t A^4 + sin^2 t A^2)."""
    scale, t = 0.6, 1.0
    shrink = lambda x: scale * x
    made = GRID.generated([shrink, shrink], times=[math.pi / 2, t, 0.0])
    want = math.cos(t) ** 2 * scale**4 + math.sin(t) ** 2 * scale**2
    assert torch.allclose(moments(made)[1], want * torch.eye(2, dtype=torch.float64), atol=GRID.spacing**2)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("interval", [False, True])
def test_samples_of_the_product_have_this_distribution(steps, interval):
    """Of a random network, through the product's samplers: mean, covariance, and the mass of cells."""
    net, count = Net(3, interval=interval), 40_000
    if interval:
        torch.nn.init.normal_(net.of_interval, std=0.3, generator=seeded(1))
    made = GRID.generated(*student_maps(net, steps))
    noises, times = [gaussian(count, generator=seeded(k)) for k in range(steps)], [math.pi / 2, *few_step_times(steps)[1:]]
    told = lambda x, s, end: net(x, s, Condition(torch.zeros(len(x), 1, 1), end=end))
    if interval:
        samples = sample_mean_flow(told, noises[0], times).view(-1, 2)
    else:
        samples = sample_few_step(conditioned(net, Condition(torch.zeros(count, 1, 1))), noises, times).view(-1, 2)
    mean, covariance = moments(made)
    assert torch.allclose(samples.mean(0), mean, atol=0.03)
    assert torch.allclose(samples.T.cov(), covariance, atol=0.06)
    edges = torch.linspace(-4.5, 4.5, 11, dtype=torch.float64)
    drawn, _, _ = np.histogram2d(*samples.detach().T.numpy(), bins=[edges.numpy()] * 2)
    held, _, _ = np.histogram2d(*GRID.points.view(-1, 2).T.numpy(), bins=[edges.numpy()] * 2, weights=made.flatten().numpy())
    assert np.abs(drawn / count - held).sum() / 2 <= 0.04


def test_distances():
    data = ring()
    itself = GRID.distances(GRID.of(data), data)
    assert itself["forward_kl"] <= 0.01 and itself["total_variation"] <= 0.03 and itself["modes"] == 8
    assert itself["outside"] == pytest.approx(0.001, abs=5e-4) and itself["mode_error"] <= 1e-6
    half = Mixture(data.weights[:4] / data.weights[:4].sum(), data.means[:4], data.covariances[:4])
    found = GRID.distances(GRID.of(half), data)
    assert found["modes"] == 4 and found["mode_error"] == pytest.approx(0.5, abs=0.01)
    # Leaving modes out costs much of KL(data | generated) and log 2 of the other.
    assert found["reverse_kl"] == pytest.approx(math.log(2), abs=0.05) and found["forward_kl"] >= 2
    wide = Mixture([1.0], [[0.0, 0.0]], [[[1.0, 0.0], [0.0, 1.0]]])
    spread = GRID.distances(GRID.of(wide), data)
    assert spread["outside"] >= 0.5 and spread["reverse_kl"] > spread["forward_kl"]


def test_the_teacher_comes_close_with_many_steps():
    data = ring()
    errors = [GRID.distances(GRID.generated(teacher_maps(data, n)), data)["total_variation"] for n in (2, 20)]
    assert errors[0] >= 0.8 and errors[1] <= 0.15


def test_map_error_of_the_flow_itself():
    data = ring()

    class Flow:
        of_interval = None

        def __call__(self, x, s, condition):
            """The velocity that leads straight to the end of the teacher's flow."""
            t = torch.atan2(s, 1 - s)
            scale = (t.cos() + t.sin()).view(-1, 1, 1, 1, 1)
            return (x - flow_endpoint(data, scale * x, t)) / s.view(-1, 1, 1, 1, 1)

    assert map_error(Flow(), data, count=50) <= 1e-6 <= 0.5 <= map_error(Net(0), data, count=50)
