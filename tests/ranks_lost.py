"""One rank of a ring in which rank 1 dies, or stops for good, between two steps (test_ring.py)."""

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from rcm_mcore.config import MeshConfig
from rcm_mcore.parallel.mesh import make_mesh
from rcm_mcore.parallel.ring import ring_attention


def main(end):
    mesh = make_mesh(MeshConfig(cp=2, cp_mode="ring", cp_inner=1, timeout_minutes=0.1))
    q = torch.ones(1, 4, 1, 64, device=mesh.device, dtype=torch.bfloat16)
    for step in range(3):
        if mesh.device.type == "cuda":
            torch.cuda.synchronize()
        if step == 2 and dist.get_rank() == 1:
            print(f"{time.time():.2f} lost", flush=True)
            os.kill(os.getpid(), getattr(signal, end))
        out, _ = ring_attention(q, q, q, tokens=8, group=mesh.groups.hcp[1])
        assert out.isfinite().all()  # waits for the result


if __name__ == "__main__":
    main(sys.argv[1])
