"""Checkpoints of runs and of single networks, in megatron's distributed format, independent of the mesh."""

from rcm_mcore.checkpoint.folder import CheckpointError, CheckpointFolder
from rcm_mcore.checkpoint.network import (
    config_of,
    load_network,
    model_of,
    open_network,
    read_network,
    require_network,
    write_network,
)

__all__ = [
    "CheckpointError",
    "CheckpointFolder",
    "config_of",
    "load_network",
    "model_of",
    "open_network",
    "read_network",
    "require_network",
    "write_network",
]
