"""On every rank: command lines of rcm_mcore.sample for networks that are given frames (test_sample_given.py).

Reads FOLDER/NETWORK for each network, FOLDER/parts and FOLDER/*.png, *.mp4, writes FOLDER/out/NAME and FOLDER/results_WORLD.json.
"""

import json
import os
import shutil
import sys
from pathlib import Path

from media_samples import write_image
from ranks_generate import run

from rcm_mcore import sample

TEACHER = ["--sampler", "euler", "--steps", "2", "--guidance", "3", "--negative-prompt", "a hen"]
TWO = ["--prompt", "a red fox", "--prompt", "two boats", "--image", "a.png", "--image", "b.png", "--batch-size", "2"]
FOX = ["--prompt", "a red fox"]
T5 = ["--text-encoder", "t5"]
VIDEO = ["--video", "c.mp4", "--frames", "9", *T5]
RUNS = {
    "i2v": ["image", *TWO, *TEACHER],
    "i2v_few": ["image", *FOX, "--image", "b.png", "--steps", "2"],
    "flf2v": ["first_last", *FOX, "--image", "a.png", "--last-image", "b.png", *TEACHER],
    "v2w": ["frames", *FOX, *VIDEO, *TEACHER],
    "v2w_few": ["frames", *FOX, *VIDEO, "--steps", "1"],
    "v2w_image": ["frames", *FOX, "--image", "a.png", "--steps", "1", *T5],
    "t2i": ["t2i", *FOX, "--frames", "1", "--mid-times", "1.3", "1.0", "0.6", *T5],
}


def arguments(folder, out, network, *more):
    """A command line; files and folders are named relative to `folder`. Later flags win."""
    more = [
        str(folder / word) if word in ("t5", "t5_other") or word.endswith((".png", ".mp4", ".txt")) else word for word in more
    ]
    parts = ["--pipeline", str(folder / "parts"), "--size", "32x48", "--frames", "5"]
    checkpoint = ["--checkpoint", str(folder / network), "--which", "student"]
    return [*checkpoint, *parts, "--out", str(out), *more]


def one_rank(folder):
    results = {name: run(arguments(folder, folder / "out" / name, *words)) for name, words in RUNS.items()}
    shutil.copy(folder / "a.png", folder / "changing.png")
    words = ["image", *FOX, "--image", "changing.png", "--steps", "1"]
    results["first"] = run(arguments(folder, folder / "out" / "changing", *words))
    results["again"] = run(arguments(folder, folder / "out" / "changing", *words))
    write_image(folder / "changing.png", 9)
    results["changed"] = run(arguments(folder, folder / "out" / "changing", *words))
    return results


def two_ranks(folder):
    flags = {"i2v": ["--cp", "2"], "v2w": ["--tp", "2", "--sp"]}
    return {name: run(arguments(folder, folder / "out" / f"{name}_2", *RUNS[name], *more)) for name, more in flags.items()}


def main(folder):
    leave, sample._leave_process_group = sample._leave_process_group, lambda: None  # a second one would meet the first's keys
    world = int(os.environ["WORLD_SIZE"])
    results = one_rank(folder) if world == 1 else two_ranks(folder)
    if os.environ["RANK"] == "0":
        (folder / f"results_{world}.json").write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
