"""Weights of other people's files: names, shapes, readers and writers, conversion."""

from rcm_mcore.interop.convert import FORMATS, Format, Summary, convert, model_of_shape, network_format, shape_of_model
from rcm_mcore.interop.files import (
    atomic_destination,
    check_destination,
    diffusers_config,
    load_tensors,
    read_diffusers,
    save_tensors,
    write_diffusers,
)
from rcm_mcore.interop.wan_names import (
    WanShape,
    check_hub,
    diffusers_to_hub,
    expected_shapes,
    hub_to_diffusers,
    hub_to_mcore,
    hub_to_rcm,
    infer_shape,
    mcore_to_hub,
    rcm_to_hub,
    wan_to_hub,
)

__all__ = [
    "FORMATS",
    "Format",
    "Summary",
    "WanShape",
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
    "infer_shape",
    "load_tensors",
    "mcore_to_hub",
    "model_of_shape",
    "network_format",
    "rcm_to_hub",
    "read_diffusers",
    "save_tensors",
    "shape_of_model",
    "wan_to_hub",
    "write_diffusers",
]
