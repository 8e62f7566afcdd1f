"""The students of the study: each a change of one run, trained from the same teacher and data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

LAMBDA = 0.01  # the paper's weight of score distillation beside consistency; scm_weight : dmd_weight = 1 : LAMBDA


@dataclass(frozen=True)
class Row:
    """A student. `distill`, `model`: fields of these sections; `stages`: of earlier stages, which share the updates.

    `times`: of the task's student updates; `against`: name of the row that it is compared with.
    """

    name: str
    group: str
    distill: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    stages: tuple[Mapping[str, Any], ...] = ()
    times: int = 1
    against: str = "rCM"

    @property
    def slug(self) -> str:
        """Name of its folder."""
        return "".join(c if c.isalnum() or c in ".-" else "_" for c in self.name)

    @property
    def plan(self) -> tuple[Mapping[str, Any], ...]:
        """The `distill` fields of each stage in turn."""
        return (*self.stages, self.distill)

    @property
    def has_time_embedding(self) -> bool:
        """Whether the row changes how a network sees time, which the plane's has no part for."""
        return bool(self.model.get("bf16_time"))


METHODS, WEIGHTS, LONGER = "methods", "weight of the score term", "three times the updates"
RCM: dict[str, Any] = {"method": "rcm"}
_METHODS = (
    Row("rCM", METHODS, RCM),
    Row("sCM", METHODS, {"method": "scm"}),
    Row("DMD2", METHODS, {"method": "dmd"}),
    Row("dCM", METHODS, {"method": "dcm"}),
    Row("MeanFlow", METHODS, {"method": "meanflow"}, {"interval": True}),
    Row("dCM, sCM, rCM in turn", METHODS, RCM, stages=({"method": "dcm"}, {"method": "scm"})),
)
ROWS = (
    *_METHODS,
    *(
        Row(f"rCM, lambda {weight:g}", WEIGHTS, RCM | {"scm_weight": 1 / weight, "dmd_weight": 1.0})
        for weight in (1.0, 0.1, 0.001)  # 0.01 is rCM's
    ),
    Row("rCM, bfloat16 time", "time embedding", RCM, {"bf16_time": True}),
    Row("sCM, bfloat16 time", "time embedding", {"method": "scm"}, {"bf16_time": True}, against="sCM"),
    Row("rCM, tangent warm-up", "tangent warm-up", RCM | {"tangent_warmup": "WARMUP"}),
    Row("sCM, tangent warm-up", "tangent warm-up", {"method": "scm", "tangent_warmup": "WARMUP"}, against="sCM"),
    Row("rCM, finite differences", "tangent", RCM | {"tangent": "finite_difference"}),
    Row("sCM, finite differences", "tangent", {"method": "scm", "tangent": "finite_difference"}, against="sCM"),
    *(
        replace(row, name=f"{row.name}, 3x", group=LONGER, times=3, against="rCM" if row.name == "rCM" else "rCM, 3x")
        for row in _METHODS
    ),
)
BY_NAME = {row.name: row for row in ROWS}


def find(names: list[str] | None) -> list[Row]:
    """Rows by name or group; without names all but the longer ones. Raises ValueError for a name that is neither."""
    if not names:
        return [row for row in ROWS if row.times == 1]
    groups = {row.group for row in ROWS}
    if unknown := [name for name in names if name not in BY_NAME and name not in groups]:
        raise ValueError(f"--rows {unknown}: there are {'; '.join([*BY_NAME, *sorted(groups)])}")
    return [row for row in ROWS if row.name in names or row.group in names]


def with_warmup(row: Row, updates: int) -> Row:
    """A quarter of the student updates is the tangent warm-up of the rows that have one."""
    if row.distill.get("tangent_warmup") != "WARMUP":
        return row
    return replace(row, distill={**row.distill, "tangent_warmup": updates // 4})
