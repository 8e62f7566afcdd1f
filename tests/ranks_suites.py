"""On every rank: command lines of tools/sample_benchmark.py one after another (test_sample_benchmark.py).

Reads FOLDER/checkpoint, FOLDER/pipeline and the prompt files, writes FOLDER/NAME for each and FOLDER/results_WORLD.json: exit
codes, errors, logs and the numbers of the samples that were made.
"""

import contextlib
import importlib.util
import io
import json
import logging
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from rcm_mcore import sample
from rcm_mcore.sampling import Sampler, SampleRequest
from rcm_mcore.sampling import sample as sample_latents

TOOL = Path(__file__).parent.parent / "tools" / "sample_benchmark.py"
GENEVAL = [
    {"tag": "single_object", "include": [{"class": "fox", "count": 1}], "prompt": "a red fox"},
    {"tag": "colors", "include": [{"class": "bird", "count": 1, "color": "green"}], "prompt": "a green bird"},
    {"tag": "counting", "include": [{"class": "fox", "count": 30}], "prompt": "fox " * 30},
    {"tag": "two_object", "include": [{"class": "fox", "count": 1}], "prompt": "a red fox"},
]
VBENCH = [
    {"prompt_en": "a red fox", "dimension": ["subject_consistency", "motion_smoothness"]},
    {"prompt_en": "a blue whale, at night", "dimension": ["temporal_flickering"]},
    {"prompt_en": "a red/green bird", "dimension": ["color"]},
    {"prompt_en": "a red fox", "dimension": ["dynamic_degree"]},
]
latents = Sampler.latents


def load_main():
    spec = importlib.util.spec_from_file_location("sample_benchmark_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def arguments(folder, suite, name, *more):
    prompts, frames = ("geneval.jsonl", "1") if suite == "geneval" else ("VBench_full_info.json", "5")
    return [
        suite, "--prompts", str(folder / prompts), "--checkpoint", str(folder / "checkpoint"), "--which", "student",
        "--pipeline", str(folder / "pipeline"), "--size", "32x32", "--frames", frames, "--steps", "2", "--seed", "5",
        "--num-per-prompt", "2", "--out", str(folder / name), *more,
    ]  # fmt: skip


def run(folder, suite, name, *more, spoil=()):
    """One command line; what came of it. Latents of the numbers in `spoil` are not finite."""
    calls, errors = [], io.StringIO()

    def counted(self, indices, *args, **kwargs):
        calls.extend(indices)
        made = latents(self, indices, *args, **kwargs)
        for place, index in enumerate(indices):
            if index in spoil:
                made[place] = torch.nan
        return made

    Sampler.latents = counted
    logged = logging.StreamHandler(errors)
    logging.getLogger().addHandler(logged)
    try:
        with contextlib.redirect_stderr(errors):
            code = load_main()(arguments(folder, suite, name, *more))
    finally:
        Sampler.latents = latents
        logging.getLogger().removeHandler(logged)
    return {"code": code, "calls": calls, "error": errors.getvalue()}


def one_rank(folder):
    results = {"geneval": run(folder, "geneval", "geneval")}
    results["again"] = run(folder, "geneval", "geneval")
    results["other steps"] = run(folder, "geneval", "geneval", "--steps", "1")
    results["other suite"] = run(folder, "vbench", "geneval")
    results["killed"] = run(folder, "geneval", "killed")
    results["rehearsal"] = run(folder, "geneval", "rehearsal", "--limit", "2", spoil={1})
    results["rehearsal manifest"] = json.loads((folder / "rehearsal" / "manifest.json").read_text())
    results["after it"] = run(folder, "geneval", "rehearsal")
    results["batch"] = run(folder, "geneval", "batch", "--batch-size", "4")
    results["vbench"] = run(folder, "vbench", "vbench", "--fps", "8")
    for name, dimension in (("color", "color"), ("color again", "color"), ("motion", "dynamic_degree")):
        results[name] = run(folder, "vbench", "dimensions", "--fps", "8", "--dimension", dimension)
    results["augmented"] = run(folder, "vbench", "augmented", "--augmented", str(folder / "augmented.txt"), "--limit", "1")
    request = SampleRequest(
        checkpoint=str(folder / "checkpoint"), text_encoder=str(folder / "pipeline"), latent_shape=(16, 1, 4, 4), steps=2,
        which="student", seed=5, prompts=("a green bird",), first_index=1001,
    )  # fmt: skip
    torch.save(sample_latents(request).latents[0], folder / "reference.pt")
    return results


def to_be_killed(folder):
    """One rank that leaves time for a signal."""

    def slow(*args, **kwargs):
        time.sleep(0.5)
        return latents(*args, **kwargs)

    Sampler.latents = slow
    load_main()(arguments(folder, "geneval", "killed"))


def main(folder):
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    leave, sample._leave_process_group = sample._leave_process_group, lambda: None  # a second one would meet the first's keys
    if world == 1:
        results = one_rank(folder)
    else:
        results = {
            "dp2": run(folder, "geneval", "dp2", spoil={1001}),
            "dp2 again": run(folder, "geneval", "dp2"),
            "tp2": run(folder, "vbench", "tp2", "--fps", "8", "--tp", "2", "--sp"),
        }
    if rank == 0:
        (folder / f"results_{world}.json").write_text(json.dumps(results))
    leave()
    assert not dist.is_initialized(), "main leaves no process group"


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "WORLD_SIZE" in os.environ:
        main(Path(sys.argv[1]))
    else:
        to_be_killed(Path(sys.argv[1]))
