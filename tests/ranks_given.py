"""On two ranks: command lines of rcm_mcore.sample for networks that are given frames (test_sample_given.py).

Reads FOLDER/NETWORK for each network, FOLDER/parts and FOLDER/*.png, *.mp4, writes FOLDER/out/NAME and FOLDER/results_2.json.
"""

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist
from media_samples import write_image
from ranks_generate import run

from rcm_mcore import sample

TEACHER = ["--sampler", "euler", "--steps", "2", "--guidance", "3", "--negative-prompt", "a hen"]
TWO = ["--prompt", "a red fox", "--prompt", "two boats", "--image", "a.png", "--image", "b.png", "--batch-size", "2"]
FOX = ["--prompt", "a red fox"]
T5 = ["--text-encoder", "t5"]
VIDEO = ["--video", "c.mp4", "--frames", "9", *T5]
RUNS = {
    "i2v": ["image", *TWO, *TEACHER, "--cp", "2"],
    "i2v_few": ["image", *FOX, "--image", "b.png", "--steps", "2"],
    "flf2v": ["first_last", *FOX, "--image", "a.png", "--last-image", "b.png", *TEACHER, "--tp", "2", "--sp"],
    "v2w": ["frames", *FOX, *VIDEO, *TEACHER, "--tp", "2", "--sp"],
    "v2w_few": ["frames", *FOX, *VIDEO, "--steps", "1"],
    "v2w_image": ["frames", *FOX, "--image", "a.png", "--steps", "1", *T5, "--pp", "2"],
    "t2i": ["t2i", *FOX, "--frames", "1", "--mid-times", "1.3", "1.0", "0.6", *T5],
}


def arguments(folder, out, network, *more):
    """A command line; files and folders are named relative to `folder`. Later flags win."""
    files = {word for word in more if word in ("t5", "other_clip") or word.endswith((".png", ".mp4"))}
    more = [str(folder / word) if word in files else word for word in more]
    parts = ["--pipeline", str(folder / "parts"), "--size", "32x48", "--frames", "5"]
    checkpoint = ["--checkpoint", str(folder / network), "--which", "student"]
    return [*checkpoint, *parts, "--out", str(out), *more]


def main(folder):
    leave, sample._leave_process_group = sample._leave_process_group, lambda: None  # a second one would meet the first's keys
    results = {name: run(arguments(folder, folder / "out" / name, *words)) for name, words in RUNS.items()}
    # On both ranks: one that fails alone ends the other through torchrun, not here.
    words = ["t2i", "--prompt", "fox " * 600, *T5, "--tp", "2"]
    results["long"] = run(arguments(folder, folder / "out" / "long", *words))
    changing, is_main = folder / "changing.png", os.environ["RANK"] == "0"
    words = ["image", *FOX, "--image", "changing.png", "--steps", "1"]
    for name in ("first", "again", "changed"):
        if is_main and name != "again":
            write_image(changing, 1 if name == "first" else 9)
        dist.barrier()
        results[name] = run(arguments(folder, folder / "out" / "changing", *words))
    if is_main:
        (folder / "results_2.json").write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
