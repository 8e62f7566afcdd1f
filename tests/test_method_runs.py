"""Whole runs of the other methods: under each mesh against one rank, resumed, sampled, and in stages."""

import importlib.util
import json
from pathlib import Path

import launch
import pytest
import tiny
import torch

from rcm_mcore.config import parse_config
from rcm_mcore.sampling.request import SamplerConfig, check
from rcm_mcore.training.setup import check_starts

MEANFLOW = dict(model={**tiny.MODEL, "interval": True}, distill={"method": "meanflow", "instant_share": 0.5})
METHODS = {
    "dcm": dict(distill={"method": "dcm", "discrete_steps": 10}),
    "meanflow": MEANFLOW,
    # A step of time so long that the rounding which it divides stays below what the meshes may differ by.
    "difference": dict(distill={"method": "scm", "tangent": "finite_difference", "difference_step": 1e-2}),
}
MESHES = {"tp2": {"tp": 2, "sp": True}, "dp2": {}, "pp2": {"pp": 2}}
CASES = ["dcm-dp2", "dcm-pp2", "meanflow-tp2", "meanflow-pp2", "difference-pp2"]
FRAMES = dict(model={**tiny.MODEL, **tiny.VARIANTS["frames"]}, data={"given_frames": [0, 1]})


def config(folder, **sections):
    """Three student steps, a checkpoint after each."""
    tree = tiny.config(
        folder / "shards", "", "distill", checkpoint={"every": 1, "keep_last": 9}, data=sections.get("data", {}),
        distill={"teacher": str(folder / "teacher"), "guidance": 2.0, "student_every": 2, **sections.get("distill", {})},
        model=sections.get("model", {}), mesh=sections.get("mesh", {}),
        # Updates so small that rounding, which differences divide by a step of time, is not made more of.
        optim={"lr": 1e-3},
    )  # fmt: skip
    return tree


def further(folder, **pretrain):
    """Three more steps of pretraining, from the teacher."""
    return tiny.config(
        folder / "shards", "", checkpoint={"every": 1, "keep_last": 9}, train={"steps": 3}, optim={"lr": 1e-3},
        pretrain={"network": str(folder / "teacher"), **pretrain},
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory, same_rounding):
    """Teachers, runs of each method, resumptions, and a chain of stages; `NAME_start`: the weights that a stage begins with."""
    folder = tmp_path_factory.mktemp("methods")
    tiny.make_shards(folder / "shards")
    pretraining = dict(train={"steps": 12}, optim={"eps": 1e-8, "lr": 1e-3})
    stage = lambda method, student, **model: config(
        folder, distill={"method": method, "student": str(folder / student), "rollout_max_steps": 2}, model=model
    )
    trees = {
        "teacher": tiny.config(folder / "shards", "", **pretraining),
        "teacher_frames": tiny.config(folder / "shards", "", **pretraining, **FRAMES),
        **{name: config(folder, **sections) for name, sections in METHODS.items()},
        "frames": config(
            folder, **FRAMES, distill={"method": "dcm", "discrete_steps": 2, "teacher": str(folder / "teacher_frames")}
        ),
        "second": stage("scm", "dcm"),
        "third": stage("rcm", "second"),
        "further": further(folder),
    }

    def write(name, tree):
        tree["checkpoint"] = {**tree["checkpoint"], "dir": str(folder / name)}
        return str(tiny.write_config(folder / f"{name}.yaml", tree))

    def resumed(name, step):
        return [["cut", str(folder / name), str(folder / f"{name}_again"), step], ["run", write(f"{name}_again", trees[name])]]

    start = lambda name: ["rewrite", write(f"{name}_unborn", trees[name]), str(folder / f"{name}_start")]
    plan = [["run", write(name, tree)] for name, tree in trees.items() if name not in ("second", "third")]
    plan += [*resumed("meanflow", 2), start("second"), ["run", write("second", trees["second"])], *resumed("second", 1)]
    plan += [start("third"), start("further"), *resumed("further", 1)]
    (folder / "plan.json").write_text(json.dumps(plan))
    launch.run_ranks(1, "ranks_resume.py", folder)
    return folder


