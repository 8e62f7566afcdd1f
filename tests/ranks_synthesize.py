"""On every rank: command lines of `prepare_shards.py synthesize` one after another (test_synthesize.py).

Reads FOLDER/checkpoint, FOLDER/pipeline and FOLDER/prompts.txt, writes FOLDER/NAME for each and FOLDER/results_WORLD.json: exit
codes and errors.
"""

import contextlib
import importlib.util
import io
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from rcm_mcore.parallel.mesh import init_distributed
from rcm_mcore.sampling import Sampler, SampleRequest, sample

TOOL = Path(__file__).parent.parent / "tools" / "prepare_shards.py"
LINES = ["a red fox", "a green bird", "", "a blue whale, at night", "fox " * 30, "a fox", "a bird at night", "a whale"]
REFUSED = {
    "size": ["--size", "32x40"],
    "frames": ["--frames", "4"],
    "mesh": ["--tp", "3"],
    "checkpoint": ["--checkpoint", "nowhere"],
    "encoder": ["--text-encoder", "nowhere"],
    "prompts": [],
}
REFERENCES = (0, 5, 7)


def load_main():
    spec = importlib.util.spec_from_file_location("prepare_shards_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def run(folder, name, *more, prompts="prompts.txt"):
    """One command line: its exit code and what it wrote to standard error."""
    argv = [
        "synthesize", str(folder / prompts), str(folder / name), "--checkpoint", str(folder / "checkpoint"),
        "--text-encoder", str(folder / "pipeline"), "--size", "32x32", "--frames", "5", "--steps", "2", "--seed", "5",
        "--negative-prompt", "a hen", "--dtype", "float32", "--samples-per-shard", "3", "--batch-size", "2", *more,
    ]  # fmt: skip
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = load_main()(argv)
    return {"code": code, "error": errors.getvalue()}


def references(folder):
    """Some samples as `rcm_mcore.sample` makes them."""
    made = {}
    for index in REFERENCES:
        request = SampleRequest(
            checkpoint=str(folder / "checkpoint"), text_encoder=str(folder / "pipeline"), latent_shape=(16, 2, 4, 4),
            sampler="euler", steps=2, shift=3.0, guidance=5.0, which="student", negative_prompt="a hen", seed=5,
            prompts=(LINES[index],), first_index=index,
        )  # fmt: skip
        made[str(index)] = sample(request).latents[0]
    dist.destroy_process_group()
    return made


def one_rank(folder):
    results = {"one": run(folder, "one"), "killed": run(folder, "killed"), "again": run(folder, "one")}
    results["seed"] = run(folder, "one", "--seed", "6")
    for name, more in REFUSED.items():
        prompts = "empty.txt" if name == "prompts" else "prompts.txt"
        results[name] = run(folder, "refused", *more, prompts=prompts)
    torch.save(references(folder), folder / "references.pt")
    return results


def two_ranks(folder):
    """In one process group: torchrun's store keeps the addresses of a first one, whose ranks do not end together."""
    init_distributed()
    destroy = dist.destroy_process_group
    dist.destroy_process_group = lambda *group: destroy(*group) if group else None
    results = {"dp2": run(folder, "dp2")}
    dist.barrier()
    return results | {"tp2": run(folder, "tp2", "--tp", "2", "--sp")}


def to_be_killed(folder):
    """One rank that leaves time for a signal."""
    latents = Sampler.latents

    def slow(*args, **kwargs):
        time.sleep(0.5)
        return latents(*args, **kwargs)

    Sampler.latents = slow
    run(folder, "killed")


def main(folder):
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world_size == 1:
        results = one_rank(folder)
    else:
        results = two_ranks(folder)
    if rank == 0:
        (folder / f"results_{world_size}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "WORLD_SIZE" in os.environ:
        main(Path(sys.argv[1]))
    else:
        to_be_killed(Path(sys.argv[1]))
