"""A folder of shards that several processes write, block by block, and that a killed run can be continued in.

Item i of the input belongs to block i // samples_per_shard, and a block gives at most one shard in each subfolder. Block b
is the work of rank b mod world size, whatever else happens, so ranks need not talk to each other, and another number of
ranks may finish what some began.

    OUT/arguments.json            what the data set is made from; a run with other arguments is refused
    OUT/[SUBFOLDER/]shard_*.tar   complete shards; numbered by block, so numbers may be missing
    OUT/progress/block_*.json     written after the shards of a block: what is in them, what was skipped and why
    OUT/dataset.json              the manifest, written last: a folder that holds it is complete
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor
from tqdm import tqdm

from rcm_mcore.data.shards import Sample, ShardWriter

logger = logging.getLogger(__name__)

MANIFEST = "dataset.json"
NEGATIVE_EMBEDDING = "negative_embedding.safetensors"
_ARGUMENTS = "arguments.json"
_PROGRESS = "progress"


@dataclass(frozen=True)
class Outcome:
    """What became of an item: a sample for the shards of a subfolder, or the reason why it was skipped."""

    index: int
    name: str
    sample: Sample | None = None
    subfolder: str = ""
    reason: str = ""


class ShardFolder:
    """See the module.

    Args:
        root: the folder, which may be there, empty or begun.
        arguments: JSON-able; what the contents depend on.
        items: how many there are.
        samples_per_shard: items of a block.
        files: further files, relative to `root`, that must be there before it is complete.
    """

    def __init__(
        self,
        root: Path,
        *,
        arguments: Mapping[str, Any],
        items: int,
        samples_per_shard: int,
        files: Sequence[str] = (),
    ) -> None:
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard={samples_per_shard}: must be at least 1")
        self.root, self.files = root, tuple(files)
        # As JSON gives it back, so that it can be compared.
        self.arguments = json.loads(json.dumps({**arguments, "samples_per_shard": samples_per_shard}))
        self._items, self._per_shard = items, samples_per_shard
        self.blocks = range(-(-items // samples_per_shard))

    def complete(self) -> dict[str, Any] | None:
        """The manifest if the folder holds this data set in full; None if it is empty, missing, or begun. Writes nothing.

        Raises: ValueError when it holds something else, or was begun with other arguments.
        """
        begun = self.root / _ARGUMENTS
        if not begun.is_file():
            if self.root.exists() and not self.root.is_dir():
                raise ValueError(f"{self.root} is a file; give another folder")
            there = self.root.iterdir() if self.root.exists() else ()
            others = [path.name for path in there if not path.name.startswith(f".{_ARGUMENTS}")]
            if others and not begun.is_file():  # another rank may just have begun it
                raise ValueError(f"{self.root} is not empty and no data set of this tool ({others[0]}); give another folder")
            return None
        try:
            found = json.loads(begun.read_text(encoding="utf-8"))
            differ = [name for name in {**found, **self.arguments} if found.get(name) != self.arguments.get(name)]
        except (ValueError, TypeError):
            raise ValueError(f"{begun} is damaged; remove the folder {self.root} or give another one") from None
        if differ:
            changes = ", ".join(f"{name} was {found.get(name)!r}, is {self.arguments.get(name)!r}" for name in differ)
            raise ValueError(f"{self.root} was begun with other arguments ({changes}); use those, or another folder")
        try:
            return json.loads((self.root / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def begin(self) -> None:
        """Records the arguments. Before it, nothing is written; after it, other arguments are refused."""
        if not (self.root / _ARGUMENTS).is_file():
            write_json(self.root / _ARGUMENTS, self.arguments)

    def pending(self, rank: int, world_size: int) -> list[int]:
        """The blocks of this rank that are not finished, in order."""
        return [block for block in self.blocks[rank::world_size] if self._finished(block) is None]

    def items_of(self, block: int) -> range:
        """The items of a block."""
        return range(block * self._per_shard, min((block + 1) * self._per_shard, self._items))

    def write(self, block: int, outcomes: Iterable[Outcome]) -> None:
        """Writes the shards of a block and, when they have their names, the record of it.

        Takes one outcome of each item, in order. Raises: what `outcomes` raises, OSError; then no shard of the block and no
        record takes its name.
        """
        skipped: list[dict[str, Any]] = []
        writers: dict[str, ShardWriter] = {}
        expected = iter(self.items_of(block))
        with contextlib.ExitStack() as stack:
            for outcome in outcomes:
                assert outcome.index == next(expected), f"outcome of item {outcome.index} out of order in block {block}"
                if outcome.sample is None:
                    skipped.append({"index": outcome.index, "name": outcome.name, "reason": outcome.reason})
                    continue
                if outcome.subfolder not in writers:
                    path = self.root / outcome.subfolder / f"shard_{block:06d}.tar"
                    writers[outcome.subfolder] = stack.enter_context(ShardWriter(path))
                writers[outcome.subfolder].add(outcome.index, outcome.sample)
            assert next(expected, None) is None, f"an item of block {block} has no outcome"
            for writer in writers.values():
                writer.commit()
        shards = {
            writer.path.relative_to(self.root).as_posix(): {
                "samples": writer.samples,
                "bytes": writer.path.stat().st_size,
                "sha256": _sha256(writer.path),
            }
            for writer in writers.values()
        }
        write_json(self._record(block), {"shards": dict(sorted(shards.items())), "skipped": skipped})

    def write_all(self, outcomes: Iterable[Outcome], *, items: int, label: str, show: bool) -> None:
        """Writes the blocks of these outcomes, of which there are `items`, whole blocks in order; logs what is skipped.

        Args:
            label: who this is, for the log.
            show: whether to show a progress bar.
        """
        start = time.perf_counter()
        skipped = 0

        def counted(bar: tqdm) -> Iterator[Outcome]:
            nonlocal skipped
            for outcome in outcomes:
                if outcome.sample is None:
                    skipped += 1
                    logger.warning("%s skipped: %s", outcome.name, outcome.reason)
                    bar.set_postfix(skipped=skipped)
                bar.update()
                yield outcome

        with tqdm(total=items, desc=label, unit="video", disable=not show, dynamic_ncols=True) as bar:
            for block, group in groupby(counted(bar), key=lambda outcome: outcome.index // self._per_shard):
                self.write(block, group)
        seconds = time.perf_counter() - start
        rate = items / seconds if items else 0.0
        report = "%s: %d videos written, %d skipped in %.1f s, %.3g videos/s"
        logger.info(report, label, items - skipped, skipped, seconds, rate)

    def finish(self, *, versions: Mapping[str, str]) -> dict[str, Any] | None:
        """Writes and returns the manifest if every block and file is there; otherwise None. Any rank may call it.

        Raises: ValueError if every item was skipped.
        """
        records = [self._finished(block) for block in self.blocks]
        missing = [name for name in self.files if not (self.root / name).is_file()]
        if missing or any(record is None for record in records):
            return None
        shards: dict[str, Any] = {}
        skipped: list[dict[str, Any]] = []
        for record in records:
            assert record is not None
            shards |= record["shards"]
            skipped += record["skipped"]
        samples = sum(shard["samples"] for shard in shards.values())
        assert samples + len(skipped) == self._items, f"{samples} samples and {len(skipped)} skipped of {self._items} items"
        if not samples:
            first = f"{skipped[0]['name']}: {skipped[0]['reason']}"
            raise ValueError(f"all {self._items} inputs were skipped, the first {first}; nothing is left for {self.root}")
        manifest = {
            "arguments": self.arguments,
            "counts": {"inputs": self._items, "samples": samples, "skipped": len(skipped), "shards": len(shards)},
            "samples_by_folder": _by_folder(shards),
            "shards": dict(sorted(shards.items())),
            "files": {name: {"sha256": _sha256(self.root / name)} for name in self.files},
            "skipped": skipped,
            "versions": dict(versions),
        }
        write_json(self.root / MANIFEST, manifest)
        return manifest

    def _record(self, block: int) -> Path:
        return self.root / _PROGRESS / f"block_{block:06d}.json"

    def _finished(self, block: int) -> dict[str, Any] | None:
        """The record of a block whose shards are there in full."""
        try:
            record = json.loads(self._record(block).read_text(encoding="utf-8"))
            whole = all((self.root / name).stat().st_size == shard["bytes"] for name, shard in record["shards"].items())
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        return record if whole else None


def write_embedding(path: Path, embed: Tensor) -> None:
    """Writes the text rows of a negative prompt for `load_embedding`."""
    with replacing(path) as temporary:
        # Not save_file, whose files only their owner may read, whatever the umask.
        temporary.write_bytes(safetensors.torch.save({"embed": embed.contiguous()}))


def write_json(path: Path, content: Any) -> None:
    """Writes a file that is there whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def replacing(path: Path):
    """A name to write to, of this process alone, that becomes `path` when the block ends without an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.partial")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _by_folder(shards: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for name, shard in shards.items():
        counts[name.rpartition("/")[0] or "."] += shard["samples"]
    return dict(sorted(counts.items()))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
