"""On every rank: a plan of runs, interruptions and resumptions, in the order given (test_resume.py).

The plan is a JSON list of [action, arguments ...]; what an action returns on each rank goes to the results by its place.
"""

import dataclasses
import json
import logging
import resource
import shutil
import sys
import zlib
from pathlib import Path

import torch.distributed as dist

from rcm_mcore.checkpoint import CheckpointError, CheckpointFolder
from rcm_mcore.config import load_config
from rcm_mcore.parallel.mesh import destroy_mesh, init_distributed
from rcm_mcore.training import loop, setup
from rcm_mcore.training.loop import save, train
from rcm_mcore.training.saver import Saver
from rcm_mcore.training.setup import check, set_up
from rcm_mcore.training.step import NonFiniteError


def run(path):
    """Train as the command line would."""
    config = load_config(path)
    check(config, dist.get_world_size())
    train(config)


def cut(source, target, step):
    """`target` is what a run that was killed after the checkpoint of `step`, in the middle of a line of its log, left."""
    if dist.get_rank() == 0:
        source, target = Path(source), Path(target)
        shutil.copytree(source, target)
        for path in target.glob("step_*"):
            if int(path.name[5:]) > step:
                shutil.rmtree(path)
        (target / "latest").write_text(f"step_{step:09d}")
        lines = [json.loads(line) for line in (target / "log.jsonl").read_text().splitlines()]
        kept = [line if line["step"] <= step else line | {"loss": -1.0} for line in lines]  # to be told from the new ones
        (target / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept) + '{"step": 999, "phase": "stu')
    dist.barrier()


def rewrite(path, target):
    """Load the newest checkpoint of a run under its mesh and write it, as it is, to the run folder `target`."""
    loaded = set_up(load_config(path))
    folder = CheckpointFolder(target)
    saver = Saver(folder, loaded.networks, config=loaded.config, mesh=loaded.mesh, report=lambda *event, **facts: None)
    save(loaded, saver)
    saver.settle(last=True)
    saver.close()


def pass_over(run, position):
    """Let a run go on past the samples that another checkpoint has read, as after a rollback."""
    if dist.get_rank() == 0:
        (path,) = Path(run).glob("step_*/state.json")
        state = json.loads(path.read_text()) | {"rollbacks": 1}
        state["data"] = json.loads((Path(position) / "state.json").read_text())["data"]
        path.write_text(json.dumps(state))
        (path.parent / "manifest.json").unlink()
        files = [p for p in path.parent.iterdir() if p.is_file()]
        manifest = {p.name: [p.stat().st_size, zlib.crc32(p.read_bytes())] for p in files}
        (path.parent / "manifest.json").write_text(json.dumps(manifest))
    dist.barrier()


def unwritable(path, rank):
    """Train; from its first save on, `rank` cannot write files of more than 100 kB; returns the error.

    Not from the beginning: the first step of a student and that of a critic compile their kernels to files.
    """
    limits, save = resource.getrlimit(resource.RLIMIT_FSIZE), loop.save

    def full(run, saver):
        if dist.get_rank() == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        save(run, saver)

    loop.save = full
    try:
        train(load_config(path))
    except CheckpointError as error:
        return str(error)
    finally:
        loop.save = save
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def poisoned(path, step, name, rank=None, again=False):
    """Train with draws of `step` (from 0), by their name, that are not finite, on all ranks or one; returns the error or None.

    With `again` those of later steps and after a rollback are so too.
    """
    with_draws = setup.with_draws

    def poison(config, batch, *, rollbacks):
        item = with_draws(config, batch, rollbacks=rollbacks)
        now = batch.step >= step if again else batch.step == step and not rollbacks
        if not now or rank not in (None, dist.get_rank()) or getattr(item.draws, name) is None:
            return item
        bad = {name: getattr(item.draws, name) * float("nan")}
        return dataclasses.replace(item, draws=dataclasses.replace(item.draws, **bad))

    setup.with_draws = poison
    try:
        train(load_config(path))
    except NonFiniteError as error:
        return str(error)
    finally:
        setup.with_draws = with_draws


def main(folder):
    logging.getLogger("megatron").setLevel(logging.CRITICAL)
    init_distributed()
    results = []
    for name, *arguments in json.loads((folder / "plan.json").read_text()):
        actions = (run, cut, rewrite, pass_over, unwritable, poisoned)
        result = {action.__name__: action for action in actions}[name](*arguments)
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, result)
        results.append(everyone)
        destroy_mesh()
    if dist.get_rank() == 0:
        (folder / f"results_{dist.get_world_size()}.json").write_text(json.dumps(results))
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
