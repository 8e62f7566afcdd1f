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
from rcm_mcore.parallel.shared_memory import shared_bytes
from rcm_mcore.training.log import RunLog
from rcm_mcore.training.recovery import Recovery
from rcm_mcore.training.saver import Saver
from rcm_mcore.training.setup import Run, gather_data_state, set_up
from rcm_mcore.training.sheets import Sheets
from rcm_mcore.training.signals import StopRequest
from rcm_mcore.training.step import NonFiniteError, StepBatch, run_step

log = logging.getLogger(__name__)


def train(config: Config, stop: StopRequest | None = None) -> Run:
    """Collective: run (or continue) to train.steps optimizer steps, or to the step during which any rank was asked to `stop`.

    The last state is saved either way. Returns the run; it is finished if `run.state.step` is train.steps.
    """
    run = set_up(config)
    total = config.train.steps
    sheets = Sheets(config, run.mesh, run.networks, run.roles.negative) if config.log.sheet_every else None
    run_log = RunLog(
        run.folder.root,
        config.log,
        is_main=run.mesh.is_main,
        start=run.state.step,
        total=total,
        resolved=asdict(config),
        wandb_id=run.state.wandb_id,
    )
    run.state = replace(run.state, wandb_id=run_log.wandb_id)
    run_log.event("resumed" if run.state.step else "started", of=total, ranks=dist.get_world_size())
    if run.state.step and run.mesh.is_main:
        log.info("resuming after step %d of %d", run.state.step, total)
    saver = Saver(run.folder, run.networks, config=config, mesh=run.mesh, report=run_log.event)
    saver.saved_step = run.state.step
    recovery = Recovery(run, run_log, saver)
    try:
        while run.state.step < total:
            received, save_failed = _agreed(stop, saver)
            if save_failed:
                saver.settle()
            if received:
                break
            _step(run, run_log, recovery)
            saver.note_finished()
            if run.state.step % config.checkpoint.every == 0 and run.state.step != saver.saved_step:
                save(run, saver)
            if sheets is not None and run.state.step % config.log.sheet_every == 0:
                sheets.make(run.state.step, run_log)
        if run.state.step != saver.saved_step:
            save(run, saver)
        saver.settle(last=True)
        if run.state.step < total and run.mesh.is_main:
            run_log.event("stopped", signal=received)
            log.info("%s: stopped after step %d of %d; started again, the run goes on", received, run.state.step, total)
    finally:
        run.loader.close()
        saver.close()
        run.folder.unlock()
        run_log.close()
    return run


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


def _step(run: Run, run_log: RunLog, recovery: Recovery) -> None:
    start = time.perf_counter()
    item: StepBatch = next(run.loader)
    waited = time.perf_counter() - start
    assert item.batch.step == run.state.step, f"the loader is at step {item.batch.step}, the run at {run.state.step}"
    trained = run.trained[item.phase.kind]
    for other in run.networks:
        if other is not trained:
            other.sleep()
    trained.wake()
    try:
        metrics: dict[str, Any] = {"skipped": 0} | run_step(trained, item, roles=run.roles, config=run.config, mesh=run.mesh)
        recovery.passed()
    except NonFiniteError as error:
        recovered = recovery.after(error)
        if recovered is None:
            return
        metrics = recovered
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
            "memory_gib": (torch.cuda.max_memory_allocated() + shared_bytes()) / 2**30 if on_gpu else None,
        }
    )
