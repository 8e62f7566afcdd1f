"""Sample a network: `python -m rcm_mcore.sample --checkpoint RUN --prompts FILE --out FOLDER ...` (torchrun for more ranks)."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rcm_mcore.config import MeshConfig, ModelConfig, parse_model, resolve_mesh, tokens_per_sample, validate_mesh

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """What to sample, and how. See `--help` for the meaning of each field."""

    checkpoint: str
    prompts: tuple[str, ...]
    text_encoder: str
    latent_shape: tuple[int, int, int, int]
    sampler: str = "few_step"
    steps: int = 4
    which: str = "ema"
    guidance: float = 1.0
    shift: float = 5.0
    sigma_max: float = 80.0
    mid_times: tuple[float, ...] = (1.5, 1.4, 1.0)
    negative_embedding: str | None = None
    seed: int = 0
    batch_size: int = 1
    tp: int = 1
    sp: bool = False
    cp: int = 1
    cp_mode: Literal["auto", "ring", "all_to_all", "two_level"] = "auto"
    cp_inner: int | None = None
    pp: int = 1
    dtype: str | None = None


@dataclass(frozen=True, kw_only=True)
class SampleResult:
    """latents [n, C, F, H, W] float32 in the order of the prompts (on rank 0; elsewhere only this rank's)."""

    latents: Tensor
    evaluations: int  # forwards of one sample, a guided pair counting two
    seconds: float  # of the sampling loop alone, on the slowest rank


def check(request: SampleRequest, world_size: int) -> ModelConfig:
    """The model to sample; ValueError naming what is wrong before anything is loaded."""
    from rcm_mcore.checkpoint import model_of
    from rcm_mcore.diffusion.samplers import few_step_times, shifted_sigmas

    section = model_of(request.checkpoint)
    model = parse_model(section | ({"dtype": request.dtype} if request.dtype else {}))
    tokens = tokens_per_sample(model, request.latent_shape)
    validate_mesh(model, _mesh_of(request), world_size, tokens=tokens)
    if request.sampler == "few_step":
        few_step_times(request.steps, sigma_max=request.sigma_max, mid_times=request.mid_times)
        if request.guidance != 1.0:
            raise ValueError(f"--guidance {request.guidance}: a distilled student is sampled without guidance; leave it at 1")
    else:
        shifted_sigmas(request.steps, request.shift)
    if not request.prompts:
        raise ValueError("there are no prompts: give --prompts a file with one prompt a line")
    if request.batch_size < 1:
        raise ValueError(f"--batch-size {request.batch_size}: must be at least 1")
    return model


def _mesh_of(request: SampleRequest) -> MeshConfig:
    fields = ("tp", "sp", "cp", "cp_mode", "cp_inner", "pp")
    return MeshConfig(**{name: getattr(request, name) for name in fields})


def sample(request: SampleRequest) -> SampleResult:
    """Collective: sample every prompt, dealt to the data-parallel ranks. Sample i depends on (seed, i), not on the mesh."""
    import torch
    import torch.distributed as dist
    from tqdm import tqdm

    from rcm_mcore.checkpoint import load_network
    from rcm_mcore.condition import Condition
    from rcm_mcore.data import load_embedding, pad_text
    from rcm_mcore.data.text import TextEncoder
    from rcm_mcore.distill.roles import guided
    from rcm_mcore.models import build_model
    from rcm_mcore.parallel.mesh import destroy_mesh, make_mesh
    from rcm_mcore.parallel.stages import as_function

    model = check(request, int(os.environ.get("WORLD_SIZE", "1")))
    resolved, why = resolve_mesh(model, _mesh_of(request), ranks_per_node=int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    mesh = make_mesh(resolved)
    if mesh.is_main and request.cp > 1:
        print(f"context parallelism: {why}", file=sys.stderr)
    net = build_model(model, mesh.config, mesh.groups, seed=None, trainable=False)
    which: Any = request.which
    load_network(net, request.checkpoint, which=which, dp_cp_group=mesh.groups.dp_cp)
    text_shape = dict(text_len=model.text_len, text_dim=model.text_dim)
    negative = torch.zeros(1, model.text_len, model.text_dim)
    if request.negative_embedding is not None:
        negative = load_embedding(request.negative_embedding, **text_shape)[None]
    indices = list(range(len(request.prompts)))[mesh.dp_rank :: mesh.dp_size]
    rows = TextEncoder(request.text_encoder).encode([request.prompts[i] for i in indices]) if indices else []
    texts = [pad_text(r, model.text_len) for r in rows]

    done: list[Tensor] = []
    bar = tqdm(total=len(request.prompts), unit="video", disable=not mesh.is_main, dynamic_ncols=True)
    seconds = 0.0
    with torch.no_grad():
        for batch in _batches(list(zip(indices, texts)), request.batch_size):
            slots = [i for i, _ in batch]
            text = torch.stack([t for _, t in batch]).to(mesh.device)
            velocity = guided(as_function(net, mesh), Condition(text), negative.to(mesh.device), request.guidance)
            noises = _noises(request, slots, mesh.device)
            if not done:  # the first call pays for allocations and compilation
                velocity(noises[0], noises[0].new_full((len(slots),), 0.9))
            _synchronize(mesh.device)
            start = time.perf_counter()
            done.append(_sample_batch(request, velocity, noises).float().cpu())
            _synchronize(mesh.device)
            seconds += time.perf_counter() - start
            bar.update(len(slots) * mesh.dp_size)
    bar.close()
    mine = torch.cat(done) if done else torch.zeros(0, *request.latent_shape)
    gathered: list[Any] = [None] * mesh.dp_size
    dist.all_gather_object(gathered, (indices, mine, seconds), group=mesh.dp_group)
    latents = torch.zeros(len(request.prompts), *request.latent_shape)
    for where, part, _ in gathered:
        latents[where] = part
    destroy_mesh()
    per_step = 2 if request.guidance != 1.0 else 1
    return SampleResult(latents=latents, evaluations=request.steps * per_step, seconds=max(s for _, _, s in gathered))


def _sample_batch(request: SampleRequest, velocity: Callable[[Tensor, Tensor], Tensor], noises: list[Tensor]) -> Tensor:
    from rcm_mcore.diffusion.samplers import few_step_times, sample_few_step, sample_ode

    if request.sampler == "few_step":
        times = few_step_times(request.steps, sigma_max=request.sigma_max, mid_times=request.mid_times)
        return sample_few_step(velocity, noises, times)
    solver: Any = request.sampler
    *_, x = sample_ode(velocity, noises[0], steps=request.steps, shift=request.shift, solver=solver)
    return x


def _noises(request: SampleRequest, slots: list[int], device: Any) -> list[Tensor]:
    """The start noise, and for the few-step sampler the fresh noise of each later step."""
    from rcm_mcore.parallel.random import noise

    count = request.steps if request.sampler == "few_step" else 1
    return [noise(f"sample-{k}", request.latent_shape, seed=request.seed, step=0, slots=slots).to(device) for k in range(count)]


def _batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _synchronize(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m rcm_mcore.sample", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--checkpoint", required=True, help="run folder or checkpoint (format mcore)")
    add("--prompts", required=True, help="text file, one prompt a line")
    add("--out", required=True, help="new folder for latents.safetensors, samples.json and, with --codec, videos")
    add("--text-encoder", required=True, help="folder with a UMT5 encoder and its tokenizer")
    add("--latent-shape", required=True, type=int, nargs=4, metavar=("C", "F", "H", "W"))
    add("--sampler", choices=("few_step", "euler", "unipc"), default="few_step", help="few_step: a student; others: a teacher")
    add("--steps", type=int, default=4)
    add("--which", choices=("ema", "student", "fake_score"), default="ema", help="network of the checkpoint (default ema)")
    add("--guidance", type=float, default=1.0, help="classifier-free guidance of a teacher")
    add("--shift", type=float, default=5.0, help="timestep shift of euler and unipc")
    add("--sigma-max", type=float, default=80.0, help="where few_step starts")
    add("--mid-times", type=float, nargs="*", default=[1.5, 1.4, 1.0], help="TrigFlow times of later few-step steps")
    add("--negative-embedding", help="text of the unconditional branch; default zeros")
    add("--codec", help="codec.json of the digits task: decode to videos.safetensors and videos.gif")
    add("--seed", type=int, default=0)
    add("--batch-size", type=int, default=1)
    add("--tp", type=int, default=1, help="tensor-parallel size; other ranks share the prompts")
    add("--sp", action="store_true", help="sequence parallelism over the tensor-parallel ranks")
    add("--cp", type=int, default=1, help="context-parallel size: the tokens of a video are split over so many ranks")
    add("--cp-mode", choices=("auto", "ring", "all_to_all", "two_level"), default="auto", help="as mesh.cp_mode of a run")
    add("--cp-inner", type=int, help="as mesh.cp_inner of a run")
    add("--pp", type=int, default=1, help="pipeline-parallel size: the layers are split over so many ranks, which take turns")
    add("--dtype", choices=("bfloat16", "float32", "float64"), help="of the network; default as in the checkpoint")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Sample and write; exit code 0, or 2 for what the user can put right."""
    args = vars(build_parser().parse_args(argv))
    out, codec, prompt_file = Path(args.pop("out")), args.pop("codec"), Path(args.pop("prompts"))
    try:
        if out.exists() and any(out.iterdir()):
            raise ValueError(f"--out {out} is not empty: choose another folder or remove it")
        prompts = tuple(line.strip() for line in prompt_file.read_text(encoding="utf-8").splitlines() if line.strip())
        args["latent_shape"], args["mid_times"] = tuple(args["latent_shape"]), tuple(args["mid_times"])
        request = SampleRequest(prompts=prompts, **args)
        result = sample(request)
        if int(os.environ.get("RANK", "0")) == 0:
            write(out, request, result, codec=codec)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        _leave_process_group()
    return 0


def write(out: Path, request: SampleRequest, result: SampleResult, *, codec: str | None) -> None:
    """latents.safetensors, samples.json (request, evaluations, timing) and decoded videos [n, F, H, W] with a GIF."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    save_file({"latents": result.latents}, out / "latents.safetensors")
    if codec is not None:
        from rcm_mcore.data.digits import DigitCodec
        from rcm_mcore.evaluation.report import write_gif

        videos = DigitCodec.load(codec).decode(result.latents)
        save_file({"videos": videos.contiguous()}, out / "videos.safetensors")
        write_gif(videos[:40], out / "videos.gif")
    count = len(request.prompts)
    facts = {
        "evaluations": result.evaluations,
        "seconds": result.seconds,
        "seconds_per_video": result.seconds / count,
        "request": asdict(request),
    }
    (out / "samples.json").write_text(json.dumps(facts, indent=1))


def _leave_process_group() -> None:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
