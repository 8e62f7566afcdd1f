"""Estimate what the steps of a run take on many GPUs, from steps that were measured on a few.

    python tools/cost_model.py CONFIG --measured step.json [more.json ...] --meshes tp8-sp tp2-sp-cp4 --between 50 \\
        [--gpus 8 32 64 128 256] [section.field=value ...]

The JSONs are those of tools/benchmark_step.py. Efficiencies are those of the first row without pipeline stages, which should
have the recompute, compilation and precision of CONFIG; every row of every file is then predicted and compared with what was
measured. `--between`: rate between nodes in 1e9 bytes/s of each GPU, an input that this project has not measured. Assumptions:
rcm_mcore/training/cost.py. Seconds; a step of a mean rollout of 1 to distill.rollout_max_steps; `scaling`: samples a GPU and
second of a whole cycle over those of the first row. Needs no GPU and reads no data.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from rcm_mcore.config import Config, MeshConfig, load_config, parse_config, tokens_per_sample, validate_mesh
from rcm_mcore.training.benchmark import KINDS, parse_mesh
from rcm_mcore.training.cost import Cost, Links, Rates, measured_rates, step_cost
from rcm_mcore.training.setup import microbatches_of_a_step

_PARTS = [field.name for field in fields(Cost)]


def measured_rows(path: Path) -> list[tuple[Config, dict[str, Any]]]:
    """The rows of a file with their configurations. ValueError for what is no file of tools/benchmark_step.py."""
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        base = parse_config(whole["config"])
        return [(replace(base, mesh=MeshConfig(**row["settings"])), row) for row in whole["rows"]]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"--measured {path} was not written by this version of tools/benchmark_step.py ({error})") from None


def predictions(config: Config, name: str, rates: Rates, links: Links, *, gpus: Sequence[int]) -> list[list[Any]]:
    """For each number of GPUs a line for each kind of step, and where there are two for a cycle of them."""
    times = {"student": 1, "critic": config.distill.student_every - 1}
    if config.distill.method not in KINDS:
        raise ValueError(f"distill.method={config.distill.method}: there is a cost model of {', '.join(KINDS)}")
    if config.distill.method == "scm":
        del times["critic"]
    rollout = (1 + config.distill.rollout_max_steps) / 2
    lines: list[list[Any]] = []
    first = None  # GPU-seconds
    for ranks in gpus:
        dp = validate_mesh(config.model, config.mesh, ranks, tokens=tokens_per_sample(config.model, config.data.latent_shape))
        microbatches_of_a_step(config, dp)
        costs = {kind: asdict(step_cost(config, ranks, kind, rates, links, rollout=rollout)) for kind in times}
        if len(times) > 1:
            costs["cycle"] = {part: sum(n * costs[kind][part] for kind, n in times.items()) for part in _PARTS}
        for kind, parts in costs.items():
            lines.append([ranks, name, dp, kind, *parts.values(), sum(parts.values()), ""])
        first = first or ranks * lines[-1][-2]
        lines[-1][-1] = f"{first / ranks / lines[-1][-2]:.1%}"
    return lines


def comparison(rows: Sequence[tuple[Config, dict[str, Any]]], rates: Rates, links: Links) -> list[list[Any]]:
    """Predicted against measured, of every timed step."""
    lines: list[list[Any]] = []
    for config, row in rows:
        for kind, found in row["kinds"].items():
            if "phases" in found:
                cost = step_cost(config, row["ranks"], kind, rates, links, rollout=found["rollout"])
                off = f"{cost.total / found['seconds'] - 1:+.1%}"
                lines.append([row["ranks"], row["mesh"], config.model.num_layers, kind, found["seconds"], cost.total, off])
    return lines


def table(titles: list[str], rows: list[list[Any]]) -> str:
    """Markdown."""
    lines = [titles, ["---:"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(f"{x:.3f}" if isinstance(x, float) else str(x) for x in line) + " |" for line in lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file of the run; its mesh is ignored")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    parser.add_argument("--measured", nargs="+", type=Path, required=True, help="step.json of tools/benchmark_step.py")
    parser.add_argument("--meshes", nargs="+", required=True, help="such as tp2-sp-cp4")
    parser.add_argument("--gpus", nargs="+", type=int, default=[8, 32, 64, 128, 256])
    parser.add_argument("--between", type=float, required=True, metavar="GB/S", help="between nodes, of each GPU")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    args = parser.parse_intermixed_args(argv)
    try:
        links = Links(between=args.between, gpus_per_node=args.gpus_per_node)
        config = load_config(args.config, args.overrides)
        rows = [row for path in args.measured for row in measured_rows(path)]
        source = next((row for row in rows if row[0].mesh.pp == 1), rows[0])
        rates = measured_rates(*source, links)
        lines: list[list[Any]] = []
        for name in args.meshes:
            lines += predictions(replace(config, mesh=parse_mesh(name)), name, rates, links, gpus=args.gpus)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(table(["GPUs", "mesh", "dp", "step", *_PARTS, "s", "scaling"], lines))
    print(
        f"\nEfficiencies of {source[1]['mesh']}, TFLOP/s a GPU: "
        + ", ".join(f"{kind} {rate:.0f}" for kind, rate in rates.tflops.items())
    )
    print(
        f"Links, GB/s: {', '.join(f'{name} {value:g}' for name, value in asdict(links).items())}; between nodes not measured.\n"
    )
    print(table(["GPUs", "mesh", "layers", "step", "measured, s", "predicted", "off"], comparison(rows, rates, links)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
