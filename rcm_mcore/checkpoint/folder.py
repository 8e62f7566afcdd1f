"""Where a run's checkpoints live: complete ones only, the newest found again, damage noticed.

`root/step_000000500/` holds a distributed checkpoint, `state.json` and `config.yaml`, and `manifest.json` with the size and
CRC-32 of every other file. A checkpoint is filled under a hidden name and renamed when it is complete; `latest`, written
last, names it. An old one is renamed before it is removed. `.lock` keeps two runs out of one folder.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import socket
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

log = logging.getLogger(__name__)
_MANIFEST = "manifest.json"
_CHUNK = 1 << 22
T = TypeVar("T")
Entry = list[int]  # size and CRC-32 of a file


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; raised on every rank, with one line that says why."""


class CheckpointFolder:
    """The checkpoints of one run. Methods marked collective are called by every rank of `group` (default: of all).

    A group of its own, over gloo, lets a thread save while others communicate. It must hold every rank.
    """

    def __init__(self, root: str | os.PathLike[str], group: dist.ProcessGroup | None = None) -> None:
        self.root, self._ranks = Path(root), _Ranks(group)
        self._lock: Any = None

    def make(self, patience: float = 60.0) -> None:
        """Collective: the folder is there and locked. Raises: ValueError on every rank when another run has locked it."""

        def make() -> None:
            self.root.mkdir(parents=True, exist_ok=True)
            self._take_lock(patience)

        self._ranks.on_main(make, ValueError)

    def lock_if_there(self, patience: float = 60.0) -> None:
        """Collective: keep other runs out of this folder, if it exists, until this process ends.

        What was killed may take a while to end: a lock is waited for `patience` seconds. Raises: ValueError on every rank.
        """
        self._ranks.on_main(lambda: self._take_lock(patience) if self.root.is_dir() else None, ValueError)

    def unlock(self) -> None:
        """Let other runs use the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _take_lock(self, patience: float) -> None:
        if self._lock is not None:
            return
        file = (self.root / ".lock").open("a+", encoding="utf-8")
        end, told = time.monotonic() + patience, False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "an unknown process"
                if time.monotonic() >= end:
                    file.close()
                    raise ValueError(
                        f"checkpoint.dir={self.root} is in use by {holder}: end that run, or use another checkpoint.dir"
                    ) from None
                if not told:
                    log.warning("checkpoint.dir=%s is in use by %s: waiting for its end", self.root, holder)
                told = True
                time.sleep(min(1.0, patience))
            except OSError as error:  # a file system without locks
                log.warning("checkpoint.dir=%s cannot be locked (%s): see to it that one run uses it", self.root, error)
                break
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        self._lock = file

    def steps(self) -> list[int]:
        """Steps of the checkpoints that were completed, oldest first."""
        return sorted(int(p.name[5:]) for p in self.root.glob("step_*") if p.name[5:].isdigit() and p.is_dir())

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of `step`."""
        return self.root / f"step_{step:09d}"

    def save(
        self,
        step: int,
        fill: Callable[[Path], T],
        finish: Callable[[Path, list[T]], Mapping[str, Entry]] | None = None,
        *,
        keep_last: int,
        keep_every: int | None = None,
    ) -> Path:
        """Collective: let every rank `fill` a new folder and rank 0 `finish` it, then publish it and remove old ones.

        `finish` gets what `fill` returned on each rank, and returns the size and CRC-32 of files whose ones are known; of the
        others they are computed. The newest `keep_last` stay, and those of steps that `keep_every` divides. Those of later
        steps go: they were passed over as damaged when the run was resumed. Raises CheckpointError on every rank when any
        rank fails; the checkpoints that existed are then untouched.
        """
        final, partial = self.path(step), self.root / f".partial_step_{step:09d}"
        try:
            self._ranks.on_main(lambda: self._start(partial))
            results = self._ranks.on_every_rank(lambda: fill(partial))

            def publish() -> None:
                entries = dict(finish(partial, results)) if finish is not None else {}
                names = sorted(str(p.relative_to(partial)) for p in partial.rglob("*") if p.is_file())
                entries |= {name: _describe(partial / name) for name in names if name not in entries}
                self._publish(partial, step, entries, keep_last=keep_last, keep_every=keep_every)

            self._ranks.on_main(publish)
        except CheckpointError as error:
            if self._ranks.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            kept = self.steps()
            usable = f"the checkpoint of step {kept[-1]} is untouched" if kept else "there is no earlier checkpoint"
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self.root} (is the disk full? {usable}): {error}"
            ) from None
        return final

    def _start(self, partial: Path) -> None:
        """An empty folder to fill; what an interrupted save left behind goes."""
        if partial.exists():
            shutil.rmtree(partial)
        for pattern in (".partial_step_*", ".removed_step_*"):
            for left in self.root.glob(pattern):
                _try_to_remove(left)
        partial.mkdir(parents=True)

    def _publish(
        self, partial: Path, step: int, entries: Mapping[str, Entry], *, keep_last: int, keep_every: int | None
    ) -> None:
        """Turn a filled folder into the newest checkpoint."""
        _write_text(partial / _MANIFEST, json.dumps(entries, indent=1, sort_keys=True))
        _sync_folder(partial)
        final = self.path(step)
        if final.exists():
            self._remove(step)
        os.replace(partial, final)
        _write_text(self.root / "latest", final.name)
        _sync_folder(self.root)  # before the ones before go
        steps = self.steps()
        old = [s for s in steps if s <= step][:-keep_last]
        for s in [s for s in steps if s > step] + [s for s in old if not keep_every or s % keep_every]:
            self._remove(s)

    def _remove(self, step: int) -> None:
        """Under another name first, so that half of one is never taken for a checkpoint."""
        name = f".removed_step_{step:09d}"
        taken = len(list(self.root.glob(f"{name}*")))  # by one that could not be removed
        doomed = self.root / (f"{name}_{taken}" if taken else name)
        os.replace(self.path(step), doomed)
        _try_to_remove(doomed)

    def newest(self) -> Path | None:
        """Collective: the newest checkpoint whose files are all there and unchanged, or None.

        A damaged one is reported as an error in the log and the one before it is taken.
        """
        share = lambda names: names[self._ranks.rank :: self._ranks.size]
        for step in self._ranks.gather(self.steps()[::-1])[0]:
            path = self.path(step)
            problems = [p for p in self._ranks.gather(_damage(path, share)) if p]
            if not problems:
                return path
            if self._ranks.rank == 0:
                log.error("checkpoint %s is damaged (%s): going back to the one before it", path, problems[0])
        return None


