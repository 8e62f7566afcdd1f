"""The measurement of what float8 forwards change, on a CPU."""

import importlib.util
import json
from pathlib import Path

import pytest
import tiny
import torch

TOOL = Path(__file__).parent.parent / "tools" / "benchmark_fp8.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("benchmark_fp8", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def config(tmp_path):
    tree = tiny.config(tmp_path / "shards", "", "distill", distill={"teacher": "x", "guidance": 2.0})
    return tiny.write_config(tmp_path / "config.yaml", tree)


def test_every_tensor_and_loss_has_a_row(tool, config, tmp_path):
    tiny.make_shards(tmp_path / "shards")
    assert tool.main([str(config), "--data", "--batches", "2", "--out", str(tmp_path)]) == 0
    rows = {row.pop("what"): row for row in json.loads((tmp_path / "fp8.json").read_text())["table"]}
    steps = {f"{of}, {term}" for of in ("gradient", "loss") for term in ("scm", "dmd", "critic")}
    assert rows.keys() == {"teacher's velocity", "tangent g", "rollout", "score gap"} | steps
    # Tensors are rounded in all of them, and float8 more.
    for name in rows.keys() - {f"loss, {term}" for term in ("scm", "dmd", "critic")}:
        assert 1e-4 < rows[name]["bf16"] < 1 and 1e-4 < rows[name]["fp8 to bf16"] < 1, (name, rows[name])
    assert rows["teacher's velocity"]["fp8"] > rows["teacher's velocity"]["bf16"]
    assert {name for name, row in rows.items() if row["another batch"] is not None} == steps
    assert rows["gradient, critic"]["another batch"] > 0.3


def test_distances(tool):
    """Of one row of two batches: (3, 4) in float32, where bf16 adds 1 and fp8 subtracts 1."""
    of = lambda change: [{"loss, scm": torch.tensor([x + change])} for x in (3.0, 4.0)]
    (row,) = tool.distances({"float32": of(0), "bf16": of(1), "fp8": of(-1)})
    rms = lambda *values: pytest.approx((sum(v * v for v in values) / len(values)) ** 0.5)
    assert row["bf16"] == row["fp8"] == rms(1 / 3, 1 / 4)
    assert row["fp8 to bf16"] == rms(2 / 4, 2 / 5) and row["another batch"] == rms(1 / 5, 1 / 4)


@pytest.mark.parametrize("change", [0.0, 0.5, float("nan")])
def test_no_report_where_float8_did_nothing_or_too_much(tool, change):
    tool.require_plausible([{"what": "teacher's velocity", "fp8 to bf16": 0.02}])
    with pytest.raises(RuntimeError, match="change the teacher's velocity by"):
        tool.require_plausible([{"what": "teacher's velocity", "fp8 to bf16": change}])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--batches", "0"], "--batches 0"),
        (["model.condition=first_last"], "model.condition=first_last: this tool"),
        (["model.ffn_hidden_size=72"], "multiples of 16"),
        (["--student", "nowhere"], "nowhere"),
    ],
)
def test_bad_input(tool, config, capsys, arguments, message):
    assert tool.main([str(config), *arguments]) == 2
    assert message in capsys.readouterr().err
