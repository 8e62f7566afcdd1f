"""On every GPU: networks in bfloat16 under each mesh against float64 on one GPU, and bfloat16 there (test_parallel.py)."""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from oracle import VARIANTS, random_weights
from ranks_networks import GRIDS, LAYERS, MODES, OF_OTHERS, relative, run, worst

from rcm_mcore.config import MeshConfig, resolve_mesh
from rcm_mcore.models import build_model
from rcm_mcore.models.common.parameters import load_full, local_shard
from rcm_mcore.parallel.mesh import destroy_mesh, make_mesh

MESHES = {
    2: {
        "tp2-sp": MeshConfig(tp=2, sp=True),
        "cp2-ring": MeshConfig(cp=2, cp_mode="ring"),
        "cp2-all_to_all": MeshConfig(cp=2, cp_mode="all_to_all"),
        "pp2": MeshConfig(pp=2),
        "pp2-vpp2": MeshConfig(pp=2, vpp=2),
    },
    4: {
        "cp4-ring": MeshConfig(cp=4, cp_mode="ring"),
        "cp4-all_to_all": MeshConfig(cp=4, cp_mode="all_to_all"),
        "cp4-two_level": MeshConfig(cp=4, cp_mode="two_level"),
        "tp2-sp-cp2-all_to_all": MeshConfig(tp=2, sp=True, cp=2, cp_mode="all_to_all"),
        "tp2-sp-cp2-ring": MeshConfig(tp=2, sp=True, cp=2, cp_mode="ring"),
        "pp4": MeshConfig(pp=4),
        "cp2-pp2-vpp2": MeshConfig(cp=2, cp_mode="ring", pp=2, vpp=2),
        "tp2-sp-pp2": MeshConfig(tp=2, sp=True, pp=2),
    },
    8: {
        "cp8-ring": MeshConfig(cp=8, cp_mode="ring"),
        "cp8-two_level": MeshConfig(cp=8, cp_mode="two_level", cp_inner=4),
        "tp2-sp-cp4-two_level": MeshConfig(tp=2, sp=True, cp=4, cp_mode="two_level"),
        "tp2-sp-cp2-pp2": MeshConfig(tp=2, sp=True, cp=2, pp=2),
    },
}


OTHERS = ("cosmos", "wan-first_last", "cosmos-frames")


def cases(world_size):
    """(variant, mesh, tokens, mode)."""
    found = [("wan", mesh, tokens, mode) for mesh in MESHES[world_size] for tokens in GRIDS for mode in MODES]
    names = [mesh for mesh in MESHES[world_size] if mesh in OF_OTHERS]
    return found + [(variant, mesh, "45", "one_pass") for variant in OTHERS for mesh in names]


def model(variant, dtype):
    """Heads of 64, which the GPU kernels take."""
    return VARIANTS[variant](num_layers=LAYERS, hidden_size=256, num_attention_heads=4, dtype=dtype)


def compute(variant, config, dtype, todo):
    """By length and mode: output and tangent; gradients; and a function from names and full tensors to this rank's shards."""
    mesh = make_mesh(resolve_mesh(model(variant, dtype), config, ranks_per_node=dist.get_world_size())[0])
    net = build_model(model(variant, dtype), mesh.config, mesh.groups)
    load_full(net, random_weights(net), mesh.tp_group)
    params, group = dict(net.named_parameters()), mesh.tp_group
    results = {}
    for tokens, mode in todo:
        out, tangent, grads = run(net, mesh, mode, GRIDS[tokens], device="cuda")
        results[tokens, mode] = {"out": out, "tangent": tangent}, grads
    destroy_mesh()
    return results, lambda name, full: local_shard(full, params[name], group)


def main(folder):
    results = {}
    make_mesh(MeshConfig())
    destroy_mesh()
    everything = cases(dist.get_world_size())
    for variant in ("wan", *OTHERS):
        todo = dict.fromkeys((tokens, mode) for v, _, tokens, mode in everything if v == variant)
        exact, _ = compute(variant, MeshConfig(), "float64", [(tokens, "none") for tokens in {t for t, _ in todo}])
        plain, _ = compute(variant, MeshConfig(), "bfloat16", todo)
        for name in dict.fromkeys(name for v, name, *_ in everything if v == variant):
            ours, shard = compute(variant, MESHES[dist.get_world_size()][name], "bfloat16", todo)
            for (tokens, mode), (outs, grads) in ours.items():
                (exact_outs, exact_grads), (plain_outs, plain_grads) = exact[tokens, "none"], plain[tokens, mode]
                errors = {
                    n: (relative(x.double(), exact_outs[n]), relative(plain_outs[n].double(), exact_outs[n]))
                    for n, x in outs.items()
                }
                for n, g in grads.items():
                    want = shard(n, exact_grads[n])
                    errors[n] = relative(g.double(), want), relative(shard(n, plain_grads[n]).double(), want)
                largest = worst(errors, lambda pairs: [max(column) for column in zip(*pairs)])
                results[f"{variant} {name} {tokens} {mode}"] = largest
    if dist.get_rank() == 0:
        (folder / f"results_{dist.get_world_size()}.json").write_text(json.dumps(results))
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
