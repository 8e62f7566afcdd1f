"""On every rank: train each configuration of a list in turn, as the command line would (test_training.py, test_resume.py).

Of the ranks that work on the same samples one must read them, and no other. Replicas of weights must be equal.
"""

import logging
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from rcm_mcore.config import load_config
from rcm_mcore.data import RankReaders
from rcm_mcore.parallel.mesh import destroy_mesh, init_distributed
from rcm_mcore.training.estimate import estimate
from rcm_mcore.training.loop import train
from rcm_mcore.training.setup import check

reads = []


def assert_replicas_are_equal(run):
    """Bit for bit: weights on the ranks that hold the same ones, of layers and of what every stage has."""
    for one in run.networks:
        for name, param in one.net.named_parameters():
            group = run.mesh.groups.dp_cp if getattr(param, "allreduce", True) else run.mesh.groups.expt_dp
            copies = [torch.empty_like(param) for _ in range(group.size())]
            dist.all_gather(copies, param.detach(), group=group)
            assert all(torch.equal(copy, param) for copy in copies), f"{one.name}.{name} differs between ranks"


def assert_counted(run):
    """The fullest stage has the parameters that were estimated."""
    mine = {True: 0, False: 0}
    for param in run.networks[0].net.parameters():
        mine[getattr(param, "allreduce", True)] += param.numel()
    counts = torch.tensor([mine[True], mine[False]])
    dist.all_reduce(counts, dist.ReduceOp.MAX)
    expected = estimate(run.config, dist.get_world_size())
    assert counts.tolist() == [expected.layers, expected.embedders], f"{counts.tolist()}, estimated {expected}"


def main(folder):
    read = RankReaders.read
    RankReaders.read = lambda self, k: (reads.append(k), read(self, k))[1]
    logging.getLogger("megatron").setLevel(logging.ERROR)
    init_distributed()
    for path in (folder / f"world_{dist.get_world_size()}.txt").read_text().split():
        config = load_config(path)
        check(config, dist.get_world_size())
        reads.clear()
        run = train(config)
        mesh = run.mesh
        assert_replicas_are_equal(run)
        assert_counted(run)
        assert bool(reads) == mesh.reads, f"rank {dist.get_rank()} read {len(reads)} samples"
        destroy_mesh()
    if dist.get_rank() == 0:
        (folder / f"results_{dist.get_world_size()}.json").write_text("{}")
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
