"""What stands on stderr while a run goes on: a bar on a terminal; elsewhere, as under Slurm, a plain line now and then."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from typing import Any

from tqdm import tqdm

log = logging.getLogger(__name__)

INTERVAL = 30.0  # seconds between lines, at least; the first and the last step always have one


class Console:
    """Of a run that goes on after step `start`, to `total`; `cycle`: steps after which its phases come again."""

    def __init__(self, *, start: int, total: int, cycle: int) -> None:
        self._start, self._total, self._last = start, total, 0.0
        self._saving = 0.0
        self._lines: deque[dict[str, Any]] = deque(maxlen=cycle)
        self._first = True
        self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True) if sys.stderr.isatty() else None

    def write(self, line: dict[str, Any]) -> None:
        """A step, as in log.jsonl."""
        if self._bar is not None:
            shown = {k: f"{line[k]:.4g}" for k in ("loss", "g_norm", "grad_norm", "seconds") if line[k] is not None}
            self._bar.set_postfix({"phase": line["phase"], **shown}, refresh=False)
            self._bar.update(1)
            return
        self._lines.append(line)
        self._saving += line["save_seconds"] or 0.0
        now = time.monotonic()
        if self._first or line["step"] == self._total or now - self._last >= INTERVAL:
            self._first, self._last = False, now
            log.info("%s", self.summary())

    def rewind(self, step: int) -> None:
        """The steps after `step` are done again."""
        self._start, self._saving = min(self._start, step), 0.0
        self._lines.clear()
        if self._bar is not None:
            self._bar.n = step
            self._bar.refresh()

    def summary(self) -> str:
        """The last step in a line: times and rates are means over the last cycle of phases; the end adds the saves."""
        line, count = self._lines[-1], len(self._lines)
        seconds = sum(x["seconds"] for x in self._lines) / count
        saving = self._saving / (line["step"] - self._start)
        waits = sum(x["data_seconds"] for x in self._lines) / count / seconds
        tokens = line["tokens_per_second"] * line["seconds"]  # the same in every step
        end = time.localtime(time.time() + (self._total - line["step"]) * (seconds + saving))
        done = ", ".join([line["phase"], *(f"{k} {line[k]:.4g}" for k in ("loss", "g_norm") if line[k] is not None)])
        memory = "" if line["memory_gib"] is None else f", {line['memory_gib']:.1f} GiB"
        return (
            f"step {line['step']} of {self._total}: {done}; {seconds:.3g} s a step, "
            f"ends {time.strftime('%a %Y-%m-%d %H:%M', end)}, {tokens / seconds:.4g} tokens/s, "
            f"{waits:.0%} waiting for data{memory}"
        )

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()
