"""The benchmark of steps and passes, on CPUs: rows, phases, the check, the comparison with the public network."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import tiny
import torch
from launch import torchrun

from rcm_mcore.training.passes import PASSES

ROOT = Path(__file__).parent.parent
TOOL = ROOT / "tools" / "benchmark_step.py"
CONSISTENCY = ["teacher", "dual", "dual backward"]
DISTILLATION = ["rollout", "rollout with graph", "fake score", "teacher at rollout", "rollout backward"]
CRITIC = ["rollout", "forward", "backward"]
EVERY = ["gradients", "optimizer", "rest"]


def tree(**sections):
    train = {"global_batch_size": 2, "micro_batch_size": 1}
    return tiny.config("none", "", "distill", train=train, distill={"teacher": "x"}, **sections)


@pytest.fixture
def config(tmp_path):
    return tiny.write_config(tmp_path / "config.yaml", tree(model=tiny.VARIANTS["first_last"]))


@pytest.fixture
def tool(monkeypatch):
    spec = importlib.util.spec_from_file_location("benchmark_step", TOOL)
    tool = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "benchmark_step", tool)
    spec.loader.exec_module(tool)
    return tool


def test_every_mesh_has_a_row(config, tmp_path):
    options = ["--meshes", "pp2", "cp2", "--rollouts", "1", "2", "--repeats", "1"]
    torchrun(2, TOOL, config, "optim.lr=1e-3", *options, "--out", tmp_path)
    whole = json.loads((tmp_path / "step.json").read_text())
    rows = {row["mesh"]: row for row in whole["rows"]}
    assert list(rows) == ["pp2", "cp2"] and whole["environment"]["versions"]["torch"] == torch.__version__
    for row in rows.values():
        kinds = row["kinds"]
        assert {kind: list(found["phases"]) for kind, found in kinds.items()} == {
            "scm": CONSISTENCY + EVERY, "student": CONSISTENCY + DISTILLATION + EVERY, "critic": CRITIC + EVERY,
        }  # fmt: skip
        for found in kinds.values():
            assert sum(found["phases"].values()) == pytest.approx(found["seconds"]) and min(found["phases"].values()) >= 0
            assert found["mfu"] > 0 and 0 <= found["data_share"] < 1 and 0 < found["waits"] < 1
        assert len(row["steps"]) == 3 + 1 + 2 + 2 and sum(step["warm"] for step in row["steps"]) == 5
        assert row["cycle"]["critic_steps"] == 4
        seconds = [kinds[kind]["seconds"] for kind in ("student", "critic")]
        assert row["cycle"]["seconds"] == pytest.approx(seconds[0] + 4 * seconds[1])
    assert rows["pp2"]["flushed"] == pytest.approx(1 / 3) and rows["cp2"]["flushed"] == 0
    text = (tmp_path / "step.md").read_text()
    assert text.count("\n| pp2 scm |") == 2 and "benchmark_step.py" in text


def test_single_passes(config, tmp_path):
    torchrun(2, TOOL, config, "--meshes", "tp2-sp", "pp2", "--single", "--repeats", "2", "--out", tmp_path)
    for row in json.loads((tmp_path / "step.json").read_text())["rows"]:
        assert list(row["kinds"]) == list(PASSES) and len(row["steps"]) == 3 * len(PASSES)
        assert all(0 < found["least"] <= found["seconds"] <= found["most"] for found in row["kinds"].values())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--meshes", "pp2", "xp2"], "--meshes xp2: xp2 is none of tpN"),
        (["--meshes", "tp4"], "mesh.tp=4"),
        (["--meshes", "pp2-vpp2"], "mesh.vpp=2 with mesh.pp=2 makes 4 chunks"),
        (["--meshes", "cp1"], "train.global_batch_size=1 must be a multiple of the data-parallel size 2"),
        (["--meshes", "tp2", "--kinds", "scm", "critics"], "--kinds critics: distill.method=rcm has scm, student, critic"),
        (["distill.method=scm", "--meshes", "tp2", "--kinds", "critic"], "--kinds critic: distill.method=scm has scm"),
        (["--meshes", "tp2", "--rollouts", "0"], "--rollouts 0 --repeats 2: must be at least 1"),
        (["train.objective=pretrain", "--meshes", "tp2"], "train.objective=pretrain"),
    ],
)
def test_bad_input(tool, config, arguments, message, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert tool.main([str(config), "train.global_batch_size=1", *arguments]) == 2
    assert f"error: {message}" in capsys.readouterr().err


def test_a_mesh_that_computes_something_else_is_an_error(tool):
    first = {"mesh": "one", "kinds": {"scm": {"loss": 1.0, "grad_norm": 2.0}}}
    tool.require_same({"mesh": "cp2", "kinds": {"scm": {"loss": 1.01, "grad_norm": 1.99}}}, first)
    with pytest.raises(RuntimeError, match="cp2: grad_norm of the first scm step is 1, of one 2"):
        tool.require_same({"mesh": "cp2", "kinds": {"scm": {"loss": 1.0, "grad_norm": 1.0}}}, first)
