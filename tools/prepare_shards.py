"""Writes WebDataset shards of latents and text embeddings: of videos and images, of what a teacher makes of prompts, or of
scikit-learn's digits (docs/data.md)."""

import argparse
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path

COMPLETE = "dataset.json"  # written last: a folder that holds it is complete
_DTYPES = ("bfloat16", "float32")
_RANK_VARIABLES = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))  # set by torchrun
_PACKAGES = ("torch", "transformers", "sentencepiece", "scikit-learn", "numpy")

_log = logging.getLogger("prepare_shards")


class UsageError(Exception):
    """What the user asked for cannot be done; the message says what would work."""


def build_parser() -> argparse.ArgumentParser:
    """The command line; its subcommands are the data sets."""
    parser = argparse.ArgumentParser(prog="prepare_shards.py", description=__doc__)
    commands = parser.add_subparsers(dest="dataset", required=True)
    digits = commands.add_parser(
        "digits",
        help="videos of real handwritten digits that move, from scikit-learn's bundled scans; no network",
        description="Writes OUT_DIR/{train,heldout}/shard_*.tar, text_encoder/ (tokenizer and UMT5), codec.json,"
        " negative_embedding.safetensors (the empty prompt) and, last, dataset.json. A complete folder is left as it"
        " is; what an interrupted run left is written anew.",
    )
    digits.add_argument("out_dir", type=Path, metavar="OUT_DIR")
    # 64 gives 90 train shards: more than the default number of readers, and small enough that the order of whole
    # shards, which is what an epoch shuffles, mixes well.
    digits.add_argument("--samples-per-shard", type=_at_least(1), default=64, metavar="N", help="default %(default)s")
    digits.add_argument("--seed", type=_at_least(0), default=0, help="of split, positions, order, encoder; default 0")
    _add_encode(commands)
    _add_synthesize(commands)
    return parser


def _add_encode(commands) -> None:
    encode = commands.add_parser(
        "encode",
        help="videos or images with captions, through the VAE and the text encoder; under torchrun, dealt to the ranks",
        description="Writes OUT_DIR/shard_*.tar (OUT_DIR/HxW/shard_*.tar for several sizes) and, last, dataset.json. Run again"
        " after a kill, with any number of ranks, it goes on where it stopped. What cannot be used is skipped, counted and"
        " named in dataset.json.",
    )
    add = encode.add_argument
    add("source", type=Path, metavar="SOURCE", help="folder with a.mp4 and a.txt, or a CSV file with columns path, caption")
    add("out_dir", type=Path, metavar="OUT_DIR")
    add("--vae", required=True, metavar="DIR", help="folder of an AutoencoderKLWan, or of a pipeline")
    add("--text-encoder", required=True, metavar="DIR", help="folder of a UMT5 or T5 encoder and tokenizer, or of a pipeline")
    add("--size", dest="sizes", required=True, nargs="+", metavar="HxW", help="buckets in pixels, such as 480x832 832x480")
    add("--frames", type=_at_least(1), default=81, help="of a video, 4n + 1; 1 for images; default %(default)s")
    add("--fps", type=_positive_fraction, default=Fraction(16), help="frames a second that are chosen; default 16")
    add("--condition", choices=("text", "image", "first_last"), default="text", help="as model.condition of the training run")
    add("--image-encoder", metavar="DIR", help="folder with image_encoder/ and image_processor/ (CLIP), for --condition image")
    add("--negative-prompt", metavar="TEXT", help="embedding to write beside the shards; default Wan's for UMT5, none for T5")
    add("--long-captions", choices=("skip", "cut"), default="skip", help="captions of more than 512 tokens; default skip")
    add("--samples-per-shard", type=_at_least(1), default=64, metavar="N", help="default %(default)s")
    add("--dtype", choices=_DTYPES, default="bfloat16", help="of the tensors in the shards; default %(default)s")
    add("--vae-dtype", choices=_DTYPES, default="float32", help="of the weights of VAE and image encoder; default %(default)s")
    add(
        "--text-dtype",
        choices=_DTYPES,
        default="bfloat16",
        help="of the weights of the text encoder; default %(default)s",
    )
    add("--decode-workers", type=_at_least(1), default=2, metavar="N", help="threads that decode ahead; default %(default)s")


