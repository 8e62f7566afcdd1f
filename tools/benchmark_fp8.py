"""What `model.fp8_forwards` changes in the steps of rCM, beside what bfloat16 changes, and what it saves. On one GPU; on a CPU
without times.

    python tools/benchmark_fp8.py examples/wan_1_3b/config.yaml model.num_layers=10 --out DIR
    python tools/benchmark_fp8.py examples/digits/rcm.yaml distill.teacher=runs/demo/teacher --student runs/demo/student --data

The same networks, samples and noise go through both loss terms of a student step and through a critic step in float32, in
bfloat16 and with float8 forwards. A row is a tensor or a loss: a network's output, or the gradient of all parameters.

`bf16`: distance of bfloat16 to float32. `fp8`: of float8 forwards to float32. `fp8 to bf16`: what switching them on changes.
`another batch`: distance between batches, both in bfloat16, of what a step averages over. All relative, root mean squares over
`--batches`.

Without --student the networks are random, the student and the fake score a little away from the teacher; without --data so are
the samples. Random networks have no outliers among their activations.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args
from zlib import crc32

import torch
from rcm_kernels.fp8 import quantize_rows
from torch import Tensor

from rcm_mcore.checkpoint import load_network, require_network
from rcm_mcore.condition import Condition
from rcm_mcore.config import Config, load_config, tokens_per_sample, validate_mesh
from rcm_mcore.config.mesh import MeshConfig
from rcm_mcore.data import DataLoader
from rcm_mcore.distill import steps
from rcm_mcore.distill.draws import draw
from rcm_mcore.distill.phases import Phase
from rcm_mcore.models import DiffusionTransformer
from rcm_mcore.models.common.fp8 import require_fp8
from rcm_mcore.parallel.mesh import Mesh, local_mesh
from rcm_mcore.parallel.random import noise
from rcm_mcore.training.networks import build_network
from rcm_mcore.training.setup import check_starts, choose_attention, negative
from rcm_mcore.training.step import terms_of

Role = Literal["teacher", "student", "fake_score"]
PRECISIONS = ("float32", "bf16", "fp8")
TERMS = ("scm", "dmd", "critic")
DRIFT = 0.05  # between random networks that play teacher, student and fake score, of a weight
SEEN = 1 << 22  # elements of a gradient that are compared, evenly over the parameters
LINEARS = ("linear_qkv.weight", "linear_q.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight")


def with_precision(config: Config, precision: str) -> Config:
    """The run in one of PRECISIONS."""
    dtype: Literal["float32", "bfloat16"] = "float32" if precision == "float32" else "bfloat16"
    return replace(config, model=replace(config.model, dtype=dtype, fp8_forwards=precision == "fp8"))


def make_network(config: Config, mesh: Mesh, name: Role, student: Path | None) -> DiffusionTransformer:
    """A network of a run by its role, the same but for rounding in every precision."""
    net = build_network(config.model, mesh, seed=0, trainable=name != "teacher")
    if student is not None:
        if name == "teacher":
            load_network(net, config.distill.teacher, which=config.distill.teacher_weights)
        else:
            load_network(net, student, which=name)
        return net
    with torch.no_grad():
        for key, param in net.named_parameters():
            if not param.any():  # training from scratch begins with it at zero, where no layer would matter
                param.copy_(0.02 * normal_like(param, key))
            if name != "teacher":
                param.add_(DRIFT * float(param.float().square().mean().sqrt()) * normal_like(param, f"{name} {key}"))
            param.copy_(param.bfloat16())  # float32 networks have the weights of the others
    return net


def normal_like(param: Tensor, name: str) -> Tensor:
    """float32 draws in the shape of `param` that depend on the name alone."""
    g = torch.Generator(param.device).manual_seed(crc32(name.encode()))
    return torch.randn(param.shape, generator=g, device=param.device)


def microbatches(config: Config, count: int, *, data: bool) -> list[tuple[Tensor, Tensor]]:
    """Latents [b, C, F, H, W] and text [b, X, text_dim] of `count` microbatches."""
    size, model = config.train.micro_batch_size, config.model
    if not data:
        slots = tuple(range(size))
        text = (model.text_len, model.text_dim)
        draws = lambda name, shape, i: noise(name, shape, seed=0, step=i, slots=slots)
        return [(draws("latents", config.data.latent_shape, i), draws("text", text, i)) for i in range(count)]
    reading: dict[str, Any] = dict(config=config.data, model=model, seed=config.train.seed, dp_rank=0, dp_size=1)
    with DataLoader(global_batch_size=size, **reading) as loader:
        return [(batch.latents, batch.text) for batch, _ in zip(loader, range(count))]


@contextmanager
def seen_in_steps() -> Iterator[dict[str, Tensor]]:
    """What the steps hand to their losses: the teacher's velocity, g, the rollout and the score gap."""
    found: dict[str, Tensor] = {}
    tangent, score = steps.consistency_tangent, steps.score_distillation_loss

    def consistency_tangent(*args: Any, **options: Any) -> Tensor:
        found["teacher's velocity"] = args[2]
        found["tangent g"] = tangent(*args, **options)
        return found["tangent g"]

    def score_distillation_loss(generated: Tensor, fake: Tensor, teacher: Tensor, **options: Any) -> Any:
        found["rollout"], found["score gap"] = generated.detach(), fake - teacher
        return score(generated, fake, teacher, **options)

    steps.consistency_tangent, steps.score_distillation_loss = consistency_tangent, score_distillation_loss
    try:
        yield found
    finally:
        steps.consistency_tangent, steps.score_distillation_loss = tangent, score


