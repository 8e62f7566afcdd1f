"""Tasks of videos: a run of the study through the product's own commands, and the measures that all tasks share.

A task is a `VideoTask` with a folder of its data, text encoder and teacher; its judges turn latents into measures. Students are
trained by `python -m rcm_mcore.train` (one process), sampled by rcm_mcore.sampling from the same prompts for every row, the
noise by the seed of the run.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from rcm_mcore.checkpoint import read_network, write_network
from rcm_mcore.evaluation import metrics
from rcm_mcore.evaluation.temporal import temporal_consistency, wasserstein
from rcm_mcore.lab.results import RESULT, STEPS, commit, write_json, write_tensors
from rcm_mcore.lab.rows import Row, with_warmup
from rcm_mcore.sampling import SampleRequest, sample


class Judge(Protocol):
    """What a task knows of its videos."""

    def measures(self, latents: Tensor, prompts: Sequence[str]) -> dict[str, Any]:
        """Of samples [n, C, F, H, W] that should show these prompts."""
        ...


@dataclass(frozen=True, kw_only=True)
class VideoTask:
    """`teacher_config` and `student_config`: YAML files, whose paths `overrides` replaces; `updates` of a student."""

    root: Path
    student_config: Path
    latent_shape: tuple[int, int, int, int]
    prompts: tuple[str, ...]
    updates: int
    teacher: Mapping[str, Any]  # fields of a request that samples the teacher: guidance, shift
    student: Mapping[str, Any]  # of one that samples a student: mid_times, sigma_max
    guidance: float  # of the teacher in distillation
    shards: str = "data/train/shard_*.tar"  # below the root
    batch_size: int = 40  # of sampling
    train_overrides: tuple[str, ...] = field(default=())

    @property
    def data_overrides(self) -> list[str]:
        """Where the data of the task are, and that nothing but the checkpoint at the end is wanted."""
        return [f"data.shards=[{self.root}/{self.shards}]", "mesh.tp=1", "mesh.sp=false", "guard.preflight=false"]

    def request(self, checkpoint: Path, *, which: str, steps: int, seed: int, **fields: Any) -> SampleRequest:
        """Of every prompt of the task."""
        return SampleRequest(
            checkpoint=str(checkpoint),
            which=which,  # type: ignore[arg-type]
            prompts=self.prompts,
            text_encoder=str(self.root / "data" / "text_encoder"),
            negative_embedding=str(self.root / "data" / "negative_embedding.safetensors"),
            latent_shape=self.latent_shape,
            batch_size=self.batch_size,
            steps=steps,
            seed=seed,
            **fields,
        )


def train(config: Path, overrides: Sequence[str], *, ranks: int = 1, show: bool = False) -> None:
    """A run to its end, continued if it was begun; its lines of steps are repeated if they are to be shown.

    Raises RuntimeError with the end of its output if it fails.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "PYTHONWARNINGS": "ignore"}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "rcm_mcore.train", str(config), *overrides]
    last: deque[str] = deque(maxlen=50)
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                last.append(line)
                if show and " INFO step " in line:
                    print(line, end="", flush=True)
        except BaseException:  # Ctrl-C
            process.kill()
            raise
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with exit code {process.returncode}:\n{''.join(last)}")


def train_student(task: VideoTask, row: Row, seed: int, out: Path) -> Path:
    """Every stage of a row in turn; returns the folder of the last run."""
    share, before = row.times * task.updates // len(row.plan), None
    row = with_warmup(row, share)
    for i, fields in enumerate(row.plan):
        folder = out / f"stage_{i + 1}"
        warm = int(fields.get("tangent_warmup", 0))
        has_critic = fields["method"] in ("rcm", "dmd")
        overrides = [
            *task.data_overrides,
            f"distill.negative_embedding={task.root}/data/negative_embedding.safetensors",
            f"distill.teacher={task.root}/teacher",
            f"distill.guidance={task.guidance}",
            "distill.student_every=2",
            f"train.steps={warm + (2 if has_critic else 1) * (share - warm)}",
            f"train.seed={seed}",
            f"checkpoint.dir={folder}",
            "checkpoint.every=100000",
            *(f"distill.{name}={value}" for name, value in fields.items()),
            *(f"model.{name}={str(value).lower()}" for name, value in row.model.items()),
            *([] if before is None else [f"distill.student={before}"]),
            *task.train_overrides,
        ]
        train(task.student_config, overrides)
        before = folder
    assert before is not None, "a row has a stage"
    return before


