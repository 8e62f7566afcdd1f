"""On every rank: runs that are asked to stop, and their continuation (test_signals.py).

The plan is a JSON list of [configuration, signal, rank that gets it, when]; results are [step it ended at, its files].
"""

import json
import logging
import os
import signal
import sys
from pathlib import Path

import torch.distributed as dist

from rcm_mcore.config import load_config
from rcm_mcore.parallel.mesh import destroy_mesh, init_distributed
from rcm_mcore.training import loop
from rcm_mcore.training.signals import listening

run_step, save = loop.run_step, loop.save


def kill_in(function, is_now, name, rank):
    """`function`, during which `rank` gets a signal, in the call for which `is_now`(its first arguments)."""

    def wrapped(*args, **options):
        if is_now(*args) and dist.get_rank() == rank:
            os.kill(os.getpid(), getattr(signal, name))
        return function(*args, **options)

    return wrapped


def one(path, name, rank, when):
    """Train; a signal comes `when`: "start", "save" of step 2, in a "step", the third, or "last", the sixth."""
    loop.run_step, loop.save = run_step, save
    step = {"step": 2, "last": 5}.get(when)
    loop.run_step = kill_in(run_step, lambda trained, item: item.batch.step == step, name, rank)
    if when == "save":
        loop.save = kill_in(save, lambda run, saver: run.state.step == 2, name, rank)
    with listening() as stop:
        if when == "start" and dist.get_rank() == rank:
            os.kill(os.getpid(), getattr(signal, name))
        run = loop.train(load_config(path), stop)
    destroy_mesh()
    return [run.state.step, sorted(p.name for p in run.folder.root.iterdir())]


def main(folder):
    logging.getLogger("megatron").setLevel(logging.ERROR)
    init_distributed()
    results = []
    for arguments in json.loads((folder / "plan.json").read_text()):
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, one(*arguments))
        results.append(everyone)
    if dist.get_rank() == 0:
        (folder / f"results_{dist.get_world_size()}.json").write_text(json.dumps(results))
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
