"""What a student and a critic step take on many GPUs: measured efficiencies, bytes by arithmetic, measured rates of links.

    passes      FLOPs of the method over TFLOP/s of such a pass, taken from a measured row (tools/benchmark_step.py)
    tensor      gathers and scatters of activations, 6 a layer and forward, none of it hidden
    context     keys on their way round the ring, as far as kernels do not hide them; heads exchanged, none of it hidden
    stages      the bubble and the messages between stages
    gradients   float32, reduced over data- and context-parallel ranks after the last backward, none of it hidden
    optimizer   seconds an element of a rank's shard, from the measured row, and the new weights on their way to all
    rest        seconds a microbatch, from the measured row

Assumed: an efficiency is that of the measured row whatever the mesh (smaller matmuls of tensor-parallel ranks are slower), and
the same for every forward; recompute and compilation are those of the measured row; ranks wait for nobody but stages; groups
lie as mesh.py numbers ranks. Rates within a node are Links' defaults, with their sources; that between nodes is given: none was
measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from rcm_mcore.config import Config, resolve_mesh, tokens_per_sample
from rcm_mcore.training.estimate import Estimate, estimate
from rcm_mcore.training.throughput import model_flops

FORWARD, DUAL, BACKWARD, DUAL_BACKWARD = "forward", "dual", "backward", "dual backward"
# Of tools/benchmark_step.py: which pass a phase consists of.
_PHASES = {
    "teacher": FORWARD, "rollout": FORWARD, "rollout with graph": FORWARD, "fake score": FORWARD, "teacher at rollout": FORWARD,
    "forward": FORWARD, "dual": DUAL, "backward": BACKWARD, "rollout backward": BACKWARD, "dual backward": DUAL_BACKWARD,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Links:
    """Rates in 1e9 bytes/s that a GPU sends at, and the share of a ring's transfers that kernels hide within a node.

    Within a node of H200: performance.md's all-reduce (bus rate) and all-to-all on eight, messages on eight;
    docs/benchmarks/context_parallel_h200_202611.md: copy engine, and `hidden` of the ring at cp 4 and 32,760 tokens.
    """

    between: float  # nodes, of each GPU; not measured
    gpus_per_node: int = 8
    collective: float = 262.0
    exchange: float = 227.0
    message: float = 112.0
    ring: float = 367.0
    ring_hidden: float = 0.5

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name != "ring_hidden" and not getattr(self, field.name) > 0:
                raise ValueError(f"{field.name}={getattr(self, field.name)}: must be positive")
        if not 0 <= self.ring_hidden <= 1:
            raise ValueError(f"ring_hidden={self.ring_hidden}: a share, must lie in [0, 1]")

    def within(self, span: int) -> bool:
        """Whether `span` ranks next to each other are of one node."""
        return self.gpus_per_node % span == 0

    def reduction(self, stride: int, size: int) -> float:
        """Rate of a collective over `size` ranks, each `stride` after the one before: all rails of a node carry it."""
        if self.within(stride * size):
            return self.collective
        return min(self.collective, self.between * max(1, self.gpus_per_node // stride))


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Of one GPU: TFLOP/s by pass; by network that learns, seconds an element of its shard in an update, and of the rest a
    microbatch."""

    tflops: Mapping[str, float]
    optimizer: Mapping[str, float]
    rest: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds of a step."""

    passes: float
    tensor: float
    context: float
    stages: float
    gradients: float
    optimizer: float
    rest: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class _Pass:
    """So many passes of a kind, each of so many branches of a sample; `has_graph`: in the schedule with backwards."""

    kind: str
    count: float
    branches: int = 1
    has_graph: bool = False


def terms_of(config: Config, kind: str, rollout: float) -> list[list[_Pass]]:
    """The passes of each loss term of a step (throughput.flops_of_step); kind: scm (the consistency term alone), student,
    critic."""
    teacher = 1 if config.distill.guidance == 1.0 else 2
    trained = [_Pass(FORWARD, 1, has_graph=True), _Pass(BACKWARD, 1, has_graph=True)]
    if kind == "critic":
        return [[_Pass(FORWARD, rollout), *trained]]
    terms = []
    if kind == "scm" or config.distill.consistency is not None:
        dual = [_Pass(DUAL, 1, has_graph=True), _Pass(DUAL_BACKWARD, 1, has_graph=True)]
        terms.append([_Pass(FORWARD, 1, teacher), *dual])
    if kind == "student" and config.distill.has_fake_score:
        again = config.mesh.pp > 1  # over stages the last evaluation runs once without its graph (training/pipeline.py)
        terms.append([_Pass(FORWARD, rollout - 1 + again + 1), _Pass(FORWARD, 1, teacher), *trained])
    return terms


def step_cost(config: Config, ranks: int, kind: str, rates: Rates, links: Links, *, rollout: float) -> Cost:
    """Seconds of an optimizer step of `kind` on `ranks` GPUs under config.mesh, which must be valid; rollout may be a mean."""
    mesh, needed = config.mesh, estimate(config, ranks)
    microbatches = _microbatches(config, ranks)
    sums = dict.fromkeys(("passes", "tensor", "context", "stages"), 0.0)
    for term in terms_of(config, kind, rollout):
        fill = 0.0  # passes without a graph follow each other through the stages, and wait once
        for item in term:
            one = {n: item.branches * x for n, x in _pass_cost(config, ranks, item.kind, rates, links).items()}
            for name in one:
                sums[name] += item.count * microbatches * one[name]
            slot = (mesh.pp - 1) / mesh.vpp * sum(one.values())
            if item.has_graph:  # megatron's schedule begins and ends with a bubble
                sums["stages"] += slot
            else:
                fill = max(fill, slot)
        sums["stages"] += fill
    learns = "fake_score" if kind == "critic" else "student"
    size = ranks // (mesh.tp * mesh.pp)
    reduced, sent = _reduced(config, needed, size, links)
    return Cost(
        **sums,
        gradients=reduced,
        optimizer=rates.optimizer[learns] * _shard(config, needed, size) + sent,
        rest=rates.rest[learns] * microbatches,
    )


def _microbatches(config: Config, ranks: int) -> int:
    """Of a step, on a data-parallel rank."""
    dp = ranks // (config.mesh.tp * config.mesh.cp * config.mesh.pp)
    return config.train.global_batch_size // (dp * config.train.micro_batch_size)


def _reduced(config: Config, needed: Estimate, size: int, links: Links) -> tuple[float, float]:
    """Seconds to reduce gradients over `size` data- and context-parallel ranks, and to give them the new weights."""
    seconds = (size - 1) / size * (needed.layers + needed.embedders) / 1e9 / links.reduction(config.mesh.tp, size)
    return 4 * seconds, {"bfloat16": 2, "float32": 4, "float64": 8}[config.model.dtype] * seconds


def _shard(config: Config, needed: Estimate, size: int) -> int:
    """Elements of a network whose masters a rank has."""
    return math.ceil(needed.layers / size) + math.ceil(needed.embedders / (size * config.mesh.pp))


def _pass_cost(config: Config, ranks: int, kind: str, rates: Rates, links: Links) -> dict[str, float]:
    """Seconds of a pass of one microbatch on the ranks that work on it."""
    if kind not in rates.tflops:
        raise ValueError(f"no efficiency of a {kind} pass was measured: time the kinds student and critic")
    own = config.mesh.tp * config.mesh.cp * config.mesh.pp
    seconds = config.train.micro_batch_size * _flops(config, kind) / own / rates.tflops[kind] / 1e12
    return {"passes": seconds} | _communication(config, ranks, kind, links, rates.tflops[kind])


def _flops(config: Config, kind: str) -> float:
    tokens = tokens_per_sample(config.model, config.data.latent_shape)
    if kind == DUAL:
        return model_flops(config.model, tokens, tangent=True)
    return model_flops(config.model, tokens) * (1 if kind == FORWARD else 2)


def _communication(config: Config, ranks: int, kind: str, links: Links, tflops: float | None) -> dict[str, float]:
    """Seconds that a pass of a microbatch waits for messages; without `tflops` kernels last long enough to hide a ring's."""
    model, mesh, needed = config.model, config.mesh, estimate(config, ranks)
    kept = 0 if model.recompute == "full" else 1  # the output of self-attention, where a block is computed again
    again = 0 if model.recompute == "none" else 1
    # In units of a forward of tensors, of which estimate.sent_* has two: backward gathers what the column-parallel linears saw
    # and the gradients of the row-parallel ones, and scatters those of the former, 9 for 6, after the forward again.
    tensor = {FORWARD: 1.0, DUAL: 2.0, BACKWARD: 1.5 + again, DUAL_BACKWARD: 2.5}[kind] * needed.sent_tp / 2
    # Tensors of keys and values, and of their gradients, that leave for each other rank.
    ring = {FORWARD: 2, DUAL: 4, BACKWARD: 4 + 2 * again * (1 - kept), DUAL_BACKWARD: 4}[kind]
    # Queries, keys, values and output, or their gradients.
    exchange = {FORWARD: 4, DUAL: 8, BACKWARD: 4 + 4 * again, DUAL_BACKWARD: 8}[kind]
    message = 2 if kind in (DUAL, DUAL_BACKWARD) else 1
    seconds = {"tensor": tensor / 1e9 / (links.collective if links.within(mesh.tp) else links.between), "context": 0.0}
    if mesh.cp > 1:
        inner = resolve_mesh(model, mesh, ranks_per_node=min(ranks, links.gpus_per_node))[0].cp_inner or 1
        one = needed.sent_cp / (mesh.cp - 1) / 4  # keys of this rank, all its layers
        rate = links.exchange if links.within(mesh.tp * inner) else links.between
        seconds["context"] = exchange * one * (inner - 1) / inner / 1e9 / rate
        near = links.within(mesh.tp * mesh.cp)
        travels = ring * one * (mesh.cp // inner - 1) / 1e9 / (links.ring if near else links.between)
        kernels = _attention(config, kind, kept=kept, again=again) / 1e12 / tflops if tflops else math.inf
        seconds["context"] += max((1 - links.ring_hidden) * travels, travels - kernels)
    near = links.within(ranks) or mesh.pp == 1
    seconds["stages"] = message * needed.sent_pp / 2 / 1e9 / (links.message if near else links.between)
    return seconds


def _attention(config: Config, kind: str, *, kept: int, again: int) -> float:
    """FLOPs of the self-attention in a pass of a microbatch, on one rank."""
    model, mesh = config.model, config.mesh
    tokens = tokens_per_sample(model, config.data.latent_shape)
    forward = 4 * tokens**2 * model.hidden_size * model.num_layers * config.train.micro_batch_size
    times = {FORWARD: 1, DUAL: 3, BACKWARD: 2 + again * (1 - kept), DUAL_BACKWARD: 2}[kind]
    return times * forward / (mesh.tp * mesh.cp * mesh.pp)


def measured_rates(config: Config, row: Mapping[str, Any], links: Links) -> Rates:
    """Efficiencies of a row that tools/benchmark_step.py measured: what is left of its phases without what this module says
    that they wait for. ValueError for a row with pipeline stages, whose phases hold none of the waiting, or without phases.
    """
    if config.mesh.pp > 1:
        raise ValueError(f"mesh {row['mesh']}: efficiencies are taken from a row without pipeline stages")
    ranks = row["ranks"]
    needed, size, microbatches = estimate(config, ranks), ranks // config.mesh.tp, _microbatches(config, ranks)
    flops: dict[str, float] = {}
    seconds: dict[str, float] = {}
    optimizer: dict[str, float] = {}
    rest: dict[str, float] = {}
    for kind, found in row["kinds"].items():
        if "phases" not in found:
            raise ValueError(f"mesh {row['mesh']}: efficiencies are taken from timed steps, not from single passes")
        counts = _counts(config, kind, found["rollout"])
        for phase, took in found["phases"].items():
            if phase in _PHASES and took:
                name, times = _PHASES[phase], counts[phase] * microbatches
                waits = sum(_communication(config, ranks, name, links, None).values())
                flops[name] = flops.get(name, 0.0) + times * config.train.micro_batch_size * _flops(config, name)
                seconds[name] = seconds.get(name, 0.0) + took - times * waits
        learns = "fake_score" if kind == "critic" else "student"
        update = found["phases"]["optimizer"] - _reduced(config, needed, size, links)[1]
        optimizer[learns] = max(0.0, update) / _shard(config, needed, size)
        rest[learns] = found["phases"]["rest"] / microbatches
    own = config.mesh.tp * config.mesh.cp
    tflops = {name: flops[name] / own / seconds[name] / 1e12 for name in flops}
    if bad := [name for name, rate in tflops.items() if not rate > 0]:
        raise ValueError(f"mesh {row['mesh']}: {bad[0]} took less than its messages would: give the rates of these links")
    for by_network in (optimizer, rest):
        by_network.setdefault("fake_score", by_network.get("student", 0.0))
        by_network.setdefault("student", by_network["fake_score"])
    return Rates(tflops=tflops, optimizer=optimizer, rest=rest)


def _counts(config: Config, kind: str, rollout: float) -> dict[str, float]:
    """How many passes of a sample each phase has."""
    teacher = 1 if config.distill.guidance == 1.0 else 2
    once = dict.fromkeys(_PHASES, 1.0)
    return once | {"teacher": teacher, "teacher at rollout": teacher, "rollout": rollout - (kind == "student")}
