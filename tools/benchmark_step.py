"""Time the steps of rCM, or single passes of one network, under one mesh or several, on random weights and synthetic shards.

    torchrun --nproc-per-node 4 tools/benchmark_step.py examples/wan_14b/config.yaml train.global_batch_size=1 \\
        --meshes tp4-sp --kinds scm student critic --rollouts 1 2 3 4 --repeats 2 --out DIR
    torchrun --nproc-per-node 1 tools/benchmark_step.py examples/wan_1_3b/config.yaml data.latent_shape=[16,21,60,104] \\
        train.global_batch_size=1 --meshes tp1 --single --out DIR

Kinds of steps: `scm`, a student step with the consistency term alone; `student`, with every term of distill.method; `critic`.
Rollouts of so many evaluations each; means are over them. Each kind is run once first (that is when kernels are compiled), then
all in turn, `--repeats` times. A step is what training does, from the loader's next batch to the next but one event on the
GPU's timeline; nothing is waited for that training does not wait for. Phases: rcm_mcore/training/timeline.py, the mean of the
ranks; a step is that of the slowest rank.

Before anything is reported a network cut to two layers must be right to twice the error of plain PyTorch in the same dtype
(rcm_mcore/training/passes.py), and loss and gradient norm of the first steps must be those of the first mesh. `MFU`: FLOPs of
the method (what recompute does again is not counted) over a matmul of 8192 x 8192 measured before and after. GiB: the most
that a rank had allocated, buffers between GPUs included, beside the estimate of training/estimate.py. `waits`: the share of the
passes in which a rank has no forward or backward to do (with pipeline stages the bubble); `flushed`: what arithmetic gives
where each pass is a pipeline of its own. The public network's figures: rcm_mcore/training/baseline.py.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rcm_mcore.config import Config, load_config, resolve_mesh, tokens_per_sample, validate_mesh
from rcm_mcore.parallel.mesh import destroy_mesh, init_distributed, make_mesh
from rcm_mcore.training.benchmark import (
    KINDS,
    cycle,
    gathered,
    matmul_tflops,
    parse_mesh,
    schedule,
    summary,
    time_passes,
    time_steps,
    write_samples,
)
from rcm_mcore.training.estimate import GIB, estimate
from rcm_mcore.training.passes import gate
from rcm_mcore.training.setup import microbatches_of_a_step, ranks_per_node, world_size
from rcm_mcore.training.timeline import PHASES

TOLERANCE = 0.05  # of the loss and the gradient norm between meshes, in bfloat16
_PACKAGES = ("torch", "triton", "megatron-core", "nvidia-nccl-cu13", "nvidia-cudnn-cu13")


def measure(config: Config, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The row of one mesh: what is asked for, gated, with the same machine's matmul before and after."""
    gc.collect()  # networks of the mesh before
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    mesh = make_mesh(resolve_mesh(config.model, config.mesh, ranks_per_node=ranks_per_node())[0])
    row: dict[str, Any] = {"mesh": name, "ranks": dist.get_world_size(), "settings": asdict(config.mesh)}
    say(f"{name}: the check")
    row["gate"] = gate(config, mesh)
    gc.collect()
    say(f"{name}: {json.dumps(row['gate'])}")
    rates = [matmul_tflops(mesh)]
    if args.single:
        done = time_passes(config, mesh, args.repeats)
    else:
        done = time_steps(config, mesh, schedule(config, args.kinds, args.rollouts, args.repeats))
    rates.append(matmul_tflops(mesh))
    row |= {"matmul_tflops": rates, "steps": done, "kinds": {}}
    for kind in dict.fromkeys(step["kind"] for step in done):
        row["kinds"][kind] = summary(config, row, kind)
    if "critic" in row["kinds"] and "student" in row["kinds"]:
        row["cycle"] = cycle(config, row)
    row["estimated_gib"] = None if args.single else estimate(config, dist.get_world_size()).total / GIB
    stages = config.mesh.pp - 1
    row["flushed"] = stages / (config.mesh.vpp * microbatches_of_a_step(config, mesh.dp_size) + stages)
    destroy_mesh()
    return row


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def require_same(row: dict[str, Any], first: dict[str, Any]) -> None:
    """RuntimeError where a mesh computes something else than the first."""
    for kind, found in row["kinds"].items():
        wanted = first["kinds"][kind]
        for name in {"loss", "grad_norm"} & found.keys():
            if not abs(found[name] - wanted[name]) <= TOLERANCE * abs(wanted[name]):
                raise RuntimeError(
                    f"{row['mesh']}: {name} of the first {kind} step is {found[name]:.6g}, "
                    f"of {first['mesh']} {wanted[name]:.6g}"
                )


