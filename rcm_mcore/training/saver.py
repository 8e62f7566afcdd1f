"""Checkpoints written behind the training: the state is copied to the host, and a thread writes the copy."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from rcm_mcore.checkpoint import CheckpointError, CheckpointFolder
from rcm_mcore.config import Config
from rcm_mcore.interop.dcp import Pieces
from rcm_mcore.parallel.mesh import Mesh
from rcm_mcore.training.locked_memory import HostMemory
from rcm_mcore.training.networks import Trained
from rcm_mcore.training.state import RunState, pieces_to_save, save_state

log = logging.getLogger(__name__)


@dataclass
class _Save:
    """One that is being written, or was. `stalled`: seconds that training stood still for it."""

    step: int
    gib: float
    stalled: float
    seconds: float = 0.0  # from its begin to its end
    error: CheckpointError | None = None


class Saver:
    """Saves a run's state, at most one checkpoint at a time.

    With checkpoint.asynchronous training goes on as soon as the state is copied to the host, and a thread of every rank writes
    it; these threads talk to each other over the folder's own process group. A save that fails is reported, and the run goes on
    to the next one; the second in a row ends it, and so does a last one.

    Args:
        report: called with an event's name and facts (RunLog.event).
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        networks: list[Trained],
        *,
        config: Config,
        mesh: Mesh,
        report: Callable[..., None],
    ) -> None:
        self._folder, self._networks, self._config, self._mesh, self._report = folder, networks, config, mesh, report
        self._thread: threading.Thread | None = None
        self._save: _Save | None = None
        self._failed_before = False
        self.saved_step = -1  # of the last save that was begun and has not failed, or of the checkpoint that was loaded
        self._host = None
        if config.checkpoint.asynchronous:
            self._host = _HostRoom(pieces_to_save(networks, mesh))

    @property
    def has_failed(self) -> bool:
        """Whether this rank knows that the save at hand has failed: then `settle` is to be called on every rank."""
        return self._save is not None and self._save.error is not None

    def save(self, state: RunState) -> float:
        """Collective: begin to save the state of the networks; returns the seconds that this took.

        The save before is waited for. Raises: CheckpointError on every rank (see `settle`).
        """
        start = time.perf_counter()
        waited = self._thread is not None and self._thread.is_alive()
        self.settle()
        if waited:
            log.warning(
                "step %d: the checkpoint before was not written yet, training waited %.1f s for it: raise checkpoint.every=%d",
                state.step, time.perf_counter() - start, self._config.checkpoint.every,
            )  # fmt: skip
        pieces = pieces_to_save(self._networks, self._mesh)
        size = sum(part.nbytes for one in pieces.values() for _, part in one.parts)
        self._save = _Save(state.step, size / 2**30, 0.0)
        self.saved_step = state.step
        if self._host is None:
            self._write(self._save, pieces, state, start)
        else:
            pieces = self._host.copy(pieces)
            # A daemon: a process that ends on an error elsewhere does not wait for it.
            self._thread = threading.Thread(
                target=self._write, args=(self._save, pieces, state, start), name="checkpoint-writer", daemon=True
            )
            self._thread.start()
        self._save.stalled = time.perf_counter() - start
        return self._save.stalled

    def _write(self, save: _Save, pieces: dict[str, Pieces], state: RunState, start: float) -> None:
        error: CheckpointError | None = None
        try:
            save_state(self._folder, pieces, state, self._config)
        except CheckpointError as failure:
            error = failure
        except BaseException as failure:  # of communication: whoever waits for this thread must hear of it
            error = CheckpointError(f"the checkpoint of step {save.step} was given up: {type(failure).__name__}: {failure}")
        save.seconds, save.error = time.perf_counter() - start, error

    def is_writing(self, *, seconds: float) -> bool:
        """Whether the save at hand is still being written after at most so many seconds."""
        if self._thread is None:
            return False
        self._thread.join(seconds)
        return self._thread.is_alive()

    def note_finished(self) -> None:
        """Report a save that has succeeded meanwhile; waits for nothing."""
        # In this order: a thread that ends between the two may have failed, which is told to all ranks first.
        if self._save is not None and not self.is_writing(seconds=0.0) and not self.has_failed:
            self.settle()

    def settle(self, *, last: bool = False) -> None:
        """Wait for the save at hand, if there is one, and report how it ended.

        Raises: CheckpointError, on every rank that calls, if it failed and the one before did, or it is the `last` one.
        """
        if self._thread is not None:
            self._thread.join()
        save, self._save, self._thread = self._save, None, None
        if save is None:
            return
        if save.error is None:
            self._failed_before = False
            self._report("saved", saved_step=save.step, gib=save.gib, stalled_seconds=save.stalled, seconds=save.seconds)
            return
        self.saved_step = -1
        self._report("save_failed", saved_step=save.step, error=str(save.error))
        if last or self._failed_before:
            raise save.error
        self._failed_before = True
        if self._mesh.is_main:
            log.error("%s. The run goes on, and ends if the next save fails too", save.error)

    def close(self) -> None:
        """Wait for the save at hand, whatever comes of it, and let go of the host's memory."""
        try:
            self.settle()
        except CheckpointError as error:
            if self._mesh.is_main:
                log.error("%s", error)
        if self._host is not None:
            self._host.close()


class _HostRoom:
    """Host memory for one copy of this rank's pieces."""

    def __init__(self, pieces: dict[str, Pieces]) -> None:
        self._memory = HostMemory(part for one in pieces.values() for _, part in one.parts)

    def copy(self, pieces: dict[str, Pieces]) -> dict[str, Pieces]:
        """The pieces' values now. Valid until the next copy."""
        self._memory.forget_copies()
        copies = {key: one.map(self._memory.take) for key, one in pieces.items()}
        if any(part.is_cuda for one in pieces.values() for _, part in one.parts):
            torch.cuda.current_stream().synchronize()
        return copies

    def close(self) -> None:
        """Give the memory back."""
        self._memory.close()
