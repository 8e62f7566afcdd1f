"""On every rank: what the guards see and refuse (test_guards.py). `ranks_guards.py FOLDER compare | end`.

compare: runs one after another, among them one with a slow rank, one with another configuration and one with a broken GPU.
end: rank 1 imports the copy of rcm_mcore in FOLDER/other, which is refused; then it hangs in its third step.
"""

import contextlib
import io
import json
import logging
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

if sys.argv[2] == "end" and os.environ["RANK"] == "1":
    sys.path.insert(0, f"{sys.argv[1]}/other")

import torch.distributed as dist

from rcm_mcore import train
from rcm_mcore.config import MeshConfig, load_config
from rcm_mcore.models import DiffusionTransformer
from rcm_mcore.parallel.mesh import destroy_mesh, init_distributed, make_mesh
from rcm_mcore.training import loop, preflight

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
forward, product, run_step = DiffusionTransformer.forward, preflight.product, loop.run_step


def gathered(value):
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def refusal(config):
    """What each rank is told."""
    try:
        loop.train(config)
    except ValueError as error:
        return gathered(str(error))
    return gathered("not refused")


def slowed(seconds):
    def slow_forward(*args, **rest):
        time.sleep(seconds)
        return forward(*args, **rest)

    return slow_forward


def wrong(a, b):
    """One element is one off, as of a broken multiplier."""
    c = product(a, b)
    c[3, 5] += 1
    return c


def compare():
    init_distributed()
    results = {}
    quiet = loop.train(load_config(folder / "quiet.yaml"))
    results["preflight"] = gathered(vars(quiet.preflight))
    destroy_mesh()
    events = [json.loads(line) for line in (folder / "quiet" / "events.jsonl").read_text().splitlines()]
    if rank == 1:
        usual = [seconds for event in events if event["event"] == "rank_times" for seconds in event["step_seconds"]]
        DiffusionTransformer.forward = slowed(10 * min(usual))
    loop.train(load_config(folder / "slow.yaml"))
    DiffusionTransformer.forward = forward
    destroy_mesh()

    results["other mesh"] = refusal(load_config(folder / "quiet.yaml", ["mesh.tp=2", "train.seed=7"] if rank == 1 else []))
    preflight.product = wrong if rank == 1 else product
    results["broken"] = refusal(load_config(folder / "quiet.yaml"))
    preflight.product = product
    destroy_mesh()

    preflight.time = SimpleNamespace(time=lambda: time.time() + 60 * rank)
    mesh = make_mesh(MeshConfig(tp=2))
    measured = preflight.preflight(load_config(folder / "quiet.yaml"), mesh)
    results["skewed"] = gathered([measured.warnings, measured.allreduce_gbps])
    if rank == 0:
        (folder / "results_compare.json").write_text(json.dumps(results))
    dist.barrier()


def stop_here():
    time.sleep(600)


def hanging_step(trained, item, **rest):
    if item.batch.step == 2 and rank == 1:
        stop_here()
    return run_step(trained, item, **rest)


def end():
    dist.destroy_process_group = lambda: None  # made again in this process, gloo may connect to addresses of the former one
    argv, err = [str(folder / "stalled.yaml")], io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        code = train.main(argv)
    (folder / f"refused_{rank}.json").write_text(json.dumps([code, err.getvalue()]))
    destroy_mesh()
    from rcm_mcore.training import setup

    setup.require_same = lambda config: None  # the copy differs in a comment
    loop.run_step = hanging_step
    os._exit(train.main(argv))


if __name__ == "__main__":
    logging.getLogger("megatron").setLevel(logging.ERROR)
    {"compare": compare, "end": end}[sys.argv[2]]()
