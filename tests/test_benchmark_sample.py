"""The benchmark of sampling, on a CPU; its arithmetic against torch's count."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from launch import torchrun
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rcm_mcore.config import parse_model

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


def test_flops_are_those_that_torch_counts_in_diffusers_network(tool):
    torch.manual_seed(0)
    net = WanTransformer3DModel(
        num_attention_heads=6, attention_head_dim=32, in_channels=32, out_channels=32, text_dim=64, ffn_dim=768, num_layers=3
    )
    x, time, text = torch.randn(1, 32, 3, 4, 8), torch.tensor([500]), torch.randn(1, 7, 64)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        net(x, time, text)
    model = parse_model({"size": "tiny", "text_len": 7})
    assert tool.forward_flops(model, 24) == pytest.approx(counter.get_total_flops(), rel=1e-6)


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
