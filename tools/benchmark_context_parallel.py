"""Time attention with tangents, its forward and backward, and a whole dual layer, over context-parallel ranks.

    torchrun --nproc-per-node 8 tools/benchmark_context_parallel.py --out DIR [--tokens 32760 75600] [--heads 40]
    python tools/benchmark_context_parallel.py --picture DIR

Every GPU works in every row: ranks that a context-parallel size leaves over form further groups doing the same. Attention and
its gradients are first checked against float64 on a few hundred tokens, and a mode that is wrong is not timed. A time is the
median of several on the slowest rank. `alone` is one GPU with all tokens in the same run, `rate` its time over this one's times
the ranks; `computing` the same kernels on this rank's blocks without any transfer, `transfers` the transfers without a kernel,
and `hidden` the share of the transfers' time by which the whole is shorter than both in a row. GiB: what a call adds, buffers
shared between GPUs included; of a layer, everything. --picture draws scaling.png from the results.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rcm_kernels import reference

import rcm_mcore.parallel.ring as ring
from rcm_mcore.config import MeshConfig, parse_model, resolve_mesh
from rcm_mcore.dual import Dual
from rcm_mcore.models import build_model
from rcm_mcore.models.common.attention import SplitAttention
from rcm_mcore.models.common.blocks import Conditioning
from rcm_mcore.parallel.exchange import heads_for_tokens, tokens_for_heads
from rcm_mcore.parallel.mesh import Mesh, destroy_mesh, init_distributed, make_mesh
from rcm_mcore.parallel.shared_memory import shared_bytes

WIDTH, TOLERANCE = 128, 8e-3


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Median over repeats, of the slowest rank."""
    run()
    run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(repeats):
        dist.barrier()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    worst = torch.tensor(statistics.median(times), device="cuda")
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return float(worst)


