"""A run of Weights & Biases that training never waits for.

Lines go to a thread of their own, through a queue. Whatever goes wrong there (no network, a server that does not answer, a
full disk) ends the use of wandb, is told once, and leaves training alone. WANDB_MODE decides; without it the run is online if
there is a WANDB_API_KEY, else offline. wandb reads the key from the environment by itself; it is taken out of what errors say.
"""

from __future__ import annotations

import os
import queue
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 60.0  # that wandb is given to begin, and to end; what it has not uploaded then stays on disk, for `wandb sync`
_MARGIN = 15.0  # more, for wandb to notice that by itself
_MAX_LINES = 10_000  # that wait for wandb

# Charts are grouped by what stands before the slash.
NAMES = {
    "loss": "loss/total",
    "loss_scm": "loss/scm",
    "loss_dmd": "loss/dmd",
    "loss_critic": "loss/critic",
    "dmd_weight": "loss/dmd_weight",
    "g_norm": "norm/tangent",
    "grad_norm": "norm/gradient",
    "teacher_gap": "gap/teacher",
    "score_gap": "gap/score",
    "nonfinite_output": "nonfinite/output",
    "nonfinite_target": "nonfinite/target",
    "skipped": "nonfinite/skipped",
    "samples": "samples",
    "bad_samples": "data/bad_samples",
    "seconds": "time/step",
    "data_seconds": "time/data",
    "forward_backward_seconds": "time/forward_backward",
    "optimizer_seconds": "time/optimizer",
    "save_seconds": "time/save",
    "samples_per_second": "throughput/samples_per_second",
    "tokens_per_second": "throughput/tokens_per_second",
    "tflops_per_rank": "throughput/tflops_per_rank",
    "mfu": "throughput/mfu",
    "memory_gib": "memory/gib",
}


def name_of(key: str) -> str:
    """A key of log.jsonl in wandb; those without a group of their own are of `run`."""
    return NAMES.get(key, f"run/{key}")


class WandbRun:
    """Feeds wandb; no method raises or waits for it, but `finish`, which waits up to SECONDS and a margin.

    `failed` is called at most once, from any thread, with one line of what went wrong. `id`: of the run, to continue it.
    """

    def __init__(
        self, folder: Path, *, project: str, run_id: str | None, resolved: dict[str, Any], failed: Callable[[str], None]
    ) -> None:
        self.id = run_id or uuid.uuid4().hex[:8]
        self._failed, self._has_failed, self._lock = failed, False, threading.Lock()
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue(_MAX_LINES)
        options = dict(project=project, dir=folder, id=self.id, resume="allow", config=resolved)
        self._thread = threading.Thread(target=self._work, args=(options,), name="wandb", daemon=True)
        self._thread.start()

    def log(self, line: dict[str, Any]) -> None:
        """The values of a step that are not null."""
        self._put(line)

    def image(self, name: str, path: Path, *, step: int) -> None:
        """A picture of a step."""
        self._put({"step": step, name: path})

    def finish(self) -> None:
        """End the run with what was logged."""
        self._put(None)
        self._thread.join(SECONDS + _MARGIN)
        if self._thread.is_alive():
            self._fail(f"wandb has not ended within {SECONDS + _MARGIN:.0f} s")

    def _put(self, line: dict[str, Any] | None) -> None:
        if self._has_failed:
            return
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._fail(f"wandb is {_MAX_LINES} lines behind")

    def _fail(self, why: str) -> None:
        with self._lock:
            if self._has_failed:
                return
            self._has_failed = True
        self._failed(why)

    def _work(self, options: dict[str, Any]) -> None:
        try:
            import wandb

            mode: Any = os.environ.get("WANDB_MODE", "online" if os.environ.get("WANDB_API_KEY") else "offline")
            # finish_timeout also bounds what wandb does when Python exits; stdout and stderr belong to the main thread.
            settings = wandb.Settings(init_timeout=SECONDS, finish_timeout=SECONDS, console="off")
            run = wandb.init(**options, mode=mode, settings=settings)
            while (line := self._lines.get()) is not None and not self._has_failed:
                values = {
                    name_of(key): wandb.Image(str(value)) if isinstance(value, Path) else value
                    for key, value in line.items()
                    if value is not None and key != "step"
                }
                run.log(values, step=line["step"])
            run.finish()
        except Exception as error:
            self._fail(without_key(f"{type(error).__name__}: {error}"))


def without_key(text: str) -> str:
    """The first line of `text`, without the key of the account."""
    key = os.environ.get("WANDB_API_KEY")
    text = text.replace(key, "WANDB_API_KEY") if key else text
    return text.strip().partition("\n")[0]
