"""What the operator sees: a bar or lines on stderr (console.py), one JSON line per step in `log.jsonl`, and wandb if asked
for (wandb_run.py).

Keys of a line, always all of them (null where the phase has none, and for what is not finite):

    step               optimizer steps done, from 1
    phase              pretrain, student or critic
    loss               what was minimised: the weighted sum of the terms below
    loss_scm           loss of the consistency term, (|g| / (|g| + c))^2 by construction (of meanflow (|g| / (|g|^2 + c))^2), so
                       it measures no progress
    loss_dmd           score-distillation loss
    loss_critic        loss of the fake score
    g_norm             mean |g| of the consistency tangent before normalisation (losses.py; of meanflow of its error)
    teacher_gap        mean |F - F_teacher|, of meanflow |u - v_teacher|
    dmd_weight         mean w = mean |x_G - x0_teacher|
    score_gap          mean |x0_fake - x0_teacher| at noised samples of the rollout; score distillation shrinks it
    grad_norm          of the trained network, before any clipping
    lr                 learning rate of the step
    rollout_steps      student evaluations of the rollout
    nonfinite_output   samples left out of the step because the trained network's output was not finite
    nonfinite_target   samples without gradient because their target was not finite
    skipped            1 if the step made no update because it was not finite (train.on_nonfinite=skip), else 0
    bad_samples        samples of the data skipped so far, all ranks
    seconds            wall time of the step
    data_seconds       part of it spent waiting for data
    forward_backward_seconds  of it: all passes and the reduction of gradients, on rank 0
    optimizer_seconds  gradient norm, update, EMA, on rank 0, of this network's step before: known without waiting for a GPU
    save_seconds       for which training stood still before this step, for a checkpoint; null if there was none
    samples_per_second of the global batch
    tokens_per_second  video tokens of the global batch trained on
    tflops_per_rank    10^12 FLOP/s that the method needs (throughput.flops_of_step; what is computed again is not counted)
    mfu                tflops_per_rank over what a large matmul reached on these GPUs before the run; null if not measured
    memory_gib         peak GPU memory of rank 0 so far; null on CPU

What is not a step (started, resumed, saved, a slow rank, ...) is a line of `events.jsonl`: `time` (seconds since 1970), `step`
(the last one done), `event` (what it is), and what there is to say of it. Nothing is ever removed from that file.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

from rcm_mcore.config import LogConfig
from rcm_mcore.training.console import Console
from rcm_mcore.training.wandb_run import WandbRun

log = logging.getLogger(__name__)

KEYS = (
    "step", "phase", "loss", "loss_scm", "loss_dmd", "loss_critic", "g_norm", "teacher_gap", "dmd_weight", "grad_norm", "lr",
    "rollout_steps", "nonfinite_output", "nonfinite_target", "skipped", "bad_samples", "seconds", "data_seconds",
    "samples_per_second", "memory_gib", "score_gap", "forward_backward_seconds", "optimizer_seconds", "save_seconds",
    "tokens_per_second", "tflops_per_rank", "mfu",
)  # fmt: skip


class RunLog:
    """The log of rank 0; on other ranks every method does nothing. `cycle`: steps after which the phases come again."""

    def __init__(
        self,
        folder: Path,
        config: LogConfig,
        *,
        is_main: bool,
        start: int,
        total: int,
        cycle: int,
        resolved: dict[str, Any],
        wandb_id: str | None,
    ) -> None:
        self.wandb_id = wandb_id
        self._console = self._wandb = None
        self._file: _Lines | None = None
        self._events: _Lines | None = None
        self._step = start
        self._save_seconds: float | None = None
        if not is_main:
            return
        self._events = _Lines(folder / "events.jsonl")
        self._file = _Lines(folder / "log.jsonl")
        _drop_after(self._file.path, start)
        self._console = Console(start=start, total=total, cycle=cycle)
        if config.wandb:
            failed = self._without_wandb
            self._wandb = WandbRun(folder, project=config.project, run_id=wandb_id, resolved=resolved, failed=failed)
            self.wandb_id = self._wandb.id

    def write(self, values: dict[str, Any]) -> None:
        """One step; keys that are missing are null, unknown ones are a bug."""
        if self._file is None or self._console is None:
            return
        unknown = values.keys() - set(KEYS)
        assert not unknown, f"log keys without a documented meaning: {sorted(unknown)}"
        line = {key: _finite(values.get(key)) for key in KEYS} | {"save_seconds": self._save_seconds}
        self._step, self._save_seconds = values["step"], None
        self._file.append(line)
        self._console.write(line)
        if self._wandb is not None:
            self._wandb.log(line)

    def rewind(self, step: int) -> None:
        """Forget the steps after `step`: they are done again."""
        self._step = step
        if self._file is None or self._console is None:
            return
        _drop_after(self._file.path, step)
        self._console.rewind(step)

    def event(self, kind: str, **facts: Any) -> None:
        """Something that is not a step."""
        if self._events is None:
            return
        self._events.append({"time": time.time(), "step": self._step, "event": kind, **facts})

    def image(self, name: str, path: Path) -> None:
        """A picture of the last step, to wandb."""
        if self._wandb is not None:
            self._wandb.image(name, path, step=self._step)

    def stood_still(self, seconds: float) -> None:
        """Training stood still for a save, between the last step and the next."""
        self._save_seconds = seconds

    def close(self) -> None:
        """Flush and finish."""
        if self._console is not None:
            self._console.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _without_wandb(self, why: str) -> None:
        log.warning("the run goes on without wandb: %s", why)
        self.event("wandb_failed", error=why)


class _Lines:
    """A file of JSON lines. What a full disk keeps from being written is written later: it must not end a run."""

    def __init__(self, path: Path) -> None:
        self.path, self._left, self._warned = path, b"", False

    def append(self, line: dict[str, Any]) -> None:
        """One more line, whole or not yet."""
        self._left += json.dumps(line).encode() + b"\n"
        try:
            with self.path.open("ab", buffering=0) as file:
                size, left = file.tell(), self._left
                try:
                    while left:
                        left = left[file.write(left) :]
                except OSError:
                    file.truncate(size)
                    raise
        except OSError as error:
            if not self._warned:
                log.warning("%s cannot be written now (%s); its lines wait", self.path, error)
            self._warned = True
            return
        self._left, self._warned = b"", False


def _finite(value: Any) -> Any:
    """JSON has no number for what is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _drop_after(path: Path, step: int) -> None:
    """Remove the lines of steps that a resumed run will do again, and a line that was cut short."""
    if not path.exists():
        return
    text, kept = path.read_text(encoding="utf-8"), []
    for line in text.splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue
    if "".join(kept) == text:
        return
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, path)
