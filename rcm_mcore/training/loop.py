"""The loop: step, log, save."""

from __future__ import annotations

import logging
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rcm_mcore.config import Config
from rcm_mcore.distill.phases import cycle_of
from rcm_mcore.parallel.shared_memory import shared_bytes
from rcm_mcore.training.log import RunLog
from rcm_mcore.training.recovery import Recovery
from rcm_mcore.training.saver import Saver
from rcm_mcore.training.setup import Run, gather_data_state, set_up
from rcm_mcore.training.sheets import Sheets
from rcm_mcore.training.signals import StopRequest
from rcm_mcore.training.step import NonFiniteError, StepBatch, run_step
from rcm_mcore.training.stragglers import Stragglers
from rcm_mcore.training.throughput import Throughput
from rcm_mcore.training.watchdog import Watchdog

log = logging.getLogger(__name__)


def train(config: Config, stop: StopRequest | None = None) -> Run:
    """Collective: run (or continue) to train.steps optimizer steps, or to the step during which any rank was asked to `stop`.

    The last state is saved either way. Returns the run; it is finished if `run.state.step` is train.steps.
    """
    with Watchdog(Path(config.checkpoint.dir) / "stacks", config.guard.stall_minutes) as watchdog:
        # Loading and saving are one beat each: they may take as long as ranks wait for one another.
        watchdog.beat("setting up", patience_minutes=config.mesh.timeout_minutes)
        run = set_up(config)
        training = _Training(run, stop, watchdog)
        try:
            training.run_to_the_end()
        finally:
            training.close()
    return run


class _Training:
    """A run with all that watches over it."""

    def __init__(self, run: Run, stop: StopRequest | None, watchdog: Watchdog) -> None:
        config, ranks = run.config, dist.get_world_size()
        self.run, self.config, self.stop, self.watchdog = run, config, stop, watchdog
        resumed = run.state.step > 0
        self.log = RunLog(
            run.folder.root,
            config.log,
            is_main=run.mesh.is_main,
            start=run.state.step,
            total=config.train.steps,
            cycle=cycle_of(config.distill) if config.train.objective == "distill" else 1,
            resolved=asdict(config),
            wandb_id=run.state.wandb_id,
        )
        run.state = replace(run.state, wandb_id=self.log.wandb_id)
        self.log.event("resumed" if resumed else "started", of=config.train.steps, ranks=ranks)
        if run.preflight is not None:
            self.log.event("preflight", **asdict(run.preflight))
        matmul = run.preflight.matmul_tflops if run.preflight is not None else None
        self.throughput = Throughput(config=config, ranks=ranks, matmul_tflops=matmul)
        self.stragglers = Stragglers(config.guard, run.mesh, dtype=getattr(torch, config.model.dtype))
        self.sheets = Sheets(config, run.mesh, run.networks, run.roles.negative) if config.log.sheet_every else None
        self.saver = Saver(run.folder, run.networks, config=config, mesh=run.mesh, report=self.log.event)
        self.saver.saved_step = run.state.step
        self.recovery = Recovery(run, self.log, self.saver)
        if resumed and run.mesh.is_main:
            log.info("resuming after step %d of %d", run.state.step, config.train.steps)

    def run_to_the_end(self) -> None:
        """Collective: the steps that are left, or those until some rank is asked to stop; then the last state is saved."""
        run, total = self.run, self.config.train.steps
        received = None
        while run.state.step < total:
            received, save_failed = _agreed(self.stop, self.saver)
            if save_failed:
                self.saver.settle()
            if received:
                break
            self._step()
            self.saver.note_finished()
            if run.state.step % self.config.checkpoint.every == 0 and run.state.step != self.saver.saved_step:
                self._save()
            if self.sheets is not None and run.state.step % self.config.log.sheet_every == 0:
                if _agreed(self.stop, self.saver)[0]:  # no time for a sheet
                    continue
                self._patiently(f"drawing samples after step {run.state.step}")
                self.sheets.make(run.state.step, self.log)
        if run.state.step != self.saver.saved_step:
            self._save()
        while self.saver.is_writing(seconds=1.0):  # that may take any time, as long as it goes on
            self._patiently("writing the last checkpoint")
        self.saver.settle(last=True)
        if run.state.step < total and run.mesh.is_main:
            self.log.event("stopped", signal=received)
            log.info("%s: stopped after step %d of %d; started again, the run goes on", received, run.state.step, total)

    def close(self) -> None:
        """Let go of threads, files and the run's folder."""
        self.run.loader.close()
        self.saver.close()
        self.run.folder.unlock()
        self.log.close()

    def _patiently(self, what: str) -> None:
        """A sign of life before what ranks do together without steps: it may take as long as they wait for one another."""
        self.watchdog.beat(what, patience_minutes=self.config.mesh.timeout_minutes)

    def _save(self) -> None:
        start = time.perf_counter()
        while self.saver.is_writing(seconds=1.0):
            self._patiently(f"waiting for the checkpoint before that of step {self.run.state.step}")
        self._patiently(f"saving step {self.run.state.step}")
        save(self.run, self.saver)
        self.log.stood_still(time.perf_counter() - start)

    def _step(self) -> None:
        run, number = self.run, self.run.state.step + 1
        self.watchdog.beat(f"waiting for the samples of step {number}")
        start = time.perf_counter()
        item: StepBatch = next(run.loader)
        waited = time.perf_counter() - start
        assert item.batch.step == run.state.step, f"the loader is at step {item.batch.step}, the run at {run.state.step}"
        self.watchdog.beat(f"in step {number} ({item.phase.kind})")
        self.stragglers.before_step(number)
        trained = run.trained[item.phase.kind]
        for other in run.networks:
            if other is not trained:
                other.sleep()
        trained.wake()
        metrics: dict[str, Any] | None
        try:
            metrics = {"skipped": 0} | run_step(
                trained, item, roles=run.roles, config=run.config, mesh=run.mesh, own_time=self.stragglers.own_time
            )
            self.recovery.passed()
        except NonFiniteError as error:
            self._patiently(f"recovering from step {number}")
            metrics = self.recovery.after(error)
            if metrics is None:
                return
        run.state = replace(run.state, step=number)
        seconds = time.perf_counter() - start
        on_gpu = run.mesh.device.type == "cuda"
        self.log.write(
            metrics
            | {
                "step": number,
                "phase": item.phase.kind,
                "rollout_steps": item.phase.rollout_steps or None,
                "seconds": seconds,
                "data_seconds": waited,
                "samples_per_second": run.config.train.global_batch_size / seconds,
                **self.throughput.of_step(item.phase, seconds),
                "memory_gib": (torch.cuda.max_memory_allocated() + shared_bytes()) / 2**30 if on_gpu else None,
            }
        )
        self.watchdog.beat(f"after step {number}")
        self.stragglers.after_step(number, waited, self.log)


def save(run: Run, saver: Saver) -> None:
    """Collective: begin to save the state after `run.state.step` steps."""
    run.state = replace(run.state, own_steps={t.name: t.steps for t in run.networks}, data=gather_data_state(run))
    saver.save(run.state)


def _agreed(stop: StopRequest | None, saver: Saver) -> tuple[str | None, bool]:
    """Collective, the same on every rank: the name of the signal that asked some rank to stop, and whether a save has failed.

    A signal reaches ranks in different steps, or only some of them, and all must save after the same one. The exchange is over
    gloo, so that no GPU is waited for.
    """
    flags = torch.tensor([stop.received if stop is not None else 0, int(saver.has_failed)])
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    number, save_failed = flags.tolist()
    return signal.Signals(number).name if number else None, bool(save_failed)
