"""Time the steps of rCM under several meshes, on random weights and data of the size that a configuration says.

    torchrun --nproc-per-node 4 tools/benchmark_step.py examples/wan_1_3b/config.yaml model.size=14B model.num_layers=8 \\
        train.global_batch_size=4 --meshes tp2-sp-cp2 cp2-pp2 cp4 --out DIR

Weights, data and noise depend on the seed and not on the mesh: the loss and the gradient norm of the first student step must
be those of the first mesh, or the tool stops. A time is that of the slowest rank, after one step of the kind. `tokens/s` is of
one GPU. GiB: the most that a rank had allocated, buffers between GPUs included, beside the estimate of training/estimate.py.
`waits` is the share of a student step's passes in which a rank has no forward or backward to do (with pipeline stages the
bubble), the mean of the ranks; `flushed` what arithmetic gives where each pass is a pipeline of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import schedules

from rcm_mcore.config import Config, MeshConfig, load_config, resolve_mesh, tokens_per_sample, validate_mesh
from rcm_mcore.data import Batch
from rcm_mcore.distill.draws import draw
from rcm_mcore.distill.phases import Phase
from rcm_mcore.models import DiffusionTransformer
from rcm_mcore.models.common.parameters import full_shape, local_shard
from rcm_mcore.parallel.mesh import Mesh, destroy_mesh, init_distributed, make_mesh
from rcm_mcore.parallel.random import noise
from rcm_mcore.parallel.shared_memory import shared_bytes
from rcm_mcore.training.estimate import estimate
from rcm_mcore.training.setup import build_networks, choose_attention, microbatches_of_a_step
from rcm_mcore.training.step import StepBatch, run_step

GIB = 2**30
TOLERANCE = 0.05  # of the loss and the gradient norm between meshes, in bfloat16


@dataclass
class Busy:
    """When this rank computes: every forward of a chunk and every backward."""

    spans: list[tuple[Any, Any]] = field(default_factory=list)

    def __enter__(self) -> Busy:
        self._forward, self._backward = DiffusionTransformer.forward, schedules.backward_step
        DiffusionTransformer.forward = self._timed(self._forward)  # type: ignore[method-assign]
        schedules.backward_step = self._timed(self._backward)
        return self

    def __exit__(self, *_: object) -> None:
        DiffusionTransformer.forward, schedules.backward_step = self._forward, self._backward  # type: ignore[method-assign]

    def _timed(self, run: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(run)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = _now()
            result = run(*args, **kwargs)
            self.spans.append((start, _now()))
            return result

        return timed

    def waits(self) -> float:
        """Share of the passes, from the first start to the last end anywhere, in which a rank has nothing to do: the mean."""
        busy = sum(_between(a, b) for a, b in self.spans)
        times = torch.tensor([busy, _between(self.spans[0][0], self.spans[-1][1])], dtype=torch.float64)
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, times)
        whole = max(float(t[1]) for t in everyone)
        return 1 - sum(float(t[0]) for t in everyone) / len(everyone) / whole


def _now() -> Any:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    return float(start.elapsed_time(end)) / 1e3 if torch.cuda.is_available() else float(end - start)


def parse_mesh(name: str) -> MeshConfig:
    """`tp2-sp-cp2-pp2-vpp2` and the like; ValueError for what is not one."""
    sizes: dict[str, Any] = {}
    for part in name.split("-"):
        found = re.fullmatch(r"(tp|cp|pp|vpp)(\d+)|(sp)|(ring|all_to_all|two_level)", part)
        if not found:
            raise ValueError(f"--meshes {name}: {part} is none of tpN, sp, cpN, ppN, vppN, ring, all_to_all, two_level")
        if found[1]:
            sizes[found[1]] = int(found[2])
        elif found[3]:
            sizes["sp"] = True
        else:
            sizes["cp_mode"] = found[4]
    return MeshConfig(**sizes)


@torch.no_grad()
def first_weights(net: DiffusionTransformer) -> None:
    """By name, none of them zero, so that gradients reach every layer; drawn where the network is."""
    for name, param in net.named_parameters():
        draws = torch.Generator(param.device).manual_seed(crc32(name.encode()))
        full = torch.randn(full_shape(param, net.tp_group), generator=draws, device=param.device)
        is_norm = "norm" in name and name.endswith("weight")
        param.copy_(local_shard(1 + 0.02 * full if is_norm else 0.02 * full, param, net.tp_group))


def batch_of(config: Config, mesh: Mesh, kind: str, step: int) -> StepBatch:
    """This rank's samples of a student or critic step, with a rollout of two evaluations."""
    count = config.train.global_batch_size // mesh.dp_size
    slots = tuple(range(mesh.dp_rank * count, (mesh.dp_rank + 1) * count))
    model = config.model
    latents = noise("latents", config.data.latent_shape, seed=0, step=step, slots=slots)
    text = noise("text", (model.text_len, model.text_dim), seed=0, step=step, slots=slots)
    more = {}
    if model.image_tokens:
        more["given"] = noise("given", config.data.latent_shape, seed=0, step=step, slots=slots)
        more["image"] = noise("image", (model.image_tokens, model.image_dim), seed=0, step=step, slots=slots)
    names = ("",) * count
    kept = dict(prompts=names, keys=names, slots=slots, step=step, state={"bad_samples": 0})
    batch = Batch(latents=latents, text=text, **kept, **more)
    student = kind == "student"
    phase = Phase(kind="student" if student else "critic", own_step=step, scm=student, dmd=student, rollout_steps=2)
    return StepBatch(batch=batch, phase=phase, draws=draw(config, phase, step=step, slots=slots))


