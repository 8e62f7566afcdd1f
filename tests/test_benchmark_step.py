"""The benchmark of steps and passes, on CPUs: rows, phases, the check, the comparison with the public network."""

import importlib.util
import itertools
import json
import sys
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from launch import torchrun

from rcm_mcore.config import load_config, parse_config
from rcm_mcore.data import DataLoader
from rcm_mcore.distill.phases import Phase
from rcm_mcore.models import DiffusionTransformer
from rcm_mcore.training import benchmark, passes, timeline
from rcm_mcore.training.baseline import against_public, public_seconds
from rcm_mcore.training.passes import PASSES, gate
from rcm_mcore.training.setup import build_networks, choose_attention
from rcm_mcore.training.step import run_step
from rcm_mcore.training.timeline import Timeline

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
def test_bad_input(config, arguments, message, request):
    tool, capsys = request.getfixturevalue("tool"), request.getfixturevalue("capsys")
    request.getfixturevalue("monkeypatch").setenv("WORLD_SIZE", "2")
    assert tool.main([str(config), "train.global_batch_size=1", *arguments]) == 2
    assert f"error: {message}" in capsys.readouterr().err


def test_a_mesh_that_computes_something_else_is_an_error(tool):
    first = {"mesh": "one", "kinds": {"scm": {"loss": 1.0, "grad_norm": 2.0}}}
    tool.require_same({"mesh": "cp2", "kinds": {"scm": {"loss": 1.01, "grad_norm": 1.99}}}, first)
    with pytest.raises(RuntimeError, match="cp2: grad_norm of the first scm step is 1, of one 2"):
        tool.require_same({"mesh": "cp2", "kinds": {"scm": {"loss": 1.0, "grad_norm": 1.0}}}, first)


def timed_step(mesh, monkeypatch, tmp_path, **phase):
    """One step on a clock that ticks whenever it is looked at: phases count their spans, as these hold nothing else."""
    config = benchmark.write_samples(parse_config(tree(data={"readers": 2})), str(tmp_path))
    _, roles, trained = build_networks(config, mesh, starts={"teacher": partial(passes.random_weights, dtype=torch.float32)})
    steps = [("x", Phase(own_step=0, **phase))]
    learns = trained[steps[0][1].kind]
    ticks = itertools.count()
    monkeypatch.setattr(timeline, "moment", lambda **_: next(ticks))
    sample = dict(dp_rank=0, dp_size=1, seed=0, global_batch_size=2)
    transform = lambda batch: benchmark.with_phase(config, steps, batch)
    with DataLoader(config=config.data, model=config.model, transform=transform, **sample) as loader:
        item = next(loader)
    learns.wake()
    forward = DiffusionTransformer.forward
    with Timeline(roles, torch.device("cpu")) as watch:
        with watch.step():
            run_step(learns, item, roles=roles, config=config, mesh=mesh)
        run_step(learns, item, roles=roles, config=config, mesh=mesh)  # nobody watches
    assert DiffusionTransformer.forward is forward
    (times,) = watch.take()
    assert watch.take() == [] and times.seconds == 2 * sum(n for x, n in times.phases.items() if x != "rest") + 1
    return times


def test_spans_of_a_student_step(mesh, monkeypatch, tmp_path):
    times = timed_step(mesh, monkeypatch, tmp_path, kind="student", scm=True, dmd=True, rollout_steps=3)
    counts = {**dict.fromkeys(CONSISTENCY + DISTILLATION, 2), "rollout": 4, "gradients": 1, "optimizer": 3}
    assert {name: n for name, n in times.phases.items() if name != "rest"} == counts
    assert list(times.phases) == CONSISTENCY + DISTILLATION + EVERY
    assert times.busy == 3 * 2 + 4 + 4 * 2 and times.passes == 2 * times.busy - 1


@pytest.mark.parametrize(
    "phase, counts",
    [
        (dict(kind="critic", rollout_steps=1), {"rollout": 2, "forward": 2, "backward": 2, "gradients": 1, "optimizer": 2}),
        (
            dict(kind="student", dmd=True, rollout_steps=1),
            {**dict.fromkeys(DISTILLATION[1:], 2), "gradients": 1, "optimizer": 3},
        ),
    ],
    ids=["critic", "dmd"],
)
def test_spans_of_other_steps(mesh, monkeypatch, tmp_path, phase, counts):
    times = timed_step(mesh, monkeypatch, tmp_path, **phase)
    assert {name: n for name, n in times.phases.items() if name != "rest"} == counts


def test_a_gpu_is_waited_for_once(monkeypatch):
    """With events in the place of CUDA's."""
    clock, waited = itertools.count(0, 500), []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.milliseconds = next(clock)

        def synchronize(self):
            waited.append(self.milliseconds)

        def elapsed_time(self, end):
            assert waited == [1500], "CUDA raises for an event that is to come"
            return end.milliseconds - self.milliseconds

    monkeypatch.setattr(timeline.torch.cuda, "Event", Event)
    watch = Timeline(None, torch.device("cuda"))
    for _ in range(2):
        with watch.step():
            pass
    assert waited == [] and [times.seconds for times in watch.take()] == [0.5, 0.5] and waited == [1500]


def ranks_of_a_step():
    common = {"kind": "scm", "rollout": 0, "loss": 1.0, "grad_norm": 2.0, "warm": True, "flops": 1.0}
    slow = {"seconds": 4.0, "data": 0.5, "passes": 3.0, "busy": 3.0, "gib": 1.0, "phases": {"dual": 3.0, "rest": 1.0}}
    fast = {"seconds": 3.9, "data": 0.1, "passes": 2.0, "busy": 1.5, "gib": 2.0, "phases": {"dual": 1.5, "rest": 2.4}}
    return common | fast, common | slow


