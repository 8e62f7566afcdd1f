"""Latents from prompts, on any mesh: the networks of a checkpoint sampled as students or teachers."""

from rcm_mcore.sampling.request import Draw, SamplerConfig, SampleRequest, check, draws_of, time_steps
from rcm_mcore.sampling.sampler import Sampler, SampleResult, sample

__all__ = [
    "Draw",
    "SampleRequest",
    "SampleResult",
    "Sampler",
    "SamplerConfig",
    "check",
    "draws_of",
    "sample",
    "time_steps",
]
