"""What a step should cost by arithmetic, and what it took: FLOPs, tokens and seconds."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rcm_mcore.config import Config, ModelConfig, tokens_per_sample
from rcm_mcore.distill.phases import Phase


def model_flops(model: ModelConfig, tokens: int, *, tangent: bool = False) -> float:
    """FLOPs of the matmuls in a forward of one sample of so many video tokens; a multiplication and an addition count as two.

    With `tangent` those of a dual forward. The tangent of x W is x_dot W: such matmuls count twice. In self-attention both
    factors of a product have tangents, so that each of its matmuls takes two more: it counts three times. Cross-attention
    counts twice, since text and image have no tangent, and the linears of these count once.
    """
    width, text, image = model.hidden_size, model.text_len, model.image_tokens
    linears = 6 * tokens * width**2 + 2 * tokens * width * model.ffn_hidden_size
    cross_attention = 2 * tokens * (text + image) * width
    self_attention = 2 * tokens**2 * width
    patches = tokens * math.prod(model.patch_size) * (model.patch_channels + model.in_channels) * width
    if model.family == "wan":
        context, rank = width, 0
        embedders = text * (model.text_dim * width + width**2) + image * (model.image_dim**2 + model.image_dim * width)
        times, interval = model.freq_dim * width + 7 * width**2, model.freq_dim * width + width**2
    else:
        context, rank = model.text_dim, model.adaln_rank
        embedders, times, interval = 0, 4 * width**2 + 3 * rank * width, 4 * width**2
    times += interval if model.interval else 0
    given = 2 * text * context * width + 2 * image * width**2  # keys and values of each layer
    carries = model.num_layers * (linears + cross_attention + 12 * rank * width) + patches + times
    once = model.num_layers * given + embedders
    if tangent:
        return 2.0 * (2 * carries + 3 * model.num_layers * self_attention + once)
    return 2.0 * (carries + model.num_layers * self_attention + once)


def flops_of_step(config: Config, phase: Phase) -> float:
    """FLOPs of an optimizer step over its global batch: what the method needs, without what is computed again to save memory.

    Forwards of a sample (backward: two more; teacher: two, one with guidance 1; N: steps of the rollout):

        pretrain              1 + backward
        sCM, MeanFlow         teacher + 1 dual + backward (by finite differences 3 instead of 1 dual)
        dCM                   teacher + 2 + backward
        score distillation    N, the last with a graph, + 1 fake score + teacher + backward
        critic                N + 1 + backward

    Optimizer, EMA, norms and activations are not counted. Backward takes less than two forwards by what has no gradient (text,
    noise); a forward over pipeline stages that is run again for its graph counts once.
    """
    tokens = tokens_per_sample(config.model, config.data.latent_shape)
    forward = model_flops(config.model, tokens)
    backward, teacher, rollout = 2, 1 if config.distill.guidance == 1.0 else 2, phase.rollout_steps
    if phase.kind == "pretrain":
        flops = forward * (1 + backward)
    elif phase.kind == "critic":
        flops = forward * (rollout + 1 + backward)
    else:
        flops = 0.0
        if phase.scm:
            by_hand = 2 if config.distill.consistency == "dcm" else 3 if config.distill.tangent == "finite_difference" else 0
            student = by_hand * forward if by_hand else model_flops(config.model, tokens, tangent=True)
            flops += forward * (teacher + backward) + student
        if phase.dmd:
            flops += forward * (rollout + 1 + teacher + backward)
    return flops * config.train.global_batch_size


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Of the steps of a run. `matmul_tflops`: what a large matmul reaches on one rank, in TFLOP/s, if that was measured."""

    config: Config
    ranks: int
    matmul_tflops: float | None = None

    def of_step(self, phase: Phase, seconds: float) -> dict[str, float | None]:
        """tokens_per_second, tflops_per_rank and mfu (see log.py) of a step that took `seconds`."""
        tokens = tokens_per_sample(self.config.model, self.config.data.latent_shape)
        tflops = flops_of_step(self.config, phase) / self.ranks / seconds / 1e12
        return {
            "tokens_per_second": self.config.train.global_batch_size * tokens / seconds,
            "tflops_per_rank": tflops,
            "mfu": None if self.matmul_tflops is None else tflops / self.matmul_tflops,
        }
