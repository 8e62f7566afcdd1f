"""On every rank: the Wan network under each mesh of this world size against the tensors of one rank (test_parallel.py)."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from oracle import inputs, small_model

from rcm_mcore.config import MeshConfig
from rcm_mcore.dual import Dual
from rcm_mcore.models.common.parameters import load_full, local_shard
from rcm_mcore.models.wan import build_wan
from rcm_mcore.parallel.mesh import destroy_mesh, make_mesh

MESHES = {1: [MeshConfig()], 2: [MeshConfig(tp=2), MeshConfig(tp=2, sp=True)], 4: [MeshConfig(tp=4), MeshConfig(tp=4, sp=True)]}
MODES = ("none", "full", "one_pass")


def run(net, mode):
    """Output, tangent and the gradients of a weighted sum of the output, as the trainer would have them."""
    x, x_dot, s, s_dot, text = inputs(net.model)
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    net.zero_grad()
    net.blocks.recompute = "full" if mode == "full" else "none"
    dual_inputs = Dual(x, x_dot), Dual(s, s_dot)
    with torch.no_grad():
        tangent = net(*dual_inputs, text).tangent
    out = net(*dual_inputs, text) if mode == "one_pass" else Dual(net(x, s, text), tangent)
    (out.primal * weight).sum().backward()
    for p in net.parameters():
        if getattr(p, "sequence_parallel", False):
            dist.all_reduce(p.grad, group=net.tp_group)
    return out.primal.detach(), out.tangent, {name: p.grad.clone() for name, p in net.named_parameters()}


def relative(a, b):
    return float((a - b).norm() / b.norm())


def main(folder):
    mesh = make_mesh(MeshConfig())
    weights = torch.load(folder / "weights.pt")
    reference = torch.load(folder / "reference.pt")
    destroy_mesh()
    results = {}
    for config in MESHES[dist.get_world_size()]:
        mesh = make_mesh(config)
        net = build_wan(small_model(), config, mesh.groups)
        load_full(net, weights, mesh.tp_group)
        for mode in MODES:
            out, tangent, grads = run(net, mode)
            params = dict(net.named_parameters())
            errors = {
                "out": relative(out, reference["out"]),
                "tangent": relative(tangent, reference["tangent"]),
                **{n: relative(g, local_shard(reference["grads"][n], params[n], mesh.tp_group)) for n, g in grads.items()},
            }
            everyone = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, errors)
            results[f"tp{config.tp}{'-sp' if config.sp else ''}-{mode}"] = {n: max(e[n] for e in everyone) for n in errors}
        destroy_mesh()
    if dist.get_rank() == 0:
        (folder / f"results_{dist.get_world_size()}.json").write_text(json.dumps(results))
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
