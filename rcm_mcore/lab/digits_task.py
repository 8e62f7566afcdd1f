"""Task (b): moving handwritten digits (data/digits.py), on CPU cores or a GPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rcm_mcore.data.digits import DigitCodec, all_prompts, parse_prompt, train_heldout_videos
from rcm_mcore.evaluation.digits import DigitClassifier, adherence, train_classifier
from rcm_mcore.evaluation.report import contact_sheet
from rcm_mcore.lab import videos
from rcm_mcore.lab.rows import BY_NAME, Row

NAME = "digits"
ROOT = Path(__file__).resolve().parents[2]  # the checkout, where examples/ and tools/ are
UPDATES, TEACHER_STEPS, PER_PROMPT = 300, 5000, 10
QUICK = dict(updates=6, teacher=12, classifier=60)
QUALITY, DIVERSITY = "Frechet", "diversity"
COMPARED = (QUALITY, DIVERSITY)
GUIDANCE = 1.75  # docs/benchmarks/demo_cpu_202611.md: best of this teacher


class DigitJudge:
    """The digit-and-motion classifier, trained on the real videos, and held-out videos for comparison."""

    def __init__(self, root: Path) -> None:
        self.classifier = DigitClassifier.load(root / "classifier.safetensors")
        self.codec = DigitCodec.load(root / "data" / "codec.json")
        _, heldout = train_heldout_videos(seed=0)
        self.reference = videos.Reference.of(self.classifier.features(heldout.videos), heldout.prompts(), heldout.videos)

    def measures(self, latents: Tensor, prompts: Sequence[str]) -> dict[str, Any]:
        shown = self.codec.decode(latents)
        digits, directions = (torch.tensor(column) for column in zip(*map(parse_prompt, prompts)))
        found = 100 * adherence(self.classifier.predict(shown), digits, directions)
        return {"adherence %": found, **self.reference.measures(self.classifier.features(shown), prompts, shown)}


def video_task(root: Path, *, quick: bool = False) -> videos.VideoTask:
    """The task in this folder."""
    per_prompt = 2 if quick else PER_PROMPT
    return videos.VideoTask(
        root=root,
        student_config=ROOT / "examples" / "digits" / "rcm.yaml",
        latent_shape=(32, 2, 4, 4),
        prompts=tuple(prompt for prompt in all_prompts() for _ in range(per_prompt)),
        updates=QUICK["updates"] if quick else UPDATES,
        teacher={"guidance": GUIDANCE, "shift": 3.0},
        student={"mid_times": (1.3, 1.0, 0.6), "sigma_max": 80.0},
        guidance=GUIDANCE,
    )


def prepare(root: Path, *, quick: bool = False) -> None:
    """Data, classifier and teacher; what is there is used again."""
    task = video_task(root, quick=quick)
    data = root / "data"
    if not (data / "dataset.json").exists():
        subprocess.run([sys.executable, str(ROOT / "tools" / "prepare_shards.py"), "digits", str(data)], check=True)
    if not (root / "classifier.safetensors").exists():
        real, _ = train_heldout_videos(seed=0)
        classifier = train_classifier(*real, seed=0, steps=QUICK["classifier"] if quick else 700)
        classifier.save(root / "classifier.partial")
        (root / "classifier.partial").rename(root / "classifier.safetensors")
    overrides = [
        *task.data_overrides,
        f"pretrain.negative_embedding={data}/negative_embedding.safetensors",
        f"checkpoint.dir={root}/teacher",
        f"train.steps={QUICK['teacher'] if quick else TEACHER_STEPS}",
        "train.micro_batch_size=32",
        "checkpoint.every=1000",
    ]
    videos.train(ROOT / "examples" / "digits" / "teacher.yaml", overrides, show=True)


def baselines(root: Path, *, seeds: int, quick: bool = False) -> None:
    """Real training videos, other ones for each seed, and the teacher."""
    task, judge = video_task(root, quick=quick), DigitJudge(root)
    real, _ = train_heldout_videos(seed=0)
    latents = [judge.codec.encode(real.videos[of_prompts(task.prompts, real, seed)]) for seed in range(seeds)]
    videos.baselines(task, judge, latents, seeds=seeds, out=root)


def guided(root: Path, guidance: float, *, quick: bool = False) -> None:
    """See videos.guided."""
    videos.guided(video_task(root, quick=quick), DigitJudge(root), guidance)


def of_prompts(prompts: Sequence[str], real: Any, seed: int) -> Tensor:
    """Indices of real videos, one for each prompt and none twice."""
    found: dict[str, list[int]] = {}
    texts = real.prompts()
    for i in videos.shuffled(len(texts), seed).tolist():
        found.setdefault(texts[i], []).append(i)
    return torch.tensor([found[prompt].pop() for prompt in prompts])


def run(row: Row, seed: int, out: Path, *, quick: bool = False) -> dict[str, Any]:
    """See videos.run."""
    root = out.parent.parent
    return videos.run(video_task(root, quick=quick), DigitJudge(root), row, seed, out)


def picture(task: Path, path: Path, order: Sequence[str]) -> None:
    """The same prompts and noise in every row. Needs Pillow."""
    codec = DigitCodec.load(task / "data" / "codec.json")
    shown = videos.read_sheet(task, [BY_NAME[name] for name in order])
    contact_sheet({label: codec.decode(latents) for label, latents in shown.items()}, path, scale=3)
