"""Compares two folders of videos, real and generated, by the features of a network that is given (docs/measures.md).

    python tools/compare_videos.py videos/real videos/generated --features extractor.safetensors --size 64 64 --frames 17

Prints a table and, with --out, writes it with everything that it depends on. A video is a file (mp4, gif ...), an array (.npy,
.safetensors: uint8 [F, H, W, 3] or floating point [3, F, H, W] in [0, 1]) or a folder of pictures; with --frames 1 a picture.
Exit code 2 for what cannot work.
"""

import argparse
import json
import logging
import platform
import sys
from collections.abc import Sequence
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path

RUN_HELP = (
    "take an extractor that is a program (.pt2 of torch.export, .pt or .ts of TorchScript). Reading a .pt2 unpickles, and"
    " both kinds run: whoever wrote the file can do what you can. Not needed for .safetensors, which hold numbers alone"
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("real", type=Path, metavar="REAL_DIR")
    add("generated", type=Path, metavar="GENERATED_DIR")
    add("--features", required=True, metavar="FILE", help="network from videos [n, 3, F, H, W] in [0, 1] to features [n, d]")
    add("--run-extractor", action="store_true", help=RUN_HELP)
    read = parser.add_argument_group("reading", "the same for both folders, as the network wants it").add_argument
    read("--size", required=True, type=int, nargs=2, metavar=("H", "W"), help="resized to just cover it, cut to its centre")
    read("--frames", required=True, type=int, help="the first so many; a video with fewer is bad")
    read("--fps", type=Fraction, default=Fraction(16), help="of the frames that are taken of mp4 and gif; default 16")
    read("--real-pattern", default="**/*", metavar="GLOB", help="default %(default)s")
    read(
        "--generated-pattern", default="**/*", metavar="GLOB", help="such as '*/samples/*.png' of GenEval; default %(default)s"
    )
    read("--skip-bad", action="store_true", help="leave out videos that cannot be read, and count them; default: refuse")
    prompts = parser.add_argument_group(
        "prompts", "samples of one have names that differ in the number after the last - or /, as VBench's and GenEval's"
    ).add_argument
    prompts("--real-groups", type=Path, metavar="JSON", help="instead: {name: prompt}, names relative to the folder")
    prompts("--generated-groups", type=Path, metavar="JSON", help="likewise")
    prompts(
        "--per-prompt", type=int, metavar="N", help="samples of a prompt that count; default as the smallest has, 2 or more"
    )
    how = parser.add_argument_group("how").add_argument
    how("--out", type=Path, metavar="DIR", help="writes comparison.json and comparison.md")
    how("--cache", type=Path, metavar="DIR", help="keeps features, for the same files, reading and extractor")
    how("--device", help="default cuda where there is one")
    how("--batch-size", type=int, default=16, metavar="N", help="default %(default)s")
    how("--workers", type=int, default=2, metavar="N", help="threads that decode ahead; default %(default)s")
    how("--seed", type=int, default=0, help="of the halves of the real videos and of the bootstrap; default 0")
    return parser


def run(args: argparse.Namespace) -> dict:
    """The comparison, with all that it depends on. Raises: ValueError, OSError."""
    # Imported here: torch takes seconds, which --help need not.
    import torch

    from rcm_mcore.evaluation.extractor import Extractor
    from rcm_mcore.lab.folders import FORMATS, MINIMUM_GENERATED, MINIMUM_REAL, Reading, compare, embed_folder

    for name in ("batch_size", "workers"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    if args.per_prompt is not None and args.per_prompt < 2:
        raise ValueError(f"--per-prompt {args.per_prompt}: diversity within a prompt needs at least 2")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    extractor = Extractor(args.features, device=device, run_code=args.run_extractor, formats=FORMATS)
    videos, groups, counts = [], [], {}
    for which, minimum in (("real", MINIMUM_REAL), ("generated", MINIMUM_GENERATED)):
        folder, file = getattr(args, which), getattr(args, f"{which}_groups")
        reading = Reading(size=tuple(args.size), frames=args.frames, fps=args.fps, pattern=getattr(args, f"{which}_pattern"))
        found = embed_folder(
            folder, reading, extractor, minimum=minimum, cache=args.cache, batch_size=args.batch_size, workers=args.workers,
            skip_bad=args.skip_bad,
        )  # fmt: skip
        videos.append(found)
        groups.append(groups_of(found.names, file))
        counts[which] = {"videos": len(found.names), "prompts": len(set(groups[-1])), "skipped": found.skipped}
    result = compare(*videos, groups=(groups[0], groups[1]), per_prompt=args.per_prompt, seed=args.seed)
    packages = ("rcm-mcore", "torch", "av", "pillow")
    return result | {
        "counts": counts,
        "extractor_sha256": extractor.sha256,
        "arguments": {
            name: value if isinstance(value, int | list | None) else str(value) for name, value in vars(args).items()
        },
        "device": device,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
    }


def groups_of(names: Sequence[str], file: Path | None) -> list[str]:
    """The prompt of each video, from the names or from a file. Raises: ValueError, OSError."""
    from rcm_mcore.data.video_folder import group_of

    if file is None:
        return [group_of(Path(name)) for name in names]
    try:
        groups = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: is no JSON ({error})") from None
    missing = [name for name in names if not isinstance(groups, dict) or not isinstance(groups.get(name), str)]
    if missing:
        raise ValueError(f"{file}: has no prompt for {len(missing)} of {len(names)} videos, such as {missing[0]}")
    return [groups[name] for name in names]


def table(result: dict) -> str:
    """The rows in Markdown, what was counted, and how to read it."""
    from rcm_mcore.evaluation.report import metrics_table

    rows = []
    for row, intervals in zip(result["rows"], result["intervals"]):
        ends = {name: " to ".join(f"{end:.3g}" for end in interval) for name, interval in intervals.items()}
        rows.append({name: f"{value:.3g} ({ends[name]})" if name in ends else value for name, value in row.items()})
    lines = [
        f"- {which}: {count['videos']} videos of {count['prompts']} prompts, {len(count['skipped'])} skipped"
        for which, count in result["counts"].items()
    ]
    lines.append(f"- extractor: {result['arguments']['features']}, sha256 {result['extractor_sha256']}")
    if result["per_prompt"] is None:
        lines.append("- within prompts: nothing, no prompt has two samples")
    else:
        width = (
            "no bandwidth, no real prompt has so many"
            if result["bandwidth"] is None
            else f"bandwidth {result['bandwidth']:.4g}"
        )
        lines.append(f"- within prompts: {result['per_prompt']} samples of each; {width}")
    lines.append(
        "- in brackets: 95 % of a bootstrap over prompts. W1: Wasserstein distance from the real values, the lower the better"
    )
    return metrics_table(rows) + "\n" + "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        result = run(args)
        text = table(result)
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "comparison.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            (args.out / "comparison.md").write_text(text, encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"compare_videos.py: {error}", file=sys.stderr)
        return 2
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
