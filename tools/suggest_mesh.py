"""List meshes that a run can use: `python tools/suggest_mesh.py CONFIG --gpus N --gpu-memory GIB [section.field=value ...]`.

Every valid tensor-, context- and pipeline-parallel size with its estimated memory per GPU and what a GPU sends, those that fit
first, then by what is sent; each with the cheapest model.recompute that fits. Weights, gradients, optimizer and EMA are exact
but for padding; activations are an estimate (rcm_mcore/training/estimate.py). Needs no GPU and reads no data.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

from rcm_mcore.config import Config, MeshConfig, load_config, tokens_per_sample, validate_mesh
from rcm_mcore.training.estimate import GIB, RECOMPUTE, Estimate, estimate

GB = 1e9


def meshes(config: Config, gpus: int) -> Iterator[tuple[MeshConfig, int]]:
    """Valid meshes, sequence-parallel wherever tensor-parallel, and their data-parallel sizes."""
    tokens = tokens_per_sample(config.model, config.data.latent_shape)
    divisors = [n for n in range(1, gpus + 1) if gpus % n == 0]
    for tp, cp, pp in product(divisors, repeat=3):
        mesh = MeshConfig(tp=tp, sp=tp > 1, cp=cp, pp=pp)
        try:
            dp = validate_mesh(config.model, mesh, gpus, tokens=tokens)
        except ValueError:
            continue
        if config.train.global_batch_size % (dp * config.train.micro_batch_size) == 0 and config.data.readers % dp == 0:
            yield mesh, dp


def cheapest(config: Config, mesh: MeshConfig, gpus: int, limit: float) -> tuple[str, Estimate]:
    """The cheapest model.recompute with which a mesh needs at most `limit` bytes, or the one that needs least."""
    found = {}
    for recompute in RECOMPUTE:
        of_it: Any = recompute
        found[recompute] = estimate(replace(config, mesh=mesh, model=replace(config.model, recompute=of_it)), gpus)
        if found[recompute].total <= limit:
            return recompute, found[recompute]
    return min(found.items(), key=lambda item: item[1].total)


def table(rows: list[tuple[MeshConfig, int, str, Estimate]], gpu_memory: float) -> str:
    """The meshes as a Markdown table."""
    titles = ["tp", "cp", "pp", "dp", "recompute", "weights", "gradients", "optimizer", "activations", "GiB", "fits", "host"]
    lines = ["| " + " | ".join([*titles, "sent tp", "cp", "pp", "dp"]) + " |", "|" + "---:|" * 16]
    for mesh, dp, recompute, e in rows:
        memory = [e.weights, e.gradients, e.optimizer, e.activations, e.total]
        sent = [e.sent_tp, e.sent_cp, e.sent_pp, e.sent_dp]
        cells = [*map(str, (mesh.tp, mesh.cp, mesh.pp, dp)), recompute] + [f"{x / GIB:.1f}" for x in memory]
        cells += ["yes" if e.total <= gpu_memory * GIB else "no", f"{e.host / GIB:.1f}"] + [f"{x / GB:.2f}" for x in sent]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file of the run; its mesh is ignored")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    parser.add_argument("--gpus", type=int, required=True, help="of the whole run")
    parser.add_argument("--gpu-memory", type=float, required=True, metavar="GIB", help="of one of them")
    args = parser.parse_intermixed_args(argv)
    try:
        if args.gpus < 1 or not args.gpu_memory > 0:
            raise ValueError(f"--gpus {args.gpus} --gpu-memory {args.gpu_memory}: both must be positive")
        config = load_config(args.config, args.overrides)
        limit = args.gpu_memory * GIB
        found = [(m, dp, *cheapest(config, m, args.gpus, limit)) for m, dp in meshes(config, args.gpus)]
        if not found:
            raise ValueError(
                f"no mesh of {args.gpus} GPUs suits train.global_batch_size={config.train.global_batch_size}, "
                f"train.micro_batch_size={config.train.micro_batch_size} and data.readers={config.data.readers}: "
                "change these or --gpus"
            )
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    found.sort(key=lambda row: (row[3].total > limit, row[3].sent_tp + row[3].sent_cp + row[3].sent_pp, row[3].total))
    fitting = sum(e.total <= limit for *_, e in found)
    print(table(found, args.gpu_memory))
    print(
        f"""
{fitting} of {len(found)} meshes fit {args.gpu_memory:g} GiB a GPU. Memory in GiB, messages in GB, of one GPU: tp, cp (a ring)
and pp in a forward of a microbatch with tangents, dp in an optimizer step. host: memory of the machine, for train.offload.
Activations are an estimate, of blocks that are not compiled."""
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
