"""The benchmark of tangents in low precision, on a CPU."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launch import torchrun

from rcm_mcore.config import DistillConfig, ModelConfig
from rcm_mcore.distill import steps
from rcm_mcore.distill.losses import consistency_tangent
from rcm_mcore.distill.roles import conditioned
from rcm_mcore.distill.tangent_error import compare, cosine, differences, emulated, error, make_problem, run
from rcm_mcore.dual import Dual
from rcm_mcore.models import build_model
from rcm_mcore.models.wan.rounded import ALL_WIDE, BF16, WIDE, Formats, Roundings, rounded

TOOL = Path(__file__).parent.parent / "tools" / "benchmark_tangent.py"
FIELDS = dict(
    num_layers=3, hidden_size=48, num_attention_heads=2, ffn_hidden_size=64, in_channels=4, freq_dim=16, text_dim=8, text_len=5
)
LATENT = (4, 2, 6, 8)


@pytest.fixture
def tool(monkeypatch):
    spec = importlib.util.spec_from_file_location("benchmark_tangent", TOOL)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "benchmark_tangent", module)  # dataclasses look for their module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def build(mesh, tool):
    """Networks with the same random weights in any dtype."""

    def make(dtype, setting="mild", **fields):
        model = ModelConfig(size="tiny", **FIELDS | fields, dtype=dtype)
        net = build_model(model, mesh.config, mesh.groups, seed=None, trainable=False)
        tool.random_weights(net, tool.SETTINGS[setting])
        return net

    return make


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-12), ("float32", 1e-4)])
def test_blocks_that_do_not_round_are_those_of_the_network(build, dtype, tolerance):
    net = build(dtype)
    problem = make_problem(net, 0.8, LATENT)
    reference = run(net, problem)
    with emulated(net, ALL_WIDE):
        found = compare(run(net, problem), reference, problem)
    assert all(found[key] <= tolerance for key in ("F", "F_dot", "g")), found
    assert max(found["layers"] + found["layers_dot"]) <= tolerance
    assert len(found["layers"]) == 3 and compare(run(net, problem), reference, problem)["F"] == 0.0


def test_blocks_that_round_err_like_the_network_in_bfloat16(build):
    exact, net = build("float64"), build("float32")
    problem = make_problem(exact, 0.8, LATENT)
    reference = run(exact, problem)
    shipped = compare(run(build("bfloat16", fp32_residual=False), problem), reference, problem)
    with emulated(net, Roundings()):
        found = compare(run(net, problem), reference, problem)
    for key in ("F", "F_dot", "g"):
        assert 0.7 <= found[key] / shipped[key] <= 1.4, (key, found[key], shipped[key])
    for key in ("layers", "layers_dot"):
        assert all(0.6 <= a / b <= 1.6 for a, b in zip(found[key], shipped[key])), (key, found[key], shipped[key])


_ALONE = [Roundings(*[BF16 if i == n else WIDE for n in range(5)]) for i in range(5)] + [
    Roundings(*[WIDE] * 5, modulation="bf16"),
]


@pytest.mark.parametrize("roundings", _ALONE, ids=["residual", "operands", "products", "attention", "out", "modulation"])
def test_every_rounding_alone_costs_something_and_less_than_all(build, roundings):
    net = build("float32")
    problem = make_problem(net, 0.8, LATENT)
    reference = run(net, problem)
    errors = []
    for which in (roundings, Roundings(modulation="bf16")):
        with emulated(net, which):
            errors.append(compare(run(net, problem), reference, problem))
    alone, together = errors
    assert 1e-4 < alone["F_dot"] < together["F_dot"] and 1e-4 < alone["F"] < together["F"]


def test_blocks_that_round_in_modulation_err_more(build):
    """Every operation with shift, scale and gate rounds, not only these three."""
    net = build("float32")
    problem = make_problem(net, 0.8, LATENT)
    reference = run(net, problem)
    with emulated(net, replace(ALL_WIDE, modulation="bf16")):
        found = compare(run(net, problem), reference, problem)
    assert found["F"] > 2e-3


def test_the_network_is_itself_again_after_an_emulation(build):
    net = build("float32")
    blocks = list(net.blocks.values())
    with emulated(net, Roundings()):
        assert not any(block in blocks for block in net.blocks.values())
    assert list(net.blocks.values()) == blocks and list(net.blocks) == ["0", "1", "2"]


def test_rounding_a_tangent_leaves_the_primal(build):
    net = build("float32")
    problem = make_problem(net, 0.8, LATENT)
    reference = run(net, problem)
    with emulated(net, Roundings(*[Formats("wide", "bf16")] * 5)):
        found = compare(run(net, problem), reference, problem)
    assert found["F"] < 1e-5 and found["F_dot"] > 1e-3


def test_formats():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    one, two, all_ = (rounded(Dual(x, x), Formats("wide", fmt)).tangent for fmt in ("bf16", "split", "wide"))
    assert torch.equal(one, x.to(torch.bfloat16).float()) and torch.equal(all_, x)
    assert 1e-4 < error(one, x) < 3e-3 and 1e-7 < error(two, x) < 2**-16
    assert torch.equal(rounded(Dual(x, x), Formats("wide", "bf16")).primal, x)


def test_the_tangent_is_that_of_the_direction(build, monkeypatch):
    """Finite differences in float64 find it, with an error of the second order, and the best step is chosen."""
    monkeypatch.setattr("rcm_mcore.distill.tangent_error.STEPS", (1e-3, 1e-5, 1e-2))
    net = build("float64")
    problem = make_problem(net, 0.8, LATENT)
    found = differences(net, problem, run(net, problem))
    assert found["F_dot"] < 1e-5 and found["h"] == 1e-5 and found["F"] == 0.0
    assert list(found["by_step"]) == ["0.001", "1e-05", "0.01"] and found["by_step"]["1e-05"] == found["F_dot"]


def test_a_difference_has_the_step_of_training(build, monkeypatch):
    """`distill.difference_step`, in TrigFlow time: the errors are those of the differences that a consistency step takes."""
    monkeypatch.setattr("rcm_mcore.distill.tangent_error.STEPS", (0.03,))
    net = build("float64")
    problem = make_problem(net, 1.2, LATENT)
    reference = run(net, problem)
    x_t, t = problem.x_t, problem.t
    found = steps.central_difference(conditioned(net, problem.condition), x_t, t, problem.teacher, 0.03)
    expected = error((t.cos() * t.sin()).view(-1, 1, 1, 1, 1) * found, reference.out.tangent)
    assert differences(net, problem, reference)["F_dot"] == pytest.approx(float(expected), rel=1e-6) and expected > 1e-5


def test_point_direction_and_g_are_those_of_a_consistency_step(build, monkeypatch):
    net = build("float64")
    problem = make_problem(net, 0.8, LATENT)
    t, found = problem.t, []
    cos, sin = t.cos().view(-1, 1, 1, 1, 1), t.sin().view(-1, 1, 1, 1, 1)
    velocity = problem.teacher * (cos + sin) - (cos - sin) * problem.x_t
    monkeypatch.setattr(steps, "consistency_tangent", lambda *a, **k: found.append(consistency_tangent(*a, **k)) or found[0])
    roles = SimpleNamespace(
        teacher=lambda *_: velocity, student=net, negative=problem.condition.text, sample_group=SimpleNamespace(size=lambda: 1)
    )
    draws = SimpleNamespace(t_g=t, eps_g=problem.x_t / sin)
    batch = SimpleNamespace(latents=torch.zeros_like(problem.x_t), condition=problem.condition, draws=draws)
    distill = DistillConfig(teacher="unused", guidance=1.0)
    steps.consistency_step(batch, roles, SimpleNamespace(distill=distill), SimpleNamespace(warmup=1.0))
    assert error(run(net, problem).g(problem), found[0]) < 1e-12


def test_errors_are_relative_to_the_reference():
    x, y = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    assert error(x, y) == 1.25 and cosine(x, y) == 0.0 and cosine(2 * x, x) == pytest.approx(1.0)


def test_random_weights_are_the_same_in_every_dtype(build):
    nets = [dict(build(dtype, "harsh").named_parameters()) for dtype in ("float64", "float32", "bfloat16")]
    for name, exact in nets[0].items():
        assert all(torch.equal(exact, other[name].double()) for other in nets[1:]), name


def test_random_weights_have_the_traits_that_are_asked_for(build, tool):
    found = {}
    for setting, scaling in tool.SETTINGS.items():
        net = build("float32", setting, num_layers=8, hidden_size=96)
        problem = make_problem(net, 0.8, LATENT)
        with emulated(net, ALL_WIDE) as blocks:
            reference = run(net, problem)
        found[setting] = tool.describe(net, problem, reference, [block.logit_rms for block in blocks])
        assert all(0.7 * scaling.gate < gate < 1.4 * scaling.gate for gate in found[setting]["gates"])
        assert 0.6 * scaling.logits < found[setting]["logits"][0] < 1.5 * scaling.logits
    mild, harsh = found["mild"], found["harsh"]
    assert 2 < mild["stream"][-1] / mild["stream"][0] < 9 < harsh["stream"][-1] / harsh["stream"][0] < 100
    assert mild["time_speed"] < 6 < harsh["time_speed"] < 15
    assert max(mild["outlier"]) < 6 < 15 < max(harsh["outlier"])
    assert all(0.5 < w["F"] < 3 and 0.1 < w["F_dot_over_F"] < 10 for w in found.values())


def test_parts_of_the_tangent_add_up(build, tool):
    net = build("float64")
    problem = make_problem(net, 0.8, LATENT)
    reference = run(net, problem)
    w = tool.describe(net, problem, reference, [])
    assert w["cancellation"] == pytest.approx(w["x_part"] + w["t_part"]) and w["cancellation"] >= 1
    x, t = problem.duals
    by_x = run(net, problem, (x, Dual(t.primal, 0 * t.tangent))).out.tangent
    by_t = run(net, problem, (Dual(x.primal, 0 * x.tangent), t)).out.tangent
    whole = reference.out.tangent
    assert error(by_x + by_t, whole) < 1e-12
    assert w["x_part"] == pytest.approx(float(by_x.norm() / whole.norm())) and w["x_part"] != pytest.approx(1.0)
    assert w["t_part"] == pytest.approx(float(by_t.norm() / whole.norm()))


def test_an_emulation_of_something_else_is_an_error(build, mesh, tool, monkeypatch):
    model = ModelConfig(size="tiny", **FIELDS)
    nets = tool.Networks(model, mesh, lambda net: tool.random_weights(net, tool.SETTINGS["mild"]))
    monkeypatch.setattr(tool, "ALL_WIDE", Roundings())
    with pytest.raises(RuntimeError, match=r"rounded.py without rounding is not the network: relative error of F_dot \d"):
        tool.measure(nets, 0.8, LATENT, rows={}, progress=tool.tqdm(disable=True))


TINY = ["--model", "tiny", *(f"{k}={v}" for k, v in FIELDS.items()), "--latent", *map(str, LATENT), "--repeats", "1"]


def test_a_record(tmp_path):
    torchrun(1, TOOL, *TINY, "num_layers=2", "--times", "0.8", "--out", tmp_path)
    settings = json.loads((tmp_path / "tangent_tiny.json").read_text())["settings"]
    assert list(settings) == ["mild", "harsh"]
    for found in settings.values():
        assert [r["t"] for r in found["records"]] == [0.8]
        for record in found["records"]:
            rows = record["rows"]
            assert all(row["F_dot"] > 0 and row["g"] > 0 and row["cosine_g"] <= 1 + 1e-9 for row in rows.values())
            assert rows["emulated"]["F_dot"] < 0.03 < rows["finite differences"]["F_dot"]
            assert rows["finite differences, float32"]["F_dot"] < rows["finite differences"]["F_dot"]
            assert 0 < record["float32_against_float64"] < 1e-4
        assert len(found["seconds"]) == 3 and all(seconds > 0 for seconds in found["seconds"].values())
        rows = [record["rows"] for record in found["records"]]
        for name in ("shipped, fp32 residual", "residual fp32"):
            assert sum(row[name]["F"] for row in rows) < sum(row["shipped, bf16 residual"]["F"] for row in rows)
    text = (tmp_path / "tangent_tiny.md").read_text()
    assert text.count("\n| residual fp32 |") == 2 and text.count("\n## ") == 2 and text.count("\n| 0.003 | ") == 2
    assert (tmp_path / "tangent_tiny.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "more, message",
    [
        (["--times", "0", "1"], "--times [0.0, 1.0]: must be between 0 and pi/2"),
        (["num_layers"], "num_layers: must be a field of `model` and its value"),
        (["num_layer=3"], "model.num_layer"),
        (["family=cosmos"], "model.family=cosmos, model.condition=text: must be wan and text"),
        (["--latent", "4", "2", "5", "8"], "5"),
        (["--checkpoint", "/nowhere"], "/nowhere is no checkpoint of ours"),
    ],
)
def test_bad_input(tool, capsys, more, message):
    assert tool.main([*TINY, *more]) == 2
    assert message in capsys.readouterr().err
