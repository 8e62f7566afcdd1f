"""Task (c): rendered scenes (scenes.py) in the latents of a learned codec, for one GPU.

Codec, reader and teacher are trained on the scenes themselves and kept beside the results: codec.safetensors,
reader.safetensors, data/, teacher_run/ and, of that run's EMA, teacher/. Codec and reader are those of examples/scenes, so that
numbers of different studies can be compared; without them there they are trained anew. Like Wan, the teacher learns what things
look like before how they move: frames_run/ is of single latent frames (frames/), five for the price of a video.
"""

from __future__ import annotations

import filecmp
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rcm_mcore.checkpoint import read_network, write_network
from rcm_mcore.checkpoint.network import resolve
from rcm_mcore.config import load_config
from rcm_mcore.lab import videos
from rcm_mcore.lab.adherence import judge, mean_of
from rcm_mcore.lab.codec import SceneCodec, train_codec
from rcm_mcore.lab.reader import SceneReader
from rcm_mcore.lab.reader_training import train_reader
from rcm_mcore.lab.rows import BY_NAME, Row
from rcm_mcore.lab.scene_shards import write_dataset
from rcm_mcore.lab.scene_sheet import scene_sheet
from rcm_mcore.lab.scenes import Stated, draw_scenes, legibility, parse_prompts, prompt_of, render, scenes_of

NAME = "scenes"
ROOT = Path(__file__).resolve().parents[2]  # the checkout, where examples/ is
UPDATES, PROMPTS, PER_PROMPT, REAL_PER_PROMPT = 400, 64, 8, 32
SIZES = dict(codec=3000, reader=3000, samples=100_000, frames=300_000, frame_steps=2000, teacher=12_500)
QUICK = dict(codec=4, reader=4, samples=32, frames=40, frame_steps=2, teacher=4)
QUALITY, DIVERSITY = "Frechet", "diversity"
# In the table of differences.
COMPARED = (
    QUALITY,
    DIVERSITY,
    "precision",
    "recall",
    "coverage",
    "Vendi",
    "adherence %",
    "shape %",
    "motion %",
    "characters %",
)
GUIDANCE = 2.0
LATENT = (16, 5, 16, 16)
# Of the training on frames, beside teacher.yaml's. Noise hides less of a frame than of five that show nearly the same.
_FRAMES = (
    f"data.latent_shape={[LATENT[0], 1, *LATENT[2:]]}",
    "data.workers=4",
    "pretrain.time.shift=1.0",
    "train.global_batch_size=3072",
    "train.micro_batch_size=1536",
    "optim.decay=constant",
)
_PROMPT_SEED = 1_000_003  # of the scenes that prompts are taken from; training has others
_TINY = (
    "model.num_layers=2",
    "model.hidden_size=48",
    "model.num_attention_heads=2",
    "model.ffn_hidden_size=64",
    "model.dtype=float32",
    "train.global_batch_size=2",
    "train.micro_batch_size=2",
    "data.readers=1",
    "data.workers=0",
)


