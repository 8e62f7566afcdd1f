"""The loop: step, log, save."""

from __future__ import annotations

import logging
import signal
import time
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed as dist

from rcm_mcore.config import Config
from rcm_mcore.distill.phases import cycle_of
from rcm_mcore.parallel.shared_memory import shared_bytes
from rcm_mcore.training.log import RunLog
from rcm_mcore.training.setup import Run, gather_data_state, set_up
from rcm_mcore.training.signals import StopRequest
from rcm_mcore.training.state import write_state
from rcm_mcore.training.step import StepBatch, run_step
from rcm_mcore.training.throughput import Throughput

log = logging.getLogger(__name__)


def train(config: Config, stop: StopRequest | None = None) -> Run:
    """Collective: run (or continue) to train.steps optimizer steps, or to the step during which any rank was asked to `stop`.

    The last state is saved either way. Returns the run; it is finished if `run.state.step` is train.steps.
    """
    run = set_up(config)
    saved, total = run.state.step, config.train.steps
    run_log = RunLog(
        run.folder.root,
        config.log,
        is_main=run.mesh.is_main,
        start=run.state.step,
        total=total,
        cycle=cycle_of(config.distill) if config.train.objective == "distill" else 1,
        resolved=asdict(config),
        wandb_id=run.state.wandb_id,
    )
    run.state = replace(run.state, wandb_id=run_log.wandb_id)
    run_log.event("resumed" if run.state.step else "started", of=total, ranks=dist.get_world_size())
    throughput = Throughput(config=config, ranks=dist.get_world_size())
    if run.state.step and run.mesh.is_main:
        log.info("resuming after step %d of %d", run.state.step, total)
    try:
        with run.loader:
            while run.state.step < total:
                received = _signal_of_any_rank(stop)
                if received:
                    break
                _step(run, run_log, throughput)
                if run.state.step % config.checkpoint.every == 0 or run.state.step == total:
                    _save(run, run_log)
                    saved = run.state.step
            if run.state.step > saved:
                _save(run, run_log)
            if run.state.step < total and run.mesh.is_main:
                run_log.event("stopped", signal=received)
                log.info("%s: stopped after step %d of %d; started again, the run goes on", received, run.state.step, total)
    finally:
        run_log.close()
    return run


def save(run: Run) -> None:
    """Collective: write a checkpoint of the state after `run.state.step` steps."""
    run.state = replace(run.state, own_steps={t.name: t.steps for t in run.networks}, data=gather_data_state(run))
    run.folder.save(
        run.state.step,
        lambda path: write_state(path, run.networks, run.state, config=run.config, mesh=run.mesh),
        keep_last=run.config.checkpoint.keep_last,
    )


def _save(run: Run, run_log: RunLog) -> None:
    start = time.perf_counter()
    save(run)
    run_log.saved(time.perf_counter() - start)


def _signal_of_any_rank(stop: StopRequest | None) -> str | None:
    """Collective: the name of the signal that asked some rank to stop, or None; the same on every rank.

    A signal reaches ranks in different steps, or only some of them, and all must save after the same one. The exchange is over
    gloo, so that no GPU is waited for.
    """
    number = torch.tensor(stop.received if stop is not None else 0)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return signal.Signals(int(number)).name if number else None


def _step(run: Run, run_log: RunLog, throughput: Throughput) -> None:
    start = time.perf_counter()
    item: StepBatch = next(run.loader)
    waited = time.perf_counter() - start
    assert item.batch.step == run.state.step, f"the loader is at step {item.batch.step}, the run at {run.state.step}"
    trained = run.trained[item.phase.kind]
    for other in run.networks:
        if other is not trained:
            other.sleep()
    trained.wake()
    metrics: dict[str, Any] = run_step(trained, item, roles=run.roles, config=run.config, mesh=run.mesh)
    run.state = replace(run.state, step=run.state.step + 1)
    seconds = time.perf_counter() - start
    on_gpu = run.mesh.device.type == "cuda"
    run_log.write(
        metrics
        | {
            "step": run.state.step,
            "phase": item.phase.kind,
            "rollout_steps": item.phase.rollout_steps or None,
            "seconds": seconds,
            "data_seconds": waited,
            "samples_per_second": run.config.train.global_batch_size / seconds,
            **throughput.of_step(item.phase, seconds),
            "memory_gib": (torch.cuda.max_memory_allocated() + shared_bytes()) / 2**30 if on_gpu else None,
        }
    )
