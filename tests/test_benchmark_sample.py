"""The benchmark of sampling, on a CPU."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from launch import torchrun

TOOL = Path(__file__).parent.parent / "tools" / "benchmark_sample.py"


@pytest.fixture
def tool(monkeypatch):
    spec = importlib.util.spec_from_file_location("benchmark_sample", TOOL)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "benchmark_sample", module)  # dataclasses look for their module
    spec.loader.exec_module(module)
    return module


def test_a_record(tmp_path):
    tiny = ["--model", "tiny", "--size", "32x32", "--frames", "5", "--steps", "1", "2", "--teacher-steps", "2", "--videos", "2"]
    torchrun(1, TOOL, *tiny, "--out", tmp_path)
    record = json.loads((tmp_path / "sample_tiny.json").read_text())
    teacher, two, one = record["rows"]
    assert [row["what"] for row in record["rows"]] == ["teacher, 50x2", "student, 2", "student, 1"]
    assert [row["evaluations"] for row in record["rows"]] == [100, 2, 1] and teacher["measured_steps"] == 2
    assert teacher["speed_up"] == 1 and one["speed_up"] == pytest.approx(teacher["seconds"] / one["seconds"])
    assert two["total_s"] == two["seconds"] + record["vae"]["whole_s"] and 0 < record["error_of_two_layers"] < 0.03
    assert [row["steps"] for row in record["overlap"]] == [1, 2]
    text = (tmp_path / "sample_tiny.md").read_text()
    assert text.count("\n| ") == 6 and "2 measured, the time of 50 from them" in text
    assert (tmp_path / "sample_tiny.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "more, message",
    [
        (["--size", "480"], "--size 480: must be HxW in pixels"),
        (["--frames", "80"], r"frames=80: must be 4n + 1"),
        (["--teacher-steps", "0"], "--teacher-steps 0: must be from 1 to 50"),
        (["--steps", "9"], "steps=9: must be from 1 to 4"),
        (["--tp", "2"], "mesh.tp=2 does not divide the 1 ranks"),
    ],
)
def test_what_cannot_be_measured(tool, capsys, more, message):
    assert tool.main(["--model", "1.3B", *more]) == 2
    assert message in capsys.readouterr().err
