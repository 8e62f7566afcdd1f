"""Timed steps of a run and single passes of its network, on random weights and synthetic shards (tools/benchmark_step.py).

A step here is a dictionary of what it took; `warm` steps came after one of their kind.
"""

from __future__ import annotations

import re
import statistics
import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from rcm_mcore.config import Config, MeshConfig, tokens_per_sample
from rcm_mcore.data import Batch, DataLoader, Sample, write_shards
from rcm_mcore.distill.draws import draw
from rcm_mcore.distill.phases import Phase
from rcm_mcore.parallel.mesh import Mesh
from rcm_mcore.parallel.random import noise
from rcm_mcore.parallel.shared_memory import shared_bytes
from rcm_mcore.training.baseline import against_public
from rcm_mcore.training.estimate import GIB
from rcm_mcore.training.networks import build_network
from rcm_mcore.training.passes import PASSES, calls_of, random_weights, run_pass
from rcm_mcore.training.setup import build_networks
from rcm_mcore.training.step import StepBatch, run_step
from rcm_mcore.training.stopwatch import Stopwatch
from rcm_mcore.training.throughput import flops_of_step, model_flops
from rcm_mcore.training.timeline import Timeline

KINDS = {"rcm": ("scm", "student", "critic"), "scm": ("scm",), "dmd": ("student", "critic")}  # by distill.method


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


def write_samples(config: Config, folder: str) -> Config:
    """`config` with shards in `folder`, one random sample for each of its readers, stored as tools/prepare_shards.py does."""
    model, latents, readers = config.model, config.data.latent_shape, config.data.readers

    def gaussian(purpose: str, shape: tuple[int, ...], i: int) -> torch.Tensor:
        return noise(purpose, shape, seed=0, step=0, slots=(i,))[0].bfloat16()

    def sample(i: int) -> Sample:
        rows = 1 + (i * 37) % model.text_len
        more: dict[str, Any] = {}
        if model.image_tokens:
            more = {
                "given": gaussian("given", latents, i),
                "image": gaussian("image", (model.image_tokens, model.image_dim), i),
            }
        return Sample(gaussian("latents", latents, i), gaussian("text", (rows, model.text_dim), i), f"sample {i}", **more)

    if dist.get_rank() == 0:
        write_shards((sample(i) for i in range(readers)), folder, samples_per_shard=1)
    dist.barrier()
    return replace(config, data=replace(config.data, shards=(f"{folder}/*.tar",)))


def schedule(config: Config, kinds: list[str], rollouts: list[int], repeats: int) -> list[tuple[str, Phase]]:
    """The steps of a row: each kind once, with a rollout that has evaluations with and without a graph; then all in turn."""

    def steps(rollouts: list[int]) -> list[tuple[str, dict[str, Any]]]:
        of_kind = {
            "scm": [dict(kind="student", scm=True)],
            "student": [
                dict(kind="student", scm=config.distill.consistency is not None, dmd=True, rollout_steps=n) for n in rollouts
            ],
            "critic": [dict(kind="critic", rollout_steps=n) for n in rollouts],
        }
        return [(kind, fields) for kind in kinds for fields in of_kind[kind]]

    every = steps([min(2, max(rollouts))]) + repeats * steps(rollouts)
    return [(kind, Phase(own_step=i, **fields)) for i, (kind, fields) in enumerate(every)]


def with_phase(config: Config, steps: list[tuple[str, Phase]], batch: Batch) -> StepBatch:
    """What the loader's thread adds to a batch; it runs ahead of the last step."""
    phase = steps[batch.step % len(steps)][1]
    return StepBatch(batch=batch, phase=phase, draws=draw(config, phase, step=batch.step, slots=batch.slots))


def time_steps(config: Config, mesh: Mesh, steps: list[tuple[str, Phase]]) -> list[dict[str, Any]]:
    """Collective: of each step what it took, the slowest rank's or the most of any; phases are the mean of the ranks."""
    weights = partial(random_weights, dtype=getattr(torch, config.model.dtype))
    networks, roles, trained = build_networks(config, mesh, starts={"teacher": weights})
    mine: list[dict[str, Any]] = []
    seen: set[str] = set()
    loader = DataLoader(
        config=config.data,
        model=config.model,
        seed=config.train.seed,
        global_batch_size=config.train.global_batch_size,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size,
        reads=mesh.reads,
        transform=partial(with_phase, config, steps),
    )
    synchronize()
    with loader, Timeline(roles, mesh.device) as timeline:
        for kind, phase in steps:
            if mesh.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            with timeline.step():
                start = time.perf_counter()
                item: StepBatch = next(loader)
                waited = time.perf_counter() - start
                learns = trained[phase.kind]
                for other in networks:
                    if other is not learns:
                        other.sleep()
                learns.wake()
                metrics = run_step(learns, item, roles=roles, config=config, mesh=mesh)
            mine.append({"kind": kind, "rollout": phase.rollout_steps, "data": waited, "gib": allocated(mesh)})
            mine[-1] |= {"warm": kind in seen, "flops": flops_of_step(config, phase)}
            seen.add(kind)
            mine[-1] |= {name: metrics[name] for name in ("loss", "grad_norm")}
        for step, times in zip(mine, timeline.take(), strict=True):
            step |= {"seconds": times.seconds, "phases": times.phases, "busy": times.busy, "passes": times.passes}
    return [over_ranks(step) for step in zip(*gathered(mine))]


