"""What asks a run to stop: SIGUSR1, which Slurm sends ahead of the time limit, SIGTERM, of a preemption, and the limit itself.

Nothing heavy is imported here: until its handler is set a signal is lost, or ends the process.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# What a run that was asked to stop exits with (EX_TEMPFAIL of sysexits.h): started again, it goes on.
EXIT_STOPPED = 75
_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
# Seconds before the end of a Slurm job at which a run stops though no signal came: one that came before the handlers was lost.
_LEAD = 120.0


class DeadlineError(ValueError):
    """The end of the job's time limit is no time."""


class StopRequest:
    """Whether this process was asked to stop. A signal is only noted: what is being done, a save say, is finished.

    Raises: DeadlineError when SLURM_JOB_END_TIME, the end of a Slurm job in seconds since 1970, is no number.
    """

    def __init__(self) -> None:
        self._number = 0
        end = os.environ.get("SLURM_JOB_END_TIME", "")
        try:
            self._deadline = float(end) - _LEAD if end else float("inf")
        except ValueError:
            raise DeadlineError(f"SLURM_JOB_END_TIME={end}: must be seconds since 1970, as Slurm sets it") from None

    @property
    def received(self) -> int:
        """Number of the last signal; 0: none. The end of the job's time limit counts as SIGUSR1."""
        if not self._number and time.time() >= self._deadline:
            self._number = signal.SIGUSR1
        return self._number

    def note(self, number: int, _: FrameType | None = None) -> None:
        """The handler."""
        self._number = number


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Note SIGUSR1 and SIGTERM instead of ending on them. For the main thread; restores the former handlers."""
    stop, former = StopRequest(), {}
    for number in _SIGNALS:
        former[number] = signal.signal(number, stop.note)
        signal.siginterrupt(number, False)  # reads and writes of libraries are restarted, not cut short
    try:
        yield stop
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
