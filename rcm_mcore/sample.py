"""Sample a network: `python -m rcm_mcore.sample --checkpoint RUN --prompts FILE --out FOLDER ...` (torchrun for more ranks)."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rcm_mcore.sampling import SampleRequest, SampleResult


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
    from rcm_mcore.sampling import SampleRequest, sample  # heavy imports only once the command line is read

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
