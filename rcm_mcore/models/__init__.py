"""Diffusion transformers on megatron-core; each forward takes tensors or Duals."""

from rcm_mcore.models.build import build_model
from rcm_mcore.models.common.dit import DiffusionTransformer

__all__ = ["DiffusionTransformer", "build_model"]