def measure(config: Config, name: str) -> dict[str, Any]:
    """Times, memory and waiting of one mesh."""
    gc.collect()  # networks of the mesh before
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    mesh = make_mesh(resolve_mesh(config.model, config.mesh, ranks_per_node=int(os.environ.get("LOCAL_WORLD_SIZE", "1")))[0])
    _, roles, trained = build_networks(config, mesh, load_teacher=first_weights)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    row: dict[str, Any] = {"mesh": name}
    for kind in ("student", "critic"):
        trained[kind].wake()
        for step in range(2):
            item = batch_of(config, mesh, kind, step)
            _synchronize()
            start = time.perf_counter()
            with Busy() as busy:
                metrics = run_step(trained[kind], item, roles=roles, config=config, mesh=mesh)
            _synchronize()
            seconds = time.perf_counter() - start
            if kind == "student" and step == 0:
                row |= {"loss": metrics["loss"], "grad_norm": metrics["grad_norm"]}
        row[kind] = worst(seconds)
        if kind == "student":
            row["waits"] = busy.waits()
            stages = config.mesh.pp - 1
            row["flushed"] = stages / (config.mesh.vpp * microbatches_of_a_step(config, mesh.dp_size) + stages)
            tokens = config.train.global_batch_size * tokens_per_sample(config.model, config.data.latent_shape)
            row["tokens_per_second"] = tokens / row[kind] / dist.get_world_size()
        trained[kind].sleep()
    on_gpu = torch.cuda.is_available()
    row["gib"] = worst((torch.cuda.max_memory_allocated() + shared_bytes()) / GIB) if on_gpu else None
    row["estimated"] = estimate(config, dist.get_world_size()).total / GIB
    destroy_mesh()
    return row


def worst(value: float) -> float:
    """The largest over the ranks."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return max(everyone)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()


def require_same(row: dict[str, Any], first: dict[str, Any]) -> None:
    """RuntimeError where a mesh computes something else than the first."""
    for name in ("loss", "grad_norm"):
        if not abs(row[name] - first[name]) <= TOLERANCE * abs(first[name]):
            raise RuntimeError(
                f"{row['mesh']}: {name} of the first step is {row[name]:.6g}, of {first['mesh']} {first[name]:.6g}"
            )


_COLUMNS = ("mesh", "student", "critic", "tokens_per_second", "waits", "flushed", "gib", "estimated", "loss", "grad_norm")
_TITLES = (
    "mesh",
    "student step, s",
    "critic step, s",
    "tokens/s",
    "waits",
    "flushed",
    "GiB",
    "estimated",
    "loss",
    "gradient norm",
)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(_TITLES) + " |", "|---" + "|---:" * (len(_TITLES) - 1) + "|"]
    for row in rows:
        cells = ["" if (x := row[name]) is None else x if isinstance(x, str) else f"{x:.4g}" for name in _COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measure and print; exit code 0, or 2 for what the user can put right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="configuration of a distillation; no file that it names is read")
    parser.add_argument("overrides", nargs="*", help="section.field=value")
    parser.add_argument("--meshes", nargs="+", required=True, help="such as tp2-sp-cp2-pp2-vpp2")
    parser.add_argument("--out", type=Path, help="folder for step.json and step.md")
    args = parser.parse_intermixed_args(argv)
    try:
        base = load_config(args.config, args.overrides)
        base = replace(base, distill=replace(base.distill, negative_embedding=None))  # zeros cost the same
        configs = [replace(base, mesh=parse_mesh(name)) for name in args.meshes]
        world = int(os.environ.get("WORLD_SIZE", "1"))
        for config in configs:
            microbatches_of_a_step(config, validate_mesh(config.model, config.mesh, world))
        tokens = tokens_per_sample(base.model, base.data.latent_shape)
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    init_distributed()
    choose_attention(base)
    rows: list[dict[str, Any]] = []
    for name, config in zip(args.meshes, configs):
        rows.append(measure(config, name))
        require_same(rows[-1], rows[0])
        if dist.get_rank() == 0:
            print(json.dumps(rows[-1]), flush=True)
    if dist.get_rank() == 0:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        text = (
            f"{world} x {device}, torch {torch.__version__}, {base.model.num_layers} layers of width {base.model.hidden_size}, "
            f"{tokens} tokens, {base.train.global_batch_size} samples a step in microbatches of {base.train.micro_batch_size}, "
            f"{base.model.dtype}\n\n{table(rows)}\n"
        )
        print(text)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "step.json").write_text(json.dumps(rows, indent=1))
            (args.out / "step.md").write_text(text)
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
