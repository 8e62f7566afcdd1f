"""What a step that is not finite leads to: the end of the run, no update, or an earlier checkpoint (train.on_nonfinite)."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from rcm_mcore.training.log import RunLog
from rcm_mcore.training.saver import Saver
from rcm_mcore.training.setup import Run, gather_data_state, make_loader
from rcm_mcore.training.state import read_state
from rcm_mcore.training.step import NonFiniteError

log = logging.getLogger(__name__)


class Recovery:
    """Counts what was forgiven, so that a run that does not recover ends."""

    def __init__(self, run: Run, run_log: RunLog, saver: Saver) -> None:
        self._run, self._log, self._saver = run, run_log, saver
        self._skips = 0  # in a row
        self._rollbacks, self._target = 0, -1  # to the checkpoint of that step

    def passed(self) -> None:
        """A step was finite."""
        self._skips = 0

    def after(self, error: NonFiniteError) -> dict[str, Any] | None:
        """Collective: metrics of a step whose update is left out, or None when the run was rolled back.

        Raises: `error`, or one that says more, when the run is to stop. The weights are then those of before the step.
        """
        train = self._run.config.train
        if train.on_nonfinite == "stop":
            raise error
        if train.on_nonfinite == "rollback":
            self._roll_back(error)
            return None
        if self._skips >= train.max_skips:
            raise NonFiniteError(f"{error}; train.max_skips={train.max_skips} steps before it were skipped", error.metrics)
        self._skips += 1
        if self._run.mesh.is_main:
            log.warning("%s: no update (train.on_nonfinite=skip, %d in a row)", error, self._skips)
        self._log.event("skipped", error=str(error))
        return error.metrics | {"skipped": 1}

    def _roll_back(self, error: NonFiniteError) -> None:
        run, limit = self._run, self._run.config.train.max_rollbacks
        self._saver.settle()
        newest = run.folder.newest()
        if newest is None:
            raise NonFiniteError(
                f"{error}; there is no checkpoint to roll back to (train.on_nonfinite=rollback)", error.metrics
            )
        if newest != run.folder.path(self._target):
            self._rollbacks, self._target = 0, int(newest.name.rpartition("_")[2])
        if self._rollbacks >= limit:
            raise NonFiniteError(
                f"{error}; the run was rolled back to step {self._target} train.max_rollbacks={limit} times", error.metrics
            )
        self._rollbacks += 1
        position = gather_data_state(run)  # past the samples of the step that failed
        run.loader.close()
        there = read_state(newest, run.networks, config=run.config, mesh=run.mesh)
        failed_after = run.state.step
        run.state = replace(there, data=position, rollbacks=run.state.rollbacks + 1, wandb_id=run.state.wandb_id)
        run.loader = make_loader(run.config, run.mesh, run.state)
        self._saver.saved_step = there.step
        if run.mesh.is_main:
            log.warning("%s: back to the checkpoint of step %d, with later data and other noise", error, there.step)
        self._log.rewind(there.step)
        self._log.event("rolled_back", error=str(error), failed_after=failed_after)
