"""Task (a): a ring of eight modes in the plane. Seconds a run on a CPU; every number is of a distribution, not of samples."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from rcm_mcore.lab.density import Grid, map_error, student_maps, teacher_maps
from rcm_mcore.lab.plane import Net, make_config, pretrained, ring, schedule, train, with_interval
from rcm_mcore.lab.results import RESULT, STEPS, commit, write_json, write_lines, write_tensors
from rcm_mcore.lab.rows import BY_NAME, Row, with_warmup
from rcm_mcore.parallel.mesh import local_mesh

NAME = "plane"
UPDATES = 2000  # of the student
QUICK_UPDATES = 60
WIDTH = 128
# The normalised gradient of consistency does not grow with the elements of a sample, that of score distillation does: with two
# of them instead of thousands this weight stands for method.md's 100.
SCM_WEIGHT = 10.0
SETTINGS = dict(student_every=2, time_g={"mean": -0.8, "std": 1.6})
QUALITY, DIVERSITY = "outside", "mode_error"
COMPARED = (QUALITY, DIVERSITY)
BESIDE = ("data", "teacher, Euler 50", "teacher, Euler 4")  # in pictures


def run(row: Row, seed: int, out: Path, *, quick: bool = False) -> dict[str, Any]:
    """Train and measure one student; result.json, logs and density.safetensors in `out`. Returns the result."""
    pretraining = QUICK_UPDATES if quick else UPDATES
    updates = row.times * pretraining
    data, grid, row = ring(), Grid(size=96 if quick else 320), with_warmup(row, updates // len(row.plan))
    start = time.perf_counter()
    with local_mesh() as mesh:
        group = mesh.groups.mp
        base = pretrained(group, data, seed, steps=pretraining, width=WIDTH)
        student: Net = with_interval(base) if row.model.get("interval") else copy.deepcopy(base)
        for stage, fields in enumerate(row.plan, start=1):
            config = make_config(**scaled(fields))
            every = config.distill.student_every if config.distill.has_fake_score else 1
            share = updates // len(row.plan)
            warm = config.distill.tangent_warmup
            phases = schedule(config, warm + every * (share - warm))
            critic = copy.deepcopy(base)
            log = train(config, group, phases, student=student, data=data, seed=seed, fake_score=critic)
            write_lines(out / f"stage_{stage}" / "log.jsonl", log)
    seconds = time.perf_counter() - start
    made = {steps: grid.generated(*student_maps(student, steps)) for steps in STEPS}
    by_steps = {steps: {"evaluations": steps, **grid.distances(made[steps], data)} for steps in STEPS}
    by_steps[1]["map_error"] = map_error(student, data)
    facts = {"updates": updates, "seconds": seconds, "commit": commit()}
    result = dict(row=row.name, group=row.group, seed=seed, facts=facts, by_steps={str(n): m for n, m in by_steps.items()})
    write_tensors(out / "density.safetensors", {str(steps): weights.float() for steps, weights in made.items()})
    write_json(out / RESULT, result)
    return result


def scaled(fields: Any) -> dict[str, Any]:
    """Fields of a row for samples of two elements: see SCM_WEIGHT."""
    weight = fields.get("scm_weight", 100.0) * SCM_WEIGHT / 100.0
    return {**SETTINGS, **fields, "scm_weight": weight}


def prepare(out: Path, *, quick: bool = False) -> None:
    """Nothing: the teacher is known."""


def baselines(out: Path, *, seeds: int, quick: bool = False) -> None:
    """The data themselves and the teacher at several numbers of steps; exact, so the same for every seed."""
    data, grid = ring(), Grid(size=96 if quick else 320)
    made: dict[str, Tensor] = {"data": grid.of(data)}
    made |= {f"teacher, Euler {n}": grid.generated(teacher_maps(data, n)) for n in (50, 4, 2, 1)}
    evaluations = {"data": None, **{f"teacher, Euler {n}": n for n in (50, 4, 2, 1)}}
    measures = {label: {"evaluations": evaluations[label], **grid.distances(weights, data)} for label, weights in made.items()}
    write_json(out / "baselines.json", {label: [found] * max(2, seeds) for label, found in measures.items()})
    write_tensors(out / "baselines.safetensors", {label: weights.float() for label, weights in made.items()})


def picture(task: Path, path: Path, order: list[str], seed: int = 0) -> None:
    """Densities: the data and the teacher, then rows at 1, 2 and 4 steps. Needs matplotlib."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    panels = load_file(task / "baselines.safetensors")
    found = {name: task / BY_NAME[name].slug / f"seed_{seed}" / "density.safetensors" for name in order}
    students = [(name, load_file(file)) for name, file in found.items() if file.exists()]
    columns = 1 + len(students)
    figure, axes = pyplot.subplots(max(len(STEPS), 1), columns, figsize=(2.4 * columns, 2.6 * len(STEPS)), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    cells = [(axis, weights, label) for axis, (label, weights) in zip(axes[:, 0], ((name, panels[name]) for name in BESIDE))]
    for column, (name, made) in enumerate(students, start=1):
        cells += [(axis, made[str(steps)], f"{name}, {steps}") for axis, steps in zip(axes[:, column], STEPS)]
    for axis, weights, title in cells:
        axis.imshow(_tone(weights), cmap="magma", origin="lower")
        axis.set_title(title, size=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def _tone(weights: Tensor) -> Tensor:
    """The middle of the plane, its square root so that thin places are seen."""
    size = len(weights)
    middle = weights[size // 4 : -size // 4, size // 4 : -size // 4].T.clamp_min(0)
    return (middle / middle.max()).sqrt()
