"""Checkpoints of runs and of single networks, in megatron's distributed format, independent of the mesh."""

from rcm_mcore.checkpoint.folder import CheckpointFolder
from rcm_mcore.checkpoint.network import load_network, model_of, read_network, write_network

__all__ = ["CheckpointFolder", "load_network", "model_of", "read_network", "write_network"]
