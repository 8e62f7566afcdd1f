"""What to sample, and how; checked before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from rcm_mcore.checkpoint import model_of, require_network
from rcm_mcore.checkpoint.network import Which
from rcm_mcore.config import MeshConfig, ModelConfig, parse_model, tokens_per_sample, validate_mesh
from rcm_mcore.diffusion.samplers import few_step_times, shifted_sigmas
from rcm_mcore.sampling.given import GivenFiles, check_given

# Fields that change rounding alone: another mesh may continue a run.
MESH_FIELDS = ("tp", "sp", "cp", "cp_mode", "cp_inner", "pp")


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How to sample. `python -m rcm_mcore.sample --help` says what each field means."""

    checkpoint: str
    text_encoder: str
    latent_shape: tuple[int, int, int, int]
    sampler: Literal["few_step", "mean_flow", "euler", "unipc"] = "few_step"
    steps: int = 4
    which: Which = "ema"
    guidance: float = 1.0
    shift: float = 5.0
    sigma_max: float = 80.0
    mid_times: tuple[float, ...] = (1.5, 1.4, 1.0)
    negative_prompt: str | None = None
    negative_embedding: str | None = None
    seed: int = 0
    tp: int = 1
    sp: bool = False
    cp: int = 1
    cp_mode: Literal["auto", "ring", "all_to_all", "two_level"] = "auto"
    cp_inner: int | None = None
    pp: int = 1
    dtype: str | None = None

    @property
    def mesh(self) -> MeshConfig:
        """The mesh that the fields describe."""
        return MeshConfig(**{name: getattr(self, name) for name in MESH_FIELDS})

    @property
    def evaluations(self) -> int:
        """Forwards of one sample, a guided pair counting two."""
        return self.steps * (1 if self.guidance == 1.0 else 2)


@dataclass(frozen=True, kw_only=True)
class SampleRequest(SamplerConfig):
    """How to sample, and what: see `draws_of`."""

    prompts: tuple[str, ...]
    given: GivenFiles | None = None  # for networks with model.condition
    num_per_prompt: int = 1
    seeds: tuple[int, ...] = ()
    first_index: int = 0
    batch_size: int = 1


@dataclass(frozen=True)
class Draw:
    """A sample to make. Its noise depends on seed and index alone."""

    number: int  # in the run
    prompt: str
    seed: int
    index: int
    given: tuple[str, ...] = ()  # files, as `GivenFiles.of_prompt`


def check(config: SamplerConfig, world_size: int) -> ModelConfig:
    """The model to sample on `world_size` ranks; ValueError naming what is wrong before anything is loaded."""
    section = model_of(config.checkpoint)
    # Samples are made in the network's own dtype, whatever its training rounded.
    model = parse_model(section | {"fp8_forwards": False} | ({"dtype": config.dtype} if config.dtype else {}))
    tokens = tokens_per_sample(model, config.latent_shape)
    validate_mesh(model, config.mesh, world_size, tokens=tokens)
    require_network(config.checkpoint, config.which)
    time_steps(config)
    if not math.isfinite(config.guidance):
        raise ValueError(f"--guidance {config.guidance}: must be a number")
    if model.interval != (config.sampler == "mean_flow"):
        told = "is" if model.interval else "is not"
        raise ValueError(
            f"--sampler {config.sampler}: the network {told} a student of distill.method=meanflow; its sampler is "
            + ("mean_flow" if model.interval else "few_step, euler or unipc")
        )
    if config.sampler in ("few_step", "mean_flow") and config.guidance != 1.0:
        raise ValueError(f"--guidance {config.guidance}: a distilled student is sampled without guidance; leave it at 1")
    if config.negative_prompt is not None and config.negative_embedding is not None:
        raise ValueError("--negative-prompt and --negative-embedding say the same thing: give one of them")
    if config.guidance == 1.0 and config.negative_prompt is not None:
        raise ValueError("--negative-prompt: without guidance nothing looks at it; set --guidance")
    return model


def check_request(request: SampleRequest, world_size: int) -> ModelConfig:
    """As `check`, of a whole request: ValueError also for prompts and files that make no sense."""
    model = check(request, world_size)
    draws_of(request)
    check_given(request.given, model, request.latent_shape, prompts=len(request.prompts))
    return model


def time_steps(config: SamplerConfig) -> list[float] | None:
    """TrigFlow times of few_step and mean_flow, rectified-flow times of euler, the last 0; none for unipc, which has its own.

    Raises ValueError for steps or times that do not work.
    """
    if config.sampler in ("few_step", "mean_flow"):
        return few_step_times(config.steps, sigma_max=config.sigma_max, mid_times=config.mid_times)
    sigmas = shifted_sigmas(config.steps, config.shift)
    return sigmas if config.sampler == "euler" else None


def draws_of(request: SampleRequest) -> list[Draw]:
    """Every sample of a request, by prompt.

    Sample i has the request's seed and index first_index + i; with `seeds`, prompt p is sampled once with each of them and
    index first_index + p. Raises ValueError for a request that makes no sense.
    """
    if not request.prompts:
        raise ValueError("there are no prompts: give --prompt, or --prompts a file with one prompt a line")
    if not all(prompt.strip() for prompt in request.prompts):
        raise ValueError("--prompt '': a prompt must not be empty")
    for name, least in (("batch_size", 1), ("num_per_prompt", 1), ("first_index", 0)):
        if getattr(request, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(request, name)}: must be at least {least}")
    prompts, files = request.prompts, (request.given or GivenFiles()).of_prompt
    if not request.seeds:
        which = [p for p in range(len(prompts)) for _ in range(request.num_per_prompt)]
        return [Draw(i, prompts[p], request.seed, request.first_index + i, files(p)) for i, p in enumerate(which)]
    if request.num_per_prompt > 1:
        raise ValueError(f"--num-per-prompt {request.num_per_prompt} goes with --seed; --seeds makes one sample for each")
    if len(set(request.seeds)) < len(request.seeds):
        raise ValueError(f"--seeds {' '.join(map(str, request.seeds))}: each must be there once")
    pairs = [(p, seed) for p in range(len(prompts)) for seed in request.seeds]
    return [Draw(i, prompts[p], seed, request.first_index + p, files(p)) for i, (p, seed) in enumerate(pairs)]