def run_terms(
    config: Config, mesh: Mesh, student: Path | None, batches: list[tuple[Tensor, Tensor]]
) -> list[dict[str, Tensor]]:
    """By microbatch: every row of the table, on the CPU."""
    nets = {name: make_network(config, mesh, name, student) for name in get_args(Role)}
    text = negative(config).to(mesh.device)
    roles = steps.Roles(**nets, negative=text, sample_group=mesh.sample_group)
    results = []
    for i, (latents, texts) in enumerate(batches):
        slots = tuple(range(len(latents)))
        found: dict[str, Tensor] = {}
        for term in TERMS:
            kind: Literal["student", "critic"] = "critic" if term == "critic" else "student"
            phase = Phase(kind=kind, own_step=0, scm=term == "scm", dmd=term == "dmd", warmup=1.0, rollout_steps=2)
            draws = draw(config, phase, step=i, slots=slots).to(mesh.device)
            condition = Condition(texts.to(mesh.device))
            batch = steps.MicroBatch(latents=latents.to(mesh.device), condition=condition, draws=draws)
            trained = nets["fake_score" if term == "critic" else "student"]
            trained.zero_grad(set_to_none=True)
            with seen_in_steps() as seen:
                (step,) = terms_of(phase, roles, config)
                loss, _ = step(batch)
            assert loss is not None, "no sample has a finite output"
            loss.backward()
            stride = -(-sum(p.numel() for p in trained.parameters()) // SEEN)
            grads = [p.grad.flatten()[::stride] for p in trained.parameters() if p.grad is not None]
            found |= seen | {f"gradient, {term}": torch.cat(grads), f"loss, {term}": loss.detach()}
            trained.zero_grad(set_to_none=True)
        results.append({name: value.double().cpu() for name, value in found.items()})
    return results


def distances(rows: dict[str, list[dict[str, Tensor]]]) -> list[dict[str, Any]]:
    """The table's rows, from what `run_terms` gave in each of PRECISIONS."""

    def distance(name: str, a: str, b: str, shift: int = 0) -> float:
        pairs = [(x[name], rows[b][(i + shift) % len(rows[b])][name]) for i, x in enumerate(rows[a])]
        squares = [float((x - y).norm() / y.norm()) ** 2 for x, y in pairs]
        return (sum(squares) / len(squares)) ** 0.5

    table = []
    for name in rows["bf16"][0]:
        row: dict[str, Any] = {
            "what": name,
            "bf16": distance(name, "bf16", "float32"),
            "fp8": distance(name, "fp8", "float32"),
            "fp8 to bf16": distance(name, "fp8", "bf16"),
        }
        of_a_step = name.startswith(("gradient", "loss")) and len(rows["bf16"]) > 1
        table.append(row | {"another batch": distance(name, "bf16", "bf16", 1) if of_a_step else None})
    return table


def require_plausible(table: list[dict[str, Any]]) -> None:
    """RuntimeError where float8 did nothing, or more than its rounding can."""
    (velocity,) = (row["fp8 to bf16"] for row in table if row["what"] == "teacher's velocity")
    if not 1e-4 < velocity < 0.3:
        raise RuntimeError(f"float8 forwards change the teacher's velocity by {velocity:.2g}: nothing, or too much")


@torch.no_grad()
def seconds(config: Config, mesh: Mesh) -> dict[str, float]:
    """Of a forward of the network without a gradient, in bfloat16 and in float8, and of rounding its weights."""
    size, model = config.train.micro_batch_size, config.model
    x = torch.randn(size, *config.data.latent_shape, device=mesh.device)
    s = torch.full((size,), 0.5, device=mesh.device)
    condition = Condition(torch.randn(size, model.text_len, model.text_dim, device=mesh.device))
    found = {}
    for precision in ("bf16", "fp8"):
        net = build_network(with_precision(config, precision).model, mesh, seed=0, trainable=False)
        found[f"forward, {precision}"] = median_seconds(partial(net, x, s, condition))
    weights = [p for name, p in net.named_parameters() if name.endswith(LINEARS)]
    found["rounding of weights"] = median_seconds(lambda: [quantize_rows(w) for w in weights])
    return found


def median_seconds(run: Any, repeats: int = 7) -> float:
    """Of a call, after two more."""
    times = []
    for i in range(repeats + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times += [time.perf_counter() - start] if i > 1 else []
    return statistics.median(times)


def as_markdown(table: list[dict[str, Any]], times: dict[str, float]) -> str:
    """Both tables."""
    lines = ["| " + " | ".join(table[0]) + " |", "|---" + "|---:" * (len(table[0]) - 1) + "|"]
    for row in table:
        cells = ["" if x is None else x if isinstance(x, str) else f"{x:.2e}" for x in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    if times:
        lines += ["", "| seconds | |", "|---|---:|", *(f"| {name} | {value:.4f} |" for name, value in times.items())]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Measure and print; exit code 0, or 2 for what the user can put right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="configuration of a distillation by rCM; its mesh is not used")
    parser.add_argument("overrides", nargs="*", help="section.field=value")
    parser.add_argument("--student", type=Path, help="a run whose student and fake score to take, with distill.teacher")
    parser.add_argument("--data", action="store_true", help="take samples from data.shards")
    parser.add_argument("--batches", type=int, default=4, help="microbatches to average over")
    parser.add_argument("--out", type=Path, help="folder for fp8.json and fp8.md")
    args = parser.parse_intermixed_args(argv)
    try:
        config = replace(load_config(args.config, args.overrides), mesh=MeshConfig())
        if not args.data and config.distill.negative_embedding is not None:
            config = replace(config, distill=replace(config.distill, negative_embedding=None))  # zeros, as random as the rest
        if config.model.condition != "text":
            raise ValueError(f"model.condition={config.model.condition}: this tool gives networks a text alone")
        if args.batches < 1:
            raise ValueError(f"--batches {args.batches}: must be at least 1")
        as_fp8 = with_precision(config, "fp8")
        require_fp8(as_fp8.model)
        tokens = tokens_per_sample(config.model, config.data.latent_shape)
        validate_mesh(as_fp8.model, config.mesh, 1, tokens=tokens)
        if args.student is not None:
            for which in ("student", "fake_score"):
                require_network(args.student, which)
            check_starts(config)
        batches = microbatches(config, args.batches, data=args.data)
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    with local_mesh() as mesh:
        rows = {}
        for precision in PRECISIONS:
            choose_attention(with_precision(config, precision))
            rows[precision] = run_terms(with_precision(config, precision), mesh, args.student, batches)
        times = seconds(config, mesh) if torch.cuda.is_available() else {}
    table = distances(rows)
    require_plausible(table)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    text = (
        f"{device}, torch {torch.__version__}, {config.model.num_layers} layers of width {config.model.hidden_size}, {tokens} "
        f"tokens, {args.batches} microbatches of {config.train.micro_batch_size}; "
        f"{'networks of ' + str(args.student) if args.student else 'random networks'}, "
        f"{'samples of data.shards' if args.data else 'random samples'}\n\n{as_markdown(table, times)}"
    )
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "fp8.json").write_text(json.dumps({"table": table, "seconds": times}, indent=1))
        (args.out / "fp8.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
