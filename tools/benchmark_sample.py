"""Time sampling on GPUs with random weights of full size: a student's few steps against a teacher's guided ones, VAE included.

    python tools/benchmark_sample.py --model 14B --out DIR
    torchrun --nproc-per-node 2 tools/benchmark_sample.py --model 14B --tp 2 --out DIR

480x832 pixels, 81 frames and Wan's VAE unless told otherwise; no file is read. First two layers of the width are held against
float64, or nothing is reported. A time is that of one video after a warm-up. `of matmul` is the arithmetic of the network, by
formula, over the seconds and the rate of a large bfloat16 matmul timed right before. A teacher takes equal steps: with fewer
than 50 the time of 50 is the same seconds a step, and the table says so. The VAE decodes whole and in tiles; `overlapped` is
the time of a video in a row of them, each decoded beside the sampling of the next. Peak memory: the most that rank 0 allocated,
all weights included. Writes DIR/sample_MODEL.json, .md and, with matplotlib, .png.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from rcm_mcore.condition import Condition
from rcm_mcore.config import MeshConfig, ModelConfig, parse_model, resolve_mesh, tokens_per_sample, validate_mesh
from rcm_mcore.data.vae import VideoVAE, latent_shape
from rcm_mcore.diffusion.samplers import few_step_times, sample_few_step, sample_ode
from rcm_mcore.distill.roles import guided
from rcm_mcore.models import DiffusionTransformer, build_model
from rcm_mcore.models.common.parameters import full_shape, local_shard
from rcm_mcore.parallel.mesh import Mesh, destroy_mesh, make_mesh
from rcm_mcore.parallel.random import noise
from rcm_mcore.sampling.background import Background
from rcm_mcore.training.throughput import model_flops

GIB = 2**30
TEACHER_STEPS = 50
GUIDANCE, SHIFT = 5.0, 5.0
TOLERANCE = 0.03  # of two layers in bfloat16, relative, in the 2-norm
_TINY_VAE = dict(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1)


@dataclass(frozen=True)
class Case:
    """What is sampled, on what."""

    model: ModelConfig
    mesh: Mesh
    latent: tuple[int, int, int, int]
    net: DiffusionTransformer

    def normal(self, name: str, *shape: int) -> Tensor:
        return noise(name, shape, seed=0, step=0, slots=[0]).to(self.mesh.device)

    def velocity(self, guidance: float) -> Callable[[Tensor, Tensor], Any]:
        """The network on a text of full length."""
        text, negative = (self.normal(name, self.model.text_len, self.model.text_dim) for name in ("text", "negative"))
        return guided(self.net, Condition(text), negative, guidance)

    def student(self, steps: int) -> Callable[[], Tensor]:
        """Samples; noise and text are drawn before."""
        velocity, noises = self.velocity(1.0), [self.normal(f"sample-{k}", *self.latent) for k in range(steps)]
        return lambda: sample_few_step(velocity, noises, few_step_times(steps))

    def teacher(self, steps: int) -> Callable[[], Tensor]:
        """Samples; noise and text are drawn before."""
        velocity, start = self.velocity(GUIDANCE), self.normal("sample-0", *self.latent)
        return lambda: list(sample_ode(velocity, start, steps=steps, shift=SHIFT))[-1]


@torch.no_grad()
def random_weights(net: DiffusionTransformer) -> None:
    """By name, drawn where the network is, none of them zero."""
    for name, param in net.named_parameters():
        draws = torch.Generator(param.device).manual_seed(crc32(name.encode()))
        full = torch.randn(full_shape(param, net.tp_group), generator=draws, device=param.device)
        is_norm = "norm" in name and name.endswith("weight")
        param.copy_(local_shard(1 + 0.02 * full if is_norm else 0.02 * full, param, net.tp_group))


@torch.no_grad()
def error_of_two_layers(model: ModelConfig, mesh: Mesh) -> float:
    """Relative, of the output in the model's dtype against float64 with the same weights."""
    outputs, weights = [], []
    for dtype in (model.dtype, "float64"):
        small = replace(model, num_layers=2, dtype=dtype)
        net = build_model(small, mesh.config, mesh.groups, seed=None, trainable=False)
        if weights:
            for param, value in zip(net.parameters(), weights, strict=True):
                param.copy_(value)
        else:
            random_weights(net)
            weights = list(net.parameters())
        case = Case(small, mesh, (model.in_channels, 1, 16, 16), net)
        x = case.normal("x", *case.latent).to(torch.float64 if dtype == "float64" else torch.float32)
        outputs.append(case.velocity(1.0)(x, x.new_full((1,), 0.7)).double())
    return float((outputs[0] - outputs[1]).norm() / outputs[1].norm())


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of one call, and its result."""
    synchronize()
    start = time.perf_counter()
    result = run()
    synchronize()
    return time.perf_counter() - start, result


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of an 8192^3 bfloat16 matmul of random numbers; of a small one on a CPU."""
    size = 8192 if device.type == "cuda" else 256
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    run = lambda: [a @ b for _ in range(10)]
    run()
    return 2 * size**3 / sorted(timed(run)[0] / 10 for _ in range(5))[2]


