"""The quality laboratory: every method of distillation from the same teacher and data, measured and pictured (docs/quality).

    python tools/lab.py plane                     # eight modes in the plane, exact distributions: 25 minutes of a core
    python tools/lab.py digits                    # moving digits: an hour and a half on two cores
    python tools/lab.py scenes                    # rendered scenes with captions: a GPU, or several, to which jobs are dealt
    python tools/lab.py digits --rows rCM sCM --seeds 3 --jobs 2
    python tools/lab.py scenes --rows "three times the updates"    # every method once more, for longer
    python tools/lab.py guidance scenes           # what the teacher makes at several strengths of guidance
    python tools/lab.py report plane digits       # tables and pictures of what is there

A row is a student of the study (rcm_mcore/lab/rows.py) or a group of them; each is trained once a seed, and a run that has a
result is not done again, so that an interrupted study goes on when it is started again. --quick is a rehearsal: tiny runs
whose numbers mean nothing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path

from tqdm import tqdm

TASKS = ("plane", "digits", "scenes")


def task_of(name: str):
    """The module of a task; imported late, so that --help and mistakes are quick."""
    if name == "plane":
        from rcm_mcore.lab import plane_task

        return plane_task
    from rcm_mcore.lab import digits_task, scene_task

    return {"digits": digits_task, "scenes": scene_task}[name]


def rows_of(task: str, names: list[str] | None):
    """The rows asked for that a task has; ValueError for names that are none."""
    from rcm_mcore.lab.rows import find

    rows = [row for row in find(names) if task != "plane" or not row.has_time_embedding]
    if not rows:
        raise ValueError(f"--rows {names}: the networks of the plane have no time embedding to round")
    return rows


def folder(out: Path, task: str, quick: bool) -> Path:
    """Where a task's results lie; a rehearsal's apart."""
    return out / (f"{task}_quick" if quick else task)


def run_all(args: argparse.Namespace) -> int:
    """Prepare a task, then baselines and every run that has no result, `--jobs` at a time; returns how many have failed."""
    from rcm_mcore.lab.results import RESULT, read_baselines

    root, task = folder(args.out, args.command, args.quick), task_of(args.command)
    rows = rows_of(args.command, args.rows)
    task.prepare(root, quick=args.quick)
    has_baselines = min(map(len, read_baselines(root).values()), default=0) >= args.seeds
    groups = dict.fromkeys(row.group for row in rows)  # one is whole before the next begins
    runs = [(row, seed) for group in groups for seed in range(args.seeds) for row in rows if row.group == group]
    left = [(row, seed) for row, seed in runs if not (root / row.slug / f"seed_{seed}" / RESULT).exists()]
    jobs = [] if has_baselines else [("baselines", partial(task.baselines, root, seeds=args.seeds, quick=args.quick))]
    jobs += [
        (f"{row.name}, seed {seed}", partial(task.run, row, seed, root / row.slug / f"seed_{seed}", quick=args.quick))
        for row, seed in left
    ]
    return run_jobs(jobs, args.jobs or default_jobs(args.command), done=len(runs) - len(left))


def sweep(args: argparse.Namespace) -> int:
    """The teacher's samples at every guidance, measured and tabulated; returns how many have failed."""
    from rcm_mcore.evaluation.report import metrics_table
    from rcm_mcore.lab.results import read_guidance

    if min(args.values) < 0:
        raise ValueError(f"--values {min(args.values):g}: must be at least 0; 1 is no guidance")
    root, task = folder(args.out, args.task, args.quick), task_of(args.task)
    task.prepare(root, quick=args.quick)
    jobs = [(f"guidance {value:g}", partial(task.guided, root, value, quick=args.quick)) for value in sorted(set(args.values))]
    failed = run_jobs(jobs, args.jobs or default_jobs(args.task))
    if found := read_guidance(root):
        print(metrics_table(found))
    return failed


def run_jobs(jobs: list[tuple[str, Callable[[], object]]], workers: int, *, done: int = 0) -> int:
    """Labelled jobs, so many at a time, beside those that are done; returns how many have failed."""
    failed = 0
    # Spawned, because torch and its threads do not survive a fork.
    context, workers = multiprocessing.get_context("spawn"), min(workers, max(1, len(jobs)))
    gpus = context.Queue()
    for gpu in gpus_of_jobs(workers):
        gpus.put(gpu)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=begin, initargs=(gpus,))
    with pool, tqdm(total=done + len(jobs), initial=done, unit="run", dynamic_ncols=True) as bar:
        started = {pool.submit(job): label for label, job in jobs}
        for run in as_completed(started):
            if error := run.exception():
                failed += 1
                bar.write(f"failed: {started[run]}: {error}")
            bar.update()
    return failed


