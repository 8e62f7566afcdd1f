"""Sections of a run's configuration. Every field is documented where it is declared."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from rcm_mcore.config.mesh import MeshConfig, tokens_per_sample
from rcm_mcore.config.model import MID_TIMES, ModelConfig


@dataclass(frozen=True, kw_only=True)
class TimeConfig:
    """A distribution over diffusion time (method.md 5)."""

    kind: Literal["lognormal", "shifted"] = "lognormal"
    mean: float = -0.8  # lognormal: log sigma ~ N(mean, std^2), sigma = tan t
    std: float = 1.6
    shift: float = 5.0  # shifted: s = shift u / (1 + (shift - 1) u), u uniform, s the rectified-flow time

    def __post_init__(self) -> None:
        if self.std <= 0 or self.shift <= 0:
            raise ValueError(f"time distribution: std={self.std} and shift={self.shift} must be positive")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Cached latents and text embeddings in WebDataset shards."""

    shards: tuple[str, ...]  # paths, globs or brace patterns
    latent_shape: tuple[int, int, int, int]  # [C, F, H, W] trained on; longer latents are cut to F frames
    given_frames: tuple[int, ...] = (1, 2)  # model.condition=frames: latent frames that are given, drawn for each sample
    readers: int = 64  # virtual readers; the data-parallel size must divide them
    max_bad_samples: int = 100  # a run stops when one rank has skipped more
    workers: int = (
        0  # processes of a data-parallel rank that read; 0: a thread does, which small samples keep from sharing Python
    )
    prefetch: int = 2  # batches prepared ahead
    stall_minutes: float = 10.0  # a run ends when one sample takes longer to read; waits are warned about before

    def __post_init__(self) -> None:
        _at_least("data.readers", self.readers, 1)
        _at_least("data.max_bad_samples", self.max_bad_samples, 0)
        _at_least("data.workers", self.workers, 0)
        _at_least("data.prefetch", self.prefetch, 1)
        if not self.stall_minutes > 0:
            raise ValueError(f"data.stall_minutes={self.stall_minutes}: must be positive")
        if not self.shards:
            raise ValueError("data.shards is empty: give at least one path, glob or brace pattern")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length and shape of the run."""

    objective: Literal["pretrain", "distill"]
    steps: int  # optimizer steps of the run, student and critic steps together
    global_batch_size: int  # samples of one optimizer step over all ranks
    micro_batch_size: int  # samples of one forward on one rank
    seed: int = 0  # of the noise, the times and the order of the data
    max_nonfinite_share: float = 0.1  # of a step's samples; above it, or with such a gradient, the step is not finite:
    # stop the run; skip the update; or roll back to the newest checkpoint and go on from there with later data and other noise
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    max_skips: int = 10  # steps in a row; the run stops when one more would be skipped
    max_rollbacks: int = 3  # to one checkpoint; likewise
    # Kept in host memory (training/offload.py): blocks of the teacher; float32 masters and second moments of the student or the
    # fake score; the EMA
    offload: tuple[Literal["teacher", "student", "fake_score", "ema"], ...] = ()

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch_size", "micro_batch_size"):
            _at_least(f"train.{name}", getattr(self, name), 1)
        for name in ("max_skips", "max_rollbacks"):
            _at_least(f"train.{name}", getattr(self, name), 1)
        if not 0 <= self.max_nonfinite_share <= 1:
            raise ValueError(f"train.max_nonfinite_share={self.max_nonfinite_share}: must lie in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Flow matching of a teacher from shards."""

    time: TimeConfig = field(default_factory=lambda: TimeConfig(kind="shifted", shift=3.0))
    condition_dropout: float = 0.1  # share of samples that see the negative embedding instead of their text
    negative_embedding: str | None = None  # file with the text rows of the negative prompt; none: zeros
    network: str = ""  # checkpoint folder that training starts from, such as one on images before videos; none: random weights
    network_weights: Literal["student", "ema"] = "ema"  # which network of that checkpoint

    def __post_init__(self) -> None:
        if not 0 <= self.condition_dropout <= 1:
            raise ValueError(f"pretrain.condition_dropout={self.condition_dropout}: must lie in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """rCM, its two halves, and what it is compared with (arXiv 2510.08431; method.md 2 to 5)."""

    teacher: str = ""  # checkpoint folder of the teacher (format mcore); the student and the fake score start from it
    teacher_weights: Literal["student", "ema"] = "student"  # which network of that checkpoint
    student: str = ""  # checkpoint folder that the student starts from instead, such as an earlier stage's
    student_weights: Literal["student", "ema"] = "ema"  # which network of that checkpoint
    # rcm: scm and dmd together. scm, dcm: continuous-time and discrete consistency. dmd: score distillation. meanflow: average
    # velocities (arXiv 2505.13447), for networks with model.interval
    method: Literal["rcm", "scm", "dmd", "dcm", "meanflow"] = "rcm"
    guidance: float = 5.0  # classifier-free guidance of the teacher, F_u + g (F_c - F_u)
    negative_embedding: str | None = None  # file with the text rows of the negative prompt; none: zeros
    student_every: int = 5  # one student step in so many steps, else critic steps
    scm_weight: float = 100.0  # of the consistency term of any method
    dmd_weight: float = 1.0
    time_g: TimeConfig = field(default_factory=TimeConfig)  # times of the consistency term
    time_d: TimeConfig = field(default_factory=lambda: TimeConfig(kind="shifted"))  # times of score distillation and rollout
    rollout_max_steps: int = 4  # rollouts of 1, 2, ... steps in turn
    rollout_times: tuple[float, ...] | None = None  # fixed TrigFlow times of the later rollout steps instead of draws
    tangent_warmup: int = 0  # student steps over which r rises from 0 to 1; student-only meanwhile
    scale_tangent: bool = True  # multiply F_dot by r as well as x_t (the public code leaves F_dot unscaled)
    tangent_norm_constant: float = 0.1  # c in g / (|g| + c); in g / (|g|^2 + c) of meanflow
    tangent: Literal["jvp", "finite_difference"] = "jvp"  # of the student of rcm and scm; differences are for comparisons alone
    # Of TrigFlow time, to both sides, in float32: of the laboratory's Wan teacher 1e-4 gives the tangent to 0.1 %, 1e-2 to 24 %
    # (the fastest sinusoid, of 1000 s, goes round more than once). In bfloat16 3e-3 is best, to 17 % (docs/quality).
    difference_step: float = 1e-4
    discrete_steps: int = 50  # dcm: steps from noise to data, equally likely under time_g
    instant_share: float = 0.25  # meanflow: share of samples whose interval is empty, which see the teacher's velocity

    def __post_init__(self) -> None:
        _at_least("distill.student_every", self.student_every, 1)
        _at_least("distill.rollout_max_steps", self.rollout_max_steps, 1)
        _at_least("distill.tangent_warmup", self.tangent_warmup, 0)
        _at_least("distill.discrete_steps", self.discrete_steps, 1)
        if self.consistency in ("dcm", "meanflow") and (self.tangent_warmup or self.tangent != "jvp"):
            raise ValueError(
                f"distill.tangent_warmup={self.tangent_warmup}, distill.tangent={self.tangent} with distill.method="
                f"{self.method}: they are of the tangent of rcm and scm; leave them at 0 and jvp"
            )
        if not 0 < self.difference_step < math.pi / 4:
            raise ValueError(f"distill.difference_step={self.difference_step}: must lie in (0, pi / 4), such as 0.01")
        if not 0 <= self.instant_share <= 1:
            raise ValueError(f"distill.instant_share={self.instant_share}: must lie in [0, 1]")
        if self.rollout_times is not None and not all(0 < t <= math.pi / 2 for t in self.rollout_times):
            raise ValueError(f"distill.rollout_times={list(self.rollout_times)}: TrigFlow times lie above 0 and up to pi / 2")
        if self.rollout_times is not None and len(self.rollout_times) < self.rollout_max_steps - 1:
            raise ValueError(
                f"distill.rollout_times has {len(self.rollout_times)} entries; distill.rollout_max_steps="
                f"{self.rollout_max_steps} needs {self.rollout_max_steps - 1}"
            )

    @property
    def consistency(self) -> Literal["scm", "dcm", "meanflow"] | None:
        """The term of the method that follows the teacher's trajectories, if it has one."""
        if self.method in ("rcm", "scm"):
            return "scm"
        return None if self.method == "dmd" else self.method  # type: ignore[return-value]

    @property
    def carries_tangents(self) -> bool:
        """Whether a term takes a JVP of the student, by a pass with tangents."""
        return self.consistency in ("scm", "meanflow") and self.tangent == "jvp"

    @property
    def has_fake_score(self) -> bool:
        """Whether the method has score distillation, and so a network that learns the student's scores."""
        return self.method in ("rcm", "dmd")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW without first moment (beta1 = 0), float32 master weights, and the EMA that travels with them."""

    lr: float = 1e-6  # student, or teacher in pretraining
    fake_score_lr: float = 2e-7
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    warmup_steps: int = 100  # linear, of each network's own steps
    warmup_start_lr: float = 1e-6  # where the warm-up begins (never above lr)
    decay: Literal["constant", "linear", "cosine"] = "constant"  # after the warm-up
    min_lr_ratio: float = 0.0  # where a decay ends, as a share of lr
    clip_grad: float = 0.0  # 0: no clipping; the norm is logged either way
    ema_length: float | None = 0.05  # relative length s of the power-function EMA of the trained network; none: no EMA
    overlap_grad_reduce: bool = False  # reduce gradients while backward runs
    overlap_param_gather: bool = False  # gather updated weights while other networks run, until their network does

    def __post_init__(self) -> None:
        for name in ("lr", "fake_score_lr", "eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"optim.{name}={getattr(self, name)}: must be positive")
        if not 0 <= self.beta2 < 1:
            raise ValueError(f"optim.beta2={self.beta2}: must lie in [0, 1)")
        if self.clip_grad < 0:
            raise ValueError(f"optim.clip_grad={self.clip_grad}: must be positive, or 0 for none")
        if self.ema_length is not None and not 0 < self.ema_length < 0.28:
            raise ValueError(f"optim.ema_length={self.ema_length}: must lie in (0, 0.28), such as 0.05 or 0.10")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Where the run lives: checkpoints, logs and the resolved configuration."""

    dir: str
    every: int = 500  # optimizer steps between saves; the last step is always saved
    keep_last: int = 2  # the newest so many are kept
    keep_every: int | None = None  # and those of steps that this divides (a multiple of `every`)
    asynchronous: bool = True  # write while training goes on, from a copy in host memory; false: training waits, no copy

    def __post_init__(self) -> None:
        _at_least("checkpoint.every", self.every, 1)
        _at_least("checkpoint.keep_last", self.keep_last, 1)
        if self.keep_every is not None and (self.keep_every < 1 or self.keep_every % self.every):
            raise ValueError(
                f"checkpoint.keep_every={self.keep_every}: must be a multiple of checkpoint.every={self.every}, "
                "the steps that are saved"
            )


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Which implementation of attention runs. `auto` takes the fastest that is here (`rcm_kernels.backends()` shows why)."""

    jvp: Literal["auto", "hopper", "triton", "blockwise"] = "auto"  # forward with tangents
    forward: Literal["auto", "hopper", "cudnn", "flash_attn_3", "flash_attn_2", "torch_flash", "triton", "blockwise"] = "auto"
    backward: Literal["auto", "cudnn", "flash_attn_3", "flash_attn_2", "torch_flash", "blockwise"] = "auto"


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What the operator sees besides the progress bar and log.jsonl."""

    wandb: bool = False
    project: str = "rcm-mcore"
    sheet_every: int = 0  # optimizer steps between sheets of samples (docs/sheets.md); 0: none
    sheet_samples: int = 4  # prompts on a sheet, those of the first samples of the run
    sheet_steps: tuple[int, ...] = (1, 4)  # student evaluations of a sample, a column each; of a teacher not looked at
    sheet_vae: str | None = None  # folder of an AutoencoderKLWan; none: the first three latent channels as colours

    def __post_init__(self) -> None:
        _at_least("log.sheet_every", self.sheet_every, 0)
        _at_least("log.sheet_samples", self.sheet_samples, 1)
        most = 1 + min(map(len, MID_TIMES.values()))
        if not self.sheet_steps or not all(1 <= steps <= most for steps in self.sheet_steps):
            raise ValueError(f"log.sheet_steps={list(self.sheet_steps)}: give at least one number, each from 1 to {most}")


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What watches a run (docs/guards.md)."""

    preflight: bool = True  # measure ranks and links before training; that code and configuration are equal is always checked
    stall_minutes: float = 10.0  # without a sign of life: stacks are written, after as long again the run ends; 0: never
    straggler_every: int = 50  # steps between comparisons of the ranks' times; 0: none
    straggler_ratio: float = 1.5  # a rank is slow above this multiple of the median

    def __post_init__(self) -> None:
        if not 0 <= self.stall_minutes < math.inf:
            raise ValueError(f"guard.stall_minutes={self.stall_minutes}: must be positive, or 0 for no watchdog")
        _at_least("guard.straggler_every", self.straggler_every, 0)
        if not 1 < self.straggler_ratio < math.inf:
            raise ValueError(f"guard.straggler_ratio={self.straggler_ratio}: must be above 1, such as 1.5")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    model: ModelConfig
    mesh: MeshConfig = field(default_factory=MeshConfig)
    train: TrainConfig
    data: DataConfig
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    log: LogConfig = field(default_factory=LogConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)

    def __post_init__(self) -> None:
        tokens_per_sample(self.model, self.data.latent_shape)
        self._check_given_frames()
        if self.train.objective == "distill" and not self.distill.teacher:
            raise ValueError("distill.teacher is empty: train.objective=distill needs the folder of a teacher checkpoint")
        self._check_offload()
        if self.model.interval != (self.train.objective == "distill" and self.distill.method == "meanflow"):
            raise ValueError(
                f"model.interval={str(self.model.interval).lower()} with train.objective={self.train.objective}, "
                f"distill.method={self.distill.method}: students of meanflow are told the interval, and no other networks"
            )

    def _check_offload(self) -> None:
        there = {"student"}
        if self.train.objective == "distill":
            there |= {"teacher", "fake_score"} if self.distill.has_fake_score else {"teacher"}
        if self.optim.ema_length is not None:
            there.add("ema")
        for name in self.train.offload:
            if name not in there:
                raise ValueError(
                    f"train.offload={list(self.train.offload)}: this run has no {name} (train.objective="
                    f"{self.train.objective}, distill.method={self.distill.method}, optim.ema_length={self.optim.ema_length}); "
                    f"it has {', '.join(sorted(there))}"
                )

    def _check_given_frames(self) -> None:
        frames, given = self.data.latent_shape[1], self.data.given_frames
        if self.model.condition == "first_last" and frames < 2:
            raise ValueError(f"data.latent_shape={list(self.data.latent_shape)}: model.condition=first_last needs two frames")
        if self.model.condition == "frames" and not (given and all(0 <= n < frames for n in given)):
            raise ValueError(
                f"data.given_frames={list(given)}: each must lie between 0 and {frames - 1}, one fewer than the frames of "
                f"data.latent_shape={list(self.data.latent_shape)}"
            )


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name}={value}: must be at least {least}")
