"""Learning rates by a network's own step count."""

from __future__ import annotations

import math

from rcm_mcore.config import OptimConfig


def learning_rate(config: OptimConfig, peak: float, step: int, total: int) -> float:
    """The rate of step `step` (from 0) of `total`: linear from `warmup_start_lr` to `peak`, then constant or decaying.

    A decay ends at `min_lr_ratio` * peak on the last step.
    """
    start = min(config.warmup_start_lr, peak)
    if step < config.warmup_steps:
        return start + (peak - start) * step / config.warmup_steps
    if config.decay == "constant":
        return peak
    progress = min(1.0, (step - config.warmup_steps) / max(1, total - 1 - config.warmup_steps))
    share = 1 - progress if config.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (config.min_lr_ratio + (1 - config.min_lr_ratio) * share)