def _add_synthesize(commands) -> None:
    synthesize = commands.add_parser(
        "synthesize",
        help="latents that a teacher makes of prompts; under torchrun, on a mesh, dealt to the data-parallel groups",
        description="Writes OUT_DIR/shard_*.tar and, last, dataset.json; the defaults are rCM's: Euler, 100 steps, shift 3,"
        " guidance 5. Run again after a kill it goes on where it stopped. Sample i is what rcm_mcore.sample makes of number i.",
    )
    what = synthesize.add_argument
    what("prompts", type=Path, metavar="PROMPTS", help="text file, one prompt a line; empty ones are skipped and counted")
    what("out_dir", type=Path, metavar="OUT_DIR")
    what("--checkpoint", required=True, metavar="DIR", help="of the teacher: run folder or checkpoint (format mcore)")
    what("--which", choices=("student", "ema", "fake_score"), default="student", help="network of it; default %(default)s")
    what("--text-encoder", required=True, metavar="DIR", help="folder of a UMT5 or T5 encoder and tokenizer, or of a pipeline")
    what("--size", default="480x832", metavar="HxW", help="of the videos in pixels; default %(default)s")
    what("--frames", type=_at_least(1), default=81, help="of a video, 4n + 1; default %(default)s")
    what("--sampler", choices=("euler", "unipc"), default="euler", help="default %(default)s")
    what("--steps", type=_at_least(1), default=100, help="default %(default)s")
    what("--shift", type=float, default=3.0, help="timestep shift; default %(default)s")
    what("--guidance", type=float, default=5.0, help="classifier-free guidance; default %(default)s")
    negative = synthesize.add_mutually_exclusive_group()
    negative.add_argument(
        "--negative-prompt", metavar="TEXT", help="default Wan's for UMT5, zeros for T5; written beside the shards"
    )
    negative.add_argument("--negative-embedding", metavar="FILE", help="the same, encoded")
    what("--seed", type=_at_least(0), default=0, help="of the noise, with the number of the line; default 0")
    what("--batch-size", type=_at_least(1), default=1, help="videos at once; default %(default)s")
    what("--long-prompts", choices=("skip", "cut"), default="skip", help="of more than 512 tokens; default %(default)s")
    what("--samples-per-shard", type=_at_least(1), default=64, metavar="N", help="default %(default)s")
    what("--dtype", choices=_DTYPES, default="bfloat16", help="of the tensors in the shards; default %(default)s")
    what("--network-dtype", choices=("bfloat16", "float32", "float64"), help="default as in the checkpoint")
    mesh = synthesize.add_argument_group("mesh", "ranks that share a video; the others share the prompts").add_argument
    mesh("--tp", type=int, default=1, help="tensor-parallel size")
    mesh("--sp", action="store_true", help="sequence parallelism over the tensor-parallel ranks")
    mesh("--cp", type=int, default=1, help="context-parallel size")
    mesh("--cp-mode", choices=("auto", "ring", "all_to_all", "two_level"), default="auto", help="as mesh.cp_mode of a run")
    mesh("--cp-inner", type=int, help="as mesh.cp_inner of a run")
    mesh("--pp", type=int, default=1, help="pipeline-parallel size")


def synthesize(arguments: argparse.Namespace) -> None:
    """Runs the synthesize command on this rank. Raises: ValueError, OSError."""
    import torch
    import torch.distributed as dist

    from rcm_mcore.checkpoint import model_of
    from rcm_mcore.config import parse_model
    from rcm_mcore.data.media_input import parse_size
    from rcm_mcore.data.text import WAN_NEGATIVE_PROMPT, encoder_kind
    from rcm_mcore.data.vae import latent_shape
    from rcm_mcore.sampling.synthesize import SynthesizeRequest
    from rcm_mcore.sampling.synthesize import synthesize as run

    other = ("dataset", "out_dir", "dtype", "network_dtype", "size", "frames")
    fields = {name: value for name, value in vars(arguments).items() if name not in other}
    height, width = parse_size(arguments.size)
    channels = parse_model(model_of(arguments.checkpoint)).in_channels
    fields["latent_shape"] = latent_shape(arguments.frames, height, width, channels=channels)
    given = arguments.negative_prompt is not None or arguments.negative_embedding is not None
    if not given and arguments.guidance != 1.0 and encoder_kind(arguments.text_encoder) == "umt5":
        fields["negative_prompt"] = WAN_NEGATIVE_PROMPT
    request = SynthesizeRequest(
        out=arguments.out_dir.resolve(), store_dtype=getattr(torch, arguments.dtype), dtype=arguments.network_dtype, **fields
    )
    try:
        _report(request.out, run(request))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def encode(arguments: argparse.Namespace) -> None:
    """Runs the encode command on this rank. Raises: ValueError, OSError."""
    # Imported here: torch and transformers take seconds, which --help need not.
    import torch

    from rcm_mcore.data import media_input
    from rcm_mcore.data.encode import EncodeRequest, encode_dataset
    from rcm_mcore.data.text import WAN_NEGATIVE_PROMPT, encoder_kind

    fields = {name: value for name, value in vars(arguments).items() if name not in ("dataset", "out_dir", "dtype")}
    fields["sizes"] = tuple(media_input.parse_size(text) for text in arguments.sizes)
    if arguments.negative_prompt is None and encoder_kind(arguments.text_encoder) == "umt5":
        fields["negative_prompt"] = WAN_NEGATIVE_PROMPT
    for name in ("vae_dtype", "text_dtype"):
        fields[name] = getattr(torch, fields[name])
    request = EncodeRequest(out=arguments.out_dir.resolve(), store_dtype=getattr(torch, arguments.dtype), **fields)
    rank, world_size, local = (int(os.environ.get(name, default)) for name, default in _RANK_VARIABLES)
    device = f"cuda:{local % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    _report(request.out, encode_dataset(request, device=device, rank=rank, world_size=world_size))


