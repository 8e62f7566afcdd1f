"""Time of a device's work."""

from __future__ import annotations

import time
from typing import Any

import torch


class Stopwatch:
    """Spans of time of this rank's device, without waiting for it: `seconds` of events that have passed long ago."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._begun: Any = None
        self._spans: list[tuple[Any, Any]] = []

    def begin(self) -> None:
        self._begun = moment(on_gpu=self._on_gpu)

    def end(self) -> None:
        """The span is over; without a `begin` there is none."""
        if self._begun is not None:
            self._spans.append((self._begun, moment(on_gpu=self._on_gpu)))
            self._begun = None

    def take(self) -> list[float]:
        """Seconds of each span since the last call. On a GPU waits for the last of them."""
        spans, self._spans = self._spans, []
        if not self._on_gpu:
            return [end - begin for begin, end in spans]
        if spans:
            spans[-1][1].synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in spans]


def moment(*, on_gpu: bool) -> Any:
    """Now: on a GPU an event on its timeline, else seconds."""
    if not on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
