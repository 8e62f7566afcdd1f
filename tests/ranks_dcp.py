"""One rank that writes a file's tensors as FSDP does, each sharded over the ranks, in torch's distributed checkpoint."""

import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor


def main(source, folder):
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state = torch.load(source, weights_only=True)
    sharded = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in state.items()}
    ema = {name.replace("net.", "net_ema.", 1): tensor + 1 for name, tensor in sharded.items()}
    dcp.save({**sharded, **ema}, checkpoint_id=folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