def peak(run: Callable[[], Any]) -> tuple[float, float | None, Any]:
    """Seconds, the most GiB that were allocated (none on a CPU), and the result."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds, result = timed(run)
    return seconds, torch.cuda.max_memory_allocated() / GIB if on_gpu else None, result


def sampling_row(case: Case, what: str, run: Callable[[], Tensor], *, evaluations: int, flops: float) -> dict[str, Any]:
    """One line of the table."""
    matmul = matmul_rate(case.mesh.device)
    seconds, gib, latents = peak(run)
    if not bool(latents.isfinite().all()) or not float(latents.std()) > 0:
        raise RuntimeError(f"{what}: the latents are constant or not finite")
    share = flops * evaluations / seconds / (matmul * dist.get_world_size())
    row = {"what": what, "evaluations": evaluations, "seconds": seconds, "of_matmul": share, "matmul_tflops": matmul / 1e12}
    report(row | {"gib": gib})
    return row | {"gib": gib}


def sampling_rows(case: Case, steps: list[int], teacher_steps: int) -> list[dict[str, Any]]:
    """Teacher and student."""
    flops = model_flops(case.model, tokens_per_sample(case.model, case.latent))
    case.teacher(1)(), case.student(1)()  # allocations and compilation
    name = f"teacher, {TEACHER_STEPS}x2"
    teacher = sampling_row(case, name, case.teacher(teacher_steps), evaluations=2 * teacher_steps, flops=flops)
    whole = TEACHER_STEPS / teacher_steps
    teacher |= {"evaluations": 2 * TEACHER_STEPS, "seconds": teacher["seconds"] * whole, "measured_steps": teacher_steps}
    students = [
        sampling_row(case, f"student, {n}", case.student(n), evaluations=n, flops=flops) for n in sorted(steps, reverse=True)
    ]
    return [teacher, *students]


def load_vae(device: torch.device, tiny: bool, *, tiled: bool) -> VideoVAE:
    """Wan's, with random weights, by way of a folder."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, torch.device(device):
        AutoencoderKLWan(**(_TINY_VAE if tiny else {})).save_pretrained(folder)
        return VideoVAE(folder, device=device, dtype=torch.bfloat16, tiled=tiled)


def decoding(case: Case, tiny: bool) -> dict[str, Any]:
    """Seconds and memory of the VAE, whole and in tiles, and of videos whose decoding is overlapped."""
    latents = case.normal("latents", *case.latent)
    found: dict[str, Any] = {}
    for tiled in (False, True):
        vae = load_vae(case.mesh.device, tiny, tiled=tiled)
        vae.decode(latents)  # cuDNN looks for its algorithms
        name = "tiled" if tiled else "whole"
        found[f"{name}_s"], found[f"{name}_gib"], video = peak(lambda v=vae: v.decode(latents))  # type: ignore[misc]
        if not bool(video.isfinite().all()):
            raise RuntimeError(f"the VAE ({name}): the video is not finite")
    report(found)
    return found


