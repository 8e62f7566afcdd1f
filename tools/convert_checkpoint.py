"""Converts Wan2.1 and Cosmos-Predict2 weights: ``convert_checkpoint.py --from FORMAT --to FORMAT SRC DST``."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

FORMATS = {
    "diffusers": "a folder for diffusers' from_pretrained (read: also a pipeline's folder, with transformer/ inside)",
    "wan": "Wan's official names; a .pth, .pt or .safetensors file, or a folder of sharded safetensors",
    "cosmos": "Cosmos' official names; a .pt file",
    "rcm": "rCM's .pt file",
    "rcm_dcp": "rCM's training checkpoint, read only: a folder with .metadata or model/ inside, or of iter_*",
    "mcore": "a checkpoint of this project, of any mesh",
}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="convert_checkpoint.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Converts Wan2.1 (T2V, I2V, FLF2V) and Cosmos-Predict2 (text-to-image, video-to-world) weights,\n"
        "one tensor at a time and bit-exactly unless --dtype is given. DST must not exist; it appears when it is complete,\n"
        "with a SHA-256 manifest (SHA256SUMS inside a folder, DST.sha256 beside a file).",
        epilog="formats:\n" + "\n".join(f"  {name:10} {text}" for name, text in FORMATS.items()),
    )
    parser.add_argument("--from", dest="src_format", choices=FORMATS, required=True, help="format of SRC")
    readable_only = [name for name in FORMATS if name != "rcm_dcp"]
    parser.add_argument("--to", dest="dst_format", choices=readable_only, required=True, help="format of DST")
    parser.add_argument("src", type=Path, metavar="SRC")
    parser.add_argument("dst", type=Path, metavar="DST")
    parser.add_argument(
        "--dtype", choices=("keep", "float32", "bfloat16"), default="keep", help="of the written tensors; default keep"
    )
    parser.add_argument(
        "--head-dim",
        type=int,
        metavar="N",
        help="head width where SRC does not tell it (Wan in wan, rcm, rcm_dcp); default 128",
    )
    parser.add_argument(
        "--which",
        choices=("student", "ema", "fake_score"),
        default="student",
        help="network of a SRC that holds several; default student",
    )
    parser.add_argument(
        "--max-shard-gb", type=float, metavar="GB", default=5.0, help="largest safetensors file of a folder; default 5"
    )
    group = parser.add_argument_group("a whole pipeline (with --to diffusers)")
    group.add_argument(
        "--pipeline",
        type=Path,
        metavar="BASE",
        help="base pipeline's folder: DST gets its components (weights as hard links where possible), our transformer, a "
        "scheduler for few-step sampling and a model card",
    )
    group.add_argument("--steps", type=int, metavar="N", help="steps of the student; default 4")
    group.add_argument("--sigma-max", type=float, metavar="SIGMA", help="noise that it starts from; default 80")
    group.add_argument(
        "--mid-times",
        type=float,
        nargs="+",
        metavar="T",
        help="TrigFlow times between; default 1.5 1.4 1.0, Cosmos 1.3 1.0 0.6",
    )
    group.add_argument(
        "--stock-scheduler",
        action="store_const",
        const=True,
        help="let the pipeline load diffusers' own scheduler: then it needs no trust_remote_code, but must be told the times",
    )
    group.add_argument("--license", metavar="ID", help="license field of the model card; default other")
    group.add_argument("--base-model", metavar="NAME", help="base_model field of the model card; default the name of BASE")
    return parser


def run(arguments: argparse.Namespace) -> str:
    """Converts; returns a line that says what was written. Raises: ValueError, OSError."""
    # Imported here: torch takes a second, which --help need not.
    import torch
    from tqdm import tqdm

    from rcm_mcore import interop

    formats = dict(interop.FORMATS)
    if "mcore" in (arguments.src_format, arguments.dst_format):
        formats["mcore"] = _mcore_format()
    with tqdm(desc="converting", unit="B", unit_scale=True, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        written = interop.convert(
            arguments.src_format,
            arguments.dst_format,
            arguments.src,
            arguments.dst,
            dtype=None if arguments.dtype == "keep" else getattr(torch, arguments.dtype),
            read=interop.ReadOptions(which=arguments.which, head_dim=arguments.head_dim),
            write=interop.WriteOptions(
                max_shard_bytes=int(arguments.max_shard_gb * 1e9), pipeline=_pipeline(arguments), progress=progress
            ),
            formats=formats,
        )
    model = written.model
    return (
        f"{arguments.dst}: {arguments.dst_format}, {written.tensors} tensors, {written.parameters:,} parameters, "
        f"{written.bytes:,} bytes ({model.family} {model.condition}, {model.num_layers} layers, width {model.hidden_size}, "
        f"{model.num_attention_heads} heads of {model.head_dim})"
    )


def _pipeline(arguments: argparse.Namespace):
    """The options of a whole pipeline, or None."""
    from rcm_mcore.interop import PipelineOptions

    names = ("steps", "sigma_max", "mid_times", "stock_scheduler", "license", "base_model")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if arguments.pipeline is not None:
        return PipelineOptions(base=arguments.pipeline, **given)
    if given:
        raise ValueError(f"--{next(iter(given)).replace('_', '-')}: only with --pipeline")
    return None


def _mcore_format():
    """The format of our checkpoints; its functions are imported only when it is used."""
    from rcm_mcore.checkpoint import open_network, write_network
    from rcm_mcore.interop import network_format

    return network_format(
        lambda path, which: open_network(path, which=which),
        lambda path, weights, section, progress: write_network(path, weights, section, progress=progress),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the conversion; returns the exit code: 0, or 2 for what cannot be converted or written."""
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        print(run(arguments))
    except (ValueError, OSError) as error:
        print(f"convert_checkpoint.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
