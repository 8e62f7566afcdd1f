"""Converts Wan2.1 text-to-video weights: ``convert_checkpoint.py --from FORMAT --to FORMAT SRC DST``."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

FORMATS = {
    "diffusers": "a folder for diffusers' from_pretrained (read: also a pipeline's folder, with transformer/ inside)",
    "wan": "official names; a .pth, .pt or .safetensors file (read: also a folder of safetensors)",
    "rcm": "rCM's .pt file",
    "mcore": "a checkpoint of this project, of any tensor-parallel size",
}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="convert_checkpoint.py",
        description="Converts Wan2.1 text-to-video weights, bit-exactly unless --dtype is given. DST must not exist.",
        epilog="formats: " + "; ".join(f"{name}: {text}" for name, text in FORMATS.items()),
    )
    parser.add_argument("--from", dest="src_format", choices=FORMATS, required=True, help="format of SRC")
    parser.add_argument("--to", dest="dst_format", choices=FORMATS, required=True, help="format of DST")
    parser.add_argument("src", type=Path, metavar="SRC")
    parser.add_argument("dst", type=Path, metavar="DST")
    parser.add_argument(
        "--dtype", choices=("keep", "float32", "bfloat16"), default="keep", help="of the written tensors; default keep"
    )
    parser.add_argument(
        "--head-dim", type=int, metavar="N", help="head width where SRC does not tell it (wan, rcm); default 128"
    )
    parser.add_argument("--which", choices=("student", "ema", "fake_score"), help="network of an mcore SRC; default student")
    return parser


def run(arguments: argparse.Namespace) -> str:
    """Converts; returns a line that says what was written. Raises: ValueError, OSError."""
    # Imported here: torch takes a second, which --help need not.
    import torch
    from tqdm import tqdm

    from rcm_mcore import interop

    formats = dict(interop.FORMATS)
    if "mcore" in (arguments.src_format, arguments.dst_format):
        formats["mcore"] = _mcore_format(arguments.which or "student")
    if arguments.which and arguments.src_format != "mcore":
        raise ValueError(f"--which {arguments.which}: only an mcore source holds several networks")
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
            head_dim=arguments.head_dim,
            formats=formats,
            progress=progress,
        )
    shape = written.shape
    return (
        f"{arguments.dst}: {arguments.dst_format}, {written.tensors} tensors, {written.parameters:,} parameters, "
        f"{written.bytes:,} bytes ({shape.num_layers} layers, width {shape.hidden_size}, {shape.num_heads} heads of "
        f"{shape.head_dim})"
    )


def _mcore_format(which: str):
    """The format of our checkpoints; its functions are imported only when it is used."""
    from rcm_mcore.checkpoint import read_network, write_network
    from rcm_mcore.interop import network_format

    return network_format(lambda path: read_network(path, which=which), write_network)


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