def overlapped(case: Case, tiny: bool, *, steps: int, videos: int) -> dict[str, Any]:
    """Seconds a video with the decoding of each beside the sampling of the next, and one after the other."""
    device, student = case.mesh.device, case.student(steps)
    vae = load_vae(device, tiny, tiled=False)
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def decode(latents: Tensor) -> None:
        with contextlib.ExitStack() as stack:
            if stream is not None:  # the current device is that of a thread
                stack.enter_context(torch.cuda.device(device))
                stack.enter_context(torch.cuda.stream(stream))
            vae.decode(latents).cpu()

    def serially() -> None:
        for _ in range(videos):
            vae.decode(student().float()).cpu()

    def beside() -> None:
        with Background(decode) as background:
            for _ in range(videos):
                background.put(student().float().cpu())

    vae.decode(case.normal("latents", *case.latent))  # cuDNN looks for its algorithms
    row = {"steps": steps, "videos": videos, "serial_s": timed(serially)[0] / videos, "overlapped_s": timed(beside)[0] / videos}
    report(row)
    return row


def table(rows: list[dict[str, Any]], vae: dict[str, Any]) -> str:
    """Markdown; the speed-ups are over the teacher, of the network alone and with the VAE."""
    lines = [
        "| sampler | evaluations | network, s | of matmul | with VAE, s | speed-up | with VAE | peak GiB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        gib = "" if row["gib"] is None else f"{row['gib']:.1f}"
        lines.append(
            f"| {row['what']} | {row['evaluations']} | {row['seconds']:.3g} | {row['of_matmul']:.2f} | {row['total_s']:.3g} "
            f"| {row['speed_up']:.1f} | {row['speed_up_total']:.1f} | {gib} |"
        )
    for name in ("whole", "tiled"):
        gib = "" if vae[f"{name}_gib"] is None else f"{vae[f'{name}_gib']:.1f}"
        lines.append(f"| VAE, {name} | | | | {vae[f'{name}_s']:.3g} | | | {gib} |")
    return "\n".join(lines)


def compare(rows: list[dict[str, Any]], vae: dict[str, Any]) -> None:
    """Add the times with VAE and the speed-ups over the first row."""
    for row in rows:
        row["total_s"] = row["seconds"] + vae["whole_s"]
        row["speed_up"] = rows[0]["seconds"] / row["seconds"]
        row["speed_up_total"] = rows[0]["total_s"] / row["total_s"]


def chart(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Bars of the speed-ups, where matplotlib is."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(7.0, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for place, (key, label) in enumerate((("speed_up", "network"), ("speed_up_total", "network and VAE"))):
        bars = axes.bar([i + 0.4 * place for i in range(len(rows))], [row[key] for row in rows], width=0.38, label=label)
        axes.bar_label(bars, fmt="%.1f")
    axes.set_xticks([i + 0.2 for i in range(len(rows))], [row["what"] for row in rows])
    axes.set_ylabel("times faster than the teacher")
    axes.set_title(title)
    axes.legend()
    figure.savefig(path, format="png", dpi=110)


def report(row: dict[str, Any]) -> None:
    if dist.get_rank() == 0:
        print(json.dumps(row), file=sys.stderr, flush=True)


def write(out: Path | None, name: str, record: dict[str, Any], text: str) -> None:
    """What was found."""
    print(text)
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(record, indent=1))
    (out / f"{name}.md").write_text(text)
    chart(record["rows"], f"Wan {record['model']}, {record['what']}", out / f"{name}.png")


def describe(args: argparse.Namespace, model: ModelConfig, mesh: Mesh, tokens: int) -> str:
    """The head of the record."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    exact = (
        ""
        if args.teacher_steps == TEACHER_STEPS
        else f" ({args.teacher_steps} measured, the time of {TEACHER_STEPS} from them)"
    )
    ranks = f"{dist.get_world_size()} x {device} (tp {mesh.tp_size}, cp {mesh.cp_size}), torch {torch.__version__}"
    network = f"Wan {args.model}, {model.num_layers} layers of width {model.hidden_size}, {model.dtype}, random weights"
    video = f"{args.size} pixels, {args.frames} frames, {tokens} tokens"
    return (
        f"{ranks}. {network}. {video}. Teacher: Euler, {TEACHER_STEPS} guided steps{exact}. VAE in bfloat16, whole in the sums."
    )


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("1.3B", "14B", "tiny"), default="1.3B", help="tiny has a tiny VAE, for tests")
    parser.add_argument("--size", default="480x832", metavar="HxW")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4], help="of the student")
    parser.add_argument("--teacher-steps", type=int, default=TEACHER_STEPS, help="steps to measure, of 50")
    parser.add_argument("--videos", type=int, default=3, help="in a row, for the overlap on one GPU; 0 leaves it out")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--cp", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder of the record")
    return parser


def settle(args: argparse.Namespace) -> tuple[ModelConfig, tuple[int, int, int, int], MeshConfig]:
    """Model, latents and mesh; ValueError for what cannot be measured."""
    height, _, width = args.size.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise ValueError(f"--size {args.size}: must be HxW in pixels, such as 480x832")
    if not 1 <= args.teacher_steps <= TEACHER_STEPS:
        raise ValueError(f"--teacher-steps {args.teacher_steps}: must be from 1 to {TEACHER_STEPS}")
    for steps in args.steps:
        few_step_times(steps)
    latent = latent_shape(args.frames, int(height), int(width))
    model = parse_model({"size": args.model, "dtype": "bfloat16", "in_channels": latent[0]})
    config = MeshConfig(tp=args.tp, sp=args.tp > 1, cp=args.cp)
    dp = validate_mesh(model, config, int(os.environ.get("WORLD_SIZE", "1")), tokens=tokens_per_sample(model, latent))
    if dp > 1:
        raise ValueError(f"--tp {args.tp} --cp {args.cp} leaves {dp} data-parallel groups; one video is sampled at a time")
    return model, latent, resolve_mesh(model, config, ranks_per_node=int(os.environ.get("LOCAL_WORLD_SIZE", "1")))[0]


def main(argv: list[str] | None = None) -> int:
    """Measure and print; exit code 0, or 2 for what the user can put right."""
    args = build_parser().parse_args(argv)
    try:
        model, latent, config = settle(args)
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    mesh = make_mesh(config)
    error = error_of_two_layers(model, mesh)
    if not error <= TOLERANCE:
        raise RuntimeError(f"two layers differ from float64 by {error:.1e}, more than {TOLERANCE}: nothing is timed")
    report({"error_of_two_layers": error})
    net = build_model(model, mesh.config, mesh.groups, seed=None, trainable=False)
    random_weights(net)
    case, tiny = Case(model, mesh, latent, net), args.model == "tiny"
    with torch.no_grad():
        rows = sampling_rows(case, args.steps, args.teacher_steps)
        if mesh.is_main:
            vae = decoding(case, tiny)
        beside = [
            overlapped(case, tiny, steps=n, videos=args.videos)
            for n in args.steps
            if args.videos and mesh.config.cp * args.tp == 1
        ]
    if mesh.is_main:
        compare(rows, vae)
        text = f"{describe(args, model, mesh, tokens_per_sample(model, latent))}\n\n{table(rows, vae)}\n"
        for row in beside:
            text += (
                f"\n{row['videos']} videos of {row['steps']} steps in a row: {row['overlapped_s']:.3g} s a video with the "
                f"decoding beside the sampling, {row['serial_s']:.3g} s one after the other.\n"
            )
        record = {"model": args.model, "what": f"{args.size}, {args.frames} frames", "error_of_two_layers": error, "rows": rows}
        write(args.out, f"sample_{args.model}", record | {"vae": vae, "overlap": beside}, text)
    dist.barrier()
    destroy_mesh()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
