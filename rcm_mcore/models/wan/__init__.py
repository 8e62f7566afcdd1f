"""Wan2.1 text-to-video on megatron-core."""

from rcm_mcore.models.wan.model import WanModel, build_wan

__all__ = ["WanModel", "build_wan"]