def device() -> torch.device:
    """Where codec and reader work."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def evaluation_prompts(*, quick: bool) -> tuple[str, ...]:
    """Prompts of combinations that training shows, each as often as it is sampled."""
    count, times = (2, 2) if quick else (PROMPTS, PER_PROMPT)
    return tuple(prompt for prompt in prompt_of(draw_scenes(count, _PROMPT_SEED)) for _ in range(times))


def real_videos(prompts: Sequence[str], seed: int) -> Tensor:
    """Videos of new scenes that show these prompts, on the CPU."""
    return render(scenes_of(parse_prompts(prompts), (_PROMPT_SEED, seed)), device()).cpu()


class SceneJudge:
    """Reads scenes, and compares them with real ones of the same prompts."""

    def __init__(self, root: Path, prompts: Sequence[str], *, per_prompt: int) -> None:
        self.codec = SceneCodec.load(root / "codec.safetensors", device=device())
        self.reader = SceneReader.load(root / "reader.safetensors", device=device())
        real = [prompt for prompt in dict.fromkeys(prompts) for _ in range(per_prompt)]
        shown = real_videos(real, seed=0)
        features, frames = self.reader.features(shown), self.reader.frame_features(shown)
        self.reference = videos.Reference.of(features, real, frames)

    def measures(self, latents: Tensor, prompts: Sequence[str]) -> dict[str, Any]:
        shown = self.codec.decode(latents.to(device())).cpu()
        stated: Stated = parse_prompts(prompts)
        read = mean_of(judge(self.reader.read(shown), prompts))._asdict()
        features, frames = self.reader.features(shown), self.reader.frame_features(shown)
        return {
            "adherence %": 100 * read.pop("all"),
            "legible %": 100 * float(legibility(shown, stated.caption, stated.place).double().mean()),
            **{
                f"{name} %": 100 * value
                for name, value in self.reader.adherence(shown, prompts)._asdict().items()
                if name != "all"
            },
            **self.reference.measures(features, prompts, frames),
        }


def video_task(root: Path, *, quick: bool = False) -> videos.VideoTask:
    """The task in this folder."""
    return videos.VideoTask(
        root=root,
        student_config=ROOT / "examples" / "scenes" / "rcm.yaml",
        latent_shape=LATENT,
        prompts=evaluation_prompts(quick=quick),
        updates=6 if quick else UPDATES,
        teacher={"guidance": GUIDANCE, "shift": 3.0},
        student={"mid_times": (1.3, 1.0, 0.6), "sigma_max": 80.0},
        guidance=GUIDANCE,
        batch_size=4 if quick else 256,
        shards="data/shard_*.tar",
        train_overrides=_TINY if quick else (),
    )


def prepare(root: Path, *, quick: bool = False) -> None:
    """Codec, reader, data and teacher; what is there is used again.

    Raises: ValueError for a folder that an earlier version began; RuntimeError for a training that failed or was stopped.
    """
    sizes, shared = QUICK if quick else SIZES, ROOT / "examples" / "scenes"
    small: dict[str, Any] = dict(batch_size=4, width=8, heldout=4) if quick else {}
    if ((root / "teacher").exists() or (root / "teacher_run").exists()) and not (root / "frames_run").exists():
        raise ValueError(
            f"{root} holds a teacher and no frames_run, as earlier versions left them, whose text encoder was another: "
            "remove the folder, or give another --out"
        )
    root.mkdir(parents=True, exist_ok=True)
    for name in ("codec.safetensors", "reader.safetensors"):
        # The reader knows the codec that it was trained with.
        ours = name == "codec.safetensors" or _same(root / "codec.safetensors", shared / "codec.safetensors")
        if not quick and ours and not (root / name).exists() and (shared / name).exists():
            partial = root / f".{name}.partial"
            shutil.copyfile(shared / name, partial)
            os.replace(partial, root / name)
    if not (root / "codec.safetensors").exists():
        train_codec(seed=0, channels=LATENT[0], steps=sizes["codec"], device=device(), **small).save(root / "codec.safetensors")
    codec = SceneCodec.load(root / "codec.safetensors", device=device())
    print(f"codec: {codec.facts}", flush=True)
    processes = 1 if quick else max(1, min(40, (os.cpu_count() or 1) - 2))
    dataset: dict[str, Any] = dict(processes=processes, device=device(), text_encoder=shared / "text_encoder")
    frames: dict[str, Any] = dict(count=sizes["frames"], seed=2, samples_per_shard=1280, single_frames=True)
    write_dataset(root / "data", codec, count=sizes["samples"], seed=1, **dataset)
    write_dataset(root / "frames", codec, **frames, **dataset)
    if not (root / "reader.safetensors").exists():
        train_reader(seed=0, codec=codec, steps=sizes["reader"], device=device(), **small).save(root / "reader.safetensors")
    print(f"reader: {SceneReader.load(root / 'reader.safetensors').facts}", flush=True)
    train_teacher(root, quick=quick)


def _same(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and filecmp.cmp(one, other, shallow=False)


def train_teacher(root: Path, *, quick: bool = False) -> None:
    """On frames, then on videos; each to its end on all GPUs, or from where it was interrupted. Its EMA is the teacher."""
    if (root / "teacher").exists():
        return
    sizes = QUICK if quick else SIZES
    frames = [f"data.shards=[{root}/frames/shard_*.tar]", *_FRAMES]
    _pretrain(root, "frames", steps=sizes["frame_steps"], fields=frames, quick=quick)
    _pretrain(root, "teacher", steps=sizes["teacher"], fields=[f"pretrain.network={root}/frames_run"], quick=quick)
    write_network(root / "teacher", *read_network(root / "teacher_run", which="ema"))


def _pretrain(root: Path, name: str, *, steps: int, fields: Sequence[str], quick: bool) -> None:
    task, path = video_task(root, quick=quick), ROOT / "examples" / "scenes" / "teacher.yaml"
    fields = [*task.data_overrides, *fields, *task.train_overrides]  # the later of two is taken
    config = load_config(path, fields)
    batch, ranks = config.train.global_batch_size, max(1, torch.cuda.device_count())
    while ranks > 1 and (batch % ranks or config.data.readers % (ranks * max(1, config.data.workers))):
        ranks -= 1
    overrides = [
        *fields,
        f"pretrain.negative_embedding={root}/data/negative_embedding.safetensors",
        f"checkpoint.dir={root}/{name}_run",
        f"train.steps={steps}",
        f"train.micro_batch_size={math.gcd(batch // ranks, config.train.micro_batch_size)}",
    ]
    videos.train(path, overrides, ranks=ranks, show=True)
    if (done := step_of(root / f"{name}_run")) < steps:  # torchrun ends well where its ranks were told to stop
        raise RuntimeError(f"{root}/{name}_run was stopped after {done} of {steps} steps; the same command goes on with it")


def step_of(run: Path) -> int:
    """Steps that the newest checkpoint of a run has behind it."""
    return int(resolve(run).name.removeprefix("step_"))


def baselines(root: Path, *, seeds: int, quick: bool = False) -> None:
    """Real scenes through the codec, others for each seed, and the teacher."""
    task, scenes = video_task(root, quick=quick), make_judge(root, quick=quick)
    real = [scenes.codec.encode(real_videos(task.prompts, seed=1 + seed)).cpu() for seed in range(seeds)]
    videos.baselines(task, scenes, real, seeds=seeds, out=root)


def guided(root: Path, guidance: float, *, quick: bool = False) -> None:
    """See videos.guided."""
    videos.guided(video_task(root, quick=quick), make_judge(root, quick=quick), guidance)


def make_judge(root: Path, *, quick: bool = False) -> SceneJudge:
    """The judge of the task in this folder."""
    return SceneJudge(root, evaluation_prompts(quick=quick), per_prompt=4 if quick else REAL_PER_PROMPT)


def run(row: Row, seed: int, out: Path, *, quick: bool = False) -> dict[str, Any]:
    """See videos.run."""
    root = out.parent.parent
    return videos.run(video_task(root, quick=quick), make_judge(root, quick=quick), row, seed, out)


def picture(task: Path, path: Path, order: Sequence[str]) -> None:
    """The same prompts and noise in every row, two samples each. Needs Pillow."""
    codec = SceneCodec.load(task / "codec.safetensors", device=device())
    shown = videos.read_sheet(task, [BY_NAME[name] for name in order])
    made = torch.cat([codec.decode(latents[:2].to(device())).cpu() for latents in shown.values()])
    labels = [label for label in shown for _ in range(2)]
    scene_sheet(made, labels, path)
