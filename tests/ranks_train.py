"""On every rank: train each configuration of a list in turn, as the command line would (test_training.py, test_resume.py)."""

import logging
import sys
from pathlib import Path

import torch.distributed as dist

from rcm_mcore.config import load_config
from rcm_mcore.parallel.mesh import destroy_mesh, init_distributed
from rcm_mcore.training.loop import train
from rcm_mcore.training.setup import check


def main(folder):
    logging.getLogger("megatron").setLevel(logging.ERROR)
    init_distributed()
    for path in (folder / f"world_{dist.get_world_size()}.txt").read_text().split():
        config = load_config(path)
        check(config, dist.get_world_size())
        train(config)
        destroy_mesh()
    if dist.get_rank() == 0:
        (folder / f"results_{dist.get_world_size()}.json").write_text("{}")
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
