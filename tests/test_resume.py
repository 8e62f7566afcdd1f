"""Interrupted and resumed = unbroken: losses, weights, masters, second moments, EMA, order of the samples, log."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import launch
import pytest
import tiny
import torch

from rcm_mcore.distill.ema import ema_beta
from rcm_mcore.training.log import KEYS

MESHES = {"one": {}, "tp2": {"tp": 2, "sp": True}, "dp2": {}, "cp2": {"cp": 2}, "pp2": {"pp": 2}}
CHANGES = [
    *((source, "one") for source in ("tp2", "dp2", "cp2", "pp2")),
    *(("one", mesh) for mesh in ("tp2", "dp2", "cp2", "pp2")),
    ("tp2", "pp2"),
    ("pp2", "dp2"),
]  # a run's mesh, and that of its continuation
TOO_FEW = 0 < torch.cuda.device_count() < 4  # GPUs, where ranks are on GPUs


@pytest.fixture(scope="module")
def runs(tmp_path_factory, same_rounding):
    """Unbroken runs under each mesh, and runs cut after step 3 and resumed under the same or another mesh."""
    folder = tmp_path_factory.mktemp("resume")
    tiny.make_shards(folder / "shards")

    def config(name, mesh, **changes):
        tree = tiny.config(
            folder / "shards", folder / name, "distill", mesh=MESHES[mesh], checkpoint={"every": 3, "keep_last": 9},
            train={"steps": 6},
            distill={"teacher": str(folder / "teacher"), "student_every": 2, "guidance": 2.0, "rollout_max_steps": 2},
            # Rates that change with every step of a network: its own step count must be restored.
            optim={"warmup_steps": 2, "warmup_start_lr": 1e-3, "decay": "linear"},
        )  # fmt: skip
        for section, fields in changes.items():
            tree[section] = tree[section] | fields
        return str(tiny.write_config(folder / f"{name}.yaml", tree))

    def resumed(source, mesh):
        name = f"{source}_{mesh}"
        return [["cut", str(folder / source), str(folder / name), 3], ["run", config(name, mesh)]]

    def carry_out(world_size, plan):
        (folder / "plan.json").write_text(json.dumps(plan))
        return launch.run_ranks(world_size, "ranks_resume.py", folder)

    teacher = tiny.config(
        folder / "shards", folder / "teacher", checkpoint={"every": 3, "keep_last": 9}, train={"steps": 12},
        optim={"eps": 1e-8, "lr": 1e-3},
    )  # fmt: skip
    teacher = str(tiny.write_config(folder / "teacher.yaml", teacher))
    carry_out(1, [["run", teacher], ["run", config("one", "one", checkpoint={"every": 1})], *resumed("one", "one")])
    every_step = {"checkpoint": {"every": 1}}
    survive = {name: {"on_nonfinite": name, "max_skips": 1, "max_rollbacks": 2} for name in ("skip", "rollback")}
    errors, *rest = carry_out(
        2,
        [
            ["unwritable", config("unwritable", "tp2", checkpoint={"every": 2}), 1],
            ["poisoned", config("poisoned_critic", "pp2", checkpoint={"every": 1}), 1, "eps_d"],
            ["poisoned", config("poisoned_student", "pp2", checkpoint={"every": 1}), 2, "rollout_noise"],
            ["poisoned", config("poisoned_one_rank", "dp2", checkpoint={"every": 1}), 1, "eps_d", 1],
            ["poisoned", config("skipped", "dp2", train=survive["skip"], **every_step), 4, "eps_g", 1],
            ["poisoned", config("skipped_pp2", "pp2", train=survive["skip"], **every_step), 4, "eps_g"],
            ["poisoned", config("skipped_twice", "dp2", train=survive["skip"], **every_step), 4, "eps_d", 1, True],
            ["poisoned", config("rolled_back", "dp2", train=survive["rollback"]), 4, "eps_g", 1],
            ["poisoned", config("rolled_back_in_vain", "dp2", train=survive["rollback"]), 4, "eps_g", 1, True],
            ["poisoned", config("nowhere_to_go", "dp2", train=survive["rollback"]), 2, "eps_g", 1],
            ["cut", str(folder / "rolled_back"), str(folder / "by_hand"), 3],
            ["pass_over", str(folder / "by_hand"), str(folder / "skipped" / "step_000000005")],
            ["run", config("by_hand", "dp2")],
            *(["run", config(mesh, mesh)] for mesh in MESHES if mesh != "one"),
            *(step for mesh in MESHES if mesh != "one" for step in resumed(mesh, mesh)),
            *(step for source, mesh in CHANGES if mesh != "one" for step in resumed(source, mesh)),
            ["cut", str(folder / "one"), str(folder / "again"), 3],
            ["rewrite", config("again", "tp2"), str(folder / "rewritten")],
            ["cut", str(folder / "one"), str(folder / "staged"), 3],
            ["rewrite", config("staged", "pp2"), str(folder / "rewritten_pp2")],
        ],
    )
    if not TOO_FEW:
        carry_out(4, [["run", config("pp2_dp2", "pp2")]])
    (folder / "poisoned.json").write_text(json.dumps(rest[:3]))
    (folder / "survived.json").write_text(json.dumps([first for first, second in rest[3:9] if first == second]))
    carry_out(1, [step for source, mesh in CHANGES if mesh == "one" for step in resumed(source, mesh)])
    (folder / "errors.json").write_text(json.dumps(errors))
    return folder


def state(checkpoint):
    return json.loads((checkpoint / "state.json").read_text())


def test_each_step_changes_its_own_network_and_the_student_alone_has_an_ema(runs):
    """Student and critic take turns; the other network, its optimizer state and, in critic steps, the EMA keep still."""
    before = tiny.all_tensors(runs / "one" / "step_000000001")
    for step in range(2, 7):
        after = tiny.all_tensors(runs / "one" / f"step_{step:09d}")
        trained = "student" if step % 2 else "fake_score"
        changed = {key for key in after if not torch.equal(after[key], before[key])}
        assert changed == {key for key in after if f"{trained}." in key}
        beta = ema_beta(0.05, (step + 1) // 2)  # of the student's own steps
        for key, ema in before.items():
            if key.startswith("ema.") and step % 2:
                weights = after[key.replace("ema.", "optimizer.state.param.", 1)]
                want = beta * ema.double() + (1 - beta) * weights.double()
                assert float((after[key] - want).norm()) <= 1e-6 * float((ema - weights).norm()) + 1e-7 * float(want.norm())
        before = after


@pytest.mark.parametrize("mesh", MESHES)
def test_resumed_on_the_same_mesh_is_bit_equal(runs, mesh):
    unbroken, resumed = runs / mesh, runs / f"{mesh}_{mesh}"
    assert tiny.metrics(resumed) == tiny.metrics(unbroken)
    found = tiny.differences(resumed / "step_000000006", unbroken / "step_000000006")
    assert {key: value for key, value in found.items() if value != 0.0} == {}
    for kind in ("student.", "fake_score.", "ema.student.", "optimizer.state.param.", "optimizer.state.exp_avg_sq."):
        assert any(key.startswith(kind) for key in found)
    # The three steps changed every tensor, so equality says something.
    moved = tiny.differences(unbroken / "step_000000003", unbroken / "step_000000006")
    assert {key: value for key, value in moved.items() if not value > 1e-9} == {}


@pytest.mark.parametrize("source, mesh", CHANGES)
def test_resumed_on_another_mesh_equals_to_rounding(runs, source, mesh):
    unbroken, resumed = runs / source, runs / f"{source}_{mesh}"
    for ours, theirs in zip(tiny.metrics(resumed), tiny.metrics(unbroken), strict=True):
        for key, value in theirs.items():
            if isinstance(value, float):
                assert abs(ours[key] - value) <= 2e-6 * abs(value), (ours["step"], key)
            else:
                assert ours[key] == value
    found = tiny.differences(resumed / "step_000000006", unbroken / "step_000000006")
    limit = {key: 1e-5 if "exp_avg_sq" in key else 2e-6 for key in found}
    assert {key: value for key, value in found.items() if not value <= limit[key]} == {}


@pytest.mark.parametrize("name", [*(f"{mesh}_{mesh}" for mesh in MESHES), *map("_".join, CHANGES)])
def test_resumed_reads_the_same_samples_and_logs_each_step_once(runs, name):
    unbroken, resumed = (state(runs / run / "step_000000006") for run in ("one", name))
    assert resumed == unbroken
    assert unbroken["own_steps"] == {"student": 3, "fake_score": 3} and unbroken["data"]["samples"] == 24
    lines = tiny.log_lines(runs / name)
    assert all(tuple(line) == KEYS for line in lines)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["phase"] for line in lines] == ["student", "critic"] * 3
    assert all(line["loss"] > 0 for line in lines)  # the lines of the steps that were lost are gone
    assert (runs / name / "latest").read_text() == "step_000000006"


def test_saved_positions_are_of_the_samples_consumed(runs):
    """Of 12 samples after three steps, whatever was read ahead."""
    data = state(runs / "one" / "step_000000003")["data"]
    assert data["samples"] == 12
    assert data["readers"] == {str(reader): [0, 0, 3, 0] for reader in range(4)}


def test_a_checkpoint_survives_another_mesh_bit_for_bit(runs):
    """Loaded by one rank's file at tp2 and written from there: the same tensors, the same exported bytes."""
    here, there = runs / "one" / "step_000000003", runs / "rewritten" / "step_000000003"
    for other in (there, runs / "rewritten_pp2" / "step_000000003"):
        assert set(tiny.differences(other, here).values()) == {0.0}
        assert state(other) == state(here)
    spec = importlib.util.spec_from_file_location("convert", Path(__file__).parent.parent / "tools" / "convert_checkpoint.py")
    convert = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(convert)
    exported = []
    for source in (runs / "one" / "step_000000003", runs / "rewritten"):  # a checkpoint, and a run's newest
        target = runs / f"exported_{len(exported)}"
        assert convert.main(["--from", "mcore", "--to", "diffusers", "--which", "ema", str(source), str(target)]) == 0
        exported.append({path.name: path.read_bytes() for path in sorted(target.iterdir())})
    assert exported[0] == exported[1] and len(exported[0]) == 3


