"""On every rank: networks under each mesh of this world size against the tensors of one rank (test_parallel.py)."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from oracle import INTERVALS, VARIANTS, inputs, small_model

from rcm_mcore.condition import Condition
from rcm_mcore.config import MeshConfig, resolve_mesh
from rcm_mcore.dual import Dual, compiled_rowwise, primal
from rcm_mcore.models import build_model
from rcm_mcore.models.common.parameters import load_full, local_shard
from rcm_mcore.parallel.mesh import destroy_mesh, make_mesh
from rcm_mcore.parallel.stages import as_function
from rcm_mcore.training.pipeline import forward_backward_schedule

MESHES = {
    2: {
        "tp2": MeshConfig(tp=2),
        "tp2-sp": MeshConfig(tp=2, sp=True),
        "cp2-ring": MeshConfig(cp=2, cp_mode="ring"),
        "cp2-all_to_all": MeshConfig(cp=2, cp_mode="all_to_all"),
        "pp2": MeshConfig(pp=2),
        "pp2-vpp2": MeshConfig(pp=2, vpp=2),
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
    8: {"tp2-sp-cp2-pp2": MeshConfig(tp=2, sp=True, cp=2, pp=2)},
}
GRIDS = {"72": (3, 8, 12), "45": (3, 6, 10)}  # tokens: every mesh divides them, none does
LAYERS = 4  # one for each chunk of two stages
MODES = ("none", "full", "one_pass")
FUSED = {2: ("tp2-sp", "pp2")}  # one pass, with row-wise functions traced by torch.compile
# Where the other variants differ from Wan: split heads, split tokens, embedders and heads on stages.
OF_OTHERS = ("tp2", "tp2-sp", "cp2-ring", "pp2", "tp2-sp-cp2-ring")


def cases(world_size):
    """(variant, mesh, tokens, mode)."""
    found = [("wan", name, tokens, mode) for name in MESHES[world_size] for tokens in GRIDS for mode in MODES]
    names = [name for name in MESHES[world_size] if name in OF_OTHERS]
    found += [("cosmos", name, "45", mode) for name in names for mode in ("none", "one_pass")]
    # Those told of more than a text.
    more = [(variant, name) for variant in ("wan-first_last", "cosmos-frames") for name in names if name != "tp2"]
    # Those told of an interval: their embedder on every stage, beside split heads and split tokens.
    more += [("wan-interval", name) for name in names if name in ("tp2-sp", "cp2-ring", "pp2")]
    more += [("cosmos-frames-interval", name) for name in names if name in ("tp2-sp", "pp2")]
    found += [(variant, name, "45", "one_pass") for variant, name in more]
    # Last, since a network stays as it is then.
    return found + [("wan", name, "45", "fused") for name in FUSED.get(world_size, ())]


def run(net, mesh, mode, grid, device="cpu"):
    """Output, tangent and the gradients of a weighted sum of the output, as the trainer would have them."""
    *tensors, condition = inputs(net.model, batch=3, grid=grid)
    (x, x_dot, s, s_dot), condition = (y.to(device) for y in tensors), condition.map(lambda y: y.to(device))
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(device)
    net.zero_grad()
    net.blocks.recompute = "full" if mode == "full" else "none"
    if mode == "fused":
        for module in net.modules():
            if hasattr(module, "rowwise"):
                module.rowwise = compiled_rowwise("aot_eager")
    dual_inputs = Dual(x, x_dot), Dual(s, s_dot)
    with torch.no_grad():
        tangent = as_function(net, mesh)(*dual_inputs, condition).tangent
    has_tangent = mode in ("one_pass", "fused")
    arguments = (*dual_inputs, condition) if has_tangent else (x, s, condition)
    if mesh.pp_size > 1:
        out, tangent = run_on_stages(net, mesh, arguments, weight, tangent)
    else:
        out = net(*arguments)
        (primal(out) * weight).sum().backward()
        out, tangent = primal(out).detach(), out.tangent if has_tangent else tangent
    for name, p in net.named_parameters():
        if not getattr(p, "allreduce", True):
            dist.all_reduce(p.grad, group=mesh.pp_group)
        if getattr(p, "sequence_parallel", False) or name.endswith(("q_layernorm.weight", "k_layernorm.weight")):
            dist.all_reduce(p.grad, group=net.tp_group)
        dist.all_reduce(p.grad, group=net.cp_group)
    return out, tangent, {name: p.grad.clone() for name, p in net.named_parameters()}


def run_on_stages(net, mesh, arguments, weights, tangents):
    """Every sample a microbatch of megatron's schedule; the outputs, and their tangents where they have one."""
    outs = []

    def part(value, i):
        rows = slice(i, i + 1)
        if isinstance(value, Condition):
            return value.rows(rows)
        return Dual(*(v[rows] for v in value)) if isinstance(value, Dual) else value[rows]

    items = [[part(value, i) for value in (*arguments, weights, tangents)] for i in range(len(weights))]

    def forward_step(items, chunk):
        *call, weight, tangent = next(items)
        out = chunk(*call)
        if not (mesh.is_last_stage and chunk.index == net.num_chunks - 1):
            return out, None
        outs.append(Dual(primal(out).detach(), out.tangent if isinstance(out, Dual) else tangent))
        # megatron divides by the number of microbatches, and multiplies by the context-parallel ranks that DDP divides by.
        return len(weights) * (primal(out) * weight).sum() / mesh.cp_size, lambda loss: (loss, {})

    forward_backward_schedule(net, forward_step, items, mesh, like=part(arguments[0], 0))
    both = torch.cat([torch.empty_like(tangents)] * 2)
    if outs:
        both = torch.cat([torch.cat(values) for values in zip(*outs)])
    dist.broadcast(both, dist.get_global_rank(mesh.pp_group, mesh.pp_size - 1), group=mesh.results_group)
    return both.chunk(2)


def relative(a, b):
    return float((a - b).norm() / b.norm())


def worst(errors, largest):
    """By name over all ranks, which hold different stages."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, errors)
    return {name: largest([e[name] for e in everyone if name in e]) for name in set().union(*everyone)}


def main(folder):
    make_mesh(MeshConfig())
    destroy_mesh()
    results = {}
    for name, config in MESHES[dist.get_world_size()].items():
        mesh = make_mesh(resolve_mesh(small_model(), config, ranks_per_node=4)[0])
        nets = {}
        todo = [(variant, *case) for variant, mesh_name, *case in cases(dist.get_world_size()) if mesh_name == name]
        for variant in dict.fromkeys(variant for variant, *_ in todo):
            weights, reference = (torch.load(folder / f"{variant}_{what}.pt") for what in ("weights", "reference"))
            net = build_model((VARIANTS | INTERVALS)[variant](num_layers=LAYERS), mesh.config, mesh.groups)
            load_full(net, weights, mesh.tp_group)
            nets[variant] = net, reference
        for variant, tokens, mode in todo:
            net, reference = nets[variant]
            out, tangent, grads = run(net, mesh, mode, GRIDS[tokens])
            params, one = dict(net.named_parameters()), reference[tokens]
            errors = {
                "out": relative(out, one["out"]),
                "tangent": relative(tangent, one["tangent"]),
                **{n: relative(g, local_shard(one["grads"][n], params[n], mesh.tp_group)) for n, g in grads.items()},
            }
            results[f"{variant} {name} {tokens} {mode}"] = worst(errors, max)
        destroy_mesh()
    if dist.get_rank() == 0:
        (folder / f"results_{dist.get_world_size()}.json").write_text(json.dumps(results))
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
