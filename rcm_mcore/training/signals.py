"""Signals that ask a run to stop: SIGUSR1, which Slurm sends ahead of the time limit, and SIGTERM, of a preemption.

Nothing heavy is imported here: until its handler is set a signal is lost, or ends the process.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# What a run that was asked to stop exits with (EX_TEMPFAIL of sysexits.h): started again, it goes on.
EXIT_STOPPED = 75
_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class StopRequest:
    """Whether this process was asked to stop. A signal is only noted: what is being done, a save say, is finished."""

    def __init__(self) -> None:
        self.received = 0  # number of the last signal; 0: none

    def note(self, number: int, _: FrameType | None = None) -> None:
        """The handler."""
        self.received = number


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
