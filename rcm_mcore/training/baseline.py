"""What the public rCM network takes for the same work, as it was measured, and what this project has set itself.

Seconds on H200 at 32,760 tokens (latents 16 x 21 x 60 x 104), one sample a step, November 2026: 1.3B on one GPU, 14B on eight
(FSDP 8, Ulysses 8, recompute). No step of its trainer was timed: steps are put together from its network's passes, without
optimizer and data. On another number of GPUs it is taken to need the same GPU-seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

from rcm_mcore.config import Config, tokens_per_sample
from rcm_mcore.config.model import SIZES

TOKENS = 32760
Parts = list[tuple[float, float | None]]  # how many passes, and seconds of one


@dataclass(frozen=True, kw_only=True)
class Public:
    """Seconds of a pass. Its student is of another class than teacher and fake score, made for torch.func.jvp."""

    gpus: int
    forward: float  # of a teacher
    student_forward: float
    jvp: float
    student: float  # forward and backward
    plain: float | None  # forward and backward of a fake score, where measured


PUBLIC = {
    "1.3B": Public(gpus=1, forward=0.60, student_forward=1.64, jvp=5.40, student=6.75, plain=None),
    "14B": Public(gpus=8, forward=0.51, student_forward=1.39, jvp=4.32, student=4.81, plain=2.64),
}
# Seconds set as targets, on as many GPUs.
TARGETS = {("1.3B", "dual"): 1.3, ("1.3B", "scm"): 4.0, ("14B", "scm"): 3.4, ("14B", "critic"): 3.9}


def public_seconds(size: str, kind: str, rollout: float = 0.0) -> tuple[float, str] | None:
    """Seconds of the public network and how they come about; none where a part was not measured.

    kind: scm (consistency term alone), student (both terms), critic, or a single pass of training/passes.py. rollout: student
    evaluations, may be a mean.
    """
    one = PUBLIC[size]
    scm: Parts = [(2, one.forward), (1, one.jvp), (1, one.student)]
    # The last evaluation of a student's rollout is the forward that has a graph.
    dmd: Parts = [(rollout - 1, one.student_forward), (1, one.student), (1, one.forward), (2, one.forward)]
    table: dict[str, Parts] = {
        "scm": scm,
        "student": scm + dmd,
        "critic": [(rollout, one.student_forward), (1, one.plain)],
        "forward": [(1, one.forward)],
        "forward and backward": [(1, one.plain)],
        "dual": [(1, one.jvp)],
        "dual and backward": [(1, one.jvp), (1, one.student)],
    }
    parts = table[kind]
    if any(seconds is None for _, seconds in parts):
        return None
    total = sum(count * seconds for count, seconds in parts if seconds is not None)
    text = " + ".join(f"{seconds:.2f}" if count == 1 else f"{count:g} x {seconds:.2f}" for count, seconds in parts if count)
    return total, f"{text} = {total:.2f} s on {one.gpus} GPU{'s' * (one.gpus > 1)}"


def against_public(config: Config, kind: str, seconds: float, *, ranks: int, rollout: float = 0.0) -> dict[str, object] | None:
    """GPU-seconds a sample of a step of `kind` that took `seconds`, beside those of the public network and of the target.

    None for what the public network was not measured at: another network, depth or number of tokens.
    """
    model = config.model
    tokens = tokens_per_sample(model, config.data.latent_shape)
    full = model.size in PUBLIC and model.num_layers == SIZES["wan"][model.size]["num_layers"]
    if kind == "student" and config.distill.method != "rcm":
        return None
    if model.family != "wan" or model.condition != "text" or not full or tokens != TOKENS:
        return None
    public = public_seconds(model.size, kind, rollout)
    if public is None:
        return None
    gpus = PUBLIC[model.size].gpus
    ours, theirs = seconds * ranks / config.train.global_batch_size, public[0] * gpus
    target = TARGETS.get((model.size, kind))
    return {
        "arithmetic": f"{public[1]} = {theirs:.1f} GPU-s" if gpus > 1 else public[1],
        "public_gpu_seconds": theirs,
        "gpu_seconds": ours,
        "times_faster": theirs / ours,
        "target_gpu_seconds": None if target is None else target * gpus,
    }