@pytest.mark.skipif(TOO_FEW, reason="needs 4 GPUs")
def test_data_parallel_stages_save_what_one_rank_does(runs):
    """Embedders are held by every stage, among parameters that are not."""
    found = tiny.differences(runs / "pp2_dp2" / "step_000000006", runs / "one" / "step_000000006")
    limit = {key: 1e-5 if "exp_avg_sq" in key else 2e-6 for key in found}
    assert {key: value for key, value in found.items() if not value <= limit[key]} == {}
    assert state(runs / "pp2_dp2" / "step_000000006") == state(runs / "one" / "step_000000006")


def test_every_rank_learns_that_one_rank_could_not_write(runs):
    first, second = json.loads((runs / "errors.json").read_text())
    assert first == second and "\n" not in first
    assert "the checkpoint of step 4 could not be written" in first and "there is no earlier checkpoint): rank 1: " in first
    assert sorted(path.name for path in (runs / "unwritable").iterdir()) == [".lock", "events.jsonl", "log.jsonl"]
    failed = [event for event in tiny.events(runs / "unwritable") if event["event"] == "save_failed"]
    assert [event["saved_step"] for event in failed] == [2, 4]  # one is forgiven
    assert all("rank 1: OSError: [Errno 27] File too large" in event["error"] for event in failed)


