"""Wan under tensor and sequence parallelism against one rank: outputs, tangents, every gradient, recompute modes."""

from functools import cache

import pytest
import torch
from launch import run_ranks
from oracle import diffusers_wan, islands_in_fp64, names_of_ours, small_model
from ranks_wan import MODES, run

from rcm_mcore.models.common.parameters import load_full
from rcm_mcore.models.wan import build_wan


@pytest.fixture(scope="module")
def reference(mesh, tmp_path_factory):
    """A folder with the weights and what one rank computes with them."""
    folder = tmp_path_factory.mktemp("wan")
    model = small_model()
    with islands_in_fp64():
        weights = names_of_ours(model, diffusers_wan(model).state_dict())
    net = build_wan(model, mesh.config, mesh.groups)
    load_full(net, weights, mesh.tp_group)
    out, tangent, grads = run(net, "none")
    torch.save({k: v.clone() for k, v in weights.items()}, folder / "weights.pt")
    torch.save({"out": out, "tangent": tangent, "grads": grads}, folder / "reference.pt")
    return folder


@pytest.fixture(scope="module")
def results(reference):
    """Errors by mesh and mode; one launch per world size, when it is first asked for."""
    return cache(lambda world_size: run_ranks(world_size, "ranks_wan.py", reference))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("world_size, mesh_name", [(2, "tp2"), (2, "tp2-sp"), (4, "tp4"), (4, "tp4-sp")])
def test_equals_one_rank(results, world_size, mesh_name, mode):
    errors = results(world_size)[f"{mesh_name}-{mode}"]
    assert len(errors) > 50
    wrong = {name: error for name, error in errors.items() if not error <= 1e-9}  # NaN is wrong
    assert not wrong, wrong
