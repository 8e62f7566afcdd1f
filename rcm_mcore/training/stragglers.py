"""Which rank is slow: the ranks' own times compared, every so many steps.

A step takes as long as its slowest rank, and from outside all ranks look equally slow: they wait for one another where
gradients are reduced. So a rank measures what it does alone: `step`, from when it has its samples to just before that
reduction; `data`, its wait for the loader; `probe`, a few matrix products. Ranks of one replica (tensor, context, pipeline)
do wait for one another within `step`: there `step` names the replica, and `probe` the rank.
"""

from __future__ import annotations

import logging
import math
import socket
import statistics
from collections.abc import Sequence

import torch
import torch.distributed as dist

from rcm_mcore.config import GuardConfig
from rcm_mcore.parallel.mesh import Mesh
from rcm_mcore.training.log import RunLog
from rcm_mcore.training.stopwatch import Stopwatch

log = logging.getLogger(__name__)

# Seconds above the median below which nothing is said, whatever the ratio.
FLOORS = {"step": 5e-3, "data": 50e-3, "probe": 1e-3}


def slow_ranks(seconds: Sequence[float], *, ratio: float, floor: float) -> list[int]:
    """Ranks whose time is above `ratio` x the median and `floor` seconds above it.

    Not finite: not measured, and no part of the median, which of two ranks is the faster.
    """
    median = median_of(seconds)
    return [rank for rank, x in enumerate(seconds) if math.isfinite(x) and x > ratio * median and x > median + floor]


def median_of(seconds: Sequence[float]) -> float:
    """The (lower) median of what is finite; NaN of nothing."""
    measured = [x for x in seconds if math.isfinite(x)]
    return statistics.median_low(measured) if measured else math.nan


class Probe:
    """The same matrix products each time, on this rank alone: milliseconds."""

    repeats = 3

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.size, self._products = (4096, 8) if device.type == "cuda" else (256, 1)
        self.flops = 2.0 * self.size**3 * self._products
        self._watch = Stopwatch(device)

    def launch(self) -> None:
        """Begin; nothing is waited for."""
        row = torch.arange(self.size, device=self.device).remainder(7).to(self.dtype)
        x = (row[:, None] + row).remainder_(7).sub_(3)
        for _ in range(self.repeats):
            self._watch.begin()
            for _ in range(self._products):
                torch.mm(x, x)
            self._watch.end()

    def seconds(self) -> float:
        """Of the fastest repeat of the last `launch`; NaN without one."""
        return min(self._watch.take(), default=math.nan)


class Stragglers:
    """Collects this rank's times and compares them with those of the others every `guard.straggler_every` steps.

    The first step is left out: it compiles, and the loader has just begun. Construction is collective.
    """

    def __init__(self, config: GuardConfig, mesh: Mesh, *, dtype: torch.dtype) -> None:
        self.config, self.mesh = config, mesh
        self.own_time = Stopwatch(mesh.device) if config.straggler_every else None
        self._probe = Probe(mesh.device, dtype)
        self._waits: list[float] = []
        self._first = True
        self._hosts: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(self._hosts, socket.gethostname())

    def before_step(self, step: int) -> None:
        """Once the samples of `step` (from 1) are there. The probe runs ahead of it, so that its end need not be waited for."""
        if self._reports_after(step):
            self._probe.launch()

    def after_step(self, step: int, waited: float, run_log: RunLog) -> None:
        """Collective: note the `waited` seconds for data of `step`, and report if it is the turn."""
        if self.own_time is None:
            return
        # A rank that is handed its samples by another does not wait for the loader.
        self._waits.append(waited if self.mesh.reads else math.nan)
        if self._first:
            self._first = False
            self.own_time.take()
            self._waits.clear()
        if not self._reports_after(step):
            return
        mine = {"step": _mean(self.own_time.take()), "data": _mean(self._waits), "probe": self._probe.seconds()}
        self._waits.clear()
        table = torch.empty(dist.get_world_size(), len(mine), dtype=torch.float64)
        # On the host: over gloo.
        dist.all_gather(list(table.unbind()), torch.tensor(list(mine.values()), dtype=torch.float64))
        if self.mesh.is_main:
            self._report(dict(zip(mine, table.T.tolist(), strict=True)), run_log)

    def _reports_after(self, step: int) -> bool:
        return self.own_time is not None and step % self.config.straggler_every == 0

    def _report(self, seconds: dict[str, list[float]], run_log: RunLog) -> None:
        """`seconds` by what, of each rank."""
        # JSON has no NaN.
        rounded = {f"{what}_seconds": [x if math.isfinite(x) else None for x in row] for what, row in seconds.items()}
        run_log.event("rank_times", **rounded)
        for what, row in seconds.items():
            for rank in slow_ranks(row, ratio=self.config.straggler_ratio, floor=FLOORS[what]):
                host, median = self._hosts[rank], median_of(row)
                log.warning("rank %d (%s) is slow: %s takes %.4g s, the median is %.4g s", rank, host, what, row[rank], median)
                run_log.event("straggler", rank=rank, host=host, what=what, seconds=row[rank], median=median)


def _mean(seconds: Sequence[float]) -> float:
    return statistics.fmean(seconds) if seconds else math.nan
