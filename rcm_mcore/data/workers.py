"""Reading in processes beside the training's: unpacking small samples is Python, which would hold up the launching of kernels.

Of R data-parallel ranks with W processes each, a process reads what one of R W ranks without them would: its own virtual
readers, hence the same samples in the same order (readers.py). It runs `main`, takes a `_Task` on its standard input and
answers on its standard output, both pickled: `_Waits`, `_Piece`s, or the exception that ended it. A pipe that is full stops
it, one that is closed ends it.
"""

from __future__ import annotations

import logging
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from rcm_mcore.config import DataConfig, ModelConfig
from rcm_mcore.data.readers import RankReaders, Rows

_POLL_SECONDS = 0.5  # a read that takes longer is told of
_PIPE_BYTES = 1 << 20  # as many as may be asked for; each turn of the pipe is a turn of Python's lock
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
class _Waits:
    """A shard has given nothing for so many seconds."""

    shard: str
    seconds: float


@dataclass(frozen=True)
class _Piece:
    """The process's samples of a step (fields of `Rows`), the position after them, and what it logged."""

    rows: dict[str, Any]  # arrays, which are pickled as they lie in memory, for tensors
    readers: dict[int, list[int]]
    records: list[logging.LogRecord]


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
        self._processes = [self._start() for _ in ranks]
        for rank, process in zip(ranks, self._processes):
            own = {v: position for v, position in self._positions.items() if v % size == rank}
            task = _Task(config, model, seed, rank, size, global_batch_size, state["samples"], own)
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # one that has died is found when its samples are asked for
                pickle.dump(task, process.stdin)
                process.stdin.flush()

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

        Raises: what a process raised; RuntimeError when one died; ValueError above data.max_bad_samples.
        """
        workers = len(self._processes)
        pieces = [self._receive(w) for w in range(workers)]
        if self._closed:
            return None
        for piece in pieces:
            self._positions.update(piece.readers)
        if self.bad_samples > self._limit:
            raise ValueError(f"data.max_bad_samples={self._limit}: this rank has skipped {self.bad_samples}")
        merged = _interleaved([piece.rows for piece in pieces], samples[0] // self._dp_size % workers)
        tensors: dict[str, Any] = {n: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for n, x in merged.items()}
        return Rows(**tensors)

    def reading(self) -> tuple[str, float] | None:
        """The shard that the process whose samples are waited for is at, and since how many seconds, once that is long."""
        waits = self._waits
        return None if waits is None else (waits[0], time.monotonic() - waits[1])

    def close(self) -> None:
        """Ends the processes, wherever they are."""
        self._closed = True
        for process in self._processes:
            process.kill()
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):  # one that hangs in a file system goes when that answers
                process.wait(_END_SECONDS)
                for pipe in (process.stdin, process.stdout):
                    with suppress(BrokenPipeError):
                        pipe.close()  # type: ignore[union-attr]

    def _start(self) -> subprocess.Popen[bytes]:
        # A session of its own: what is sent to the training's process group, Ctrl-C for one, is for the training to decide.
        command = [sys.executable, "-c", "from rcm_mcore.data.workers import main; main()"]
        options: dict[str, Any] = dict(start_new_session=True, pipesize=_PIPE_BYTES)
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options)

    def _receive(self, worker: int) -> Any:
        """The next piece of a process; what it says before is taken note of."""
        process = self._processes[worker]
        assert process.stdout is not None
        while True:
            try:
                message = pickle.load(process.stdout)
            except (EOFError, pickle.UnpicklingError):
                if self._closed:
                    return None
                code = process.wait()
                killed = " (SIGKILL: out of memory?)" if code == -signal.SIGKILL else ""
                raise RuntimeError(
                    f"data.workers: process {worker + 1} of {len(self._processes)}, which reads data.shards, ended with exit "
                    f"code {code}{killed}; see its last words above. Started again, the run goes on from its checkpoint"
                ) from None
            if isinstance(message, BaseException):
                raise message
            if isinstance(message, _Piece):
                self._waits = None
                for record in message.records:
                    logging.getLogger(record.name).handle(record)
                return message
            self._waits = message.shard, time.monotonic() - message.seconds


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
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        record.msg, record.args = record.getMessage(), None  # arguments may not travel
        self.records.append(record)

    def taken(self) -> list[logging.LogRecord]:
        """Since the last call."""
        taken, self.records = self.records, []
        return taken


def _serve(task: _Task, out: BinaryIO) -> None:
    """Pieces of one step after another, until the pipe is closed."""
    kept, writing = _Kept(), threading.Lock()
    logging.basicConfig(handlers=[kept], level=logging.INFO)

    def send(message: object) -> None:
        with writing:
            pickle.dump(message, out, protocol=5)
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
            send(_Piece(arrays, readers.state()["readers"], kept.taken()))
            first += task.global_batch_size
    except BrokenPipeError:
        raise
    except BaseException as error:
        send(error)


def _tell_of_waits(readers: RankReaders, send: Any) -> None:
    """Every so often, if a read has not come back for as long."""
    with suppress(BrokenPipeError):
        while True:
            time.sleep(_POLL_SECONDS)
            found = readers.reading()
            if found is not None and found[1] > _POLL_SECONDS:
                send(_Waits(*found))


def main() -> None:
    """What a process of `ReaderProcesses` runs."""
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGUSR1,
    ):  # the training's to act on: it wants its batches until its end
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    out, sys.stdout = sys.stdout.buffer, sys.stderr
    with suppress(BrokenPipeError):
        _serve(pickle.load(sys.stdin.buffer), out)
