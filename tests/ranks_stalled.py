"""A rank of a run: once it is set up, a shard of rank 1 becomes a pipe that nobody writes into (test_data_faults.py)."""

import os
import sys
from pathlib import Path

import torch.distributed as dist

from rcm_mcore import train
from rcm_mcore.data import deal_shards, expand_shards
from rcm_mcore.training import loop

set_up = loop.set_up


def and_stall(config):
    """The second shard of reader 1: steps 1 to 4 take one sample each of the first."""
    run = set_up(config)
    dist.barrier()  # the other rank has its list of shards
    if run.mesh.dp_rank == 1:
        shards = expand_shards(config.data.shards)
        deal = deal_shards(len(shards), readers=config.data.readers, reader=1, seed=config.train.seed, epoch=0)
        os.unlink(shards[deal[1]])
        os.mkfifo(shards[deal[1]])
    return run


def main(folder):
    loop.set_up = and_stall
    code = train.main([str(folder / "run.yaml")])
    (folder / f"code_{os.environ['RANK']}").write_text(str(code))
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
