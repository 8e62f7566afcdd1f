"""Reading in processes beside the training's: unpacking small samples is Python, which would hold up the launching of kernels.

Of R data-parallel ranks with W processes each, a process reads what one of R W ranks without them would: its own virtual
readers, hence the same samples in the same order (readers.py). It runs `main`, takes a `_Task` on its standard input and
answers with `_Message`s on a pipe of its own, all pickled. A pipe that is full stops it; it ends when its input is closed.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from rcm_mcore.config import DataConfig, ModelConfig
from rcm_mcore.data.readers import RankReaders, Rows

_POLL_SECONDS = 0.5  # between looks at what is being read
_END_SECONDS = 10.0  # that a killed process is given


@dataclass(frozen=True)
class _Task:
    config: DataConfig
    model: ModelConfig
    seed: int
    dp_rank: int
    dp_size: int
    global_batch_size: int
    samples: int  # of the run so far
    readers: dict[int, list[int]]  # positions of the process's own


@dataclass(frozen=True)
class _Message:
    """What the process logged since its last message."""

    records: list[logging.LogRecord]


@dataclass(frozen=True)
class _Waits(_Message):
    """A read of this shard has been going on for so many seconds."""

    shard: str
    seconds: float


@dataclass(frozen=True)
class _Piece(_Message):
    """The process's samples of a step (fields of `Rows`), and the position after them."""

    rows: dict[str, Any]  # arrays, which are pickled as they lie in memory, for tensors
    readers: dict[int, list[int]]


@dataclass(frozen=True)
class _Failed(_Message):
    """What ended the process."""

    error: BaseException


class ReaderDied(RuntimeError):
    """A process that reads samples has ended by itself; the message says which, and how."""


@dataclass(frozen=True)
class _Process:
    process: subprocess.Popen[bytes]
    out: BinaryIO  # what it answers


