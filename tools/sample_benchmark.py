"""Samples a checkpoint for the public GenEval or VBench evaluator, into the folder that it reads (docs/suites.md).

A run that was interrupted continues when it is started again, on any mesh. Under torchrun, ranks beyond --tp x --cp x --pp
share the samples. The prompt file is the evaluator's own: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import logging
import sys
from typing import Any

from rcm_mcore.sample import add_sampling, run_command, take_sampling

_EXAMPLES = """examples:
  python tools/sample_benchmark.py geneval --prompts geneval/prompts/evaluation_metadata.jsonl --checkpoint runs/cosmos_t2i \\
      --pipeline Cosmos-Predict2-2B-Text2Image --latent-shape 16 1 90 160 --steps 4 --batch-size 4 --out geneval_rcm_4
  torchrun --nproc-per-node 8 tools/sample_benchmark.py vbench --prompts VBench/vbench/VBench_full_info.json \\
      --checkpoint runs/wan_1_3b --pipeline Wan2.1-T2V-1.3B-Diffusers --size 480x832 --frames 77 --steps 4 --out vbench_rcm_4
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="sample_benchmark.py", description=__doc__, epilog=_EXAMPLES)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("suite", choices=("geneval", "vbench"))
    what = parser.add_argument_group("what to sample").add_argument
    what("--prompts", required=True, metavar="FILE", help="evaluation_metadata.jsonl; VBench_full_info.json or a text file")
    what("--augmented", metavar="FILE", help="what the network is told instead, a line for each prompt; names stay")
    what("--dimension", metavar="NAME", help="vbench: only the prompts of this dimension, with VBench_full_info.json")
    what(
        "--limit",
        type=int,
        metavar="N",
        help="the first N prompts, for a rehearsal; the full run may follow in the same folder",
    )
    what("--num-per-prompt", type=int, metavar="N", help="default 4 (geneval), 5 (vbench), 25 (its temporal_flickering)")
    what(
        "--seed",
        type=int,
        default=0,
        help="of the noise, with the place of the prompt in the file and the number of the sample",
    )
    add_sampling(parser)
    files = parser.add_argument_group("files").add_argument
    files("--out", required=True, metavar="FOLDER", help="new, or with an interrupted run of the same request")
    files("--fps", type=float, default=16.0, help="frames a second of an mp4; VBench looks at it (default 16, as Wan's)")
    return parser


def _sample(args: dict[str, Any]) -> None:
    from rcm_mcore.sampling import Output, SamplerConfig
    from rcm_mcore.sampling.suite_folder import generate_suite
    from rcm_mcore.sampling.suites import Selection

    names = ("suite", "prompts", "augmented", "dimension", "limit", "num_per_prompt")
    selection = Selection(**{name: args.pop(name) for name in names})
    output, batch_size = Output(**take_sampling(args)), args.pop("batch_size")
    counts = generate_suite(selection, SamplerConfig(**args), output, batch_size=batch_size)
    log = logging.getLogger("sample_benchmark")
    if counts.failed:
        log.warning("%d of %d samples could not be made: manifest.json says why", counts.failed, counts.samples)
    log.info("%s: %d samples", output.folder, counts.made)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, also where samples could not be made, or 2 for what the user can put right."""
    return run_command(vars(build_parser().parse_args(argv)), _sample)


if __name__ == "__main__":
    sys.exit(main())
