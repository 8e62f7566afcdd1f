"""A run that hangs tells where, and ends, instead of keeping its GPUs until somebody looks.

A thread of each rank waits for signs of life. Ranks wait for one another in collectives, so that all of them stall together:
each writes its own Python stacks, and the rank whose stack is not that of a collective is the one to look at. torch's flight
recorder (which collectives this rank began and finished) goes beside them, in the format that `torchfrtrace` reads.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

log = logging.getLogger(__name__)

# What a rank exits with that was ended because nothing moved: started again, the run goes on.
EXIT_STALLED = 76

# Flight recorders of torch: file name without the rank, and the function that dumps it as a pickle.
_RECORDERS = {"nccl_trace_rank_": "_dump_nccl_trace", "gloo_trace_rank_": "_dump_fr_trace"}


@dataclass(frozen=True)
class _Beat:
    """What a rank does since when, and how long it may take to the next sign of life."""

    what: str
    seconds: float
    since: float = field(default_factory=time.time)


class Watchdog:
    """Watches this process between `__enter__` and `__exit__`; with 0 minutes it does nothing.

    After `minutes` without a beat the stacks of all threads are written to `folder`/rank_NNNNN.txt and an error is logged;
    after as many more the process ends with EXIT_STALLED. Time in which the process itself was stopped (SIGSTOP) does not
    count.
    """

    def __init__(self, folder: Path, minutes: float) -> None:
        self.folder, self.seconds = folder, 60.0 * minutes
        self.rank = int(os.environ.get("RANK", "0"))
        self._who = f"rank {self.rank} ({socket.gethostname()})"
        self._beat = _Beat("starting", self.seconds)
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self.seconds > 0:
            self.beat("starting")
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, stack: TracebackType | None) -> None:
        self._leave.set()
        if self._thread.is_alive():
            self._thread.join(10.0)

    def beat(self, what: str, *, patience_minutes: float = 0.0) -> None:
        """A sign of life: this rank begins `what`, for which it may take `patience_minutes` if that is longer than usual."""
        self._beat = _Beat(what, max(self.seconds, 60.0 * patience_minutes))

    def _watch(self) -> None:
        tick = min(1.0, self.seconds / 20)
        seen, idle, written, last = self._beat, 0.0, False, time.monotonic()
        while not self._leave.wait(tick):
            now = time.monotonic()
            # More than two ticks: this process was stopped, or starved, and so was what it waits for.
            idle, last = idle + min(now - last, 2 * tick), now
            if self._beat is not seen:
                if written:
                    log.error("%s moves again: %s", self._who, self._beat.what)
                seen, idle, written = self._beat, 0.0, False
            elif not written and idle >= seen.seconds:
                written = True
                log.error(
                    "%s: no sign of life for %.3g minutes while %s; its stacks go to %s; in %.3g minutes more it ends",
                    self._who, seen.seconds / 60, seen.what, self._file("rank_", ".txt"), self.seconds / 60,
                )  # fmt: skip
                # A thread of its own: what hangs may be the file system.
                threading.Thread(target=self._write, args=(seen,), name="watchdog-writer", daemon=True).start()
            elif idle >= seen.seconds + self.seconds:
                log.error("%s: still %s; it ends with exit code %d", self._who, seen.what, EXIT_STALLED)
                os._exit(EXIT_STALLED)

    def _file(self, prefix: str, suffix: str = "") -> Path:
        # `torchfrtrace` takes what follows the prefix for the rank.
        return self.folder / f"{prefix}{self.rank:05d}{suffix}"

    def _write(self, beat: _Beat) -> None:
        """Stacks first; a flight recorder asks the GPU for the state of its collectives."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._file("rank_", ".txt").open("a", encoding="utf-8") as file:
                file.write(
                    f"time: {_iso(time.time())}\nhost: {socket.gethostname()}\npid: {os.getpid()}\nrank: {self.rank}\n"
                    f"doing: {beat.what}\nsince: {_iso(beat.since)}\n\n"
                )
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                file.write("\n")
            self._write_recorders()
        except Exception as error:  # whatever it is, what matters is that the process ends in time
            log.error("%s: its state could not be written to %s: %s", self._who, self.folder, error)

    def _write_recorders(self) -> None:
        import torch._C as torch_c  # here, so that the exit code is to be had without torch

        recorders = getattr(torch_c, "_distributed_c10d", None)
        # Should one hang with the interpreter's lock, this ends the process, which the watchdog then could not (exit code 1).
        faulthandler.dump_traceback_later(2 * self.seconds + 60, exit=True, file=sys.__stderr__ or 2)
        try:
            for prefix, dump in _RECORDERS.items():
                if hasattr(recorders, dump):
                    self._file(prefix).write_bytes(getattr(recorders, dump)())
        finally:
            faulthandler.cancel_dump_traceback_later()


def _iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