def over_ranks(ranks: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """One step from what each rank says of it."""
    step = {**ranks[0]} | {name: max(rank[name] for rank in ranks) for name in ("seconds", "data", "passes")}
    step["gib"] = None if ranks[0]["gib"] is None else max(rank["gib"] for rank in ranks)
    names = [name for name in max((rank["phases"] for rank in ranks), key=len) if name != "rest"]
    step["phases"] = {name: statistics.mean(rank["phases"].get(name, 0.0) for rank in ranks) for name in names}
    step["phases"]["rest"] = step["seconds"] - sum(step["phases"].values())
    step["waits"] = 1 - statistics.mean(rank["busy"] for rank in ranks) / step["passes"]
    return step


def time_passes(config: Config, mesh: Mesh, repeats: int) -> list[dict[str, Any]]:
    """Collective: of each pass, run in turn, what it took on the slowest rank; the first of each is when kernels compile."""
    net = build_network(config.model, mesh, trainable=True)
    random_weights(net, dtype=getattr(torch, config.model.dtype))
    calls = {tangents: calls_of(config, mesh, tangents=tangents) for tangents in (False, True)}
    watch, done = Stopwatch(mesh.device), []
    for i in range(1 + repeats):
        for name in PASSES:
            net.zero_grad()
            synchronize()
            if mesh.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            watch.begin()
            run_pass(net, mesh, calls[name.startswith("dual")], backward=name.endswith("backward"))
            watch.end()
            everyone = gathered((watch.take()[-1], allocated(mesh)))
            gib = None if everyone[0][1] is None else max(rank[1] for rank in everyone)
            done.append({"kind": name, "rollout": 0, "seconds": max(rank[0] for rank in everyone), "gib": gib, "warm": i > 0})
    return done


def matmul_tflops(mesh: Mesh) -> float:
    """Collective: what a large matmul reaches, the mean of the ranks, in TFLOP/s."""
    size, dtype = (8192, torch.bfloat16) if mesh.device.type == "cuda" else (256, torch.float32)
    a, b = (torch.randn(size, size, device=mesh.device, dtype=dtype) for _ in range(2))
    watch = Stopwatch(mesh.device)
    for times in (20, 50):
        watch.begin()
        for _ in range(times):
            a @ b
        watch.end()
    return statistics.mean(gathered(50 * 2 * size**3 / watch.take()[-1] / 1e12))


def summary(config: Config, row: dict[str, Any], kind: str) -> dict[str, Any]:
    """Means of the steps of a kind, the first one apart."""
    first, *steps = [step for step in row["steps"] if step["kind"] == kind]
    seconds = statistics.mean(step["seconds"] for step in steps)
    if "flops" in first:
        flops = statistics.mean(step["flops"] for step in steps)
    else:
        tokens = tokens_per_sample(config.model, config.data.latent_shape)
        forward, own = (model_flops(config.model, tokens, tangent=t) for t in (False, kind.startswith("dual")))
        flops = config.train.global_batch_size * (own + 2 * forward * kind.endswith("backward"))
    found: dict[str, Any] = {
        "seconds": seconds,
        "least": min(step["seconds"] for step in steps),
        "most": max(step["seconds"] for step in steps),
        "first": first["seconds"],
        "gib": None if first["gib"] is None else max(step["gib"] for step in steps),
    }
    rollouts = sorted({step["rollout"] for step in steps})
    if "phases" in first:
        names = max((step["phases"] for step in steps), key=len)
        found["phases"] = {name: statistics.mean(step["phases"].get(name, 0.0) for step in steps) for name in names}
        found["data_share"] = sum(step["data"] for step in steps) / sum(step["seconds"] for step in steps)
        found["waits"] = statistics.mean(step["waits"] for step in steps)
        found["seconds_by_rollout"] = {
            n: statistics.mean(step["seconds"] for step in steps if step["rollout"] == n) for n in rollouts
        }
        found |= {name: first[name] for name in ("loss", "grad_norm")}
    found["tflops_per_rank"] = flops / row["ranks"] / seconds / 1e12
    found["mfu"] = found["tflops_per_rank"] / statistics.mean(row["matmul_tflops"])
    found["rollout"] = statistics.mean(rollouts)
    found["public"] = against_public(config, kind, seconds, ranks=row["ranks"], rollout=found["rollout"])
    return found


def cycle(config: Config, row: dict[str, Any]) -> dict[str, Any]:
    """One student step and the critic steps that follow it, from the means of both."""
    critics = config.distill.student_every - 1
    student, critic = row["kinds"]["student"], row["kinds"]["critic"]
    seconds = student["seconds"] + critics * critic["seconds"]
    tflops = (
        student["tflops_per_rank"] * student["seconds"] + critics * critic["tflops_per_rank"] * critic["seconds"]
    ) / seconds
    waited = student["data_share"] * student["seconds"] + critics * critic["data_share"] * critic["seconds"]
    mfu = tflops / statistics.mean(row["matmul_tflops"])
    return {"critic_steps": critics, "seconds": seconds, "tflops_per_rank": tflops, "mfu": mfu, "data_share": waited / seconds}


def allocated(mesh: Mesh) -> float | None:
    """The most GiB since the last reset, with buffers between GPUs."""
    return (torch.cuda.max_memory_allocated() + shared_bytes()) / GIB if mesh.device.type == "cuda" else None


def gathered(value: Any) -> list[Any]:
    """Collective: `value` of every rank."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()