@pytest.fixture(scope="module")
def meshes(runs):
    """The runs of two ranks, in the same folder."""
    split = [(name, *name.split("-")) for name in CASES]
    tiny.train_all(runs, {(2, name): config(runs, **METHODS[method], mesh=MESHES[mesh]) for name, method, mesh in split})
    return runs


@pytest.mark.parametrize("name", METHODS)
def test_every_step_is_a_student_step(runs, name):
    lines = tiny.log_lines(runs / name)
    assert [line["phase"] for line in lines] == ["student"] * 3
    for line in lines:
        assert line["loss"] == pytest.approx(100 * line["loss_scm"]) and line["loss_dmd"] is line["loss_critic"] is None
        assert line["g_norm"] > 0 and line["teacher_gap"] > 0 and line["grad_norm"] > 0
        assert line["nonfinite_output"] == line["nonfinite_target"] == 0 and line["tflops_per_rank"] > 0
    tensors = tiny.all_tensors(runs / name / "step_000000003")
    assert not any("fake_score" in key for key in tensors)
    moved = tiny.differences(runs / name / "step_000000001", runs / name / "step_000000003")
    weights = {key: value for key, value in moved.items() if key.startswith("student.")}
    assert {key for key, value in weights.items() if not value > 0} == set()
    assert any("interval_embedding" in key for key in weights) == (name == "meanflow")


@pytest.mark.parametrize("name", CASES)
def test_meshes_equal_one_rank(meshes, name):
    one = meshes / name.split("-")[0]
    for ours, theirs in zip(tiny.log_lines(meshes / name), tiny.log_lines(one), strict=True):
        for key in ("loss", "loss_scm", "g_norm", "teacher_gap", "grad_norm"):
            assert abs(ours[key] - theirs[key]) <= 2e-4 * abs(theirs[key]), (ours["step"], key)
    for step in (1, 3):
        # After its first step the second moment of a network is (1 - beta2) g^2: the gradient, element by element.
        found = tiny.differences(meshes / name / f"step_{step:09d}", one / f"step_{step:09d}")
        assert {k: v for k, v in found.items() if not v <= (1e-3 if "exp_avg_sq" in k else 2e-5)} == {}


@pytest.mark.parametrize("name", ["meanflow", "second", "further"])
def test_resumed_is_bit_equal(runs, name):
    """A stage too: its checkpoint counts, not the network that it began with."""
    assert tiny.metrics(runs / f"{name}_again") == tiny.metrics(runs / name)
    found = tiny.differences(runs / f"{name}_again" / "step_000000003", runs / name / "step_000000003")
    assert set(found.values()) == {0.0}


def test_given_frames_down_to_the_data(runs):
    """Two steps of the grid: half of the samples have their target at the data."""
    lines = tiny.log_lines(runs / "frames")
    assert len(lines) == 3 and all(line["nonfinite_target"] == 0 and line["loss"] > 0 for line in lines)


# Stages.


def network(checkpoint, prefix):
    """The weights of one network by their own names."""
    tensors = tiny.all_tensors(checkpoint)
    return {key.removeprefix(prefix): tensors[key].float() for key in tensors if key.startswith(prefix)}


@pytest.mark.parametrize("stage, before", [("second", "dcm"), ("third", "second")])
def test_a_stage_begins_with_the_student_of_another(runs, stage, before):
    """With its EMA; the fake score, where there is one, begins as the teacher."""
    (start,) = (runs / f"{stage}_start").glob("step_*")
    found, want = network(start, "student."), network(runs / before / "step_000000003", "ema.student.")
    assert found.keys() == want.keys() and all(torch.equal(found[key], want[key]) for key in want)
    teacher = network(runs / "teacher" / "step_000000012", "student.")
    assert any(not torch.equal(found[key], teacher[key]) for key in want)
    fake = network(start, "fake_score.")
    assert len(fake) == (len(teacher) if stage == "third" else 0)
    assert all(torch.equal(fake[key], teacher[key]) for key in fake)


def test_pretraining_begins_with_another_network(runs):
    """With its EMA, and an EMA of its own from there."""
    (start,) = (runs / "further_start").glob("step_*")
    want = network(runs / "teacher" / "step_000000012", "ema.student.")
    for prefix in ("student.", "ema.student."):
        found = network(start, prefix)
        assert found.keys() == want.keys() and all(torch.equal(found[key], want[key]) for key in want)
    first, last = (tiny.log_lines(runs / name)[0]["loss"] for name in ("teacher", "further"))
    assert last < first  # it goes on where the teacher was, at the same samples and noise


