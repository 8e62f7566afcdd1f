"""Whether to start a run again: `python -m rcm_mcore.requeue --exit-code N CONFIG.yaml [section.field=value ...]`.

For the job script, after an attempt at a run that ended with exit code N; the other arguments are those of the trainer.
Says why, and exits with 75 if the run is to be started again, else with N (1 for 0 if the run is not finished).

`attempts.jsonl` in checkpoint.dir has a line for each attempt that did not finish the run:

    time       when it ended, seconds since 1970
    job        SLURM_JOB_ID, the same for a job that was requeued; null without Slurm
    exit_code  0: it was asked to stop, and has saved; else it failed
    step       last step in log.jsonl
    saved      step of the newest checkpoint, 0 without one
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Literal

from rcm_mcore.config import Config, load_config
from rcm_mcore.train import build_parser
from rcm_mcore.training.signals import EXIT_STOPPED

Verdict = Literal["finished", "start again", "not started again"]
MAX_WITHOUT_PROGRESS = 5  # attempts of a job, stopped or failed, that leave no newer checkpoint


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = build_parser()
    parser.prog, parser.description, parser.epilog = "python -m rcm_mcore.requeue", (__doc__ or "").partition("\n\n")[2], None
    parser.add_argument("--exit-code", type=int, required=True, help="of the attempt")
    args = parser.parse_intermixed_args(argv)
    failure = args.exit_code or 1
    if args.dry_run:
        return args.exit_code
    try:
        config = load_config(args.config, args.overrides)
        verdict, why = decide(config, args.exit_code, job=os.environ.get("SLURM_JOB_ID"))
    except (ValueError, OSError) as error:  # a folder that can no longer be written, say
        print(f"not started again: {error}")
        return failure
    print(f"{verdict}: {why}")
    return {"finished": args.exit_code, "start again": EXIT_STOPPED, "not started again": failure}[verdict]


def decide(config: Config, exit_code: int, *, job: str | None) -> tuple[Verdict, str]:
    """Whether to start the run again after an attempt, and why; takes a note of the attempt in checkpoint.dir."""
    root = Path(config.checkpoint.dir)
    if not root.is_dir():
        return "not started again", f"the run had not begun (exit code {exit_code}, there is no {root}); the reason is above"
    latest = root / "latest"  # read here and not by checkpoint.folder, which would import torch while the time limit comes near
    saved = int(latest.read_text().removeprefix("step_")) if latest.exists() else 0
    if saved >= config.train.steps:
        return "finished", f"{saved} steps"
    attempt = {"time": time.time(), "job": job, "exit_code": exit_code, "step": _last_step(root / "log.jsonl"), "saved": saved}
    notes = root / "attempts.jsonl"
    earlier = [line for line in _lines(notes) if line["job"] == job]
    with notes.open("a", encoding="utf-8") as file:
        file.write(json.dumps(attempt) + "\n")
    how = f"failed with exit code {exit_code}" if exit_code else "was asked to stop"
    where = f"{how} after step {attempt['step']} of {config.train.steps}, newest checkpoint {saved}"
    if exit_code and earlier and earlier[-1]["exit_code"] and earlier[-1]["step"] == attempt["step"]:
        return "not started again", f"{where}, and failed there the time before; see the log for the reason"
    last = [*earlier, attempt][-MAX_WITHOUT_PROGRESS:]
    if len(last) == MAX_WITHOUT_PROGRESS and len({line["saved"] for line in last}) == 1:
        return "not started again", (
            f"{where}; {MAX_WITHOUT_PROGRESS} attempts have left no newer checkpoint: save more often (checkpoint.every="
            f"{config.checkpoint.every}), or take a longer time limit"
        )
    return "start again", where


def _last_step(log: Path) -> int:
    """The last step that was logged, 0 without one."""
    return max((line["step"] for line in _lines(log)), default=0)


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON-lines file, without one that was cut short."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


if __name__ == "__main__":
    sys.exit(main())
