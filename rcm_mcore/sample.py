"""From prompts to files: `python -m rcm_mcore.sample --checkpoint RUN --prompt TEXT --out FOLDER ...`, or under torchrun.

A student in 1 to 4 steps, or a teacher (--sampler euler or unipc, --guidance). With --pipeline or --vae it writes an mp4, or a
png of one frame, a sample; always latents.safetensors and samples.json, which says how each sample came to be. A run that was
interrupted continues when it is started again. Noise depends on --seed and the number of the sample, not on the mesh.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rcm_mcore.config import ModelConfig
    from rcm_mcore.sampling import GivenFiles

_EXAMPLE = (
    "example: torchrun --nproc-per-node 2 -m rcm_mcore.sample --checkpoint runs/wan_1_3b --prompts prompts.txt --steps 4 "
    "--tp 2 --pipeline Wan2.1-T2V-1.3B-Diffusers --size 480x832 --frames 81 --out samples"
)


_SAMPLERS = "few_step: a student; mean_flow: one of distill.method=meanflow; others: a teacher"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m rcm_mcore.sample", description=__doc__, epilog=_EXAMPLE)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    what = parser.add_argument_group("what to sample").add_argument
    what("--prompt", action="append", metavar="TEXT", help="a prompt; may be repeated")
    what("--prompts", metavar="FILE", help="text file, one prompt a line")
    what("--seed", type=int, default=0, help="sample i has the noise of this seed and number i")
    what("--seeds", type=int, nargs="+", help="samples of every prompt, one for each; prompt p has the noise of number p")
    what("--num-per-prompt", type=int, default=1, help="samples of a prompt, one after another")
    what("--first-index", type=int, default=0, help="number of the first sample, to repeat one of a longer list")
    given = parser.add_argument_group(
        "given frames", "for networks with model.condition; a flag once for all prompts, or once for each, in their order"
    ).add_argument
    given(
        "--image", action="append", metavar="FILE", help="first frame (image, first_last, frames); resized to cover, then cut"
    )
    given("--last-image", action="append", metavar="FILE", help="last frame (first_last)")
    given("--video", action="append", metavar="FILE", help="a video to go on with (frames), in place of --image")
    given("--video-frames", type=int, default=5, help="the last so many frames of --video are given, 4n + 1 (default 5)")
    given("--image-encoder", metavar="FOLDER", help="CLIP vision model and image processor, if not those of --pipeline")
    add_sampling(parser)
    files = parser.add_argument_group("files").add_argument
    files("--out", required=True, metavar="FOLDER", help="new, or with an interrupted run of the same request")
    files("--fps", type=float, default=16.0, help="frames a second of an mp4")
    files("--codec", metavar="FILE", help="codec.json of the digits task: decode to videos.safetensors and videos.gif")
    return parser


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """The flags of every command line that samples: network, shape, sampler, other networks, mesh (`take_sampling`)."""
    network = parser.add_argument_group("network").add_argument
    network("--checkpoint", required=True, help="run folder or checkpoint (format mcore)")
    network("--which", choices=("ema", "student", "fake_score"), default="ema", help="network of the checkpoint (default ema)")
    network("--size", metavar="HxW", help="of the video in pixels, such as 480x832")
    network("--frames", type=int, help="of the video, 4n + 1 (default 81); 1 is an image")
    network("--latent-shape", type=int, nargs=4, metavar=("C", "F", "H", "W"), help="instead of --size and --frames")
    how = parser.add_argument_group("how").add_argument
    how("--sampler", choices=("few_step", "mean_flow", "euler", "unipc"), default="few_step", help=_SAMPLERS)
    how("--steps", type=int, default=4)
    how("--sigma-max", type=float, default=80.0, help="where few_step and mean_flow start")
    how(
        "--mid-times",
        type=float,
        nargs="*",
        help="TrigFlow times of later few-step steps; default 1.5 1.4 1.0, of Cosmos 1.3 1.0 0.6",
    )
    how("--shift", type=float, default=5.0, help="timestep shift of euler and unipc")
    how(
        "--guidance",
        type=float,
        default=1.0,
        help="classifier-free guidance of a teacher, 1 for none; Cosmos's own scale plus 1",
    )
    how("--negative-prompt", metavar="TEXT", help="text of the unconditional branch; default zeros")
    how("--negative-embedding", metavar="FILE", help="the same, encoded")
    how("--batch-size", type=int, default=1)
    how("--dtype", choices=("bfloat16", "float32", "float64"), help="of the network; default as in the checkpoint")
    parts = parser.add_argument_group("other networks").add_argument
    parts("--pipeline", metavar="FOLDER", help="diffusers folder with vae, text_encoder and tokenizer")
    parts(
        "--text-encoder", metavar="FOLDER", help="UMT5 (Wan) or T5 (Cosmos) encoder and tokenizer, if not those of --pipeline"
    )
    parts("--vae", metavar="FOLDER", help="AutoencoderKLWan, if not that of --pipeline")
    parts("--vae-dtype", choices=("float32", "bfloat16"), default="float32")
    parts("--tiled", action="store_true", help="decode in tiles: less memory, seams are blended")
    mesh = parser.add_argument_group("mesh").add_argument
    mesh("--tp", type=int, default=1, help="tensor-parallel size; other ranks share the prompts")
    mesh("--sp", action="store_true", help="sequence parallelism over the tensor-parallel ranks")
    mesh("--cp", type=int, default=1, help="context-parallel size: the tokens of a video are split over so many ranks")
    mesh("--cp-mode", choices=("auto", "ring", "all_to_all", "two_level"), default="auto", help="as mesh.cp_mode of a run")
    mesh("--cp-inner", type=int, help="as mesh.cp_inner of a run")
    mesh("--pp", type=int, default=1, help="pipeline-parallel size: the layers are split over so many ranks, which take turns")


def main(argv: list[str] | None = None) -> int:
    """Sample and write; exit code 0, or 2 for what the user can put right."""
    return run_command(vars(build_parser().parse_args(argv)), _sample)


def run_command(args: dict[str, Any], sample: Callable[[dict[str, Any]], None]) -> int:
    """`sample(args)` with logging of rank 0; exit code 0, or 2 for what the user can put right. Leaves no process group."""
    is_main = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if is_main else logging.ERROR, format="%(message)s")
    for name in ("megatron", "diffusers", "transformers", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        sample(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        _leave_process_group()
    return 0


def _sample(args: dict[str, Any]) -> None:
    from rcm_mcore.sampling import Output, SampleRequest, generate  # heavy imports only once the command line is read

    pipeline = args["pipeline"]
    output = take_sampling(args) | {"codec": args.pop("codec")}
    args["given"] = _given(args, pipeline, output)
    args["prompts"] = _prompts(args.pop("prompt"), args["prompts"])
    args["seeds"] = tuple(args["seeds"] or ())
    generate(SampleRequest(**args), Output(**output))


def take_sampling(args: dict[str, Any]) -> dict[str, Any]:
    """Fields of `Output` from --out, --fps and the flags of `add_sampling`, taken out of `args`; what of these flags is left
    there are fields of `SampleRequest`. Raises ValueError for flags that do not fit together."""
    from rcm_mcore.checkpoint import model_of
    from rcm_mcore.config import MID_TIMES, parse_model

    pipeline = args.pop("pipeline")
    output = {name: args.pop(name) for name in ("vae", "vae_dtype", "tiled", "fps")}
    output |= {"folder": args.pop("out"), "vae": output["vae"] or pipeline}
    args["text_encoder"] = args["text_encoder"] or pipeline
    if args["text_encoder"] is None:
        raise ValueError("--text-encoder: give a folder with a UMT5 or T5 encoder and its tokenizer, or --pipeline")
    model = parse_model(model_of(args["checkpoint"]))
    args["latent_shape"] = _latent_shape(model, args.pop("size"), args.pop("frames"), args["latent_shape"])
    args["mid_times"] = MID_TIMES[model.family] if args["mid_times"] is None else tuple(args["mid_times"])
    return output


def _given(args: dict[str, Any], pipeline: str | None, output: dict[str, Any]) -> GivenFiles | None:
    """What the flags for given frames say; takes them out of `args`."""
    from rcm_mcore.sampling import GivenFiles

    names = {"images": "image", "last_images": "last_image", "videos": "video"}
    files: dict[str, Any] = {field: tuple(args.pop(flag) or ()) for field, flag in names.items()}
    frames, encoder = args.pop("video_frames"), args.pop("image_encoder")
    if not any(files.values()):
        if encoder is not None:
            raise ValueError(f"--image-encoder {encoder}: it is for --image, which is not there")
        return None
    encoders: dict[str, Any] = dict(vae=output["vae"], image_encoder=encoder or pipeline, dtype=output["vae_dtype"])
    return GivenFiles(**files, video_frames=frames, **encoders)


def _prompts(given: list[str] | None, file: str | None) -> tuple[str, ...]:
    """Those of the command line or those of a file, without its empty lines."""
    if (given is None) == (file is None):
        raise ValueError("give prompts either by --prompt TEXT or by --prompts FILE")
    if file is None:
        return tuple(given or ())
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts {file}: is not UTF-8 text ({error})") from None
    return tuple(line.strip() for line in lines if line.strip())


def _latent_shape(model: ModelConfig, size: str | None, frames: int | None, shape: list[int] | None) -> tuple[int, ...]:
    """[C, F, H, W] from pixels and frames, or as given."""
    if shape is not None:
        if size is not None or frames is not None:
            raise ValueError("--latent-shape says what --size and --frames say: leave them out")
        return tuple(shape)
    if size is None:
        raise ValueError("--size: give it (HxW in pixels, with --frames), or --latent-shape")
    from rcm_mcore.data.vae import PIXELS, latent_shape

    found = re.fullmatch(r"(\d+)x(\d+)", size)
    if not found:
        raise ValueError(f"--size {size}: must be HxW in pixels, such as 480x832")
    height, width = int(found[1]), int(found[2])
    for pixels, patch in ((height, model.patch_size[1]), (width, model.patch_size[2])):
        if pixels < 1 or pixels % (PIXELS * patch):
            raise ValueError(f"--size {size}: height and width must be multiples of {PIXELS * patch}")
    try:
        return latent_shape(81 if frames is None else frames, height, width, channels=model.in_channels)
    except ValueError as error:
        raise ValueError(f"--{str(error).replace('=', ' ', 1)}") from None


def _leave_process_group() -> None:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
