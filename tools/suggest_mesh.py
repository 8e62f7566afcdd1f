"""List meshes that a run can use: `python tools/suggest_mesh.py CONFIG --gpus N --gpu-memory GIB [section.field=value ...]`.

Every valid tensor-, context- and pipeline-parallel size with its estimated memory per GPU and what a GPU sends, those that fit
first, then by what is sent. Weights, gradients, optimizer and EMA are exact but for padding; activations are an estimate
(rcm_mcore/training/estimate.py). Needs no GPU and reads no data.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from rcm_mcore.config import Config, MeshConfig, load_config, tokens_per_sample, validate_mesh
from rcm_mcore.training.estimate import GIB, Estimate, estimate

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


def table(rows: list[tuple[MeshConfig, int, Estimate]], gpu_memory: float) -> str:
    """The meshes as a Markdown table."""
    lines = ["| tp | cp | pp | dp | weights | gradients | optimizer | activations | GiB | fits | sent tp | cp | pp | dp |"]
    lines += ["|" + "---:|" * 14]
    for mesh, dp, e in rows:
        memory = [e.weights, e.gradients, e.optimizer, e.activations, e.total]
        sent = [e.sent_tp, e.sent_cp, e.sent_pp, e.sent_dp]
        cells = [str(n) for n in (mesh.tp, mesh.cp, mesh.pp, dp)] + [f"{x / GIB:.1f}" for x in memory]
        cells += ["yes" if e.total <= gpu_memory * GIB else "no"] + [f"{x / GB:.2f}" for x in sent]
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
        found = [(m, dp, estimate(replace(config, mesh=m), args.gpus)) for m, dp in meshes(config, args.gpus)]
        if not found:
            raise ValueError(
                f"no mesh of {args.gpus} GPUs suits train.global_batch_size={config.train.global_batch_size}, "
                f"train.micro_batch_size={config.train.micro_batch_size} and data.readers={config.data.readers}: "
                "change these or --gpus"
            )
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    limit = args.gpu_memory * GIB
    found.sort(key=lambda row: (row[2].total > limit, row[2].sent_tp + row[2].sent_cp + row[2].sent_pp, row[2].total))
    fitting = sum(e.total <= limit for _, _, e in found)
    print(table(found, args.gpu_memory))
    print(
        f"\n{fitting} of {len(found)} meshes fit {args.gpu_memory:g} GiB a GPU. Memory in GiB, messages in GB, of one GPU: tp,"
    )
    print(
        "cp (a ring) and pp in a forward of a microbatch with tangents, dp in an optimizer step. Activations are an estimate."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
