"""On every rank: command lines of rcm_mcore.sample one after another, some sabotaged (test_sample.py).

Reads FOLDER/checkpoint and FOLDER/pipeline, writes FOLDER/NAME for each and FOLDER/results_WORLD.json: exit codes, errors, how
many batches were sampled, and what a kill left behind.
"""

import contextlib
import io
import json
import os
import sys
import threading
from pathlib import Path

import torch.distributed as dist
from components import PROMPTS

from rcm_mcore import sample
from rcm_mcore.data import media
from rcm_mcore.data.digits import DigitCodec
from rcm_mcore.data.vae import VideoVAE
from rcm_mcore.sampling import Sampler

latents, write_media, decode = Sampler.latents, media.write_media, VideoVAE.decode


class Killed(BaseException):
    """In the place of a signal."""


def killed_in_the_third_batch(calls):
    if len(calls) == 3:
        raise Killed


def full_disk(path, pixels, *, fps):
    if path.name.startswith("001"):
        raise OSError(28, "No space left on device", str(path))
    write_media(path, pixels, fps=fps)


def arguments(folder, name, *more, prompts=PROMPTS, frames=5):
    texts = [word for prompt in prompts for word in ("--prompt", prompt)]
    return [
        "--checkpoint", str(folder / "checkpoint"), "--which", "student", "--pipeline", str(folder / "pipeline"), *texts,
        "--size", "32x32", "--frames", str(frames), "--steps", "2", "--out", str(folder / name), *more,
    ]  # fmt: skip


def run(argv, *, before_batch=lambda calls: None):
    """One command line; what came of it."""
    calls, errors = [], io.StringIO()

    def counted(self, indices, *args, **kwargs):
        calls.append(list(indices))
        before_batch(calls)
        return latents(self, indices, *args, **kwargs)

    Sampler.latents = counted
    try:
        with contextlib.redirect_stderr(errors):
            code = sample.main(argv)
    except Killed:
        code = "killed"
    finally:
        Sampler.latents = latents
    return {"code": code, "calls": calls, "error": errors.getvalue()}


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def decoded_beside_the_next_batch(folder):
    """The first decode begins when the second batch does, and the second batch when the first decode has begun."""
    batch_two, decoding = threading.Event(), threading.Event()

    def waiting(self, value):
        decoding.set()
        assert batch_two.wait(30), "the next batch waits for the decoding"
        return decode(self, value)

    def before_batch(calls):
        if len(calls) == 2:
            batch_two.set()
            assert decoding.wait(30), "the decoding waits for the next batch"

    VideoVAE.decode = waiting
    result = run(arguments(folder, "overlap"), before_batch=before_batch)
    VideoVAE.decode = decode
    return result


def one_rank(folder):
    results = {"video": run(arguments(folder, "video", "--batch-size", "2", "--seed", "5"))}
    before = {name: (folder / "video" / name).stat().st_mtime_ns for name in listing(folder / "video")}
    results["again"] = run(arguments(folder, "video", "--batch-size", "2", "--seed", "5"))
    results["again"]["touched"] = [
        n for n in listing(folder / "video") if before[n] != (folder / "video" / n).stat().st_mtime_ns
    ]
    results["other"] = run(arguments(folder, "video", "--batch-size", "2", "--seed", "6"))

    results["killed"] = run(arguments(folder, "killed", "--seed", "5"), before_batch=killed_in_the_third_batch)
    results["killed"]["files"] = listing(folder / "killed")
    results["killed"]["facts"] = json.loads((folder / "killed" / "samples.json").read_text())
    (folder / "killed" / "000_a-red-fox.mp4").unlink()  # as if the kill had come between latents and video
    (folder / "killed" / ".old.mp4.partial").touch()
    results["resumed"] = run(arguments(folder, "killed", "--seed", "5"))

    media.write_media = full_disk
    results["full"] = run(arguments(folder, "full"))
    results["full"]["files"] = [name for name in listing(folder / "full") if not name.startswith(".parts")]
    media.write_media = write_media

    results["overlap"] = decoded_beside_the_next_batch(folder)
    results["image"] = run(arguments(folder, "image", frames=1, prompts=PROMPTS[:2]))
    (third,) = json.loads((folder / "video" / "samples.json").read_text())["samples"][2:]
    chosen = ["--seed", str(third["seed"]), "--first-index", str(third["index"])]
    results["alone"] = run(arguments(folder, "alone", *chosen, prompts=[third["prompt"]]))
    results["seeds"] = run(arguments(folder, "seeds", "--seeds", "7", "5", prompts=PROMPTS[:2], frames=1))
    results["several"] = run(arguments(folder, "several", "--num-per-prompt", "2", prompts=PROMPTS[:2], frames=1))
    teacher = ["--sampler", "euler", "--guidance", "3", "--negative-prompt", "a blue bird", "--tiled"]
    results["teacher"] = run(arguments(folder, "teacher", *teacher, prompts=PROMPTS[:1]))
    results["long"] = run(arguments(folder, "long", prompts=["red " * 40]))
    alone = ["--checkpoint", "--which", "--text-encoder", "--prompt"]
    values = [str(folder / "checkpoint"), "student", str(folder / "pipeline"), "a red fox"]
    latents_alone = [word for pair in zip(alone, values) for word in pair] + ["--latent-shape", "16", "2", "4", "4"]
    DigitCodec(mean=0.5, std=0.2, time=1).save(folder / "codec.json")
    digits = [*latents_alone, "--seed", "5", "--steps", "2", "--codec", str(folder / "codec.json")]
    results["digits"] = run([*digits, "--out", str(folder / "digits")])
    return results


def two_ranks(folder):
    return {
        "dp2": run(arguments(folder, "dp2", "--seed", "5")),
        "tp2": run(arguments(folder, "tp2", "--seed", "5", "--tp", "2", "--sp")),
    }


def main(folder):
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    leave, sample._leave_process_group = sample._leave_process_group, lambda: None  # a second one would meet the first's keys
    results = one_rank(folder) if world == 1 else two_ranks(folder)
    if rank == 0:
        (folder / f"results_{world}.json").write_text(json.dumps(results))
    leave()
    assert not dist.is_initialized(), "main leaves no process group"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