def test_a_step_is_that_of_the_slowest_rank():
    step = benchmark.over_ranks(ranks_of_a_step())
    assert (step["seconds"], step["data"], step["gib"]) == (4.0, 0.5, 2.0)
    assert step["phases"] == {"dual": 2.25, "rest": 1.75} and step["waits"] == 1 - 2.25 / 3


def test_a_kind_is_the_mean_of_its_steps_without_the_first():
    config = parse_config(tree())
    first, *steps = ({**benchmark.over_ranks(ranks_of_a_step()), "rollout": n} for n in (2, 1, 3, 1, 3))
    for seconds, step in zip((9.0, 1.0, 3.0, 2.0, 6.0), (first, *steps)):
        step |= {"seconds": seconds, "data": 0.3, "flops": 6e12 * step["rollout"]}
    row = {"ranks": 2, "matmul_tflops": [3.0, 5.0], "steps": [first, *steps]}
    found = benchmark.summary(config, row, "scm")
    assert (found["seconds"], found["least"], found["most"], found["first"], found["rollout"]) == (3.0, 1.0, 6.0, 9.0, 2)
    assert found["seconds_by_rollout"] == {1: 1.5, 3: 4.5} and found["data_share"] == pytest.approx(0.1)
    assert found["tflops_per_rank"] == pytest.approx(12 / 2 / 3) and found["mfu"] == pytest.approx(0.5)


def test_single_passes_have_their_flops(mesh):
    config = parse_config(tree())
    rows = [{"kind": kind, "rollout": 0, "seconds": 1.0, "gib": None} for kind in PASSES for _ in range(2)]
    rates = {}
    for kind in PASSES:
        rates[kind] = benchmark.summary(config, {"ranks": 1, "matmul_tflops": [1.0], "steps": rows}, kind)["tflops_per_rank"]
    forward, both, dual, dual_both = (rates[kind] for kind in PASSES)
    assert both == pytest.approx(3 * forward) and forward < dual < 3 * forward
    assert dual_both == pytest.approx(dual + 2 * forward)


@pytest.mark.parametrize("dtype, size", [("bfloat16", 5e-5), ("float32", 1e-8)])
def test_the_check_passes_in_every_dtype(mesh, dtype, size):
    config = parse_config(tree(model={"dtype": dtype, "recompute": "full", "num_layers": 3}))
    errors = gate(config, mesh)
    assert set(errors) == {"forward", "plain output", "dual output", "tangent", "gradients of plain", "gradients of dual"}
    assert all(size < x["error"] < 1000 * size and x["error"] <= 2 * x["plain"] for x in errors.values())


@pytest.mark.parametrize(
    "quantity, dtypes, change",
    [
        ("tangent", ("float64", "float32", "float32"), lambda tensors: tensors["0"].mul_(1.05)),
        ("gradients of dual", ("float32", "bfloat16", "bfloat16"), lambda tensors: tensors["head.head.bias"].mul_(0.9)),
        ("gradients of plain", ("float64", "float32", "float32"), lambda tensors: tensors["head.head.bias"].fill_(torch.nan)),
    ],
)
def test_the_check_fails(mesh, monkeypatch, quantity, dtypes, change):
    """The last of the three that are compared is what the run is configured as."""
    config, values, seen = parse_config(tree(model={"dtype": dtypes[2]})), passes._values, []

    def disturbed(*args):
        found = values(*args)
        seen.append(args[0].model.dtype)
        if len(seen) == 3:
            change(found[quantity])
        return found

    monkeypatch.setattr(passes, "_values", disturbed)
    with pytest.raises(RuntimeError, match=f"the check failed: {quantity} of 2 layers has .* nothing is reported"):
        gate(config, mesh)
    assert tuple(seen) == dtypes
    choose_attention(config)


@pytest.mark.parametrize(
    "size, kind, rollout, seconds",
    [
        ("14B", "scm", 0, 10.15),  # 10.2 in the design
        ("1.3B", "scm", 0, 13.35),  # 13.3
        ("14B", "critic", 2.5, 6.115),  # 6.1
        ("1.3B", "dual", 0, 5.40),
        ("14B", "student", 1, 10.15 + 4.81 + 3 * 0.51),
    ],
)
def test_the_public_network_by_arithmetic(size, kind, rollout, seconds):
    assert public_seconds(size, kind, rollout)[0] == pytest.approx(seconds)


def test_what_was_not_measured_has_no_baseline():
    assert public_seconds("1.3B", "critic", 2.5) is None
    wan = lambda *more: load_config(ROOT / "examples/wan_14b/config.yaml", ["train.global_batch_size=1", *more])
    against = lambda *more: against_public(wan(*more), "scm", 5.0, ranks=4)
    found = against()
    assert found["gpu_seconds"] == 20 and found["public_gpu_seconds"] == pytest.approx(81.2)
    assert found["times_faster"] == pytest.approx(4.06) and found["target_gpu_seconds"] == pytest.approx(27.2)
    assert found["arithmetic"] == "2 x 0.51 + 4.32 + 4.81 = 10.15 s on 8 GPUs = 81.2 GPU-s"
    assert against("train.global_batch_size=2")["gpu_seconds"] == 10
    assert against("model.num_layers=8") is against("data.latent_shape=[16,20,60,104]") is None
    assert against_public(wan("distill.method=dmd"), "student", 5.0, ranks=4) is None