def test_a_run_stops_on_every_rank_before_weights_are_touched(runs):
    """Stages in a critic step, and in a student step, whose samples are made before the pass that has a graph; and
    data-parallel ranks of which one alone has no sample left.
    """
    names = ("critic", "student", "one_rank")
    for (first, second), step, name in zip(json.loads((runs / "poisoned.json").read_text()), (1, 2, 1), names, strict=True):
        assert first == second and f"step {step}: " in first and "are not finite" in first
        assert "train.max_nonfinite_share" in first
        saved = sorted(path.name for path in (runs / f"poisoned_{name}").glob("step_*"))
        assert saved[-1] == f"step_{step:09d}"  # the last before the error


@pytest.mark.parametrize("name", ["skipped", "skipped_pp2"])
def test_a_step_that_is_not_finite_can_be_skipped(runs, name):
    """Its update is left out, everything else goes on as it was."""
    before, after = (runs / name / f"step_{step:09d}" for step in (4, 5))
    assert set(tiny.differences(after, before).values()) == {0.0}
    assert state(before)["own_steps"] == state(after)["own_steps"] == {"student": 2, "fake_score": 2}
    assert state(after)["data"]["samples"] == 20
    lines = tiny.log_lines(runs / name)
    assert [line["skipped"] for line in lines] == [0, 0, 0, 0, 1, 0]
    assert (lines[4]["phase"], lines[4]["grad_norm"]) == ("student", None) and lines[4]["nonfinite_output"] > 0
    assert state(runs / name / "step_000000006")["own_steps"] == {"student": 2, "fake_score": 3}
    assert max(tiny.differences(runs / name / "step_000000006", after).values()) > 0
    assert [e["step"] for e in tiny.events(runs / name) if e["event"] == "skipped"] == [4]


