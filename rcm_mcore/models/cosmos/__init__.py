"""Cosmos-Predict2 on megatron-core."""

from rcm_mcore.models.cosmos.model import CosmosModel, build_cosmos

__all__ = ["CosmosModel", "build_cosmos"]