def gpus_of_jobs(jobs: int) -> list[str | None]:
    """The GPU that each job sees, by turns; None: what this process sees, where there are not several."""
    import torch

    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    return [visible[i % count] if count > 1 else None for i in range(jobs)]


def default_jobs(task: str) -> int:
    """Four a GPU, which one alone would leave waiting for Python; one a core without GPUs, and in the plane."""
    import torch

    gpus = 0 if task == "plane" else torch.cuda.device_count()
    return 4 * gpus or os.cpu_count() or 1


def begin(gpus) -> None:
    """A process that runs: its GPU, one thread, no repeated notes of megatron's about what is not installed."""
    import warnings

    if (gpu := gpus.get()) is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu

    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning)


def report(args: argparse.Namespace) -> None:
    """OUT/report/TASK.md with its pictures, and TASK.json, of the results that are there."""
    from rcm_mcore.evaluation.report import training_curves
    from rcm_mcore.lab.results import logs, tables, trade_off, write_record
    from rcm_mcore.lab.rows import METHODS, ROWS, WEIGHTS

    target = args.out / "report"
    for name in args.tasks:
        root = folder(args.out, name, args.quick)
        if not (root / "baselines.json").exists():
            raise ValueError(f"{root} holds no results: run `python tools/lab.py {name}` first")
    target.mkdir(parents=True, exist_ok=True)
    for name in args.tasks:
        root, task, rows = folder(args.out, name, args.quick), task_of(name), rows_of(name, [row.name for row in ROWS])
        traded = [row.name for row in rows if row.group in (METHODS, WEIGHTS)]  # as many as there are colours
        measures = dict(quality=task.QUALITY, diversity=task.DIVERSITY)
        text = tables(root, rows, compared=task.COMPARED)
        methods = [row.name for row in rows if row.group == METHODS]
        trade_off(root, target / f"{name}_trade_off.png", **measures, order=traded, title=name)
        task.picture(root, target / f"{name}.png", methods)
        write_record(root, target / f"{name}.json")
        pictures = f"![samples]({name}.png)\n\n![quality and diversity]({name}_trade_off.png)\n"
        if curves := logs(root, [row for row in rows if row.group == METHODS]):
            training_curves(curves, target / f"{name}_curves.png")
            pictures += f"\n![losses and norm of the tangent, seed 0]({name}_curves.png)\n"
        (target / f"{name}.md").write_text(f"{text}\n{pictures}", encoding="utf-8")
        print(f"{target / name}.md")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in TASKS:
        command = commands.add_parser(name, help=f"train and measure the students of {name}")
        command.add_argument("--rows", nargs="+", help="names of rows or groups (default: all but longer runs)")
        command.add_argument("--seeds", type=int, default=3, help="runs of each row; intervals need 2 (default %(default)s)")
        command.add_argument("--jobs", type=int, help="runs at a time (default: four a GPU, or cores)")
    command = commands.add_parser("guidance", help="the teacher at several strengths of guidance")
    command.add_argument("task", choices=("digits", "scenes"))
    command.add_argument("--values", type=float, nargs="+", default=[1.5, 2.0, 3.0, 4.5], help="(default %(default)s)")
    command.add_argument("--jobs", type=int, help="at a time (default: four a GPU, or cores)")
    command = commands.add_parser("report", help="tables and pictures")
    command.add_argument("tasks", nargs="+", choices=TASKS)
    for command in commands.choices.values():
        command.add_argument("--out", type=Path, default=Path("runs/lab"), help="folder (default %(default)s)")
        command.add_argument("--quick", action="store_true", help="a rehearsal: tiny runs in a folder of their own")
    return parser


def main() -> int:
    parser = build_parser()
    args = parser.parse_args()
    try:
        if args.command == "report":
            report(args)
            return 0
        if args.jobs is not None and args.jobs < 1:
            raise ValueError(f"--jobs {args.jobs}: must be at least 1")
        if args.command == "guidance":
            return 1 if sweep(args) else 0
        if args.seeds < 1:
            raise ValueError(f"--seeds {args.seeds}: must be at least 1")
        return 1 if run_all(args) else 0
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    # Of the processes that run: one thread, and no bars beside this one.
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")
    sys.exit(main())
