"""Frame to frame: closed forms, what tells flicker from motion, scipy's Wasserstein distance."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from rcm_mcore.evaluation.temporal import TemporalConsistency, temporal_consistency, wasserstein


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one(video: torch.Tensor) -> list[float]:
    return [float(value) for value in temporal_consistency(video[None])]


def test_closed_forms() -> None:
    base, change = noise(5, seed=1), noise(5, seed=2)
    time = torch.arange(6.0, dtype=torch.float64)[:, None]
    frozen = one(base.expand(6, 5))
    assert abs(frozen[0] - 1) <= 1e-12 and frozen[1:] == [0.0, 0.0]
    steady = one(base + time * change)
    assert abs(steady[2]) <= 1e-12 and abs(steady[1] - float(change.square().mean().sqrt())) <= 1e-12
    alternating = one(base + (time % 2) * change)
    assert abs(alternating[2] - 2) <= 1e-12 and abs(alternating[1] - steady[1]) <= 1e-12
    opposite = one((1 - 2 * (time % 2)) * change)
    assert abs(opposite[0] + 1) <= 1e-12
    turning = torch.stack([torch.cos(0.3 * time), torch.sin(0.3 * time)], 1)  # each frame turned by 0.3 from the last
    assert abs(one(turning)[0] - math.cos(0.3)) <= 1e-12 and abs(one(turning)[2] - (1 - math.cos(0.3))) <= 1e-12


def test_an_edge_passes_and_noise_flickers() -> None:
    edge = (torch.arange(40)[None, :] < 5 + 3 * torch.arange(9)[:, None]).double()  # no pixel changes twice
    assert abs(one(edge)[2] - 1) <= 1e-12
    assert abs(one(noise(9, 40000))[2] - 1.5) < 0.02


def test_flicker_on_a_moving_picture_is_seen_by_jitter_alone() -> None:
    """A bright bump that moves, the same with flicker, and the same moving faster, with about the flicker's change."""
    place = torch.linspace(0, 10, 200, dtype=torch.float64)

    def bump(speed: float) -> torch.Tensor:
        return torch.exp(-((place - 3 - speed * torch.arange(9)[:, None]) ** 2))

    smooth, fast = one(bump(0.05)), one(bump(0.25))
    flickering = one(bump(0.05) * (1 + 0.12 * torch.tensor([-1.0, 1.0]).repeat(5)[:9, None]))
    assert smooth[2] < 0.2 and fast[2] < 0.3 and flickering[2] > 1.5
    assert fast[0] < smooth[0] and flickering[0] >= fast[0], "similarity cannot tell them"
    assert abs(flickering[1] / fast[1] - 1) < 0.1, "nor can change"


def test_jitter_depends_on_neither_brightness_contrast_nor_order_of_time() -> None:
    video = noise(7, 3, 4, 5, seed=4).cumsum(0)
    expected = one(video)[2]
    for other in (video + 10, -0.1 * video, video.flip(0)):
        assert abs(one(other)[2] - expected) <= 1e-9
    assert 0.5 < expected < 1.5


def test_videos_are_measured_apart_in_float64() -> None:
    videos = noise(3, 4, 2, 6, seed=5)
    together = temporal_consistency(videos)
    assert isinstance(together, TemporalConsistency) and together.jitter.shape == (3,)
    for row in range(3):
        assert [float(value[row]) for value in together] == one(videos[row])
    offset = torch.randint(0, 255, (1, 5, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert temporal_consistency(offset).change[0] > 10, "uint8 must not wrap"
    assert temporal_consistency(offset.numpy()) == temporal_consistency(offset)


@pytest.mark.parametrize("n, m", [(1, 1), (7, 7), (30, 13)])
def test_wasserstein_equals_scipy(n: int, m: int) -> None:
    x, y = noise(n, seed=6), 2 * noise(m, seed=7) + 1
    y[: m // 2] = x[0]  # ties
    expected = scipy.stats.wasserstein_distance(x.numpy(), y.numpy())
    assert abs(wasserstein(x, y) - expected) <= 1e-12
    assert abs(wasserstein(y.numpy(), x.numpy()) - expected) <= 1e-12
    assert wasserstein(x, x) == 0.0


def test_wasserstein_sees_what_the_mean_does_not() -> None:
    real, mixed = np.full(10, 0.7), np.repeat([0.0, 1.4], 5)  # half frozen, half flickering
    assert abs(real.mean() - mixed.mean()) < 1e-12 and abs(wasserstein(real, mixed) - 0.7) <= 1e-12


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: temporal_consistency(torch.ones(2, 2, 4)), r"\[2, 2, 4\]; must be .* 3 frames or more"),
        (lambda: temporal_consistency(torch.ones(5, 4)), r"\[5, 4\]"),
        (lambda: temporal_consistency(torch.ones(0, 5, 4)), r"\[0, 5, 4\]"),
        (lambda: temporal_consistency(torch.ones(1, 5, 4).cfloat()), "complex64"),
        (lambda: temporal_consistency(torch.stack([torch.ones(3, 2), torch.full((3, 2), torch.nan)])), "video 1 has NaN"),
        (lambda: wasserstein(torch.ones(0), torch.ones(1)), r"real: shape \[0\]"),
        (lambda: wasserstein(torch.ones(1), torch.ones(1, 1)), r"generated: shape \[1, 1\]"),
        (lambda: wasserstein(torch.ones(1), torch.tensor([math.inf])), "generated: .*finite"),
    ],
)
def test_bad_input(call, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()
