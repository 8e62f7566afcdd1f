"""On every rank: float8 linears and a network under tensor parallelism (test_fp8.py). Errors relative to the largest entry."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from oracle import inputs, small_model
from rcm_kernels.fp8 import quantize_rows

from rcm_mcore.config import MeshConfig, resolve_mesh
from rcm_mcore.models import build_model
from rcm_mcore.models.common.fp8 import fp8_forwards
from rcm_mcore.models.common.linears import apply, column_linear, parallel_linears, row_linear
from rcm_mcore.models.common.parameters import load_full
from rcm_mcore.parallel.mesh import destroy_mesh, init_distributed, local_mesh, make_mesh

MESHES = {"tp2": MeshConfig(tp=2), "tp2-sp": MeshConfig(tp=2, sp=True)}
WIDTH, FFN, TOKENS = 64, 96, 6


def rounded(x):
    """x [..., K] as float8 stands for it."""
    quantized = quantize_rows(x.contiguous())
    return quantized.values.double() * quantized.scales.double()


def of_layers(mesh, config):
    """Errors of a column and of a row linear against products of what is rounded on each rank."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: (torch.randn(shape, generator=g) * torch.randn(*shape[:-1], 1, generator=g).exp()).bfloat16()
    rank, tp = mesh.tp_group.rank(), mesh.tp_group.size()
    linears, options = parallel_linears("local"), dict(config=config, group=mesh.tp_group, bias=False)
    x, weight = draw(TOKENS, 2, WIDTH), draw(FFN, WIDTH)
    mine = lambda y, dim: y.chunk(tp, dim)[rank].contiguous()
    tokens = lambda y: mine(y, 0) if mesh.config.sp else y

    column = column_linear(linears, WIDTH, FFN, **options)
    column.weight.data.copy_(mine(weight, 0))
    with torch.no_grad(), fp8_forwards(True):
        out = apply(column, tokens(x))
    errors = {"column": relative(out, mine(rounded(x) @ rounded(weight).t(), -1))}

    x, weight = draw(TOKENS, 2, FFN), draw(WIDTH, FFN)
    row = row_linear(linears, FFN, WIDTH, **options)
    row.weight.data.copy_(mine(weight, 1))
    with torch.no_grad(), fp8_forwards(True):
        out = apply(row, mine(x, -1))
    want = sum(rounded(a) @ rounded(b).t() for a, b in zip(x.chunk(tp, -1), weight.chunk(tp, -1)))
    return errors | {"row": relative(out, tokens(want))}


def relative(a, b):
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


def network(mesh, weights, *, fp8, dtype="bfloat16"):
    """Velocity on this rank's mesh."""
    net = build_model(small_model(dtype=dtype, fp8_forwards=fp8), mesh.config, mesh.groups)
    load_full(net, weights, mesh.tp_group)
    x, _, s, _, condition = inputs(net.model)
    with torch.no_grad():
        return net, net(x, s, condition).double()


def main(folder):
    init_distributed()
    with local_mesh() as mesh:
        net = build_model(small_model(), mesh.config, mesh.groups, seed=0)
        g = torch.Generator().manual_seed(5)
        draw = lambda p: 0.2 * torch.randn(p.shape, generator=g) if p.ndim > 1 else 1 + 0.1 * torch.randn(p.shape, generator=g)
        weights = {name: draw(p).double() for name, p in net.named_parameters()}
        exact = network(mesh, weights, fp8=False, dtype="float64")[1]
        distance = lambda out: float((out - exact).norm() / exact.norm())
        results = {"one": distance(network(mesh, weights, fp8=True)[1])}
    for name, config in MESHES.items():
        mesh = make_mesh(resolve_mesh(small_model(), config, ranks_per_node=2)[0])
        net, out = network(mesh, weights, fp8=True)
        results[name] = {"network": distance(out), **of_layers(mesh, net.config)}
        destroy_mesh()
    if dist.get_rank() == 0:
        (folder / f"results_{dist.get_world_size()}.json").write_text(json.dumps(results))
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
