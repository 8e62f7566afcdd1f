"""Memory of conversions at full size: ``benchmark_convert.py --size 14B --dir DIR [TARGET ...]``.

Every target is written from weights made up as they are asked for, then read back and thrown away, each in a process of its
own whose peak resident memory is taken from the operating system. DIR needs room for one network. Prints a Markdown table.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

NAMES = {"diffusers": "diffusers", "wan": "wan.safetensors", "rcm": "rcm.pt", "mcore": "mcore"}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures each target in two child processes."""
    parser = argparse.ArgumentParser(prog="benchmark_convert.py", description=__doc__.partition("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(NAMES)}; default all")
    parser.add_argument("--size", default="14B", help="of Wan T2V; default 14B")
    parser.add_argument("--dir", type=Path, required=True, help="an existing folder with room")
    parser.add_argument("--child", choices=("write", "read"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    targets = arguments.targets or list(NAMES)
    if unknown := [name for name in targets if name not in NAMES]:
        parser.error(f"{unknown[0]}: must be one of {', '.join(NAMES)}")
    if arguments.child:
        print(json.dumps(_child(arguments.child, targets[0], arguments.size, arguments.dir)))
        return 0
    print("| format | bytes | written: peak GB | seconds | read: peak GB | seconds |\n|---|---|---|---|---|---|", flush=True)
    for target in targets:
        cells = []
        try:
            for child in ("write", "read"):
                command = [sys.executable, __file__, target, "--size", arguments.size, "--dir", str(arguments.dir)]
                done = subprocess.run([*command, "--child", child], check=True, stdout=subprocess.PIPE, text=True)
                measured = json.loads(done.stdout.splitlines()[-1])
                cells += [f"{measured['peak'] / 1e9:.2f}", f"{measured['seconds']:.0f}"]
        finally:
            path = arguments.dir / NAMES[target]
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            path.with_name(path.name + ".sha256").unlink(missing_ok=True)
        print(f"| {target} | {measured['bytes']:,} | {' | '.join(cells)} |", flush=True)
    return 0


def _child(kind: str, target: str, size: str, folder: Path) -> dict:
    """One conversion; peak resident bytes, seconds, bytes of the weights."""
    import torch

    from rcm_mcore import interop
    from rcm_mcore.checkpoint import open_network, write_network
    from rcm_mcore.config import parse_model

    model = parse_model({"size": size})
    noise = torch.randn(1 << 20).bfloat16()

    def make(shape: torch.Size) -> interop.LazyTensor:
        load = lambda: noise.repeat(-(-shape.numel() // noise.numel()))[: shape.numel()].view(shape)
        return interop.LazyTensor(shape, torch.bfloat16, load)

    def discard(path: Path, hub: interop.Weights, *_) -> None:
        for weight in hub.values():
            interop.loaded(weight).clone()  # a mapped file is read only where it is touched
        path.mkdir()

    formats = {
        **interop.FORMATS,
        "mcore": interop.network_format(
            lambda path, which: open_network(path, which=which),
            lambda path, weights, section, progress: write_network(path, weights, section, progress=progress),
        ),
        "made up": interop.Format(
            read=lambda *_: ({name: make(shape) for name, shape in interop.expected_shapes(model).items()}, model)
        ),
        "nothing": interop.Format(read=lambda *_: ({}, model), write=discard),
    }
    source, path = folder / "source", folder / NAMES[target]
    start = time.perf_counter()
    if kind == "write":
        done = interop.convert("made up", target, source, path, formats=formats)
    else:
        done = interop.convert(target, "nothing", path, folder / "nothing", formats=formats)
        shutil.rmtree(folder / "nothing")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak": peak, "seconds": time.perf_counter() - start, "bytes": done.bytes}


if __name__ == "__main__":
    sys.exit(main())
