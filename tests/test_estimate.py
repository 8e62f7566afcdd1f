"""What a run needs, against the design's figures for 14B, and the tool that lists meshes."""

import importlib.util
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from torch.profiler import ProfilerActivity, profile

from rcm_mcore.condition import Condition
from rcm_mcore.config import MeshConfig, load_config, parse_config
from rcm_mcore.dual import Dual, compiled_rowwise
from rcm_mcore.models import build_model
from rcm_mcore.models.common import attention, blocks
from rcm_mcore.models.common.attention import AttentionCache
from rcm_mcore.parallel import ring
from rcm_mcore.training import setup
from rcm_mcore.training.estimate import GIB, RECOMPUTE, _Work, estimate, kept_of_a_layer, refuse_what_cannot_fit

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
    for mesh in (dict(tp=4, sp=True), dict(cp=4)):  # buffers of gathered rows, and of the ring
        assert tokens_alone() / 4 < tokens_alone(**mesh) < tokens_alone() / 2
    assert tokens_alone(cp=4, cp_mode="all_to_all") == pytest.approx(tokens_alone() / 4, rel=1e-3)
    assert on(pp=2).activations > on().activations  # two microbatches of half the layers, and messages
    assert on(pp=2).sent_pp > 0 == on().sent_pp and on(tp=2, sp=True).sent_tp > 0 == on().sent_tp
    assert on(cp=2).sent_cp > 0 == on().sent_cp


# Measured peaks in GiB: (configuration, overrides, mesh, ranks, GiB). A new benchmark_step row is one more line here.
_STEP, _EXAMPLES = (
    json.loads((ROOT / f"docs/benchmarks/{name}_h200_202611.json").read_text()) for name in ("step", "examples")
)
_WAN_14B = ["model.size=14B", "model.num_layers=8", "data.latent_shape=[16,21,60,104]", "train.global_batch_size=4"]
_BEFORE_FUSION = ["model.compile=false", "model.fp32_residual=false", "model.recompute=full"]
_STEP_MESHES = {
    "pp4": dict(pp=4),
    "cp2-pp2": dict(cp=2, pp=2),
    "tp2-sp-cp2": dict(tp=2, sp=True, cp=2),
    "cp4": dict(cp=4),
    "tp4-sp": dict(tp=4, sp=True),
    "pp4-vpp2": dict(pp=4, vpp=2),
}
_BATCH = lambda samples, micro: [f"train.global_batch_size={samples}", f"train.micro_batch_size={micro}"]
MEASURED = {row["mesh"]: ("wan_1_3b", _WAN_14B + _BEFORE_FUSION, _STEP_MESHES[row["mesh"]], 4, row["gib"]) for row in _STEP} | {
    name: (config, overrides + _BEFORE_FUSION, mesh, ranks, _EXAMPLES[name]["gib"])
    for name, config, overrides, mesh, ranks in (
        ("cosmos_0_6b", "cosmos_t2i_0_6b", _BATCH(8, 4), {}, 1),
        ("cosmos_2b", "cosmos_t2i_2b", _BATCH(4, 2), {}, 1),
        ("cosmos_14b", "cosmos_t2i_14b", _BATCH(4, 1), dict(tp=4, sp=True), 4),
        ("wan_1_3b", "wan_1_3b", _BATCH(2, 1), {}, 1),
        ("wan_i2v_4l", "wan_i2v_14b", [*_BATCH(2, 1), "model.num_layers=4"], {}, 1),
    )
}
_32760 = "data.latent_shape=[16,21,60,104]"
_BF16 = "model.fp32_residual=false"
for _file, _config, _overrides, _mesh, _ranks in (
    ("wan_1_3b", "wan_1_3b", [*_BATCH(1, 1), _32760, _BF16, "model.recompute=full"], {}, 1),
    ("wan_1_3b_fp32_residual", "wan_1_3b", [*_BATCH(1, 1), _32760], {}, 1),
    ("wan_14b", "wan_14b", [*_BATCH(1, 1), _BF16, "train.offload=[teacher,student,ema]"], dict(tp=2, sp=True), 2),
    ("cosmos_0_6b", "cosmos_t2i_0_6b", _BATCH(8, 4), {}, 1),
):
    _row = json.loads((ROOT / f"docs/benchmarks/{_file}_h200_202611.json").read_text())["rows"][0]
    MEASURED[f"{_file} fused"] = (_config, _overrides, _mesh, _ranks, max(kind["gib"] for kind in _row["kinds"].values()))


