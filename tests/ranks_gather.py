"""On every rank: train, with the gather of weights as late as it may be, and without overlap (test_gather.py)."""

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from rcm_mcore.config import load_config
from rcm_mcore.models import DiffusionTransformer
from rcm_mcore.parallel.mesh import destroy_mesh, init_distributed
from rcm_mcore.training import gather
from rcm_mcore.training.loop import train

events = []


class Late:
    """A gather of which nothing is seen until somebody waits for it."""

    def __init__(self, whole, own, *, group, async_op):
        assert async_op
        self.whole, self.arrived = whole, torch.empty_like(whole)
        self.work = dist.all_gather_into_tensor(self.arrived, own.clone(), group=group, async_op=True)
        events.append("start")

    def wait(self):
        events.append("wait")
        self.work.wait()
        self.whole.copy_(self.arrived)


def main(folder):
    logging.getLogger("megatron").setLevel(logging.ERROR)
    init_distributed()
    gather.dist = SimpleNamespace(all_gather_into_tensor=Late)
    forward = DiffusionTransformer.forward
    DiffusionTransformer.forward = lambda *args, **options: (events.append("forward"), forward(*args, **options))[1]
    results = {}
    for path in map(Path, (folder / f"world_{dist.get_world_size()}.txt").read_text().split()):
        events.clear()
        run = train(load_config(path))
        assert not any(one.optimizer.weights._on_their_way for one in run.networks), "the last checkpoint has waited"
        buffers = {one.name: len(one.ddp.buffers) + len(one.ddp.expert_parallel_buffers) for one in run.networks}
        results[path.stem] = {"events": list(events), "buffers": buffers}
        destroy_mesh()
    if dist.get_rank() == 0:
        (folder / f"results_{dist.get_world_size()}.json").write_text(json.dumps(results))
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
