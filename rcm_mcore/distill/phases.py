"""What each optimizer step of a run does: a pure function of the configuration and the step number (method.md 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rcm_mcore.config import DistillConfig


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One optimizer step."""

    kind: Literal["pretrain", "student", "critic"]
    own_step: int  # steps of this kind done before
    scm: bool = False  # the step has the consistency term of the method, whichever that is
    dmd: bool = False  # the step has the score-distillation term
    rollout_steps: int = 0  # student evaluations of the rollout, 0: none
    warmup: float = 1.0  # r of the tangent warm-up


def phase_of(step: int, config: DistillConfig) -> Phase:
    """The phase of optimizer step `step` (from 0) of a distillation.

    During the tangent warm-up, and throughout for methods that have none, every step is a student step without score
    distillation; afterwards one step in `student_every` is a student step and the others train the fake score. Rollouts take
    1, 2, ...
    `rollout_max_steps` evaluations in turn, counted apart for the student and for the critic.
    """
    scm, dmd = config.consistency is not None, config.has_fake_score
    after = step - config.tangent_warmup if scm else step
    warmup = 1.0 if config.tangent_warmup == 0 else min(1.0, step / config.tangent_warmup)
    if not dmd:
        return Phase(kind="student", own_step=step, scm=True, warmup=warmup)
    if after < 0:
        return Phase(kind="student", own_step=step, scm=True, warmup=warmup)
    done = -(-after // config.student_every)  # student steps since the warm-up
    student = after % config.student_every == 0
    own = step - after + done if student else after - done
    rollout = 1 + own % config.rollout_max_steps
    if not student:
        return Phase(kind="critic", own_step=own, rollout_steps=rollout)
    return Phase(kind="student", own_step=own, scm=scm, dmd=True, rollout_steps=rollout)


def cycle_of(config: DistillConfig) -> int:
    """Steps after which the kinds of phases come again, tangent warm-up aside."""
    return config.student_every if config.has_fake_score else 1


def steps_by_kind(steps: int, config: DistillConfig) -> tuple[int, int]:
    """How many student and critic steps the first `steps` optimizer steps hold."""
    kinds = [phase_of(step, config).kind for step in range(steps)]
    return kinds.count("student"), kinds.count("critic")
