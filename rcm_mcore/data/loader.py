"""Batches of one data-parallel rank, prepared ahead in a thread, resumable at the batch last consumed."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Any

from torch import Tensor

from rcm_mcore.config import DataConfig, ModelConfig
from rcm_mcore.data.readers import RankReaders, Rows
from rcm_mcore.data.shards import Sample
from rcm_mcore.data.workers import ReaderProcesses

logger = logging.getLogger(__name__)
_WARN_SECONDS = 60.0  # of waiting, between warnings
_JOIN_SECONDS = 10.0  # that the thread is given to end in


class DataStalled(RuntimeError):
    """Nothing came from a shard for data.stall_minutes; the message names it and says what to look at."""


@dataclass(frozen=True)
class Batch:
    """The samples of one rank for one step, b = global batch size / data-parallel size of them.

    Attributes:
        latents: [b, C, F, H, W] float32 on CPU; [0] where the loader does not read.
        text: [b, text_len, text_dim] float32 on CPU, zero rows past the prompt; likewise.
        given: [b, C, F, H, W] float32 on CPU, the latents of the given frames, zeros encoded elsewhere; likewise; None where
            the model takes none (`ModelConfig.condition` image and first_last do).
        image: [b, image_tokens, image_dim] float32 on CPU, the image encoder's rows; like `given`.
        prompts, keys: of each sample.
        slots: of each sample, its place in the global batch, from 0.
        step: the step that the batch is for.
        state: the position after this batch (see `DataLoader.state_dict`).
    """

    latents: Tensor
    text: Tensor
    prompts: tuple[str, ...]
    keys: tuple[str, ...]
    slots: tuple[int, ...]
    step: int
    state: dict[str, Any]
    given: Tensor | None = None
    image: Tensor | None = None


class DataLoader:
    """Endless iterator over the batches of one data-parallel rank.

    A thread, started with the first batch, keeps up to data.prefetch batches ready; it reads the samples itself, or has
    data.workers processes do it (workers.py), to the same batches and positions. Its exceptions are raised where
    the batch it was preparing would have been returned. A wait for it is warned about every minute, and raises DataStalled
    when one sample has taken data.stall_minutes. Use as a context manager, or call `close`.

    Args:
        config: the data section.
        model: the network that the samples are for: its text and image rows, and whether frames are given.
        seed: of the order of the shards.
        global_batch_size: samples of a step over all ranks.
        dp_rank, dp_size: this rank's place among the data-parallel ranks.
        reads: whether to read samples, or to hand out batches without them: of the tensor- and context-parallel ranks of
            one data-parallel rank one reads, and sends the others what it read. The state of one that does not is void.
        start_step: the step of the first batch.
        transform: applied to each batch in the thread, for example to draw noise; what it returns is iterated over.
    Raises: ValueError for what `RankReaders` refuses, a global batch that the data-parallel size does not divide, and readers
        that the processes cannot share.
    """

    def __init__(
        self,
        *,
        config: DataConfig,
        model: ModelConfig,
        seed: int,
        global_batch_size: int,
        dp_rank: int,
        dp_size: int,
        reads: bool = True,
        start_step: int = 0,
        transform: Callable[[Batch], Any] | None = None,
    ) -> None:
        if global_batch_size % dp_size:
            raise ValueError(
                f"train.global_batch_size={global_batch_size} is not divisible by the data-parallel size {dp_size}: "
                f"set it to a multiple of {dp_size}"
            )
        self._workers = config.workers
        if self._workers and config.readers % (dp_size * self._workers):
            raise ValueError(
                f"data.workers={self._workers}: data.readers={config.readers} is not divisible by data-parallel size {dp_size} "
                f"times data.workers; set data.readers to a multiple of {dp_size * self._workers}"
            )
        own: dict[str, Any] = dict(model=model, seed=seed, dp_rank=dp_rank, dp_size=dp_size)
        self._readers = RankReaders(config, **own)
        self._reading = dict(own, config=config, global_batch_size=global_batch_size)
        self._processes: ReaderProcesses | None = None
        self._global_batch_size, self._dp_rank, self._dp_size = global_batch_size, dp_rank, dp_size
        self._reads, self._transform = reads, transform
        self._prefetch, self._stall_minutes = config.prefetch, config.stall_minutes
        self._step = start_step
        self._samples = start_step * global_batch_size
        self._state = self._position()

        self._thread: threading.Thread | None = None
        # Guards the three below; notified when any of them changes.
        self._changed = threading.Condition()
        self._ready: deque[tuple[dict[str, Any], Any]] = deque()
        self._error: BaseException | None = None
        self._closed = False

    def state_dict(self) -> dict[str, Any]:
        """The position after the batch last returned (whatever has been prepared ahead), for this rank.

        Plain and JSON-able: {"readers": {v: [epoch, shard, member, bad]}, "samples": of the whole run so far,
        "bad_samples": skipped by this rank's readers, "shards_digest"}. `merge_states` joins those of all ranks.
        """
        return self._state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes after a saved position: this rank's own, or the whole one under any data-parallel size.

        To be called before the first batch. Raises: ValueError if data.shards or data.readers changed since.
        """
        assert self._thread is None, "load_state_dict must be called before the first batch"
        self._readers.load(state)
        self._samples = state["samples"]
        self._state = self._position()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        with self._changed:
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="data-loader", daemon=True)
                self._thread.start()
            self._wait_for_batch()
            if self._closed:
                raise RuntimeError("the DataLoader is closed")
            if not self._ready:
                assert self._error is not None, "woken without a batch or an error"
                raise self._error
            self._state, batch = self._ready.popleft()
            self._changed.notify_all()
            return batch

    def close(self) -> None:
        """Stops the thread (within the sample it is reading) and closes the shards.

        A thread that hangs in a read is left behind with its shards; as a daemon it does not keep the process.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._processes is not None:
            self._processes.close()
        if self._thread is not None:
            self._thread.join(_JOIN_SECONDS)
            if self._thread.is_alive():
                logger.warning("data.shards: the thread that reads %s does not end and is left behind", self._place()[0])
                return
        self._ready.clear()
        self._readers.close()

    def __enter__(self) -> DataLoader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _wait_for_batch(self) -> None:
        """Until there is a batch, an error or the end; raises DataStalled. The lock is held, and given away meanwhile."""
        limit, start = 60 * self._stall_minutes, time.monotonic()
        pause = min(_WARN_SECONDS, limit / 10)
        while not self._changed.wait_for(lambda: self._ready or self._error or self._closed, pause):
            shard, seconds = self._place()
            if seconds is None:
                seconds = time.monotonic() - start
            if seconds >= limit:
                raise DataStalled(
                    f"data.shards: {shard} has given no sample for {seconds / 60:.3g} minutes, the limit is "
                    f"data.stall_minutes={self._stall_minutes:g}: see whether the file system of the shards answers; if it is "
                    "only slow, raise data.prefetch or data.stall_minutes. Started again, the run goes on from its checkpoint"
                )
            logger.warning("waiting for data: %s has given no sample for %.0f s", shard, seconds)

    def _place(self) -> tuple[str, float | None]:
        """The shard being read and for how long; without the time where the thread is at something else."""
        reading = (self._readers if self._processes is None else self._processes).reading()
        return reading or ("the thread that prepares batches", None)

    def _run(self) -> None:
        try:
            while self._wait_for_room():
                batch = self._next_batch()
                if batch is None:
                    return
                item = batch if self._transform is None else self._transform(batch)
                with self._changed:
                    self._ready.append((batch.state, item))
                    self._changed.notify_all()
        except BaseException as error:  # of any kind: a consumer must not wait for a thread that is gone
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _wait_for_room(self) -> bool:
        """Waits until another batch may be prepared; false when the loader is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._ready) < self._prefetch)
            return not self._closed

    def _next_batch(self) -> Batch | None:
        """The next batch, or None when the loader is closed meanwhile."""
        slots = [j for j in range(self._global_batch_size) if (self._samples + j) % self._dp_size == self._dp_rank]
        rows = self._read([self._samples + slot for slot in slots])
        if rows is None:
            return None
        self._samples += self._global_batch_size
        self._step += 1
        return Batch(
            **{field.name: getattr(rows, field.name) for field in fields(rows)},
            slots=tuple(slots),
            step=self._step - 1,
            state=self._position(),
        )

    def _read(self, numbers: list[int]) -> Rows | None:
        """The samples of these numbers in the run, or none where the loader does not read; None when it is closed meanwhile."""
        if not self._reads:
            return self._readers.rows([])
        if self._workers:
            if self._processes is None:
                self._processes = ReaderProcesses(**self._reading, state=self._state)
            if self._closed:
                self._processes.close()
            return self._processes.read(numbers)
        samples: list[Sample] = []
        for number in numbers:
            if self._closed:
                return None
            samples.append(self._readers.read(number))
        return self._readers.rows(samples)

    def _position(self) -> dict[str, Any]:
        state = {**self._readers.state(), "samples": self._samples}
        if self._processes is not None:
            state |= {"readers": dict(self._processes.positions), "bad_samples": self._processes.bad_samples}
        return state