def check_files(path: Path) -> None:
    """ValueError when a file of a checkpoint is missing or changed; without a manifest nothing is known."""
    if (path / _MANIFEST).is_file() and (problem := _damage(path, lambda names: names)):
        raise ValueError(f"{path} is damaged: {problem}")


class _Ranks:
    """What ranks tell each other about what they did."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def size(self) -> int:
        return dist.get_world_size()

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank."""
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def on_every_rank(self, action: Callable[[], T], kind: type[Exception] | None = None) -> list[T]:
        """What `action` returns on each rank; an error on all of them, naming the first that failed, if any fails.

        It is a CheckpointError, or a `kind` if the failure was one.
        """
        result, reason, expected = None, "", False
        try:
            result = action()
        except Exception as error:
            expected = kind is not None and isinstance(error, kind)
            reason = str(error) if expected else f"rank {self.rank}: {type(error).__name__}: {error}"
        outcomes = self.gather((result, reason, expected))
        for _, failed, is_kind in outcomes:
            if failed:
                raise (kind if is_kind and kind is not None else CheckpointError)(failed)
        return [value for value, _, _ in outcomes]

    def on_main(self, action: Callable[[], T], kind: type[Exception] | None = None) -> T:
        """What `action` returns on rank 0, the only one to do it, told to every rank."""
        return self.on_every_rank(lambda: action() if self.rank == 0 else None, kind)[0]  # type: ignore[return-value]


def _try_to_remove(folder: Path) -> None:
    """Another process may have a file of it open (NFS then keeps the folder): no reason to call a save failed."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        log.warning("%s could not be removed, the next save tries again: %s", folder, error)


def _describe(path: Path) -> Entry:
    """Size and CRC-32 of a file, which is then on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return [path.stat().st_size, _crc32(path)]


def _sync_folder(folder: Path) -> None:
    """Names in a folder are on the disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _crc32(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


def _damage(path: Path, share: Callable[[list[str]], list[str]]) -> str:
    """What is wrong with a share of the files of a checkpoint, or nothing."""
    name = _MANIFEST
    try:
        entries = json.loads((path / name).read_text())
        if not isinstance(entries, dict) or not entries:
            return f"{name} lists no files"
        for name in share(sorted(entries)):
            size, crc = entries[name]
            if (path / name).stat().st_size != size:
                return f"{name} has {(path / name).stat().st_size} bytes, not {size}"
            if _crc32(path / name) != crc:
                return f"{name} has changed since it was written"
    except (OSError, ValueError, TypeError) as error:  # a file that is gone or makes no sense
        return f"{name}: {error}"
    return ""


def _write_text(path: Path, text: str) -> None:
    """Replace a small file at once."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
