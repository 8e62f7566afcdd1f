"""What a run needs, against the design's figures for 14B, and the tool that lists meshes."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

from rcm_mcore.condition import Condition
from rcm_mcore.config import MeshConfig, load_config, parse_config
from rcm_mcore.dual import Dual
from rcm_mcore.models import build_model
from rcm_mcore.models.common import blocks
from rcm_mcore.models.common.attention import AttentionCache
from rcm_mcore.training.estimate import GIB, estimate, kept_of_a_layer, refuse_what_cannot_fit

ROOT = Path(__file__).resolve().parent.parent
WAN = ROOT / "examples/wan_1_3b/config.yaml"


@pytest.fixture(scope="module")
def suggest():
    spec = importlib.util.spec_from_file_location("suggest_mesh", ROOT / "tools" / "suggest_mesh.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.mark.parametrize(
    "mesh, gigabytes, rest",
    [
        (MeshConfig(cp=8), 179, 0),
        (MeshConfig(tp=2, sp=True, cp=4), 107, 0),
        (MeshConfig(cp=4, pp=2), 107, 0),
        (MeshConfig(tp=4, sp=True, cp=2), 71, 4),
        (MeshConfig(tp=8, sp=True), 54, 6),
    ],
)
def test_states_of_14b_are_those_of_the_design(mesh, gigabytes, rest):
    """stack.md 5: three bfloat16 networks, gradients of one, masters, second moments, EMA on eight GPUs.

    Its figures take the embedders to be split over tensor-parallel ranks, which they are not: `rest` gigabytes.
    """
    config = replace(load_config(WAN, ["model.size=14B"]), mesh=mesh)
    assert estimate(config, 8).states / 1e9 == pytest.approx(gigabytes + rest, rel=0.03)


def test_activations_follow_the_tokens_of_a_rank():
    config = load_config(WAN, [])
    on = lambda **mesh: estimate(replace(config, mesh=MeshConfig(**mesh)), 8)
    constant = 4 * 1536 * (7 * 1536 + 256)  # of a microbatch: the time embedder's weights in float32
    tokens_alone = lambda **mesh: on(**mesh).activations - constant
    assert tokens_alone(tp=4, sp=True) == pytest.approx(tokens_alone() / 4, rel=1e-3)
    assert tokens_alone() / 4 < tokens_alone(cp=4) < tokens_alone() / 2  # buffers of the ring
    assert on(pp=2).activations > on().activations  # two microbatches of half the layers, and messages
    assert on(pp=2).sent_pp > 0 == on().sent_pp and on(tp=2, sp=True).sent_tp > 0 == on().sent_tp
    assert on(cp=2).sent_cp > 0 == on().sent_cp


def test_what_cannot_fit_is_refused():
    config = replace(load_config(WAN, ["model.size=14B"]), mesh=MeshConfig(cp=8))
    with pytest.raises(ValueError, match=r"mesh.cp=8, mesh.pp=1 on 8 ranks needs 16\d.\d GiB .* has 140.0: raise mesh.tp or"):
        refuse_what_cannot_fit(config, 8, 140 * GIB)
    refuse_what_cannot_fit(replace(config, mesh=MeshConfig(tp=8)), 8, 140 * GIB)


def test_pretraining_has_one_network(tmp_path):
    one = estimate(parse_config(tiny.config("shards", tmp_path)), 1)
    assert one.weights == 4 * (one.layers + one.embedders) == one.gradients  # float32
    assert one.optimizer == 8 * (one.layers + one.embedders)  # second moments and EMA, no masters


def test_the_tool_lists_what_fits_first(suggest, capsys):
    assert suggest([str(WAN), "model.size=14B", "--gpus", "8", "--gpu-memory", "80"]) == 0
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    fits = [cells[9].strip() for cells in lines]
    assert "yes" in fits and "no" in fits and fits == sorted(fits, reverse=True)
    for cells in lines:
        tp, cp, pp, dp = (int(cell) for cell in cells[:4])
        assert tp * cp * pp * dp == 8 and (float(cells[8]) <= 80) == (cells[9].strip() == "yes")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--gpus", "0", "--gpu-memory", "80"], "--gpus 0"),
        (["--gpus", "7", "--gpu-memory", "80", "train.global_batch_size=3", "train.micro_batch_size=2"], "no mesh of 7 GPUs"),
        (["--gpus", "8", "--gpu-memory", "80", "mesh.pq=2"], "mesh.pq"),
    ],
)
def test_bad_input_of_the_tool(suggest, arguments, message, capsys):
    assert suggest([str(WAN), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and message in err


def bytes_kept(net, *arguments):
    """Storages that a pass with gradients leaves behind for backward, weights and arguments apart."""
    known = {t.untyped_storage()._cdata for t in [*net.parameters(), *arguments] if isinstance(t, torch.Tensor)}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage  # held, or another would have its address
        return tensor

    caches = []
    with pytest.MonkeyPatch.context() as patch, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        patch.setattr(blocks, "AttentionCache", lambda: caches.append(AttentionCache()) or caches[-1])
        result = net(*arguments)
        for cache in caches:
            for tensor in (cache.out, cache.lse):
                if tensor is not None:
                    keep(tensor)
    del result
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("method", ["scm", "dmd"])
def test_a_layer_keeps_what_is_estimated(mesh, tmp_path, method):
    """With tangents and without, under full recompute: what three layers keep beyond two."""
    found = {}
    for layers in (2, 3):
        tree = tiny.config(
            "shards",
            tmp_path,
            "distill",
            model={"num_layers": layers, "recompute": "full"},
            distill={"method": method, "teacher": "x"},
        )
        config = parse_config(tree)
        model = config.model
        net = build_model(model, mesh.config, mesh.groups)
        x = torch.randn(config.train.micro_batch_size, *config.data.latent_shape)
        s, condition = torch.rand(len(x)), Condition(torch.randn(len(x), model.text_len, model.text_dim))
        arguments = (Dual(x, torch.randn_like(x)), Dual(s, s), condition) if method == "scm" else (x, s, condition)
        found[layers] = bytes_kept(net, *arguments)
    assert found[3] - found[2] == kept_of_a_layer(config)