def test_a_run_rolls_back_and_takes_another_way(runs):
    """As if the run had been resumed from its checkpoint by hand, past the samples since, with other noise."""
    assert tiny.metrics(runs / "rolled_back") == tiny.metrics(runs / "by_hand")
    ours, theirs = (runs / name / "step_000000006" for name in ("rolled_back", "by_hand"))
    assert set(tiny.differences(ours, theirs).values()) == {0.0}
    assert state(ours) == state(theirs)
    assert (state(ours)["rollbacks"], state(ours)["data"]["samples"]) == (1, 32)  # four steps, two of them in vain, and three
    (event,) = [e for e in tiny.events(runs / "rolled_back") if e["event"] == "rolled_back"]
    assert (event["step"], event["failed_after"]) == (3, 4) and "are not finite" in event["error"]
    undisturbed = tiny.metrics(runs / "dp2")
    assert tiny.metrics(runs / "rolled_back")[:3] == undisturbed[:3] and tiny.metrics(runs / "rolled_back")[3] != undisturbed[3]


def test_what_does_not_recover_stops(runs):
    skipped, staged, twice, back, in_vain, nowhere = json.loads((runs / "survived.json").read_text())
    assert (skipped, staged, back) == (None, None, None)
    assert "step 5: " in twice and twice.endswith("train.max_skips=1 steps before it were skipped")
    assert "step 4: " in in_vain and in_vain.endswith("the run was rolled back to step 3 train.max_rollbacks=2 times")
    assert "step 2: " in nowhere and "there is no checkpoint to roll back to" in nowhere


def kill_after_step_4(command, folder):
    """Start a run and kill it past its checkpoint of step 3; whether that was before its end (a busy machine may miss it)."""
    log, output = folder / "log.jsonl", folder.with_suffix(".txt")
    with output.open("w") as stream:
        run = subprocess.Popen(command, env=launch.environment(), stdout=stream, stderr=stream, start_new_session=True)
        while not (log.exists() and log.read_text().count("\n") >= 4 and (folder / "step_000000003").is_dir()):
            assert run.poll() is None, output.read_text()
            time.sleep(0.002)
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    return not (folder / "step_000000012").exists()


def test_killed_in_mid_run_and_started_again_equals_unbroken(runs):
    killed = runs / "killed"
    command = [sys.executable, "-m", "rcm_mcore.train", str(runs / "teacher.yaml"), f"checkpoint.dir={killed}"]
    while not kill_after_step_4(command, killed):
        shutil.rmtree(killed)
    assert (killed / "step_000000003").is_dir()
    left = killed / ".partial_step_000000009"  # as a kill in the middle of a save leaves it
    left.mkdir(exist_ok=True)
    (left / "__0_0.distcp").write_bytes(b"half")

    subprocess.run(command, env=launch.environment(), check=True, capture_output=True, text=True)
    assert tiny.metrics(killed) == tiny.metrics(runs / "teacher")
    found = tiny.differences(killed / "step_000000012", runs / "teacher" / "step_000000012")
    assert set(found.values()) == {0.0}
    assert state(killed / "step_000000012") == state(runs / "teacher" / "step_000000012")
    assert sorted(path.name for path in killed.iterdir()) == sorted(path.name for path in (runs / "teacher").iterdir())
