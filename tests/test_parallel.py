"""Networks under every kind of parallelism against one rank: outputs, tangents, every gradient, recompute modes."""

from functools import cache

import pytest
import ranks_networks_gpu
import torch
from launch import run_ranks
from oracle import INTERVALS, VARIANTS, diffusers_network, exact_diffusers, interval_weights, names_of_ours
from ranks_networks import GRIDS, LAYERS, MESHES, cases, run

from rcm_mcore.models import build_model
from rcm_mcore.models.common.parameters import load_full


@pytest.fixture(scope="module")
def reference(mesh, tmp_path_factory):
    """A folder with the weights of each variant and what one rank computes with them."""
    folder = tmp_path_factory.mktemp("networks")
    for variant, small in (VARIANTS | INTERVALS).items():
        model = small(num_layers=LAYERS)
        with exact_diffusers():
            weights = names_of_ours(model, diffusers_network(model).state_dict())
            weights |= interval_weights(model) if model.interval else {}
        net = build_model(model, mesh.config, mesh.groups)
        load_full(net, weights, mesh.tp_group)
        torch.save({k: v.clone() for k, v in weights.items()}, folder / f"{variant}_weights.pt")
        results = {t: dict(zip(("out", "tangent", "grads"), run(net, mesh, "none", grid))) for t, grid in GRIDS.items()}
        torch.save(results, folder / f"{variant}_reference.pt")
    return folder


@pytest.fixture(scope="module")
def results(reference):
    """Errors by variant, mesh and mode; one launch per world size, when it is first asked for."""
    return cache(lambda world_size: run_ranks(world_size, "ranks_networks.py", reference))


@pytest.mark.parametrize("world_size, case", [(n, " ".join(case)) for n in MESHES for case in cases(n)])
def test_equals_one_rank(results, world_size, case):
    errors = results(world_size)[case]
    assert len(errors) > 50
    wrong = {name: error for name, error in errors.items() if not error <= 1e-9}  # NaN is wrong
    assert not wrong, wrong


def on_gpus(world_size):
    """Every case of so many GPUs."""
    names = [" ".join(case) for case in ranks_networks_gpu.cases(world_size)]
    return [pytest.param(world_size, name, marks=getattr(pytest.mark, f"gpu{world_size}")) for name in names]


@pytest.mark.parametrize("world_size, name", [*on_gpus(2), *on_gpus(4), *on_gpus(8)])
def test_bfloat16_on_gpus_is_within_the_budget(gpu_results, world_size, name):
    """At most twice the error of one GPU against float64, for every tensor; some gradients are all rounding."""
    errors = gpu_results(world_size)[name]
    assert len(errors) > 50
    wrong = {n: pair for n, pair in errors.items() if not pair[0] <= 2 * pair[1] + 2e-3}
    assert not wrong, wrong


@pytest.fixture(scope="module")
def gpu_results(tmp_path_factory):
    """Errors (under the mesh, on one GPU) by case."""
    return cache(lambda world_size: run_ranks(world_size, "ranks_networks_gpu.py", tmp_path_factory.mktemp("gpus")))
