"""`make demo` in seconds: every part of it end to end, with its kill and resume and its export, and again when it is done."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from launch import environment
from safetensors import safe_open

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "run"
    return out, rehearse(out)


def rehearse(out):
    command = [sys.executable, "tools/demo.py", "--quick", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_every_part_is_there(demo):
    out, printed = demo
    assert "killed every process on purpose" in printed and (out / "killed_rcm").exists()
    rows = json.loads((out / "report.json").read_text())
    assert len(rows) == 9 and all(row["Frechet"] > 0 for row in rows)
    assert [row["evaluations"] for row in rows] == [None, 100, 8, 4, 2, 4, 4, 2, 1]
    for name in ("report.md", "samples.png", "samples.gif", "curves.png", "export/config.json"):
        assert (out / name).stat().st_size > 100, name
    for path in (out / "samples").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.get_slice("latents").get_shape()[1:] == [32, 2, 4, 4]


def test_the_killed_run_logged_every_step_once(demo):
    out, _ = demo
    assert [line["step"] for line in tiny.log_lines(out / "student")] == list(range(1, 13))


def test_a_second_run_uses_what_is_there(demo):
    out, _ = demo
    files = [p for folder in ("data", "samples", "teacher", "export") for p in (out / folder).rglob("*")]
    before = {p: p.stat().st_mtime_ns for p in files if p.name not in ("events.jsonl", ".lock")}  # a run was there again
    printed = rehearse(out)
    assert "killed every process" not in printed
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_targets_are_judged():
    """The lines under the table tell a run that reached its targets from one that did not."""
    spec = importlib.util.spec_from_file_location("demo_tool", ROOT / "tools" / "demo.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    row = lambda frechet, adherence, seconds=1.0: {"Frechet": frechet, "adherence %": adherence, "s/video, batched": seconds}
    rows = {
        "real training videos": row(1.0, 100), "teacher, Euler 50": row(3.0, 97, 20.0), "teacher, Euler 2": row(20.0, 95),
        "rCM student, 4": row(4.0, 93), "rCM student, 2": row(5.0, 92),
    }  # fmt: skip
    assert all(line.startswith("- reached") for line in tool.targets(rows))
    rows["rCM student, 4"] = row(5.0, 91, 2.0)
    assert [line.startswith("- MISSED") for line in tool.targets(rows)] == [False, False, True, True, False, False, True]