class ReaderProcesses:
    """The reading of one data-parallel rank in config.workers processes, which are started with the first step.

    Args: see `RankReaders`; global_batch_size: samples of a step over all ranks; state: where they begin, of `DataLoader`.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        model: ModelConfig,
        seed: int,
        dp_rank: int,
        dp_size: int,
        global_batch_size: int,
        state: Mapping[str, Any],
    ) -> None:
        self._dp_size, self._limit, self._model = dp_size, config.max_bad_samples, model
        self._positions: dict[int, list[int]] = {int(v): list(position) for v, position in state["readers"].items()}
        self._waits: tuple[str, float] | None = None
        self._closed = False
        ranks = [dp_rank + dp_size * w for w in range(config.workers)]
        size = dp_size * config.workers
        self._processes: list[_Process] = []
        try:
            for rank in ranks:
                own = {v: position for v, position in self._positions.items() if v % size == rank}
                self._start(_Task(config, model, seed, rank, size, global_batch_size, state["samples"], own))
        except BaseException:
            self.close()
            raise

    @property
    def bad_samples(self) -> int:
        """As of RankReaders."""
        return sum(bad for *_, bad in self._positions.values())

    @property
    def positions(self) -> dict[int, list[int]]:
        """Of all readers of the rank after the last step."""
        return self._positions

    def read(self, samples: Sequence[int]) -> Rows | None:
        """The rank's samples of the next step, of these numbers in the run; None when the processes were closed meanwhile.

        Raises: what a process raised; ReaderDied when one ended; ValueError above data.max_bad_samples.
        """
        workers = len(self._processes)
        pieces = [self._receive(w) for w in range(workers)]
        if self._closed:
            return None
        before = self.bad_samples
        for piece in pieces:
            self._positions.update(piece.readers)
        if self.bad_samples > max(before, self._limit):
            raise ValueError(f"data.max_bad_samples={self._limit}: this rank has skipped {self.bad_samples}")
        merged = _interleaved([piece.rows for piece in pieces], samples[0] // self._dp_size % workers)
        tensors: dict[str, Any] = {n: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for n, x in merged.items()}
        return Rows(**tensors)

    def reading(self) -> tuple[str, float] | None:
        """The shard that the process whose samples are waited for is at, and since how many seconds."""
        waits = self._waits
        return None if waits is None else (waits[0], time.monotonic() - waits[1])

    def close(self) -> None:
        """Ends the processes, wherever they are."""
        self._closed = True
        for one in self._processes:
            one.process.kill()
        end = time.monotonic() + _END_SECONDS
        for one in self._processes:
            with suppress(subprocess.TimeoutExpired):  # one that hangs in a file system goes when that answers
                one.process.wait(max(0.0, end - time.monotonic()))

    def _start(self, task: _Task) -> None:
        # The training's own path: it may run a copy that is not installed.
        command = f"import sys; sys.path[:] = {sys.path!r}; from rcm_mcore.data.workers import main; main(int(sys.argv[1]))"
        read, write = os.pipe()
        # What a job is told by signals is the training's to act on, which wants its batches until its end: blocked from the
        # process's first moment on, and a session of its own for those that are sent to a group.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1))
        try:
            # Whatever prints goes to the training's stderr.
            streams: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=2, pass_fds=(write,), start_new_session=True)
            process = subprocess.Popen([sys.executable, "-c", command, str(write)], **streams)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            os.close(write)
        self._processes.append(_Process(process, os.fdopen(read, "rb")))
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # one that has died is found when its samples are asked for
            pickle.dump(task, process.stdin)
            process.stdin.flush()

    def _receive(self, worker: int) -> Any:
        """The next piece of a process; what it says before is taken note of."""
        one = self._processes[worker]
        while True:
            try:
                message: _Message = pickle.load(one.out)
            except Exception as error:  # of its end, or of bytes that it cannot have meant
                if self._closed:
                    return None
                if not isinstance(error, EOFError):
                    one.process.kill()
                code = one.process.wait()
                killed = " (SIGKILL: out of memory?)" if code == -signal.SIGKILL and isinstance(error, EOFError) else ""
                raise ReaderDied(
                    f"data.workers: process {worker + 1} of {len(self._processes)}, which reads data.shards, ended with exit "
                    f"code {code}{killed}; see its last words above. Started again, the run goes on from its checkpoint"
                ) from error
            for record in message.records:
                logger = logging.getLogger(record.name)
                if logger.isEnabledFor(record.levelno):
                    logger.handle(record)
            if isinstance(message, _Failed):
                raise message.error
            if isinstance(message, _Waits):
                self._waits = message.shard, time.monotonic() - message.seconds
            else:
                self._waits = None
                return message


def _interleaved(pieces: Sequence[dict[str, Any]], first: int) -> dict[str, Any]:
    """Fields of rows in the order of the step: from pieces[first], the one after it and so on in a circle, one of each."""
    pieces = [*pieces[first:], *pieces[:first]]
    if len(pieces) == 1:
        return pieces[0]
    count = sum(len(piece["keys"]) for piece in pieces)
    merged: dict[str, Any] = {}
    for name, full in pieces[0].items():
        if full is None:
            merged[name] = None
            continue
        array = isinstance(full, np.ndarray)
        rows: Any = np.empty((count, *full.shape[1:]), full.dtype) if array else [""] * count
        for i, piece in enumerate(pieces):
            if i < count:  # one of fewer samples than processes has nothing from the others
                rows[i :: len(pieces)] = piece[name]
        merged[name] = rows if array else tuple(rows)
    return merged


class _Kept(logging.Handler):
    """Keeps what is logged, for the process that has a log."""

    def __init__(self) -> None:
        super().__init__()
        self._records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        record.msg, record.args = record.getMessage(), None  # arguments may not travel
        record.exc_info = None
        self._records.append(record)

    def taken(self) -> list[logging.LogRecord]:
        """Since the last call."""
        taken, self._records = self._records, []
        return taken


def _serve(task: _Task, out: BinaryIO) -> None:
    """Pieces of one step after another, until the pipe is closed."""
    kept, writing = _Kept(), threading.Lock()
    logging.basicConfig(handlers=[kept], level=logging.INFO, force=True)

    def send(kind: Callable[..., _Message], *content: Any) -> None:
        with writing:
            pickle.dump(kind(kept.taken(), *content), out, protocol=5)
            out.flush()

    try:
        options: dict[str, Any] = dict(model=task.model, seed=task.seed, dp_rank=task.dp_rank, dp_size=task.dp_size)
        readers = RankReaders(task.config, **options)
        readers.seek(task.readers)
        threading.Thread(target=_tell_of_waits, args=(readers, send), daemon=True).start()
        first = task.samples
        while True:
            mine = [k for k in range(first, first + task.global_batch_size) if k % task.dp_size == task.dp_rank]
            rows = vars(readers.rows([readers.read(k) for k in mine]))
            arrays = {name: value.numpy() if isinstance(value, Tensor) else value for name, value in rows.items()}
            send(_Piece, arrays, readers.state()["readers"])
            first += task.global_batch_size
    except BrokenPipeError:
        raise
    except BaseException as error:
        send(_Failed, error)


def _tell_of_waits(readers: RankReaders, send: Callable[..., None]) -> None:
    """Every so often where a read is, if one is going on: the limit is of one sample, and the training cannot see them."""
    with suppress(BrokenPipeError):
        while True:
            time.sleep(_POLL_SECONDS)
            if (found := readers.reading()) is not None:
                send(_Waits, *found)


def _end_with_training() -> None:
    """Its end of the standard input is closed when it is gone, however it went."""
    sys.stdin.buffer.read()
    os._exit(0)


def main(descriptor: int) -> None:
    """What a process of `ReaderProcesses` runs; it answers on this file descriptor."""
    torch.set_num_threads(1)
    task = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_training, daemon=True).start()
    with suppress(BrokenPipeError), os.fdopen(descriptor, "wb") as out:
        _serve(task, out)