def run(task: VideoTask, judge: Judge, row: Row, seed: int, out: Path) -> dict[str, Any]:
    """Train, sample and judge one student; result.json, samples.safetensors and, as a checkpoint of its own, student/ in `out`.

    Returns the result. Of the runs that led to it only the logs are kept: their checkpoints are several times the size.
    """
    trained = train_student(task, row, seed, out)
    sampler = "mean_flow" if row.model.get("interval") else "few_step"
    by_steps, shown = {}, {}
    for steps in STEPS:
        made = sample(task.request(trained, which="ema", steps=steps, seed=seed, sampler=sampler, **task.student))
        cost = {"evaluations": made.evaluations, "s/video": made.seconds / len(made.latents)}
        by_steps[str(steps)] = {**cost, **judge.measures(made.latents, task.prompts)}
        shown[str(steps)] = made.latents[sheet_rows(len(task.prompts))].contiguous()
    log = [json.loads(line) for stage in sorted(out.glob("stage_*/log.jsonl")) for line in stage.read_text().splitlines()]
    facts = {"updates": row.times * task.updates, "seconds": sum(line["seconds"] for line in log), "commit": commit()}
    result = dict(row=row.name, group=row.group, seed=seed, facts=facts, by_steps=by_steps)
    write_tensors(out / "samples.safetensors", shown)
    if not (out / "student").exists():
        write_network(out / "student", *read_network(trained, which="ema"))
    write_json(out / RESULT, result)
    for checkpoint in out.glob("stage_*/step_*"):
        shutil.rmtree(checkpoint)
    return result


def sheet_rows(count: int, columns: int = 8) -> list[int]:
    """Indices of the samples that pictures show."""
    return list(range(0, count, max(1, count // columns)))[:columns]


def baselines(task: VideoTask, judge: Judge, real: Sequence[Tensor], *, seeds: int, out: Path) -> None:
    """Real data (latents of other samples for each seed) and the teacher at several numbers of steps."""
    found = {"real data": [judge.measures(latents, task.prompts) for latents in real]}
    shown = {"real data": real[0][sheet_rows(len(task.prompts))].contiguous()}
    for steps in (50, 4, 2, 1):
        label, runs = f"teacher, Euler {steps}", []
        for seed in range(seeds):
            euler = dict(which="student", steps=steps, sampler="euler", **task.teacher)
            made = sample(task.request(task.root / "teacher", seed=seed, **euler))
            cost = {"evaluations": made.evaluations, "s/video": made.seconds / len(made.latents)}
            runs.append({**cost, **judge.measures(made.latents, task.prompts)})
            shown.setdefault(label, made.latents[sheet_rows(len(task.prompts))].contiguous())
        found[label] = runs
    write_tensors(out / "baselines.safetensors", shown)
    write_json(out / "baselines.json", found)


def guided(task: VideoTask, judge: Judge, guidance: float) -> None:
    """Measures of the teacher's samples at this guidance, guidance_G.json in the task's folder."""
    fields = {**task.teacher, "guidance": guidance}
    # Of a seed that no row has: what is chosen by these must not be measured by them again.
    made = sample(task.request(task.root / "teacher", which="student", seed=100, steps=50, sampler="euler", **fields))
    write_json(task.root / f"guidance_{guidance:g}.json", {"guidance": guidance, **judge.measures(made.latents, task.prompts)})


@dataclass(frozen=True)
class Reference:
    """Real videos as a judge sees them: `features` [n, d], `bandwidth` of the Vendi score's kernel, `jitter` [n] of frames."""

    features: Tensor
    bandwidth: float
    jitter: Tensor

    @staticmethod
    def of(features: Tensor, groups: Sequence[Hashable], frames: Tensor) -> Reference:
        """groups: prompts of the videos; frames [n, F, ...], of pixels or features."""
        bandwidth = metrics.median_distance(features, groups)
        return Reference(features, bandwidth, temporal_consistency(frames).jitter)

    def measures(self, features: Tensor, groups: Sequence[Hashable], frames: Tensor) -> dict[str, float]:
        """What every task measures of samples [m, d]: quality, coverage, diversity within prompts, and steadiness in time."""
        found = metrics.precision_recall(self.features, features)
        density = metrics.density_coverage(self.features, features)
        return {
            "Frechet": metrics.frechet_distance(self.features, features),
            "precision": found.precision,
            "recall": found.recall,
            "density": density.density,
            "coverage": density.coverage,
            "diversity": metrics.within_group_diversity(features, groups),
            "Vendi": metrics.within_group_vendi(features, groups, bandwidth=self.bandwidth),
            "jitter off": wasserstein(self.jitter, temporal_consistency(frames).jitter),
        }


def read_sheet(task: Path, order: Sequence[Row], seed: int = 0) -> dict[str, Tensor]:
    """Label -> latents of the samples that pictures show: baselines, then every row at 1, 2 and 4 steps."""
    shown = load_file(task / "baselines.safetensors")
    labels = [label for label in ("real data", "teacher, Euler 50", "teacher, Euler 4", "teacher, Euler 1") if label in shown]
    rows: dict[str, Tensor] = {label: shown[label] for label in labels}
    for row in order:
        path = task / row.slug / f"seed_{seed}" / "samples.safetensors"
        if path.exists():
            made = load_file(path)
            rows |= {f"{row.name}, {steps}": made[str(steps)] for steps in STEPS}
    return rows


def shuffled(count: int, seed: int) -> Tensor:
    """A permutation of 0 .. count - 1."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
