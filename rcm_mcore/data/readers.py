"""Virtual readers: the order of the samples of a run, the same under every data-parallel size.

V virtual readers share the shards: in each epoch a permutation drawn from (seed, epoch) is dealt out in whole shards,
reader v taking every V-th from the v-th on. The k-th sample of the run, k counting over all steps and slots, comes
from reader k mod V (docs/adr/0001-running-sample-index.md). Rank r of R data-parallel ranks owns the readers and the
samples k with v mod R = k mod R = r, so neither the order nor a saved position depends on R.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from braceexpand import braceexpand  # a requirement of webdataset, whose shard notation this is
from torch import Tensor

from rcm_mcore.config import DataConfig, ModelConfig
from rcm_mcore.data.shards import BadSample, DamagedShard, Members, Sample, Shard, fit_sample

logger = logging.getLogger(__name__)
_PAUSES = (0.1, 1.0, 5.0)  # seconds before each new try to read what the file system did not give


def expand_shards(patterns: Sequence[str]) -> list[str]:
    """The files that paths, globs and brace patterns name, each once, by base name (then by path).

    Raises: ValueError where a pattern, or one of the alternatives in its braces, matches no file.
    """
    paths: set[str] = set()
    for pattern in patterns:
        for alternative in braceexpand(pattern):
            found = [path for path in (alternative, *glob.glob(alternative)) if os.path.isfile(path)]
            if not found:
                part = "" if alternative == pattern else f" (of {pattern!r})"
                hint = f"; it is a folder: write {alternative}/shard_*.tar" if os.path.isdir(alternative) else ""
                raise ValueError(f"data.shards: {alternative!r}{part} matches no file{hint}")
            paths.update(found)
    return sorted(paths, key=lambda path: (os.path.basename(path), path))


def shards_digest(shards: Sequence[str]) -> str:
    """Identifies a list of shards by its base names, so that a folder may move between two halves of a run."""
    names = sorted(os.path.basename(path) for path in shards)
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


def deal_shards(count: int, *, readers: int, reader: int, seed: int, epoch: int) -> list[int]:
    """Indices of the shards, out of `count`, that a reader goes through in an epoch, in order.

    The permutation sorts hashes, because the random generators of numpy and torch may change between versions and a
    resumed run must not.
    """
    hashed = [hashlib.sha256(f"{seed}/{epoch}/{shard}".encode()).digest() for shard in range(count)]
    return sorted(range(count), key=hashed.__getitem__)[reader::readers]


class VirtualReader:
    """One of V readers. It has at most one shard open.

    Attributes:
        epoch, shard, member: the position: the epoch, the index within its deal, the samples of that shard passed.
        bad: bad samples skipped since the run began; the rest of a shard that cannot be read counts as one.
        reading: the path of the shard that `next_sample` reads, or last read.
    """

    def __init__(self, shards: Sequence[str], *, reader: int, readers: int, seed: int) -> None:
        self._shards, self._reader, self._readers, self._seed = shards, reader, readers, seed
        self._open: tuple[Shard, Iterator[tuple[str, Members]]] | None = None
        self.reading = self._key = ""
        self.seek(0, 0, 0, 0)

    def position(self) -> list[int]:
        """[epoch, shard, member, bad], for `seek`."""
        return [self.epoch, self.shard, self.member, self.bad]

    def seek(self, epoch: int, shard: int, member: int, bad: int) -> None:
        """Moves to a position; the headers up to it are read with the next sample."""
        self.close()
        self.epoch, self.shard, self.member, self.bad = epoch, shard, member, bad
        self._deal = self._deal_of(epoch)

    def next_sample(self, fit: Callable[[Sample], Sample], on_bad: Callable[[str, str, str], None]) -> Sample:
        """The next sample that `fit` accepts.

        What the file system refuses (a file that is gone, an input/output error) is tried again, from the same sample, three
        times over six seconds, so that a hiccup does not change the order; then the shard is skipped like a damaged one.

        Args:
            fit: raises BadSample for a sample that does not fit.
            on_bad: told the shard, the key and the reason of each bad sample, after it was counted; may raise.
        Raises: ValueError if no shard of the run holds a good sample.
        """
        fruitless: set[str] = set()  # shards gone through from their start in vain
        from_start = self.member == 0
        while len(fruitless) < len(self._shards):
            path = self._shards[self._deal[self.shard]]
            try:
                if (sample := self._patient_read(path)) is not None:
                    return fit(sample)
            except BadSample as error:
                self._count_bad(path, self._key, error, on_bad)
                continue
            except DamagedShard as error:
                self._count_bad(path, "(rest of the shard)", error, on_bad)
            self._next_shard()
            if from_start:
                fruitless.add(path)
            from_start = True
        raise ValueError(f"data.shards: none of the {len(fruitless)} shards holds a good sample")

    def close(self) -> None:
        if self._open is not None:
            self._open[0].close()
            self._open = None

    def _patient_read(self, path: str) -> Sample | None:
        """`_read`, tried again where the file system fails. Raises: BadSample, DamagedShard."""
        self.reading, member = path, self.member
        for tries, pause in enumerate((*_PAUSES, 0.0), start=1):
            try:
                return self._read(path)
            except OSError as error:
                self.close()
                self.member = member
                if tries > len(_PAUSES):
                    raise DamagedShard(f"cannot be read, tried {tries} times: {error}") from error
                logger.warning("%s cannot be read: %s; try %d comes in %g s", path, error, tries + 1, pause)
            time.sleep(pause)
        raise AssertionError("the last try returns or raises")

    def _read(self, path: str) -> Sample | None:
        """The next sample of the shard, whatever it is; None at its end. Raises: BadSample, DamagedShard, OSError."""
        shard, samples = self._current(path)
        entry = next(samples, None)
        if entry is None:
            return None
        self.member += 1
        self._key, members = entry
        return shard.read(self._key, members)

    def _current(self, path: str) -> tuple[Shard, Iterator[tuple[str, Members]]]:
        if self._open is None:
            shard = Shard(path)
            self._open = shard, shard.skip(self.member)
        return self._open

    def _next_shard(self) -> None:
        self.close()
        self.shard, self.member = self.shard + 1, 0
        if self.shard == len(self._deal):
            self.epoch, self.shard = self.epoch + 1, 0
            self._deal = self._deal_of(self.epoch)

    def _deal_of(self, epoch: int) -> list[int]:
        return deal_shards(len(self._shards), readers=self._readers, reader=self._reader, seed=self._seed, epoch=epoch)

    def _count_bad(self, path: str, key: str, error: Exception, on_bad: Callable[[str, str, str], None]) -> None:
        self.bad += 1
        on_bad(path, key, str(error))


@dataclass(frozen=True)
class Rows:
    """Samples one behind the other; shapes: see `loader.Batch`."""

    latents: Tensor
    text: Tensor
    given: Tensor | None
    image: Tensor | None
    prompts: tuple[str, ...]
    keys: tuple[str, ...]


class RankReaders:
    """The virtual readers of one data-parallel rank, with their checks and counts. Open files: at most V / R.

    Raises: ValueError for patterns that match nothing, fewer shards than readers, a data-parallel size that does not
        divide data.readers.
    """

    def __init__(self, config: DataConfig, *, model: ModelConfig, seed: int, dp_rank: int, dp_size: int) -> None:
        assert 0 <= dp_rank < dp_size, f"data-parallel rank {dp_rank} of {dp_size}"
        shards = expand_shards(config.shards)
        if len(shards) < config.readers:
            raise ValueError(
                f"data.readers={config.readers} but data.shards names only {len(shards)} shards, and a reader needs "
                f"at least one: set data.readers to at most {len(shards)}, or write smaller shards"
            )
        if config.readers % dp_size:
            raise ValueError(
                f"data.readers={config.readers} is not divisible by the data-parallel size {dp_size}: "
                f"set data.readers to a multiple of {dp_size}"
            )
        self._config, self._model = config, model
        self._asked: tuple[VirtualReader, float] | None = None
        self._digest = shards_digest(shards)
        self._readers = {
            v: VirtualReader(shards, reader=v, readers=config.readers, seed=seed)
            for v in range(dp_rank, config.readers, dp_size)
        }

    @property
    def bad_samples(self) -> int:
        """Bad samples that this rank's readers have skipped since the run began."""
        return sum(reader.bad for reader in self._readers.values())

    def read(self, k: int) -> Sample:
        """The k-th sample of the run, fitted (`fit_sample`); to be called in the order of k.

        Raises: ValueError above data.max_bad_samples.
        """
        reader = self._readers.get(k % self._config.readers)
        assert reader is not None, f"sample {k} belongs to another data-parallel rank"
        self._asked = reader, time.monotonic()
        try:
            return reader.next_sample(self._fit, self._on_bad)
        finally:
            self._asked = None

    def rows(self, samples: Sequence[Sample]) -> Rows:
        """Samples, or none, as tensors; `given` and `image` where the model takes them."""
        takes_images = self._model.condition in ("image", "first_last")
        return Rows(
            latents=_stack(sample.latent for sample in samples),
            text=_stack(sample.embed for sample in samples),
            given=_stack(sample.given for sample in samples) if takes_images else None,
            image=_stack(sample.image for sample in samples) if takes_images else None,
            prompts=tuple(sample.prompt for sample in samples),
            keys=tuple(sample.key for sample in samples),
        )

    def reading(self) -> tuple[str, float] | None:
        """The shard that a `read` in another thread is at, and the seconds since it began; None between reads."""
        asked = self._asked
        return None if asked is None else (asked[0].reading, time.monotonic() - asked[1])

    def state(self) -> dict[str, Any]:
        """{"readers": {v: [epoch, shard, member, bad]}, "bad_samples", "shards_digest"} of this rank."""
        return {
            "readers": {v: reader.position() for v, reader in self._readers.items()},
            "bad_samples": self.bad_samples,
            "shards_digest": self._digest,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Moves to a position: this rank's own state, or the whole state of a run under any data-parallel size.

        Raises: ValueError if the shards or data.readers changed since.
        """
        if state["shards_digest"] != self._digest:
            raise ValueError(
                "data.shards: the names of the shards differ from those this run was saved with (digest "
                f"{state['shards_digest']} then, {self._digest} now): resume with the same shards, or start a new run; "
                "in place of a shard that is lost, an empty file of its name is skipped as a damaged one"
            )
        positions = {int(v): position for v, position in state["readers"].items()}  # JSON makes keys strings
        if set(positions) not in (set(range(self._config.readers)), set(self._readers)):
            raise ValueError(
                f"data.readers={self._config.readers} does not match the saved position, which holds "
                f"{len(positions)} readers: resume with the value the run was started with"
            )
        self.seek(positions)

    def seek(self, positions: Mapping[int, Sequence[int]]) -> None:
        """Moves each reader to its position (`VirtualReader.position`)."""
        for v, reader in self._readers.items():
            reader.seek(*positions[v])

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()

    def _fit(self, sample: Sample) -> Sample:
        return fit_sample(sample, latent_shape=self._config.latent_shape, model=self._model)

    def _on_bad(self, shard: str, key: str, reason: str) -> None:
        bad, limit = self.bad_samples, self._config.max_bad_samples
        logger.warning("bad sample %s in %s skipped (%d so far, data.max_bad_samples=%d): %s", key, shard, bad, limit, reason)
        if bad > limit:
            raise ValueError(f"data.max_bad_samples={limit}: this rank has skipped {bad}, the last {key} in {shard}: {reason}")


def _stack(rows: Iterable[Tensor | None]) -> Tensor:
    """One batch of them; [0] of none."""
    present = [row for row in rows if row is not None]
    return torch.stack(present) if present else torch.empty(0)


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The whole state out of those of all data-parallel ranks, to be loaded under any data-parallel size.

    Takes states of `DataLoader.state_dict`; they must be of the same step.
    """
    samples, digests = {s["samples"] for s in states}, {s["shards_digest"] for s in states}
    assert len(samples) == len(digests) == 1, f"states of different steps {samples} or shards {digests}"
    readers = {int(v): list(position) for state in states for v, position in state["readers"].items()}
    assert len(readers) == sum(len(s["readers"]) for s in states), "two states hold the same reader"
    return {
        "readers": dict(sorted(readers.items())),
        "samples": samples.pop(),
        "bad_samples": sum(s["bad_samples"] for s in states),
        "shards_digest": digests.pop(),
    }
