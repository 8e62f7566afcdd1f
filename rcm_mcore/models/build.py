"""A network of any family."""

from __future__ import annotations

from megatron.core.process_groups_config import ProcessGroupCollection

from rcm_mcore.config import MeshConfig, ModelConfig
from rcm_mcore.models.common.dit import DiffusionTransformer
from rcm_mcore.models.common.parameters import initialize
from rcm_mcore.models.cosmos.model import CosmosModel
from rcm_mcore.models.wan.model import WanModel

FAMILIES: dict[str, type[WanModel] | type[CosmosModel]] = {"wan": WanModel, "cosmos": CosmosModel}


def build_model(
    model: ModelConfig, mesh: MeshConfig, groups: ProcessGroupCollection, *, seed: int | None = 0, trainable: bool = True
) -> DiffusionTransformer:
    """A network with weights that depend on `seed` and not on the mesh, or that are still to be loaded if it is None.

    Frozen unless `trainable`.
    """
    net = FAMILIES[model.family](model, mesh, groups)
    if seed is not None:
        initialize(net, net.initial_values, seed=seed, group=groups.tp)
    return net.requires_grad_(trainable)
