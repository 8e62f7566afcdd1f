"""Where the time of optimizer steps goes: spans on the device's own timeline, without waiting for it within a step.

Phases of a step, in their order; those that a step does not have are missing:

    teacher            both branches of the guided teacher, in one batch, for the consistency term
    dual               the student's pass with a tangent and a graph
    dual backward
    rollout            the student's evaluations without a graph
    rollout with graph the last of them, of a student step
    fake score         at the noised rollout
    teacher at rollout likewise
    rollout backward
    forward            of the critic, with a graph
    backward           of the critic
    gradients          their reduction over ranks, as far as backward does not hide it
    optimizer          gradient norm, update, EMA
    rest               all else: samples and what draws need, losses, waiting for other stages, for data and for the host
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules

from rcm_mcore.distill.steps import Roles
from rcm_mcore.dual import Dual
from rcm_mcore.models import DiffusionTransformer
from rcm_mcore.training import networks
from rcm_mcore.training.optim import NetworkOptimizer
from rcm_mcore.training.stopwatch import moment

PHASES = (
    "teacher", "dual", "dual backward", "rollout", "rollout with graph", "fake score", "teacher at rollout", "rollout backward",
    "forward", "backward", "gradients", "optimizer", "rest",
)  # fmt: skip
_BACKWARD_OF = {"dual": "dual backward", "rollout with graph": "rollout backward", "forward": "backward"}
_NO_PASS = ("gradients", "optimizer")


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Seconds of one step on this rank: of the whole, of its phases, and from the first pass to the end of the last."""

    seconds: float
    phases: dict[str, float]
    passes: float

    @property
    def busy(self) -> float:
        """Seconds of the forwards and backwards."""
        return sum(value for name, value in self.phases.items() if name not in (*_NO_PASS, "rest"))


@dataclass
class _Step:
    start: Any = None
    end: Any = None
    spans: list[tuple[str, Any, Any]] = field(default_factory=list)


class Timeline:
    """Watches, as a context manager, the passes, reductions and updates of this process; `step` brackets a step.

    It knows networks by who they are in `roles`, and a pass by what it is given.
    """

    def __init__(self, roles: Roles, device: torch.device) -> None:
        self._roles, self._on_gpu = roles, device.type == "cuda"
        self._steps: list[_Step] = []
        self._open: _Step | None = None
        self._on_rollout, self._graph = False, ""
        self._before: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Timeline:
        self._watch(DiffusionTransformer, "forward", self._name_of_forward)
        self._watch(schedules, "backward_step", lambda *_: _BACKWARD_OF[self._graph])
        self._watch(networks, "finalize_model_grads", lambda *_: "gradients")
        for method in ("prepare_and_clip", "step", "update_ema"):
            self._watch(NetworkOptimizer, method, lambda *_: "optimizer")
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name, function in self._before:
            setattr(owner, name, function)
        self._before.clear()

    @contextmanager
    def step(self) -> Iterator[None]:
        """What runs inside is one step."""
        self._open, self._on_rollout = _Step(start=moment(on_gpu=self._on_gpu)), False
        yield
        self._open.end = moment(on_gpu=self._on_gpu)
        self._steps.append(self._open)
        self._open = None

    def take(self) -> list[StepTimes]:
        """Of the steps since the last call. On a GPU waits for the last of them."""
        steps, self._steps = self._steps, []
        if steps and self._on_gpu:
            steps[-1].end.synchronize()
        return [self._times(step) for step in steps]

    def _times(self, step: _Step) -> StepTimes:
        phases: dict[str, float] = {}
        for name, start, end in step.spans:
            phases[name] = phases.get(name, 0.0) + self._between(start, end)
        seconds = self._between(step.start, step.end)
        phases["rest"] = seconds - sum(phases.values())
        passes = [span for span in step.spans if span[0] not in _NO_PASS]
        whole = self._between(passes[0][1], passes[-1][2]) if passes else 0.0
        return StepTimes(seconds=seconds, phases={n: phases[n] for n in PHASES if n in phases}, passes=whole)

    def _watch(self, owner: Any, name: str, phase: Callable[..., str]) -> None:
        function = getattr(owner, name)

        @wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self._open is None:
                return function(*args, **kwargs)
            called, start = phase(*args), moment(on_gpu=self._on_gpu)
            result = function(*args, **kwargs)
            self._open.spans.append((called, start, moment(on_gpu=self._on_gpu)))
            return result

        self._before.append((owner, name, function))
        setattr(owner, name, watched)

    def _name_of_forward(self, net: DiffusionTransformer, x: Any, *_: Any) -> str:
        has_graph = torch.is_grad_enabled()
        if net is self._roles.teacher:
            return "teacher at rollout" if self._on_rollout else "teacher"
        if net is self._roles.fake_score:
            name = "forward" if has_graph else "fake score"
        elif isinstance(x, Dual):
            name = "dual"
        else:
            name, self._on_rollout = "rollout with graph" if has_graph else "rollout", True
        if has_graph:
            self._graph = name
        return name

    def _between(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) / 1e3 if self._on_gpu else end - start
