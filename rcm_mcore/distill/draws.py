"""Everything random of one step, drawn from generators that know step and slot but not the mesh.

Drawn on the CPU in the loader's thread. Shapes: b samples of this rank, latents [b, C, F, H, W] float32, times [b] float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from rcm_mcore.config import Config, TimeConfig
from rcm_mcore.diffusion.trigflow import draw_time
from rcm_mcore.distill.phases import Phase
from rcm_mcore.parallel.random import generator, noise


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Noise and times of one step; what its phase has no use for is None."""

    t_g: Tensor | None = None  # consistency term (and pretraining): times and noise
    eps_g: Tensor | None = None
    t_end: Tensor | None = None  # meanflow: where the intervals end, at most t_g
    t_d: Tensor | None = None  # score distillation and critic: times and noise
    eps_d: Tensor | None = None
    rollout_times: Tensor | None = None  # [N, b], falling from pi/2
    rollout_noise: Tensor | None = None  # [N, b, C, F, H, W], the start and the fresh noise of later steps
    dropped: Tensor | None = None  # [b] bool: samples that see the negative embedding
    frames: Tensor | None = None  # [b] whole numbers: latent frames that are given (`model.condition=frames`)

    def rows(self, rows: Any) -> Draws:
        """The same for some samples."""
        stacked = ("rollout_times", "rollout_noise")
        picked = {f.name: getattr(self, f.name) for f in fields(self)}
        return Draws(**{n: v if v is None else v[:, rows] if n in stacked else v[rows] for n, v in picked.items()})

    def to(self, device: torch.device) -> Draws:
        """The same on a device."""
        return Draws(**{f.name: None if (v := getattr(self, f.name)) is None else v.to(device) for f in fields(self)})


def draw(config: Config, phase: Phase, *, step: int, slots: tuple[int, ...]) -> Draws:
    """The draws of optimizer step `step` for the samples in `slots` of the global batch."""
    shape, seed, distill = config.data.latent_shape, config.train.seed, config.distill

    def times(purpose: str, distribution: TimeConfig) -> Tensor:
        ts = [draw_time(distribution, generator(purpose, seed=seed, step=step, slot=s)) for s in slots]
        return torch.tensor(ts, dtype=torch.float64)

    def gaussian(purpose: str) -> Tensor:
        return noise(purpose, shape, seed=seed, step=step, slots=slots)

    frames = None
    if config.model.condition == "frames":
        choices = torch.tensor(config.data.given_frames)
        picked = [torch.randint(len(choices), (), generator=generator("frames", seed=seed, step=step, slot=s)) for s in slots]
        frames = choices[torch.tensor(picked, dtype=torch.int64)]
    if phase.kind == "pretrain":
        rate = config.pretrain.condition_dropout
        uniform = [float(torch.rand((), generator=generator("dropout", seed=seed, step=step, slot=s))) for s in slots]
        dropped = torch.tensor([u < rate for u in uniform])
        return Draws(t_g=times("time", config.pretrain.time), eps_g=gaussian("noise"), dropped=dropped, frames=frames)
    draws: dict[str, Tensor | None] = {"frames": frames}
    if phase.scm:
        draws |= dict(t_g=times("time-g", distill.time_g), eps_g=gaussian("noise-g"))
    if phase.scm and distill.consistency == "meanflow":
        one, other = draws["t_g"], times("time-end", distill.time_g)
        assert one is not None
        uniform = [float(torch.rand((), generator=generator("instant", seed=seed, step=step, slot=s))) for s in slots]
        instant = torch.tensor([u < distill.instant_share for u in uniform])
        draws["t_g"] = torch.where(instant, one, torch.maximum(one, other))
        draws["t_end"] = torch.where(instant, one, torch.minimum(one, other))
    if phase.rollout_steps:
        draws |= dict(t_d=times("time-d", distill.time_d), eps_d=gaussian("noise-d"))
        draws["rollout_noise"] = torch.stack([gaussian(f"rollout-{k}") for k in range(phase.rollout_steps)])
        levels = [torch.full((len(slots),), math.pi / 2, dtype=torch.float64)]
        for k in range(1, phase.rollout_steps):
            if distill.rollout_times is not None:
                fresh = torch.full_like(levels[0], distill.rollout_times[k - 1])
            else:
                fresh = times(f"rollout-time-{k}", distill.time_d)
            levels.append(torch.minimum(levels[-1], fresh))
        draws["rollout_times"] = torch.stack(levels)
    return Draws(**draws)
