"""On every rank: the Wan network under each mesh of this world size against the tensors of one rank (test_parallel.py)."""

import json
import sys
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from oracle import inputs, small_model

from rcm_mcore.config import MeshConfig, resolve_mesh
from rcm_mcore.dual import Dual
from rcm_mcore.models.common.parameters import load_full, local_shard
from rcm_mcore.models.wan import build_wan
from rcm_mcore.parallel.mesh import destroy_mesh, make_mesh

MESHES = {
    2: {
        "tp2": MeshConfig(tp=2),
        "tp2-sp": MeshConfig(tp=2, sp=True),
        "cp2-ring": MeshConfig(cp=2, cp_mode="ring"),
        "cp2-all_to_all": MeshConfig(cp=2, cp_mode="all_to_all"),
    },
    4: {
        "tp4": MeshConfig(tp=4),
        "tp4-sp": MeshConfig(tp=4, sp=True),
        "cp4-ring": MeshConfig(cp=4, cp_mode="ring"),
        "cp4-all_to_all": MeshConfig(cp=4, cp_mode="all_to_all"),
        "cp4-two_level": MeshConfig(cp=4, cp_mode="two_level"),
        "tp2-cp2-ring": MeshConfig(tp=2, cp=2, cp_mode="ring"),
        "tp2-sp-cp2-all_to_all": MeshConfig(tp=2, sp=True, cp=2, cp_mode="all_to_all"),
        "tp2-sp-cp2-ring": MeshConfig(tp=2, sp=True, cp=2, cp_mode="ring"),
    },
}
GRIDS = {"72": (3, 8, 12), "45": (3, 6, 10)}  # tokens: every mesh divides them, none does
MODES = ("none", "full", "one_pass")


def run(net, mode, grid, device="cpu"):
    """Output, tangent and the gradients of a weighted sum of the output, as the trainer would have them."""
    x, x_dot, s, s_dot, text = (y.to(device) for y in inputs(net.model, grid=grid))
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(device)
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
        dist.all_reduce(p.grad, group=net.cp_group)
    return out.primal.detach(), out.tangent, {name: p.grad.clone() for name, p in net.named_parameters()}


def relative(a, b):
    return float((a - b).norm() / b.norm())


def main(folder):
    mesh = make_mesh(MeshConfig())
    weights = torch.load(folder / "weights.pt")
    reference = torch.load(folder / "reference.pt")
    destroy_mesh()
    results = {}
    for name, config in MESHES[dist.get_world_size()].items():
        model = small_model()
        config, _ = resolve_mesh(model, config, ranks_per_node=4)
        mesh = make_mesh(config)
        net = build_wan(model, config, mesh.groups)
        load_full(net, weights, mesh.tp_group)
        for mode, tokens in product(MODES, GRIDS):
            out, tangent, grads = run(net, mode, GRIDS[tokens])
            params, one = dict(net.named_parameters()), reference[tokens]
            errors = {
                "out": relative(out, one["out"]),
                "tangent": relative(tangent, one["tangent"]),
                **{n: relative(g, local_shard(one["grads"][n], params[n], mesh.tp_group)) for n, g in grads.items()},
            }
            everyone = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, errors)
            results[f"{name} {tokens} {mode}"] = {n: max(e[n] for e in everyone) for n in errors}
        destroy_mesh()
    if dist.get_rank() == 0:
        (folder / f"results_{dist.get_world_size()}.json").write_text(json.dumps(results))
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