@pytest.mark.parametrize("name", MEASURED)
def test_measured_peaks_are_within_a_tenth(name):
    config, overrides, mesh, ranks, gib = MEASURED[name]
    found = replace(load_config(ROOT / "examples" / config / "config.yaml", overrides), mesh=MeshConfig(**mesh))
    assert estimate(found, ranks).total / GIB == pytest.approx(gib, rel=0.1)


def test_recompute_keeps_less_the_more_it_recomputes():
    config = load_config(WAN, [])
    kept = {}
    for recompute in RECOMPUTE:
        now = replace(config, model=replace(config.model, recompute=recompute))
        kept[recompute] = [kept_of_a_layer(now, dual=dual) for dual in (False, True)]
    (none, dual), (selective, _), (full, _) = (kept[recompute] for recompute in RECOMPUTE)
    assert none > 8 * selective and selective == dual and 1.5 * full < selective < 1.6 * full
    assert {two for _, two in kept.values()} == {dual}


def test_what_is_offloaded_is_the_hosts():
    on = lambda *names: estimate(
        load_config(WAN, ["model.size=14B", "mesh={tp: 8, sp: true}", f"train.offload={list(names)}"]), 8
    )
    plain = on()
    assert plain.host == 0
    for names, each in ((["ema"], 4), (["student"], 8), (["fake_score"], 8), (["student", "fake_score", "ema"], 20)):
        found = on(*names)
        assert found.host == each * (plain.layers + plain.embedders) == plain.optimizer - found.optimizer
        assert found.activations == plain.activations and found.weights == plain.weights
    found = on("teacher")
    assert found.host == 2 * plain.layers and plain.weights - found.weights == pytest.approx(
        2 * plain.layers * 38 / 40, rel=1e-6
    )


@pytest.mark.parametrize(
    "overrides, gib",
    [
        (["mesh.tp=8", "mesh.cp=1"], 63),
        (["mesh.tp=4", "mesh.cp=2", "train.offload=[ema]"], 71),
        (["train.offload=[teacher,student,fake_score,ema]"], 63),
    ],
)
def test_14b_fits_gpus_of_80_gb_as_its_readme_says(overrides, gib):
    found = estimate(load_config(ROOT / "examples/wan_14b/config.yaml", overrides), 8)
    assert round(found.total / GIB) == gib


def test_what_the_host_has_no_room_for_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "host_memory", lambda: 1000)
    tree = tiny.config("shards", tmp_path, train={"offload": ["ema"]}, checkpoint={"asynchronous": False})
    with pytest.raises(ValueError, match=r"train.offload=\['ema'\] keeps 0.0 GiB, .* of which 0.0 GiB are available"):
        setup.check_output(parse_config(tree), 1, 1)
    setup.check_output(parse_config(tree | {"train": tree["train"] | {"offload": []}}), 1, 1)


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
    fits = [cells[10].strip() for cells in lines]
    assert "yes" in fits and "no" in fits and fits == sorted(fits, reverse=True)
    for cells in lines:
        tp, cp, pp, dp = (int(cell) for cell in cells[:4])
        assert tp * cp * pp * dp == 8 and (float(cells[9]) <= 80) == (cells[10].strip() == "yes")


def test_the_tool_takes_the_cheapest_recompute_that_fits(suggest, capsys):
    taken = {}
    for gib in (16, 40, 139):
        assert suggest([str(WAN), "--gpus", "8", "--gpu-memory", str(gib)]) == 0
        rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
        taken[gib] = {tuple(cell.strip() for cell in cells[:4]): cells[4].strip() for cells in rows}
    config = load_config(WAN, [])
    for gib, found in taken.items():
        for (tp, cp, pp, _), recompute in found.items():
            mesh = MeshConfig(tp=int(tp), sp=tp != "1", cp=int(cp), pp=int(pp))
            needed = [
                estimate(replace(config, mesh=mesh, model=replace(config.model, recompute=r)), 8).total for r in RECOMPUTE
            ]
            fitting = [r for r, bytes_ in zip(RECOMPUTE, needed) if bytes_ <= gib * GIB]
            assert recompute == (fitting[0] if fitting else RECOMPUTE[needed.index(min(needed))])
    # Never full: where a pass with tangents keeps its attentions, a plain one that keeps them needs no more.
    assert {recompute for found in taken.values() for recompute in found.values()} == {"none", "selective"}


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
    assert found[3] - found[2] == kept_of_a_layer(config, dual=method == "scm")


@pytest.mark.parametrize("fields", [{"method": "dcm"}, {"method": "scm", "tangent": "finite_difference"}])
def test_methods_without_a_jvp_need_no_tangents(tmp_path, fields):
    def activations(**distill):
        distill = {"teacher": "x", **distill}
        tree = tiny.config("shards", tmp_path, "distill", distill=distill, model={"recompute": "full", "num_layers": 4})
        return estimate(parse_config(tree), 1).activations

    assert activations(**fields) == activations(method="dmd") < activations(method="scm")


