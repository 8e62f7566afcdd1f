"""Distillation in the plane, where everything is known: a mixture of Gaussians, its exact velocity as the teacher, and (in
density.py) the exact distribution of what a student makes.

The student and the fake score are small MLPs and learn by the losses, phases and schedules of a run (distill/steps.py,
training/step.py); the loop here stands in for the trainer. Points are latents [B, 2, 1, 1, 1] in float64.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from rcm_mcore.condition import Condition
from rcm_mcore.config import Config, TimeConfig, parse_config
from rcm_mcore.distill.draws import Draws
from rcm_mcore.distill.phases import Phase
from rcm_mcore.distill.steps import MicroBatch, Roles
from rcm_mcore.dual import MaybeDual, rowwise
from rcm_mcore.training.step import phase_at, terms_of

POINT = (2, 1, 1, 1)  # a latent [C, F, H, W]
RATE = 1e-2  # of Adam without first moment, as a run has it; falls as a cosine


def seeded(seed: int) -> torch.Generator:
    """A generator on the CPU."""
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, generator: torch.Generator) -> Tensor:
    """Standard normal points [*shape, 2, 1, 1, 1]."""
    return torch.randn(*shape, *POINT, generator=generator, dtype=torch.float64)


class Mixture:
    """A mixture of K Gaussians: weights [K], means [K, 2], covariances [K, 2, 2]; and the velocity of its rectified flow."""

    def __init__(self, weights: Any, means: Any, covariances: Any) -> None:
        self.weights, self.means, self.covariances = (
            torch.as_tensor(x, dtype=torch.float64) for x in (weights, means, covariances)
        )
        self.variances, self.axes = torch.linalg.eigh(self.covariances)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Points [count, 2, 1, 1, 1]."""
        component = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        roots = torch.linalg.cholesky(self.covariances)[component]
        spread = roots @ gaussian(count, generator=generator).view(-1, 2, 1)
        return (self.means[component] + spread.squeeze(2)).view(-1, *POINT)

    def _in_components(self, x: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """In each component's axes [B, K, 2]: offsets of x from its mean, variances at s; log of the joint density [B, K]."""
        s = s.view(-1, 1, 1)
        offset = torch.einsum("bki,kij->bkj", x.reshape(-1, 1, 2) - (1 - s) * self.means, self.axes)
        variance = (1 - s) ** 2 * self.variances + s**2
        log_joint = self.weights.log() - 0.5 * (offset**2 / variance + (2 * math.pi * variance).log()).sum(2)
        return offset, variance, log_joint

    def velocity(self, x: Tensor, s: Tensor, condition: Condition | None = None) -> Tensor:
        """E[eps - x0 | x_s = x], in closed form; s [B]."""
        offset, variance, log_joint = self._in_components(x, s)
        s, responsibility = s.view(-1, 1, 1), log_joint.softmax(1)
        of_component = torch.einsum("bkj,kij->bki", (s - (1 - s) * self.variances) * offset / variance, self.axes) - self.means
        return (responsibility[..., None] * of_component).sum(1).view_as(x)

    def density(self, x: Tensor) -> Tensor:
        """[B] at points [B, ...]."""
        return self._in_components(x, x.new_zeros(len(x)))[2].logsumexp(1).exp()

    def responsibilities(self, x: Tensor) -> Tensor:
        """Of the components for points [B, ...]: [B, K]."""
        return self._in_components(x, x.new_zeros(len(x)))[2].softmax(1)

    def blurred(self, width: float) -> Mixture:
        """After adding noise of this standard deviation."""
        return Mixture(self.weights, self.means, self.covariances + width**2 * torch.eye(2, dtype=torch.float64))

    def misfit(self, x: Tensor) -> dict[str, float]:
        """How far the samples x are from this distribution: distances of mean, covariance, and shares of the modes."""
        mean = self.weights @ self.means
        spread = self.means - mean
        covariance = (self.weights.view(-1, 1, 1) * (self.covariances + spread[:, :, None] * spread[:, None])).sum(0)
        # Under the distribution itself the mean responsibility of a component is its weight.
        share = self.responsibilities(x).mean(0)
        x = x.flatten(1)
        return {
            "mean": float((x.mean(0) - mean).norm()),
            "covariance": float((x.T.cov() - covariance).norm()),
            "share": float((share - self.weights).abs().max()),
        }


def ring(modes: int = 8, *, radius: float = 1.5, width: float = 0.12) -> Mixture:
    """Modes on a circle, every other one three times as likely as its neighbours."""
    angles = torch.arange(modes, dtype=torch.float64) * (2 * math.pi / modes)
    weights = torch.tensor([3.0 if i % 2 == 0 else 1.0 for i in range(modes)], dtype=torch.float64)
    means = radius * torch.stack([angles.cos(), angles.sin()], 1)
    return Mixture(weights / weights.sum(), means, width**2 * torch.eye(2, dtype=torch.float64).expand(modes, 2, 2))


class Net(nn.Module):
    """v(x, s) by an MLP on the point and on cosines and sines of the time (the cosine of 0 is its bias); on Duals too.

    With `interval` also on s - `condition.end`, at first without effect.
    """

    def __init__(self, seed: int, *, width: int = 64, interval: bool = False) -> None:
        super().__init__()
        sizes = 2 + 1 + 2 * 4, width, width, 2
        generator = seeded(seed)
        weights = [torch.randn(n, m, generator=generator, dtype=torch.float64) / n**0.5 for n, m in pairwise(sizes)]
        self.weights = nn.ParameterList(weights)
        self.of_interval = nn.Parameter(torch.zeros(1 + 2 * 4, width, dtype=torch.float64)) if interval else None

    def value(self, x: Tensor, s: Tensor, end: Tensor | None = None) -> Tensor:
        """x [B, 2, 1, 1, 1], s and end [B] -> v as x."""
        h = torch.cat([x.flatten(1), _time_features(s)], 1) @ self.weights[0]
        if self.of_interval is not None:
            assert end is not None, "a network of intervals is told where they end"
            h = h + _time_features(s - end) @ self.of_interval
        for weight in self.weights[1:]:
            h = nn.functional.silu(h) @ weight
        return h.view_as(x)

    def forward(self, x: MaybeDual, s: MaybeDual, condition: Condition | None) -> MaybeDual:
        end = None if condition is None else condition.end
        return rowwise(functools.partial(self.value, end=end), x, s)


def _time_features(s: Tensor) -> Tensor:
    angles = math.pi * s[:, None] * torch.arange(4)
    return torch.cat([s[:, None], angles.cos(), angles.sin()], 1)


def make_config(objective: str = "distill", *, batch: int = 256, **distill: Any) -> Config:
    """A run in the plane. Guidance 1: the teacher is one velocity. Times need less noise than those of videos."""
    interval = distill.get("method") == "meanflow"
    return parse_config(
        {
            "model": {"size": "tiny", "in_channels": 2, "patch_size": [1, 1, 1], "interval": interval},
            "train": {"objective": objective, "steps": 1, "global_batch_size": batch, "micro_batch_size": batch},
            "data": {"shards": "x.tar", "latent_shape": list(POINT)},
            "distill": {"teacher": "t", "guidance": 1.0, "time_d": {"kind": "shifted", "shift": 2.0}, **distill},
            "checkpoint": {"dir": "run"},
        }
    )


def draw_times(distribution: TimeConfig, count: int, generator: torch.Generator) -> Tensor:
    """TrigFlow times of a batch at once; a run draws them sample by sample (trigflow.draw_time)."""
    if distribution.kind == "lognormal":
        log_sigma = distribution.mean + distribution.std * torch.randn(count, generator=generator, dtype=torch.float64)
        return log_sigma.exp().atan()
    u = torch.rand(count, generator=generator, dtype=torch.float64)
    s = distribution.shift * u / (1 + (distribution.shift - 1) * u)
    return torch.atan2(s, 1 - s)


def draw_batch(config: Config, phase: Phase, count: int, generator: torch.Generator) -> Draws:
    """What distill/draws.py draws, for a batch at once."""
    distill, drawn = config.distill, dict[str, Tensor]()
    if phase.kind == "pretrain":
        t = draw_times(config.pretrain.time, count, generator)
        drawn |= dict(t_g=t, dropped=torch.zeros(count, dtype=torch.bool))
    if phase.scm:
        drawn |= dict(t_g=draw_times(distill.time_g, count, generator))
    if phase.scm and distill.consistency == "meanflow":
        one, other = drawn["t_g"], draw_times(distill.time_g, count, generator)
        other = torch.where(torch.rand(count, generator=generator) < distill.instant_share, one, other)
        drawn |= dict(t_g=torch.maximum(one, other), t_end=torch.minimum(one, other))
    if drawn:
        drawn |= dict(eps_g=gaussian(count, generator=generator))
    if phase.rollout_steps:
        levels = [torch.full((count,), math.pi / 2, dtype=torch.float64)]
        for k in range(1, phase.rollout_steps):
            fixed = None if distill.rollout_times is None else torch.full_like(levels[0], distill.rollout_times[k - 1])
            levels.append(torch.minimum(levels[-1], draw_times(distill.time_d, count, generator) if fixed is None else fixed))
        drawn |= dict(rollout_times=torch.stack(levels), rollout_noise=gaussian(len(levels), count, generator=generator))
        drawn |= dict(t_d=draw_times(distill.time_d, count, generator), eps_d=gaussian(count, generator=generator))
    return Draws(**drawn)


def schedule(config: Config, steps: int) -> list[Phase]:
    """The phases of the first `steps` optimizer steps."""
    return [phase_at(config, step) for step in range(steps)]


def train(
    config: Config,
    group: Any,
    phases: Sequence[Phase],
    *,
    student: Any,
    data: Mixture,
    seed: int,
    fake_score: nn.Module | None = None,
    rate: float = RATE,
) -> list[dict[str, float]]:
    """One optimizer step per phase, as a run takes them; the metrics of each, averaged over its samples.

    Networks that are no modules do not learn. Adam without first moment, as rCM has it (with one, the moving target of sCM
    overshoots). `group`: of one rank, over which steps agree on samples that are not finite.
    """
    generator, count = seeded(seed), config.train.global_batch_size
    networks: dict[str, Any] = dict(student=student, teacher=data.velocity, fake_score=fake_score)
    roles = Roles(**networks, negative=torch.zeros(1, 1, 1), sample_group=group)
    trained = {"pretrain": student, "student": student, "critic": fake_score}
    optimizers = {
        kind: torch.optim.Adam(net.parameters(), betas=(0.0, 0.99))
        for kind, net in trained.items()
        if isinstance(net, nn.Module)
    }
    log = []
    for step, phase in enumerate(phases):
        optimizer = optimizers[phase.kind]
        optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / len(phases))) / 2
        latents, condition = data.sample(count, generator), Condition(torch.zeros(count, 1, 1))
        batch = MicroBatch(latents=latents, condition=condition, draws=draw_batch(config, phase, count, generator))
        optimizer.zero_grad()
        metrics: dict[str, float] = {}
        for term in terms_of(phase, roles, config):
            loss, found = term(batch)
            assert loss is not None, "no sample in the plane is left out"
            loss.backward()
            metrics |= {name: float(value) / count for name, value in found.items()}
        optimizer.step()
        log.append(metrics)
    return log


