"""The benchmark of steps, on CPUs."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import tiny
from launch import torchrun

TOOL = Path(__file__).parent.parent / "tools" / "benchmark_step.py"


@pytest.fixture
def config(tmp_path):
    train = {"global_batch_size": 2, "micro_batch_size": 1}
    return tiny.write_config(
        tmp_path / "config.yaml",
        tiny.config("none", "", "distill", train=train, distill={"teacher": "x"}, model=tiny.VARIANTS["first_last"]),
    )


def test_every_mesh_has_a_row(config, tmp_path):
    torchrun(2, TOOL, config, "optim.lr=1e-3", "--meshes", "pp2", "cp2", "--out", tmp_path)
    rows = {row["mesh"]: row for row in json.loads((tmp_path / "step.json").read_text())}
    assert list(rows) == ["pp2", "cp2"]
    assert all(row["student"] > 0 and row["critic"] > 0 and 0 < row["waits"] < 1 for row in rows.values())
    assert rows["pp2"]["flushed"] == pytest.approx(1 / 3) and rows["cp2"]["flushed"] == 0
    assert (tmp_path / "step.md").read_text().count("\n| ") == 3


@pytest.mark.parametrize(
    "meshes, message",
    [
        (["pp2", "xp2"], "--meshes xp2: xp2 is none of tpN"),
        (["tp4"], "mesh.tp=4"),
        (["pp2-vpp2"], "mesh.vpp=2 with mesh.pp=2 makes 4 chunks"),
        (["cp1"], "train.global_batch_size=1 must be a multiple of the data-parallel size 2"),
    ],
)
def test_bad_meshes(config, meshes, message):
    done = torchrun(2, TOOL, config, "train.global_batch_size=1", "--meshes", *meshes, check=False)
    assert done.returncode and f"error: {message}" in done.stderr


def test_a_mesh_that_computes_something_else_is_an_error(monkeypatch):
    spec = importlib.util.spec_from_file_location("benchmark_step", TOOL)
    tool = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "benchmark_step", tool)  # dataclasses look for their module
    spec.loader.exec_module(tool)
    first = {"mesh": "one", "loss": 1.0, "grad_norm": 2.0}
    tool.require_same({"mesh": "cp2", "loss": 1.01, "grad_norm": 1.99}, first)
    with pytest.raises(RuntimeError, match="cp2: grad_norm of the first step is 1, of one 2"):
        tool.require_same({"mesh": "cp2", "loss": 1.0, "grad_norm": 1.0}, first)
