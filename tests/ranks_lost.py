"""One rank of a ring in which rank 1 dies, or stops for good, in the middle of an attention (test_ring.py)."""

import os
import signal
import sys

import torch
import torch.distributed as dist

from rcm_mcore.config import MeshConfig
from rcm_mcore.parallel import ring
from rcm_mcore.parallel.mesh import make_mesh
from rcm_mcore.parallel.ring import ring_attention


def main(end):
    def lose(*_, **__):
        if mesh.device.type == "cuda":
            torch.cuda.synchronize()
        os.kill(os.getpid(), getattr(signal, end))

    mesh = make_mesh(MeshConfig(cp=2, cp_mode="ring", cp_inner=1, timeout_minutes=0.1))
    q = torch.ones(1, 4, 1, 64, device=mesh.device, dtype=torch.bfloat16)
    for step in range(10):  # what the lost rank sent before it was lost may still serve a step
        if step == 2 and dist.get_rank() == 1:
            ring.flash_attention = lose  # with the other's block on its way
        out, _ = ring_attention(q, q, q, tokens=8, group=mesh.groups.hcp[1])
        assert out.isfinite().all()  # waits for the result


if __name__ == "__main__":
    main(sys.argv[1])