def environment() -> dict[str, Any]:
    """Versions, commit and device."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    git = subprocess.run(
        ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty", "--exclude=*"], capture_output=True, text=True
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"device": device, "commit": git.stdout.strip() or None, "versions": versions, "python": sys.version.split()[0]}


def table(titles: list[str], rows: list[list[Any]]) -> str:
    """Markdown."""

    def line(values: list[Any]) -> str:
        return "| " + " | ".join("" if x is None else x if isinstance(x, str) else f"{x:.4g}" for x in values) + " |"

    return "\n".join([line(titles), "|---" + "|---:" * (len(titles) - 1) + "|", *map(line, rows)])


def report(rows: list[dict[str, Any]]) -> str:
    """Markdown: the figures, the phases, the public network beside them, the checks."""
    kinds = [(row, kind, found) for row in rows for kind, found in row["kinds"].items()]
    titles = ["mesh, kind", "s", "least", "most", "first", "TFLOP/s a GPU", "MFU", "GiB", "estimated", "data wait", "waits"]
    lines: list[list[Any]] = []
    for row, kind, found in kinds:
        names = ("seconds", "least", "most", "first", "tflops_per_rank", "mfu", "gib")
        shares = [None if (x := found.get(name)) is None else f"{x:.2%}" for name in ("data_share", "waits")]
        lines.append([f"{row['mesh']} {kind}", *(found[name] for name in names), row["estimated_gib"], *shares])
    text = table(titles, lines) + "\n"
    for row in rows:
        before, after = row["matmul_tflops"]
        text += (
            f"\n{row['mesh']}: matmul {before:.1f} TFLOP/s before, {after:.1f} after; flushed {row['flushed']:.4g}. Relative "
        )
        text += "errors of two layers, and of plain PyTorch: "
        text += ", ".join(f"{name} {x['error']:.2e} ({x['plain']:.2e})" for name, x in row["gate"].items()) + ".\n"
        if "cycle" in row:
            whole = row["cycle"]
            text += (
                f"{row['mesh']}: a cycle of one student and {whole['critic_steps']} critic steps, by their means, "
                f"{whole['seconds']:.4g} s, MFU {whole['mfu']:.4g}, data wait {whole['data_share']:.2%}.\n"
            )
    if any("phases" in found for _, _, found in kinds):
        phases = [name for name in PHASES if any(name in found.get("phases", {}) for _, _, found in kinds)]
        lines = [[f"{row['mesh']} {kind}", *map(found["phases"].get, phases)] for row, kind, found in kinds]
        text += "\nSeconds by phase:\n\n" + table(["mesh, kind", *phases], lines) + "\n"
        counts = sorted({n for _, _, found in kinds for n in found["seconds_by_rollout"] if n})
        lines = [[f"{r['mesh']} {k}", *map(f["seconds_by_rollout"].get, counts)] for r, k, f in kinds if f["rollout"]]
        if lines:
            text += "\nSeconds by evaluations of the rollout:\n\n" + table(["mesh, kind", *map(str, counts)], lines) + "\n"
    titles = ["mesh, kind", "GPU-s a sample", "public network", "times faster", "target, GPU-s"]
    names = ("gpu_seconds", "arithmetic", "times_faster", "target_gpu_seconds")
    lines = [[f"{r['mesh']} {k}", *(f["public"][name] for name in names)] for r, k, f in kinds if f["public"]]
    return text + ("\n" + table(titles, lines) + "\n" if lines else "")


def check(args: argparse.Namespace) -> list[Config]:
    """The configuration under each mesh; ValueError for what cannot be run."""
    base = load_config(args.config, args.overrides)
    if base.train.objective != "distill":
        raise ValueError(f"train.objective={base.train.objective}: the steps of a distillation are timed")
    base = replace(base, distill=replace(base.distill, negative_embedding=None))  # zeros cost the same
    if base.distill.method not in KINDS:
        raise ValueError(f"distill.method={base.distill.method}: the steps of {', '.join(KINDS)} are timed")
    allowed = KINDS[base.distill.method]
    args.kinds = args.kinds or list(allowed)
    if unknown := [kind for kind in args.kinds if kind not in allowed]:
        raise ValueError(f"--kinds {' '.join(unknown)}: distill.method={base.distill.method} has {', '.join(allowed)}")
    args.rollouts = args.rollouts or list(range(1, base.distill.rollout_max_steps + 1))
    if min(args.rollouts) < 1 or args.repeats < 1:
        raise ValueError(f"--rollouts {min(args.rollouts)} --repeats {args.repeats}: must be at least 1")
    configs = [replace(base, mesh=parse_mesh(name)) for name in args.meshes]
    for config in configs:
        dp = validate_mesh(
            config.model, config.mesh, world_size(), tokens=tokens_per_sample(config.model, config.data.latent_shape)
        )
        microbatches_of_a_step(config, dp)
        if config.data.readers % dp:
            raise ValueError(f"data.readers={config.data.readers} must be a multiple of the data-parallel size {dp}")
    return configs


def main(argv: list[str] | None = None) -> int:
    """Measure and print; exit code 0, or 2 for what the user can put right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="configuration of a distillation; no file that it names is read")
    parser.add_argument("overrides", nargs="*", help="section.field=value")
    parser.add_argument("--meshes", nargs="+", required=True, help="such as tp2-sp-cp2-pp2-vpp2, or tp1")
    parser.add_argument("--kinds", nargs="+", help="of scm, student, critic; default: all that distill.method has")
    parser.add_argument("--rollouts", nargs="+", type=int, help="evaluations; default: 1 to distill.rollout_max_steps")
    parser.add_argument("--repeats", type=int, default=2, help="default %(default)s")
    parser.add_argument("--single", action="store_true", help="passes of one network, without teacher, optimizer and data")
    parser.add_argument("--out", type=Path, help="folder for step.json and step.md")
    args = parser.parse_intermixed_args(argv)
    try:
        configs = check(args)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    init_distributed()
    folder = gathered(tempfile.mkdtemp(prefix="benchmark_step_") if dist.get_rank() == 0 else None)[0]
    rows: list[dict[str, Any]] = []
    try:
        data = configs[0].data if args.single else write_samples(configs[0], folder).data
        for name, config in zip(args.meshes, configs):
            rows.append(measure(replace(config, data=data), name, args))
            require_same(rows[-1], rows[0])
            say(json.dumps(rows[-1]["kinds"]))
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
    if dist.get_rank() == 0:
        model, train, facts = configs[0].model, configs[0].train, environment()
        facts["command"] = " ".join(sys.argv if argv is None else argv)
        text = (
            f"{world_size()} x {facts['device']}, commit {facts['commit']}, "
            + ", ".join(f"{name} {value}" for name, value in facts["versions"].items() if value)
            + f"; {model.num_layers} layers of width {model.hidden_size}, "
            f"{tokens_per_sample(model, configs[0].data.latent_shape)} tokens, {train.global_batch_size} samples a step in "
            f"microbatches of {train.micro_batch_size}, {model.dtype}; each kind once, then {args.repeats} times in turn\n\n"
            f"    {facts['command']}\n\n{report(rows)}"
        )
        print(text)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            whole = {"environment": facts, "config": asdict(configs[0]), "rows": rows}
            (args.out / "step.json").write_text(json.dumps(whole, indent=1))
            (args.out / "step.md").write_text(text)
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
