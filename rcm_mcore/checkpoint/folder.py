"""Where a run's checkpoints live: complete ones only, the newest found again, damage noticed.

`root/step_000000500/` holds megatron's distributed checkpoint, `state.json` and `config.yaml`, and `manifest.json` with the
size and CRC-32 of every other file. A checkpoint is filled under a hidden name and renamed when it is complete; `latest`,
written last, names it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

log = logging.getLogger(__name__)
_MANIFEST = "manifest.json"
_CHUNK = 1 << 22
T = TypeVar("T")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; raised on every rank, with one line that says why."""


class CheckpointFolder:
    """The checkpoints of one run. Methods marked collective are called by every rank of the default group."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def steps(self) -> list[int]:
        """Steps of the checkpoints that were completed, oldest first."""
        return sorted(int(p.name[5:]) for p in self.root.glob("step_*") if p.name[5:].isdigit() and p.is_dir())

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of `step`."""
        return self.root / f"step_{step:09d}"

    def save(self, step: int, fill: Callable[[Path], None], *, keep_last: int) -> Path:
        """Collective: let every rank `fill` a new folder, then publish it and remove all but the newest `keep_last`.

        Those of later steps go too: they were passed over as damaged when the run was resumed. Raises CheckpointError on
        every rank when any rank fails; the checkpoints that existed are then untouched.
        """
        final, partial = self.path(step), self.root / f".partial_step_{step:09d}"
        try:
            _on_main(lambda: self._start(partial))
            _on_every_rank(lambda: fill(partial))
            names = _on_main(lambda: sorted(str(p.relative_to(partial)) for p in partial.rglob("*") if p.is_file()))
            parts = _on_every_rank(lambda: _describe(partial, _share(names)))
            entries = {name: entry for part in parts for name, entry in part.items()}
            _on_main(lambda: self._publish(partial, step, entries, keep_last=keep_last))
        except CheckpointError as error:
            if dist.get_rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            kept = self.steps()
            usable = f"the checkpoint of step {kept[-1]} is untouched" if kept else "there is no earlier checkpoint"
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self.root} (is the disk full? {usable}): {error}"
            ) from None
        return final

    def _start(self, partial: Path) -> None:
        """An empty folder to fill; what an interrupted save left behind goes."""
        for left in self.root.glob(".partial_step_*"):
            shutil.rmtree(left)
        partial.mkdir(parents=True)

    def _publish(self, partial: Path, step: int, entries: dict[str, list[int]], *, keep_last: int) -> None:
        """Turn a filled folder into the newest checkpoint."""
        _write_text(partial / _MANIFEST, json.dumps(entries, indent=1, sort_keys=True))
        final = self.path(step)
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        _write_text(self.root / "latest", final.name)
        steps = self.steps()
        later = [s for s in steps if s > step]
        for old in later + [s for s in steps if s <= step][:-keep_last]:
            shutil.rmtree(self.path(old))

    def newest(self) -> Path | None:
        """Collective: the newest checkpoint whose files are all there and unchanged, or None.

        A damaged one is reported as an error in the log and the one before it is taken.
        """
        for step in _gather(self.steps()[::-1])[0]:
            path = self.path(step)
            problems = [p for p in _gather(_damage(path, _share)) if p]
            if not problems:
                return path
            if dist.get_rank() == 0:
                log.error("checkpoint %s is damaged (%s): going back to the one before it", path, problems[0])
        return None


def check_files(path: Path) -> None:
    """ValueError when a file of a checkpoint is missing or changed; without a manifest nothing is known."""
    if (path / _MANIFEST).is_file() and (problem := _damage(path, lambda names: names)):
        raise ValueError(f"{path} is damaged: {problem}")


def _gather(value: Any) -> list[Any]:
    """`value` of every rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _on_every_rank(action: Callable[[], T]) -> list[T]:
    """What `action` returns on each rank; CheckpointError on all of them, naming the first that failed, if any fails."""
    result, reason = None, ""
    try:
        result = action()
    except CheckpointException as error:  # a BaseException; rank 0 knows who failed, the others only that someone did
        failures = {rank: failure for rank, (failure, _) in error.failures.items()} or {dist.get_rank(): error}
        reason = "; ".join(f"rank {rank}: {failure}" for rank, failure in failures.items())
    except Exception as error:
        reason = f"rank {dist.get_rank()}: {type(error).__name__}: {error}"
    outcomes = _gather((result, reason))
    for _, failed in outcomes:
        if failed:
            raise CheckpointError(failed)
    return [value for value, _ in outcomes]


def _on_main(action: Callable[[], T]) -> T:
    """What `action` returns on rank 0, the only one to do it, told to every rank."""
    return _on_every_rank(lambda: action() if dist.get_rank() == 0 else None)[0]  # type: ignore[return-value]


def _share(names: list[str]) -> list[str]:
    """This rank's part of the files."""
    return names[dist.get_rank() :: dist.get_world_size()]


def _describe(folder: Path, names: list[str]) -> dict[str, list[int]]:
    """Size and CRC-32 by name."""
    return {name: [(folder / name).stat().st_size, _crc32(folder / name)] for name in names}


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