def test_the_other_network_of_a_stage_can_be_asked_for(runs):
    ema, student = (network(runs / "dcm" / "step_000000003", prefix) for prefix in ("ema.student.", "student."))
    assert any(not torch.equal(ema[key], student[key]) for key in ema)
    tree = config(runs, distill={"method": "scm", "student": str(runs / "dcm"), "student_weights": "student"})
    check_starts(parse_config(tree))


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"distill": {"student": "nowhere"}}, r"distill\.student=nowhere, distill\.student_weights=ema: .*no checkpoint"),
        ({"distill": {"student": "{}/frames"}}, r"distill\.student=.*/frames has model\.family=cosmos, this run has wan"),
        ({"distill": {"student": "{}/meanflow"}}, r"distill\.student=.*/meanflow has model\.interval=True, this run has False"),
        ({"distill": {"teacher": "{}/meanflow"}}, r"distill\.teacher=.*/meanflow has model\.interval=True, this run has False"),
        (
            {**MEANFLOW, "distill": {"method": "meanflow", "student": "{}/dcm"}},
            r"distill\.student=.*/dcm has model\.interval=False, this run has True",
        ),
        ({"distill": {"student": "{}/dcm", "student_weights": "fake"}}, r"distill\.student_weights='?fake"),
    ],
)  # fmt: skip
def test_students_that_do_not_fit_are_refused(runs, changes, says):
    distill = {key: value.replace("{}", str(runs)) for key, value in changes["distill"].items()}
    with pytest.raises(ValueError, match=says):
        check_starts(parse_config(config(runs, **{**changes, "distill": distill})))


@pytest.mark.parametrize(
    "pretrain, model, says",
    [
        ({"network": "nowhere"}, {}, r"pretrain\.network=nowhere, pretrain\.network_weights=ema: .*no checkpoint"),
        ({}, {"num_layers": 3}, r"pretrain\.network=.*/teacher has model\.num_layers=2, this run has 3"),
        ({"network_weights": "fake_score"}, {}, r"pretrain\.network_weights='fake_score': must be one of "),
    ],
)
def test_networks_that_do_not_fit_are_refused(runs, pretrain, model, says):
    tree = further(runs, **pretrain)
    with pytest.raises(ValueError, match=says):
        check_starts(parse_config(tree | {"model": {**tree["model"], **model}}))


# What is made of the checkpoints.


@pytest.mark.parametrize(
    "name, how, says",
    [
        ("meanflow", {"sampler": "few_step"}, r"--sampler few_step: the network is a student of .*meanflow; .* is mean_flow$"),
        ("meanflow", {"sampler": "euler"}, r"--sampler euler: the network is a student of"),
        ("dcm", {"sampler": "mean_flow"}, r"--sampler mean_flow: the network is not a student of .* few_step, euler or unipc$"),
        ("meanflow", {"sampler": "mean_flow", "guidance": 2.0}, r"--guidance 2\.0: a distilled student is sampled without"),
    ],
)
def test_samplers_that_do_not_fit_are_refused(runs, name, how, says):
    request = dict(checkpoint=str(runs / name), text_encoder="", latent_shape=tuple(tiny.LATENT), steps=2)
    with pytest.raises(ValueError, match=says):
        check(SamplerConfig(**request, **how), 1)
    right = {"meanflow": "mean_flow", "dcm": "few_step"}[name]
    assert check(SamplerConfig(**request, sampler=right), 1).interval == (name == "meanflow")


@pytest.mark.parametrize("name", ["meanflow", "dcm"])
def test_what_a_hub_cannot_hold_is_not_exported(runs, name, capsys, tmp_path):
    path = Path(__file__).parent.parent / "tools" / "convert_checkpoint.py"
    spec = importlib.util.spec_from_file_location("convert_checkpoint", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    code = tool.main(["--from", "mcore", "--to", "diffusers", "--which", "ema", str(runs / name), str(tmp_path / "out")])
    out, err = capsys.readouterr()
    if name == "dcm":
        assert code == 0 and (tmp_path / "out").is_dir()
    else:
        assert code != 0 and "model.interval=true: no other format" in out + err and list(tmp_path.iterdir()) == []