@pytest.fixture
def attention_of_gpus(monkeypatch):
    """Attention that allocates what kernels on GPUs do and computes nothing: in plain PyTorch it would need more."""
    lse = lambda q: torch.ones(q.shape[0], q.shape[2], q.shape[1])
    plain = lambda q, k, v, **_: (torch.ones_like(q), lse(q))
    with_tangents = lambda q, *_, **__: (torch.ones_like(q), torch.ones_like(q), lse(q), lse(q))
    backward = lambda dout, q, k, v, *_, **__: tuple(torch.ones_like(x) for x in (q, k, v))
    for module in (attention, ring):
        monkeypatch.setattr(module, "flash_attention", plain)
        monkeypatch.setattr(module, "flash_attention_jvp", with_tangents)
    monkeypatch.setattr(ring, "flash_attention_backward", backward)


def allocated(passes):
    """Of each named pass in turn, the most bytes that are allocated in it, and those left at its end."""
    ends = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        for name, run in passes.items():
            run()
            ends.append((name, time.time_ns()))
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = sorted((e.start_ns(), i, e.nbytes()) for i, e in enumerate(events))
    found, total, start = {}, 0, 0
    for name, end in ends:
        most = total
        for _, _, change in (c for c in changes if start < c[0] <= end):
            total += change
            most = max(most, total)
        found[name], start = (most, total), end
    return found


def passes_of(net, config):
    x, s = torch.randn(1, *config.data.latent_shape), torch.rand(1)
    condition = Condition(torch.randn(1, config.model.text_len, config.model.text_dim))
    if config.model.condition == "frames":
        condition = condition._replace(latents=x.clone(), frames=torch.ones(1, dtype=torch.long))
    held = {}
    forward = torch.no_grad()(lambda: net(x, s, condition))
    forward()  # tables that are made once
    return {
        "forward": forward,
        "dual": torch.no_grad()(lambda: net(Dual(x, x), Dual(s, s), condition)),
        "dual graph": lambda: held.update(y=net(Dual(x, x), Dual(s, s), condition).primal),
        "backward": lambda: held.pop("y").sum().backward(),
        "graph": lambda: held.update(y=net(x, s, condition)),
    }


_COSMOS = {"family": "cosmos", "ffn_hidden_size": 1024, "adaln_rank": 8}


@pytest.mark.parametrize(
    "section",
    [
        {"family": "wan", "ffn_hidden_size": 691, "compile": False},
        {"family": "wan", "ffn_hidden_size": 1493, "compile": False, "fp32_residual": False},
        _COSMOS | {"compile": False},
        _COSMOS | {"compile": False, "condition": "frames"},
        {"family": "wan", "ffn_hidden_size": 1493},  # compiling takes long: one stands for all
    ],
    ids=["wan 14B", "wan 1.3B", "cosmos", "cosmos frames", "wan 1.3B compiled"],
)
def test_what_a_block_needs_is_what_a_pass_allocates(mesh, tmp_path, attention_of_gpus, section):
    """The widths of feed-forwards are those of the released networks; two and three layers tell a layer from the rest."""
    found, kept = {}, {}
    for layers in (2, 3):
        model = {"num_layers": layers, "hidden_size": 256, "num_attention_heads": 4, "dtype": "bfloat16", "in_channels": 2}
        tree = tiny.config("shards", tmp_path, "distill", model=model | section, distill={"teacher": "x"})
        tree["data"] |= {"latent_shape": [2, 2, 64, 64], "given_frames": [1]}
        tree["train"] |= {"micro_batch_size": 1}
        config = parse_config(tree)
        net = build_model(config.model, mesh.config, mesh.groups)
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        passes = passes_of(net, config)
        if config.model.compile:
            for module in net.modules():
                if hasattr(module, "rowwise"):
                    module.rowwise = compiled_rowwise()
            for name in (*passes, "backward"):  # once to compile; the last frees the last graph
                passes[name]()
        result = allocated(passes)
        unit = 2 * 32 * 32 * config.model.hidden_size
        found[layers] = {name: [count / unit for count in counts] for name, counts in result.items()}
        kept = kept_of_a_layer(config, dual=True) / unit
    work, two = _Work.of(config), found[2]
    assert work.forward == pytest.approx(two["forward"][0], rel=0.08)
    assert work.dual == pytest.approx(two["dual"][0], rel=0.08)
    assert work.backward == pytest.approx(two["backward"][0] - 2 * kept, rel=0.08)
    assert work.graph == pytest.approx(found[3]["graph"][1] - two["graph"][1], rel=0.08)
