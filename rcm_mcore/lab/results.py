"""Results of runs as files, one a run, and what is made of them: tables with intervals over seeds, plots.

    OUT/TASK/ROW/seed_N/result.json        {"row", "group", "seed", "facts": {"updates", "seconds", "commit"},
                                            "by_steps": {"1": {measure: value}, ...}}
    OUT/TASK/ROW/seed_N/stage_M/log.jsonl  {"step", "loss_...", ...} of each step of its training
    OUT/TASK/baselines.json                {label: [{measure: value} of each seed]}: real data, the teacher
    OUT/TASK/guidance_G.json               {"guidance", measure: value}: the teacher's samples, 50 steps, at guidance G

A file is there whole or not at all: a run that has one is not done again.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from rcm_mcore.evaluation.intervals import run_interval, runs_table
from rcm_mcore.evaluation.report import metrics_table
from rcm_mcore.lab.rows import Row

RESULT = "result.json"
STEPS = (1, 2, 4)  # of samplers


def write_json(path: Path, value: Any) -> None:
    """All or nothing."""
    _write(path, (json.dumps(value, indent=1) + "\n").encode())


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A log of steps 1, 2, ... as JSON lines, all or nothing."""
    lines = (json.dumps({"step": step, **row}) + "\n" for step, row in enumerate(rows, start=1))
    _write(path, "".join(lines).encode())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """As safetensors, all or nothing."""
    _write(path, safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def logs(task: Path, order: Sequence[Row], seed: int = 0) -> dict[str, Path]:
    """Title -> log of every stage of the rows that have run with this seed."""
    found: dict[str, Path] = {}
    for row in order:
        stages = sorted((task / row.slug / f"seed_{seed}").glob("stage_*/log.jsonl"))
        found |= {row.name if len(stages) == 1 else f"{row.name}, stage {i}": log for i, log in enumerate(stages, start=1)}
    return found


def commit() -> str | None:
    """Of the checkout that runs, with -dirty if it was changed; None where there is none."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # no git
        return None


def write_record(task: Path, path: Path) -> None:
    """Every result of a task and what it is beside in one JSON file, which the tables and plots can be made of again."""
    write_json(path, {"results": read_results(task), "baselines": read_baselines(task), "guidance": read_guidance(task)})


def read_results(task: Path) -> list[dict[str, Any]]:
    """Of every run of a task that has ended, by row and seed. Raises ValueError for a file that cannot be read."""
    found = []
    for path in sorted(task.glob(f"*/seed_*/{RESULT}")):
        try:
            found.append(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path} cannot be read ({error}): remove it, and its run is done again") from None
    return found


def read_guidance(task: Path) -> list[dict[str, Any]]:
    """What the teacher makes at each guidance that was tried, weakest first. ValueError as `read_results`."""
    found = []
    for path in task.glob("guidance_*.json"):
        try:
            found.append(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path} cannot be read ({error}): remove it, and it is made again") from None
    return sorted(found, key=lambda one: one["guidance"])


def read_baselines(task: Path) -> dict[str, list[dict[str, Any]]]:
    """Label -> measures of each seed of real data and the teacher; none before they were made. ValueError as `read_results`."""
    path = task / "baselines.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}): remove it, and it is made again") from None


def by_row(results: Sequence[Mapping[str, Any]], steps: int) -> dict[str, dict[int, Mapping[str, Any]]]:
    """Row -> seed -> its measures at so many steps, of rows with two runs or more."""
    rows: dict[str, dict[int, Mapping[str, Any]]] = {}
    for result in results:
        if str(steps) in result["by_steps"]:
            rows.setdefault(result["row"], {})[result["seed"]] = result["by_steps"][str(steps)]
    return {row: runs for row, runs in rows.items() if len(runs) > 1}


def tables(task: Path, order: Sequence[Row], *, compared: Sequence[str]) -> str:
    """Markdown of each group of rows: a table of its rows, and of those that they are compared with, at 1, 2 and 4 steps below
    each other, baselines first; and a table of the differences. At the end the rows with one run, and what guidance does.

    `compared`: measures of the second table.
    """
    results = read_results(task)
    known = read_baselines(task)
    of_baselines = {label: [_exact(runs, run) for run in runs] for label, runs in known.items() if len(runs) > 1}
    by_steps = {steps: by_row(results, steps) for steps in STEPS}
    text = []
    for group in dict.fromkeys(row.group for row in order):
        own = [row for row in order if row.group == group and any(row.name in found for found in by_steps.values())]
        others = {row.against for row in own}
        rows: dict[str, Sequence[Mapping[str, Any]]] = dict(of_baselines)
        apart: dict[str, Sequence[Mapping[str, Any]]] = {}
        for steps, found in by_steps.items():
            shown = [row for row in order if row.name in found and (row in own or row.name in others)]
            rows |= {f"{row.name}, {steps}": list(found[row.name].values()) for row in shown}
            for row in shown:
                if row in own and row.name != row.against and row.against in found:
                    pairs = differences(found[row.name], found[row.against], compared)
                    apart |= {f"{row.name} - {row.against}, {steps}": pairs} if len(pairs) > 1 else {}
        if own:
            text.append(f"### {group[0].upper()}{group[1:]}\n\n{runs_table(rows, label='sampler, steps')}")
        if apart:
            text.append(f"Differences of runs with the same seed:\n\n{runs_table(apart, label='samplers, steps')}")
    alone = [one for one in results if not any(one["row"] in found for found in by_steps.values())]
    singles = {f"{one['row']}, {n}": one["by_steps"][str(n)] for n in STEPS for one in alone if str(n) in one["by_steps"]}
    if singles:
        singles = {label: runs[0] for label, runs in known.items() if len(runs) == 1} | singles
        table = metrics_table([{"sampler, steps": label, **measures} for label, measures in singles.items()])
        text.append(f"### Of one run only, and so without an interval\n\n{table}")
    if guided := read_guidance(task):
        text.append(f"### The teacher at several strengths of guidance, 50 steps, one run each\n\n{metrics_table(guided)}")
    return "\n".join(text)


def differences(
    runs: Mapping[int, Mapping[str, Any]], others: Mapping[int, Mapping[str, Any]], measures: Sequence[str]
) -> list[dict[str, float]]:
    """Of each seed that both have: what seeds share, the teacher's faults and the prompts' luck, cancels."""
    return [{name: runs[seed][name] - others[seed][name] for name in measures} for seed in runs if seed in others]


def _exact(runs: Sequence[Mapping[str, Any]], run: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers that are the same in every run, which no interval belongs to, as text."""
    same = {name for name, value in run.items() if all(other[name] == value for other in runs)}
    return {name: f"{value:.3g}" if name in same and isinstance(value, float) else value for name, value in run.items()}


def trade_off(task: Path, path: Path, *, quality: str, diversity: str, order: Sequence[str], title: str) -> None:
    """A plot of one measure against another, a panel for each number of steps: means and intervals over seeds.

    The baselines are black, without the teacher's one and two steps, which are far from all else. Logarithmic where
    `quality` spans more than a decade. Needs matplotlib.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    results = read_results(task)
    baselines = {name: runs for name, runs in read_baselines(task).items() if not name.endswith(("Euler 1", "Euler 2"))}
    figure, panels = pyplot.subplots(1, 3, figsize=(15, 5), sharex=True, sharey=True)
    colours = pyplot.get_cmap("tab10").colors  # type: ignore[attr-defined]
    means = [runs[0][quality] for runs in baselines.values()]
    for panel, steps in zip(panels, STEPS):
        found = by_row(results, steps)
        for i, row in enumerate(order):
            if row not in found:
                continue
            x, y = (run_interval([run[name] for run in found[row].values()]) for name in (diversity, quality))
            bars = dict(xerr=x.half_width, yerr=y.half_width, fmt="o", capsize=2, color=colours[i % len(colours)])
            panel.errorbar(x.mean, y.mean, label=row, **bars)
            means.append(y.mean)
        for mark, (label, runs) in zip("*sDv^xP", baselines.items()):
            panel.plot(runs[0][diversity], runs[0][quality], mark, color="black", markersize=5, label=label, linestyle="")
        panel.set_title(f"{steps} step{'s' * (steps > 1)}")
        panel.set_xlabel(diversity)
    if 0 < 10 * min(means) < max(means):
        panels[0].set_yscale("log")
        panels[0].set_ylim(min(means) / 2, 2 * max(means))
    panels[0].set_ylabel(quality)
    panels[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