def inputs(tokens: int, heads: int, mesh: Mesh, *, whole: bool = False) -> list[Dual]:
    """q, k, v of this rank [s, 1, N, D], v a view as a fused linear leaves it; of all tokens if `whole`."""
    block = -(-tokens // mesh.cp_size)
    generator = torch.Generator("cuda").manual_seed(0 if whole else mesh.groups.cp.rank())
    rows = block * mesh.cp_size if whole else block
    fused = [torch.randn(rows, 1, heads, 3, WIDTH, device="cuda", dtype=torch.bfloat16, generator=generator) for _ in range(2)]
    parts = [[part if i == 2 else part.contiguous() for i, part in enumerate(x.unbind(3))] for x in fused]
    return [Dual(x, y) for x, y in zip(*parts)]


def error(attend: SplitAttention, mesh: Mesh) -> float:
    """The largest relative error of out, out_dot and the gradients, on 700 tokens, of any rank."""
    tokens, heads = 700, 8
    whole = inputs(tokens, heads, mesh, whole=True)
    block, rank = -(-tokens // mesh.cp_size), mesh.groups.cp.rank()
    rows = slice(rank * block, (rank + 1) * block)
    got = attend(*(Dual(x.primal[rows], x.tangent[rows]) for x in whole), tokens=tokens)
    exact = lambda xs: [x[:tokens].transpose(0, 1).double() for x in xs]
    want = reference.attention_jvp(exact(x.primal for x in whole), exact(x.tangent for x in whole))
    pairs = [(mine, theirs.transpose(0, 1).flatten(2)) for mine, theirs in zip((got.primal, got.tangent), want)]
    leaves = [x.primal[rows].clone().requires_grad_() for x in whole]
    dout = whole[0].tangent.flatten(2)[:tokens]  # any numbers
    out = attend(*leaves, tokens=tokens)
    here = dout[rows]
    mine = torch.autograd.grad(out[: len(here)], leaves, here)
    exact_leaves = [x.requires_grad_() for x in exact(x.primal for x in whole)]
    exact_out = reference.attention(*exact_leaves)[0].transpose(0, 1).flatten(2)
    pairs += zip(mine, (x.transpose(0, 1) for x in torch.autograd.grad(exact_out, exact_leaves, dout.double())))
    worst = 0.0
    for ours, theirs in pairs:
        there = theirs[rows]
        worst = max(worst, float((ours[: len(there)].double() - there).norm() / there.norm()))
    value = torch.tensor(worst, device="cuda")
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return float(value)


def attention_row(mesh: Mesh, tokens: int, heads: int, repeats: int) -> dict[str, Any]:
    """Times of attention with tangents under this mesh."""
    attend, group = SplitAttention(*mesh.groups.hcp), mesh.groups.hcp
    wrong = error(attend, mesh) if mesh.cp_size > 1 else 0.0
    if not wrong <= TOLERANCE:
        return {"failed": f"relative error {wrong:.1e}"}
    q, k, v = inputs(tokens, heads, mesh)
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    with torch.no_grad():
        row: dict[str, Any] = {"error": wrong, "seconds": seconds(lambda: attend(q, k, v, tokens=tokens), repeats)}
        row["gib"] = (torch.cuda.max_memory_allocated() - base + shared_bytes()) / 2**30
        if mesh.cp_size > 1:
            row["computing"] = seconds(lambda: _computing(q, k, v, tokens, mesh), repeats)
            row["transfers"] = seconds(lambda: _transfers((q, k, v), group), repeats)
            row["hidden"] = 1 - (row["seconds"] - row["computing"]) / row["transfers"]
    return row


def gradient_row(mesh: Mesh, tokens: int, heads: int, repeats: int) -> dict[str, Any]:
    """Time and memory of forward and backward of attention without tangents."""
    attend = SplitAttention(*mesh.groups.hcp)
    q, k, v = (x.primal.clone().requires_grad_() for x in inputs(tokens, heads, mesh))
    dout = torch.randn(len(q), 1, heads * WIDTH, device="cuda", dtype=q.dtype)
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    time = seconds(lambda: torch.autograd.grad(attend(q, k, v, tokens=tokens), (q, k, v), dout), repeats)
    return {"seconds": time, "gib": (torch.cuda.max_memory_allocated() - base + shared_bytes()) / 2**30}


def _computing(q: Dual, k: Dual, v: Dual, tokens: int, mesh: Mesh) -> None:
    """The kernels of an attention on blocks of this rank's own, as often as blocks would come."""
    exchange, rounds = mesh.groups.hcp[0], mesh.groups.hcp[1]
    parts = [x.transpose(0, 1) for d in (q, k, v) for x in (d.primal, d.tangent)]
    if exchange is not None:
        n = exchange.size()
        parts = [x[:, :, : x.shape[2] // n].repeat(1, n, 1, 1) for x in parts]
    (q_, q_dot, k_, k_dot, v_, v_dot), size = parts, 1 if rounds is None else rounds.size()
    blocks = [ring.Partial(*ring.flash_attention_jvp(q_, k_, v_, q_dot, k_dot, v_dot)) for _ in range(size)]
    ring.merge(blocks)


def _transfers(duals: tuple[Dual, ...], group: list[Any]) -> None:
    """The messages of an attention without its kernels."""
    exchange, rounds = group
    parts = [x.transpose(0, 1) for half in ("primal", "tangent") for x in (getattr(d, half) for d in duals)]
    if exchange is not None:
        parts = list(tokens_for_heads(parts, exchange))
    if rounds is not None:
        for _ in ring._blocks(tuple(parts[i] for i in (1, 2, 4, 5)), 1 << 40, rounds):
            pass
    if exchange is not None:
        heads_for_tokens(parts[:2], exchange)


def layer_row(mesh: Mesh, tokens: int, repeats: int) -> dict[str, Any]:
    """Time and memory of one whole layer of Wan 14B for Duals, forward alone."""
    model = parse_model({"size": "14B", "num_layers": 1})
    net = build_model(model, mesh.config, mesh.groups, trainable=False)
    block = -(-tokens // mesh.cp_size)
    draw = lambda *shape, dtype=torch.float32: torch.randn(shape, device="cuda", dtype=dtype)
    x = Dual(draw(block, 1, model.hidden_size), draw(block, 1, model.hidden_size))
    if not model.fp32_residual:
        x = Dual(x.primal.bfloat16(), x.tangent.bfloat16())
    modulation = Dual(draw(6, 1, model.hidden_size), draw(6, 1, model.hidden_size))
    places = draw(block, 1, 1, WIDTH // 2).cos(), draw(block, 1, 1, WIDTH // 2).sin()
    cond = Conditioning(
        modulation, draw(model.text_len, 1, model.hidden_size, dtype=torch.bfloat16), None, *places, tokens, None
    )
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        time = seconds(lambda: net.blocks(x, cond), repeats)
    return {"seconds": time, "gib": (torch.cuda.max_memory_allocated() + shared_bytes()) / 2**30}


def meshes(world: int, heads: int) -> list[MeshConfig]:
    """Every context-parallel size and mode that this world allows."""
    found = [MeshConfig()]
    for cp in (n for n in (2, 4, 8) if world % n == 0):
        found.append(MeshConfig(cp=cp, cp_mode="ring"))
        found += [MeshConfig(cp=cp, cp_mode="all_to_all")] if heads % cp == 0 else []
        found += [MeshConfig(cp=cp, cp_mode="two_level", cp_inner=n) for n in (2, 4) if n < cp and heads % n == 0]
    return found


def trace(mesh: Mesh, tokens: int, heads: int, path: Path) -> None:
    """A chrome trace of one attention on rank 0: kernels and copies alone."""
    q, k, v = inputs(tokens, heads, mesh)
    attend = SplitAttention(*mesh.groups.hcp)
    with torch.no_grad():
        attend(q, k, v, tokens=tokens)
        dist.barrier()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            attend(q, k, v, tokens=tokens)
            torch.cuda.synchronize()
    if dist.get_rank() == 0:
        profile.export_chrome_trace(str(path))
        kept = [
            e for e in json.loads(path.read_text())["traceEvents"] if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
        ]
        slim = [{k: e[k] for k in ("ph", "cat", "name", "pid", "tid", "ts", "dur")} | {"name": e["name"][:60]} for e in kept]
        path.write_text(json.dumps({"traceEvents": slim}))


def measure(args: argparse.Namespace) -> int:
    init_distributed()
    world, rank = dist.get_world_size(), dist.get_rank()
    model = parse_model({"size": "14B", "num_layers": 1, "hidden_size": args.heads * WIDTH, "num_attention_heads": args.heads})
    rows: list[dict[str, Any]] = []
    for config in meshes(world, args.heads):
        mesh = make_mesh(resolve_mesh(model, config, ranks_per_node=world)[0])
        for tokens in args.tokens:
            name = config.cp_mode + (f" {config.cp_inner}" if config.cp_inner else "") if config.cp > 1 else "alone"
            row = {"what": "with tangents", "cp": config.cp, "mode": name, "tokens": tokens, "heads": args.heads}
            rows.append(row | attention_row(mesh, tokens, args.heads, args.repeats))
            if "failed" in rows[-1]:
                continue
            rows.append(row | {"what": "forward and backward"} | gradient_row(mesh, tokens, args.heads, args.repeats))
            if args.heads == 40:
                rows.append(row | {"what": "dual layer of 14B"} | layer_row(mesh, tokens, args.repeats))
            if rank == 0:
                print(*(json.dumps(r) for r in rows[-3:]), sep="\n", file=sys.stderr, flush=True)
            if args.trace and config.cp == max(c.cp for c in meshes(world, args.heads)) and args.out:
                trace(mesh, tokens, args.heads, args.out / f"trace_cp{config.cp}_{name.replace(' ', '_')}_{tokens}.json")
        destroy_mesh()
    alone = {(r["what"], r["tokens"]): r["seconds"] for r in rows if r["cp"] == 1}
    for row in rows:
        if "failed" not in row:
            row["rate"] = alone[row["what"], row["tokens"]] / (row["cp"] * row["seconds"])
    if rank == 0:
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        head = f"{world} x {torch.cuda.get_device_name()}, torch {torch.__version__}, NCCL {nccl}"
        text = f"{head}, bfloat16, batch 1\n\n{table(rows)}\n"
        print(text)
        if args.out:
            (args.out / "context_parallel.md").write_text(text)
            (args.out / "context_parallel.json").write_text(json.dumps(rows, indent=1))
    dist.barrier()
    dist.destroy_process_group()
    return 1 if any("failed" in row for row in rows) else 0


def table(rows: list[dict[str, Any]]) -> str:
    """All rows in Markdown."""
    lines = ["| what | tokens | heads | cp | mode | ms | rate | computing | transfers | hidden | GiB |"]
    lines += ["|---|---:|---:|---:|---|---:|---:|---:|---:|---:|---:|"]
    show = lambda row, name, factor=1e3: f"{factor * row[name]:.3g}" if name in row else ""
    for r in rows:
        cells = [r["what"], r["tokens"], r["heads"], r["cp"], r["mode"]]
        cells += [r["failed"]] if "failed" in r else [show(r, "seconds"), show(r, "rate", 1), show(r, "computing")]
        cells += [show(r, "transfers"), show(r, "hidden", 1), show(r, "gib", 1)]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def picture(folder: Path) -> int:
    """scaling.png: the rate per GPU over the context-parallel size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [r for r in json.loads((folder / "context_parallel.json").read_text()) if "failed" not in r]
    lengths, whats = sorted({r["tokens"] for r in rows}), list(dict.fromkeys(r["what"] for r in rows))
    figure = Figure(figsize=(3.6 * len(whats), 2.8 * len(lengths)), layout="constrained")
    FigureCanvasAgg(figure)
    for i, (tokens, what) in enumerate(product(lengths, whats)):
        axes = figure.add_subplot(len(lengths), len(whats), i + 1, title=f"{what}, {tokens:,} tokens", ylim=(0.7, 1.1))
        here = [r for r in rows if (r["what"], r["tokens"]) == (what, tokens)]
        for mode in dict.fromkeys(r["mode"] for r in here if r["cp"] > 1):
            points = [(r["cp"], r["rate"]) for r in here if r["mode"] in ("alone", mode)]
            axes.plot(*zip(*points), marker="o", label=mode)
        axes.set_xticks(sorted({r["cp"] for r in here}))
        axes.set_xlabel("GPUs" if i >= len(whats) * (len(lengths) - 1) else "")
        axes.set_ylabel("" if i % len(whats) else "rate per GPU, one alone = 1")
        axes.grid(alpha=0.3)
        axes.legend(loc="lower left", fontsize=7)
    figure.savefig(folder / "scaling.png", dpi=110)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for context_parallel.md and .json, and traces")
    parser.add_argument("--tokens", type=int, nargs="+", default=[32760, 75600])
    parser.add_argument("--heads", type=int, default=40, help="of all ranks; with 40 a layer of Wan 14B is timed too")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--trace", action="store_true", help="write chrome traces of the largest context-parallel size")
    parser.add_argument("--picture", type=Path, metavar="DIR", help="draw the results in DIR and stop")
    args = parser.parse_args()
    if args.picture:
        return picture(args.picture)
    if not torch.cuda.is_available():
        print("this benchmark needs GPUs", file=sys.stderr)
        return 2
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    return measure(args)


if __name__ == "__main__":
    sys.exit(main())
