"""Weights of other people's files: names, shapes, readers and writers, conversion."""

from rcm_mcore.interop.convert import (
    FORMATS,
    Format,
    ReadOptions,
    Summary,
    WriteOptions,
    convert,
    model_of_section,
    network_format,
    section_of_model,
)
from rcm_mcore.interop.destination import MANIFEST, atomic_destination, check_destination, verify
from rcm_mcore.interop.diffusers_folder import diffusers_config, read_diffusers, write_diffusers
from rcm_mcore.interop.files import open_tensors, save_tensors
from rcm_mcore.interop.lazy import LazyTensor, Weight, Weights, loaded
from rcm_mcore.interop.maps import (
    check_hub,
    diffusers_to_hub,
    expected_shapes,
    hub_to_diffusers,
    hub_to_mcore,
    hub_to_rcm,
    infer_model,
    make_model,
    mcore_to_hub,
    official_to_hub,
    rcm_to_hub,
)
from rcm_mcore.interop.pipeline import PipelineOptions

__all__ = [
    "FORMATS",
    "MANIFEST",
    "Format",
    "LazyTensor",
    "PipelineOptions",
    "ReadOptions",
    "Summary",
    "Weight",
    "Weights",
    "WriteOptions",
    "atomic_destination",
    "check_destination",
    "check_hub",
    "convert",
    "diffusers_config",
    "diffusers_to_hub",
    "expected_shapes",
    "hub_to_diffusers",
    "hub_to_mcore",
    "hub_to_rcm",
    "infer_model",
    "loaded",
    "make_model",
    "mcore_to_hub",
    "model_of_section",
    "network_format",
    "official_to_hub",
    "open_tensors",
    "rcm_to_hub",
    "read_diffusers",
    "save_tensors",
    "section_of_model",
    "verify",
    "write_diffusers",
]