def _report(out_dir: Path, manifest: dict | None) -> None:
    if manifest is not None:
        _log.info("%s is complete: %s", out_dir, json.dumps(manifest["counts"]))


def prepare_digits(out_dir: Path, *, samples_per_shard: int, seed: int) -> None:
    """Writes the digit data set.

    Everything is built in ``OUT_DIR.partial``, which takes its name when it is complete, so OUT_DIR never holds half
    a data set.

    Raises: UsageError when out_dir is something else, or the same data set with other arguments.
    """
    arguments = {"dataset": "digits", "samples_per_shard": samples_per_shard, "seed": seed}
    if _is_complete(out_dir, arguments):
        _log.info("%s is complete: nothing to do", out_dir)
        return
    partial = out_dir.with_name(out_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    counts = _write_digits(partial, samples_per_shard, seed)
    versions = {package: version(package) for package in _PACKAGES}
    content = {"arguments": arguments, "counts": counts, "versions": versions}
    (partial / COMPLETE).write_text(json.dumps(content, indent=2) + "\n")
    partial.rename(out_dir)  # an empty OUT_DIR is replaced
    _log.info("%s: %s", out_dir, json.dumps(counts))


def _write_digits(folder: Path, samples_per_shard: int, seed: int) -> dict[str, int]:
    """Fills the folder; returns the numbers of samples and shards of both splits."""
    # Imported here: transformers takes seconds, which --help and a complete folder need not.
    import transformers

    from rcm_mcore.data import digits, text
    from rcm_mcore.data.build import write_embedding
    from rcm_mcore.data.shards import write_shards

    transformers.utils.logging.disable_progress_bar()
    splits = dict(zip(("train", "heldout"), digits.train_heldout_videos(seed=seed)))
    codec = digits.DigitCodec.fit(splits["train"].videos)
    codec.save(folder / "codec.json")
    text.train_tokenizer(digits.all_prompts(), folder / "text_encoder")
    text.build_text_encoder(folder / "text_encoder", seed=seed)
    encoder = text.TextEncoder(folder / "text_encoder")
    prompts = [*digits.all_prompts(), ""]
    embeddings = dict(zip(prompts, encoder.encode(prompts)))
    write_embedding(folder / "negative_embedding.safetensors", embeddings[""])
    counts = {}
    for split, videos in splits.items():
        samples = _samples(split, codec.encode(videos.videos), videos.prompts(), embeddings)
        counts[f"{split}_samples"] = len(videos.videos)
        counts[f"{split}_shards"] = len(write_shards(samples, folder / split, samples_per_shard=samples_per_shard))
    return counts


def _samples(split: str, latents, prompts: Sequence[str], embeddings) -> Iterator:
    """The samples to write, in order, under a progress bar."""
    from tqdm import tqdm

    from rcm_mcore.data.shards import Sample

    for latent, prompt in tqdm(zip(latents, prompts), total=len(prompts), desc=split, unit="video"):
        yield Sample(latent=latent, embed=embeddings[prompt], prompt=prompt)


def _is_complete(out_dir: Path, arguments: dict) -> bool:
    """Whether out_dir holds the data set of these arguments; False when it is missing or empty.

    Raises: UsageError when it holds anything else.
    """
    marker = out_dir / COMPLETE
    if not marker.is_file():
        if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
            raise UsageError(f"{out_dir} exists, is not empty and is no data set of this tool; give another folder")
        return False
    try:
        found = json.loads(marker.read_text())["arguments"]
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{marker} is damaged; remove the folder {out_dir} or give another one") from None
    if found != arguments:
        raise UsageError(
            f"{out_dir} was written with {json.dumps(found)}, asked for is {json.dumps(arguments)};"
            " remove it, give another folder or the same arguments"
        )
    return True


def _at_least(minimum: int) -> Callable[[str], int]:
    """A converter for argparse: integers from the minimum on."""

    def integer(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{text}: must be at least {minimum}")
        return value

    return integer


def _positive_fraction(text: str) -> Fraction:
    """A converter for argparse: 16, 23.976 or 24000/1001."""
    value = Fraction(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text}: must be positive")
    return value


def _quiet() -> None:
    """Leaves the terminal to our own progress."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    for name in ("megatron", "diffusers", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns the exit code: 0, or 2 for what cannot work or be written."""
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if arguments.dataset == "encode":
            _quiet()
            encode(arguments)
        elif arguments.dataset == "synthesize":
            _quiet()
            synthesize(arguments)
        else:
            prepare_digits(arguments.out_dir.resolve(), samples_per_shard=arguments.samples_per_shard, seed=arguments.seed)
    except (UsageError, ValueError, OSError) as error:
        print(f"prepare_shards.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
