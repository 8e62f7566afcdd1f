"""From prompts to latents and files, on any mesh: the networks of a checkpoint sampled as students or teachers."""

from rcm_mcore.sampling.folder import Output
from rcm_mcore.sampling.generate import generate
from rcm_mcore.sampling.given import GivenFiles
from rcm_mcore.sampling.request import Draw, SamplerConfig, SampleRequest, check, check_request, draws_of, time_steps
from rcm_mcore.sampling.sampler import Sampler, SampleResult, sample

__all__ = [
    "Draw",
    "GivenFiles",
    "Output",
    "SampleRequest",
    "SampleResult",
    "Sampler",
    "SamplerConfig",
    "check",
    "check_request",
    "draws_of",
    "generate",
    "sample",
    "time_steps",
]