def pretrained(group: Any, data: Mixture, seed: int, *, steps: int = 300, width: int = 64) -> Net:
    """A network after flow matching on `data`."""
    net, config = Net(seed, width=width), make_config("pretrain")
    train(config, group, schedule(config, steps), student=net, data=data, seed=seed)
    return net


def with_interval(net: Net, seed: int = 0) -> Net:
    """A network of the same values that is told an interval."""
    width = net.weights[0].shape[1]
    other = Net(seed, width=width, interval=True)
    other.weights = copy.deepcopy(net.weights)
    return other


def flow_endpoint(data: Mixture, x: Tensor, t: Tensor, steps: int = 60) -> Tensor:
    """Where the probability-flow ODE dx/dt = F(x, t) takes x from t to 0: classical Runge-Kutta, in TrigFlow time."""
    wide = lambda t: t.view(-1, 1, 1, 1, 1)

    def slope(x: Tensor, t: Tensor) -> Tensor:
        cos, sin = wide(t.cos()), wide(t.sin())
        return ((cos - sin) * x + data.velocity(x / (cos + sin), t.sin() / (t.sin() + t.cos()))) / (cos + sin)

    h = -t / steps
    for _ in range(steps):
        k1 = slope(x, t)
        k2 = slope(x + wide(h / 2) * k1, t + h / 2)
        k3 = slope(x + wide(h / 2) * k2, t + h / 2)
        k4 = slope(x + wide(h) * k3, t + h)
        x, t = x + wide(h / 6) * (k1 + 2 * k2 + 2 * k3 + k4), t + h
    return x
