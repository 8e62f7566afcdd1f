"""The distribution of what a sampler makes of pure noise in the plane, on a grid, and how far it is from the data's.

Pure noise is a grid of weighted points. A deterministic step moves the points, fresh noise is a convolution with a Gaussian:
both are done to the grid, without drawing a sample. What remains of error is that of the grid (`Grid`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from rcm_mcore.condition import Condition
from rcm_mcore.diffusion.samplers import few_step_times, shifted_sigmas
from rcm_mcore.diffusion.trigflow import rf_time
from rcm_mcore.lab.plane import POINT, Mixture, Net, flow_endpoint, gaussian, seeded

_UNIFORM = 1e-3
# A step of a sampler: points [n, 2, 1, 1, 1] to points.
Map = Callable[[Tensor], Tensor]


class Grid:
    """Weights on a square grid of points, `size` to a side of length 2 `reach`.

    A map moves the points; their weights are then shared out among the four points of the grid around each (so that means are
    kept, and variances grow by less than spacing^2 / 4 a coordinate).
    """

    def __init__(self, size: int = 320, reach: float = 4.5) -> None:
        self.size, self.reach = size, reach
        self.axis = torch.linspace(-reach, reach, size, dtype=torch.float64)
        self.spacing = float(self.axis[1] - self.axis[0])
        self.points = torch.cartesian_prod(self.axis, self.axis).view(-1, *POINT)

    def noise(self) -> Tensor:
        """Of a standard normal, [size, size]."""
        line = (-0.5 * self.axis**2).exp()
        return torch.outer(line, line) / line.sum() ** 2

    def of(self, data: Mixture) -> Tensor:
        """Of a mixture whose components are wider than the spacing."""
        weights = data.density(self.points).view(self.size, self.size)
        return weights / weights.sum()

    def moved(self, weights: Tensor, points: Tensor) -> Tensor:
        """`weights`, each of which has moved to `points` [size^2, 2, 1, 1, 1]; what leaves the grid stays at its border."""
        place = ((points.view(-1, 2) + self.reach) / self.spacing).clamp(0, self.size - 1 - 1e-9)
        corner, rest = place.floor().long(), place - place.floor()
        result = weights.new_zeros(self.size**2)
        for dx, wx in ((0, 1 - rest[:, 0]), (1, rest[:, 0])):
            for dy, wy in ((0, 1 - rest[:, 1]), (1, rest[:, 1])):
                at = ((corner[:, 0] + dx) * self.size + corner[:, 1] + dy).clamp_max(self.size**2 - 1)
                result.index_add_(0, at, weights.flatten() * wx * wy)
        return result.view(self.size, self.size)

    def noised(self, weights: Tensor, scale: float, width: float) -> Tensor:
        """Of `scale` times a point of `weights` plus noise of standard deviation `width`."""
        kernel = (-0.5 * ((self.axis[:, None] - scale * self.axis) / width) ** 2).exp()
        kernel = kernel / (width * math.sqrt(2 * math.pi)) * self.spacing
        return kernel @ weights @ kernel.T

    @torch.no_grad()
    def generated(self, maps: Sequence[Map], times: Sequence[float] | None = None) -> Tensor:
        """Of what a sampler makes of noise. `maps`: its steps; with `times` (TrigFlow, of the later ones) fresh noise is added
        before each of these, x = cos t x0 + sin t noise; otherwise one follows the other."""
        weights, points = self.noise(), self.points
        for k, step in enumerate(maps):
            if k and times is not None:
                weights = self.noised(weights, math.cos(times[k]), math.sin(times[k]))
                points = self.points
            points = torch.cat([step(part) for part in points.split(1 << 16)])
            if times is not None:
                weights = self.moved(weights, points)
        return weights if times is not None else self.moved(weights, points)

    def distances(self, weights: Tensor, data: Mixture, *, blur: float = 0.04) -> dict[str, float]:
        """Of a distribution on the grid from the data's.

        forward_kl KL(data | generated), reverse_kl KL(generated | data) and total_variation, both blurred by noise of standard
        deviation `blur` and mixed with a thousandth of the uniform distribution, so that none is infinite; `modes`: how many
        components have at least half the mass that they should have, `mode_error`: total variation between the masses of
        components; `outside`: mass where the data's density is below the level that 99.9 % of the data exceed.
        """
        p, q = self.of(data.blurred(blur)), self.noised(weights, 1.0, blur)
        p, q = ((1 - _UNIFORM) * f / f.sum() + _UNIFORM / self.size**2 for f in (p, q))
        log_ratio = p.log() - q.log()
        exact = data.density(self.points)
        ordered = exact.sort(descending=True).values
        level = ordered[(ordered / ordered.sum()).cumsum(0) <= 0.999][-1]
        shares = (weights.flatten()[:, None] * data.responsibilities(self.points)).sum(0)
        return {
            "forward_kl": float((p * log_ratio).sum()),
            "reverse_kl": float(-(q * log_ratio).sum()),
            "total_variation": float(0.5 * (p - q).abs().sum()),
            "modes": float((shares >= 0.5 * data.weights).sum()),
            "mode_error": float(0.5 * (shares - data.weights).abs().sum()),
            "outside": float(weights.flatten()[exact < level].sum()),
        }


def student_maps(net: Net, steps: int) -> tuple[list[Map], list[float] | None]:
    """The steps of a student's sampler, and the times of its fresh noise: none for one that is told intervals."""
    times = [math.pi / 2, *few_step_times(steps)[1:]]
    if net.of_interval is None:
        return [partial(_denoised, net, t=t) for t in times[:-1]], times
    s = rf_time(torch.tensor(times, dtype=torch.float64)).tolist()
    return [partial(_averaged, net, s=now, end=end) for now, end in pairwise(s)], None


def _denoised(net: Net, x: Tensor, *, t: float) -> Tensor:
    at = x.new_full((len(x),), t)
    s, scale = rf_time(at), math.cos(t) + math.sin(t)
    return x / scale - s.view(-1, 1, 1, 1, 1) * net(x / scale, s, None)


def _averaged(net: Net, x: Tensor, *, s: float, end: float) -> Tensor:
    now, then = (x.new_full((len(x),), time) for time in (s, end))
    return x - (s - end) * net(x, now, Condition(x.new_zeros(len(x), 1, 1), end=then))


def teacher_maps(data: Mixture, steps: int, shift: float = 1.0) -> list[Map]:
    """Euler steps along the exact velocity."""
    return [partial(_euler, data, s=now, end=end) for now, end in pairwise(shifted_sigmas(steps, shift))]


def _euler(data: Mixture, x: Tensor, *, s: float, end: float) -> Tensor:
    return x + (end - s) * data.velocity(x, x.new_full((len(x),), s))


@torch.no_grad()
def map_error(net: Net, data: Mixture, *, count: int = 1000, seed: int = 1000) -> float:
    """Root mean square distance of one student step from where the teacher's ODE ends, from pure noise."""
    x = gaussian(count, generator=seeded(seed))
    maps, _ = student_maps(net, 1)
    endpoint = flow_endpoint(data, x, x.new_full((count,), math.pi / 2))
    return float((maps[0](x) - endpoint).square().flatten(1).sum(1).mean().sqrt())
