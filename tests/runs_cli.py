"""In one process: command lines of the trainer one after another, some sabotaged (test_train_cli.py).

Reads FOLDER/cases.json, a list of {"argv", "sabotage"}, and writes FOLDER/results.json: exit code, output and errors of each.
"""

import contextlib
import dataclasses
import io
import json
import logging
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch

from rcm_mcore import train
from rcm_mcore.parallel.mesh import destroy_mesh
from rcm_mcore.training import loop, setup

LIMITS = resource.getrlimit(resource.RLIMIT_FSIZE)
save, with_draws, run_step = loop.save, setup.with_draws, loop.run_step


def full_disk_after_first_save(run, saver):
    """From the second save on, no file may grow over 100 kB."""
    save(run, saver)
    saver.settle()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, LIMITS[1]))


def nan_weight_after_first_save(run, saver):
    save(run, saver)
    saver.settle()
    with torch.no_grad():
        run.networks[0].net.blocks["0"].ffn.linear_fc1.weight[0, 0] = torch.nan


def nan_in_one_sample_of_step_2(config, batch, **rest):
    item = with_draws(config, batch, **rest)
    if batch.step != 1:
        return item
    noise = item.draws.eps_g.clone()
    noise[2, 0, 0, 0, 0] = torch.nan
    return dataclasses.replace(item, draws=dataclasses.replace(item.draws, eps_g=noise))


def signal_in_step_2(trained, item, **rest):
    if item.batch.step == 1:
        signal.raise_signal(signal.SIGTERM)
    return run_step(trained, item, **rest)


def as_under_torchrun():
    os.environ["TORCHELASTIC_RUN_ID"] = "none"
    loop.run_step = signal_in_step_2


SABOTAGE = {
    "full disk": lambda: setattr(loop, "save", full_disk_after_first_save),
    "nan weight": lambda: setattr(loop, "save", nan_weight_after_first_save),
    "nan sample": lambda: setattr(setup, "with_draws", nan_in_one_sample_of_step_2),
    "signal": lambda: setattr(loop, "run_step", signal_in_step_2),
    "signal under torchrun": as_under_torchrun,
    "no time left": lambda: os.environ.__setitem__("SLURM_JOB_END_TIME", str(time.time() - 5)),
    "no time": lambda: os.environ.__setitem__("SLURM_JOB_END_TIME", "soon"),
    None: lambda: None,
}


def run(argv, sabotage):
    SABOTAGE[sabotage]()
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = train.main(argv)
    finally:
        loop.save, setup.with_draws, loop.run_step = save, with_draws, run_step
        for name in ("TORCHELASTIC_RUN_ID", "SLURM_JOB_END_TIME"):
            os.environ.pop(name, None)
        resource.setrlimit(resource.RLIMIT_FSIZE, LIMITS)
        destroy_mesh()
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def main(folder):
    logging.basicConfig(level=logging.CRITICAL)  # what is logged is not asked for here
    results = [run(**case) for case in json.loads((folder / "cases.json").read_text())]
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
