"""The trainer's command line: bad input, dry runs, the log, and runs that cannot go on."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import launch
import pytest
import tiny
import torch
import yaml

from rcm_mcore.checkpoint import CheckpointFolder, write_network
from rcm_mcore.config import load_config, parse_config
from rcm_mcore.data import Sample, write_shards
from rcm_mcore.models import build_model
from rcm_mcore.train import main
from rcm_mcore.training.log import KEYS
from rcm_mcore.training.setup import check, pipeline_facts


class Runs:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def place(tmp_path_factory, mesh):
    """Shards, a teacher, files that cannot be used, and configurations that could run."""
    place = tmp_path_factory.mktemp("cli")
    tiny.make_shards(place / "shards")
    wide = [Sample(latent=torch.zeros(4, 2, 4, 6), embed=torch.ones(1, 8), prompt="wide") for _ in range(6)]
    write_shards(wide, place / "bad_shards", samples_per_shard=1)
    model = parse_config(tiny.config("s", "r")).model
    net = build_model(model, parse_config(tiny.config("s", "r")).mesh, mesh.groups)
    section = tiny.MODEL | {"patch_size": [1, 2, 2]}
    write_network(place / "teacher", {name: p.detach() for name, p in net.named_parameters()}, section)
    for name, change in (("deep", {"num_layers": 3}), ("rowless", {"text_len": 6}), ("odd", {})):
        write_network(place / name, {"a": torch.zeros(2)}, section | change)
    for name, content in (("hostile", Runs(place / "it ran")), ("pickled", {"a": [1, 2]})):
        (place / name).mkdir()
        (place / name / "config.yaml").write_text(yaml.safe_dump({"model": section}))
        (place / name / ".metadata").write_bytes(pickle.dumps(content))
    (place / "hostile.pt").write_bytes(pickle.dumps(Runs(place / "it ran")))
    torch.save(torch.zeros(5, 7), place / "narrow.pt")
    torch.save(torch.zeros(6, 8), place / "long.pt")
    torch.save(torch.full((5, 8), torch.nan), place / "nan.pt")
    torch.save({"embed": torch.zeros(5, 8)}, place / "dict.pt")
    (place / "junk.safetensors").write_bytes(b"\xff" * 40)
    (place / "a_file").write_text("")
    distill = {"teacher": str(place / "teacher"), "student_every": 2, "rollout_max_steps": 2}
    tiny.write_config(place / "pretrain.yaml", tiny.config(place / "shards", place / "run"))
    tiny.write_config(place / "distill.yaml", tiny.config(place / "shards", place / "run", "distill", distill=distill))
    (place / "broken.yaml").write_text("model: {size: [\ntrain: 3")
    (place / "list.yaml").write_text("- 1")
    return place


# name: (configuration, arguments, what the line must say); {} is the folder of the fixture.
BAD = {
    "no such file": ("nowhere", [], ["nowhere.yaml", "No such file"]),
    "broken YAML": ("broken", [], ["broken.yaml", "not valid YAML"]),
    "no mapping": ("list", [], ["list.yaml", "mapping"]),
    "unknown key": ("pretrain", ["optim.fake_score_rl=1"], ["optim.fake_score_rl", "did you mean optim.fake_score_lr?"]),
    "unknown section": ("pretrain", ["optimizer.lr=1"], ["optimizer", "did you mean optim?"]),
    "wrong type": ("pretrain", ["train.steps=many"], ["train.steps='many'", "whole number"]),
    "no override": ("pretrain", ["train.steps"], ["'train.steps'", "section.field=value"]),
    "no such shards": ("pretrain", ["data.shards=[{}/none_*.tar]"], ["data.shards", "none_*.tar", "matches no file"]),
    "few shards": ("pretrain", ["data.readers=64"], ["data.readers=64", "12 shards"]),
    "latent channels": ("pretrain", ["data.latent_shape=[5,2,4,4]"], ["data.latent_shape=[5, 2, 4, 4]", "model.in_channels=4"]),
    "micro batch": ("pretrain", ["train.micro_batch_size=3"], ["train.global_batch_size=4", "train.micro_batch_size=3"]),
    "batch over ranks": ("pretrain", ["--dry-run", "--world-size", "4"], ["train.global_batch_size=4", "data-parallel size 4"]),
    "readers over ranks": (
        "pretrain", ["train.global_batch_size=6", "--dry-run", "--world-size=3"], ["data.readers=4", "data-parallel size 3"]
    ),
    "heads": ("pretrain", ["mesh.tp=3", "--dry-run", "--world-size=3"], ["mesh.tp=3", "model.num_attention_heads=2", "[1, 2]"]),
    "ranks": ("pretrain", ["mesh.tp=2", "--world-size=3", "--dry-run"], ["mesh.tp=2", "3 ranks"]),
    "tp on one rank": ("pretrain", ["mesh.tp=2"], ["mesh.tp=2", "1 ranks"]),
    "cp over ranks": ("pretrain", ["mesh.cp=2", "--world-size=3", "--dry-run"], ["mesh.cp=2", "3 ranks", "[1, 3]"]),
    "cp over tokens": ("pretrain", ["mesh.cp=9", "--world-size=9", "--dry-run"], ["mesh.cp=9 exceeds the 8 tokens", "most 8"]),
    "stages over layers": ("pretrain", ["mesh.pp=3", "--world-size=3", "--dry-run"], ["mesh.pp=3", "model.num_layers=2"]),
    "chunks over layers": (
        "pretrain", ["mesh.pp=2", "mesh.vpp=2", "--world-size=2", "--dry-run"], ["mesh.vpp=2", "model.num_layers=2"]
    ),
    "sp without tp": ("pretrain", ["mesh.sp=true"], ["mesh.sp=true", "mesh.tp=1"]),
    "world size in earnest": ("pretrain", ["--world-size=2"], ["--world-size 2", "--dry-run"]),
    "no ranks": ("pretrain", ["--dry-run", "--world-size=0"], ["--world-size 0", "at least 1"]),
    "attention elsewhere": ("pretrain", ["attention.forward=hopper"], ["attention.forward=hopper", "Hopper GPU", "blockwise"]),
    "no such attention": ("pretrain", ["attention.jvp=cudnn"], ["attention.jvp", "cudnn", "hopper"]),
    "checkpoints in a file": ("pretrain", ["checkpoint.dir={}/a_file"], ["checkpoint.dir=", "a_file is a file"]),
    "no teacher": ("distill", ["distill.teacher="], ["distill.teacher"]),
    "teacher missing": ("distill", ["distill.teacher={}/nowhere"], ["distill.teacher=", "nowhere", "no checkpoint"]),
    "teacher deeper": ("distill", ["distill.teacher={}/deep"], ["distill.teacher=", "model.num_layers=3", "2"]),
    "teacher of other text": ("distill", ["distill.teacher={}/rowless"], ["distill.teacher=", "model.text_len=6", "5"]),
    "teacher pickled": ("distill", ["distill.teacher={}/pickled"], ["distill.teacher=", "pickled", "no index of a checkpoint"]),
    "teacher hostile": ("distill", ["distill.teacher={}/hostile"], ["distill.teacher=", "hostile", "no index of a checkpoint"]),
    "teacher weights": ("distill", ["distill.teacher_weights=ema"], ["distill.teacher_weights=ema", "it holds: student"]),
    "bad samples": (
        "pretrain", ["data.shards={}/bad_shards/*.tar", "data.max_bad_samples=3"], ["data.max_bad_samples=3", "[4, 2, 4, 6]"]
    ),
    "no good sample": ("pretrain", ["data.shards={}/bad_shards/*.tar"], ["data.shards", "holds a good sample"]),
}  # fmt: skip
EMBEDDINGS = {
    "nowhere.pt": "No such file",
    "narrow.pt": "[5, 7]",
    "long.pt": "6 rows, more than model.text_len=5",
    "nan.pt": "NaN",
    "dict.pt": "dict",
    "junk.safetensors": "cannot be read",
    "hostile.pt": "cannot be read",
}
for section, name in (("pretrain", "pretrain"), ("distill", "distill")):
    for file, says in EMBEDDINGS.items():
        BAD[f"{section} {file}"] = (name, [f"{section}.negative_embedding={{}}/{file}"], ["negative_embedding=", file, says])


def refused(capsys, place, argv, words):
    """Exit code 2, one line that says so, and nothing written."""
    before = sorted(place.rglob("*"))
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ")
    assert [word for word in words if word not in err] == [], err
    assert sorted(place.rglob("*")) == before and not (place / "run").exists()


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_line(place, name, capsys):
    config, arguments, words = BAD[name]
    refused(capsys, place, [str(place / f"{config}.yaml"), *(a.replace("{}", str(place)) for a in arguments)], words)
    assert not (place / "it ran").exists()


def test_too_little_disk_is_refused(place, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: asked.append(folder) or SimpleNamespace(free=500_000))
    refused(capsys, place, [str(place / "pretrain.yaml")], ["checkpoint.dir=", "/run", "0.0 GiB free"])
    assert asked == [place]  # the nearest folder there is
    # A checkpoint of 73,056 parameters: weights, masters and second moments of each network, and the EMA, 4 bytes each.
    for config, networks in (("pretrain", 1), ("distill", 2)):
        needed = 73_056 * 4 * (3 * networks + 1)
        for free, code in ((needed, 0), (needed - 1, 2)):
            monkeypatch.setattr(shutil, "disk_usage", lambda folder, free=free: SimpleNamespace(free=free))
            assert main([str(place / f"{config}.yaml"), "--dry-run"]) == code


def test_transformer_engine_is_refused_where_it_is_not(place, capsys, monkeypatch):
    import megatron.core.extensions.transformer_engine as te

    monkeypatch.setattr(te, "HAVE_TE", False)
    argv = [str(place / "pretrain.yaml"), "model.transformer_impl=transformer_engine"]
    refused(capsys, place, argv, ["model.transformer_impl=transformer_engine", "model.transformer_impl=local"])


def test_the_module_exits_with_2_and_one_line(place):
    command = [sys.executable, "-m", "rcm_mcore.train", str(place / "pretrain.yaml"), "optim.learning_rate=1"]
    done = subprocess.run(command, env=launch.environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unknown key optim.learning_rate") and done.stderr.count("\n") == 1


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("config", "section.field=value", "--dry-run", "--world-size", "torchrun"))


@pytest.mark.parametrize("config", ["pretrain", "distill"])
def test_dry_run_prints_the_run_and_writes_nothing(place, config, capsys):
    path, overrides = str(place / f"{config}.yaml"), ["optim.lr=3e-4", "mesh.tp=2", "mesh.sp=true"]
    before = sorted(place.rglob("*"))
    assert main([path, overrides[0], "--dry-run", "--world-size", "4", *overrides[1:]]) == 0
    out, err = capsys.readouterr()
    assert err == "" and sorted(place.rglob("*")) == before
    assert parse_config(yaml.safe_load(out)) == load_config(path, overrides)
    facts = yaml.safe_load("".join(line[2:] + "\n" for line in out.splitlines() if line.startswith("# ")))
    assert facts["pipeline"] == "one stage holds all layers"
    assert facts["data_parallel_size"] == 2 and facts["tokens_per_sample"] == 2 * 2 * 2
    assert facts["parameters"] == 73_056 and facts["first_prompt"].startswith("sample ")
    assert facts["free_gib"] > facts["checkpoint_gib"] > 0
    assert main([path, "--dry-run"]) == 0
    assert "# data_parallel_size: 1\n" in capsys.readouterr().out
    split = ["mesh.cp=2", "mesh.pp=2", "train.micro_batch_size=1"]
    assert main([path, *split, "--dry-run", "--world-size", "4"]) == 0
    facts = yaml.safe_load("".join(line[2:] + "\n" for line in capsys.readouterr().out.splitlines() if line.startswith("# ")))
    assert facts["data_parallel_size"] == 1 and facts["context_parallel"].startswith("ring (the ranks are within a node")
    assert facts["pipeline"] == "2 stages of 1, 1 layers; with 4 microbatches each waits 20% of a pass"


def test_chunks_of_layers_need_as_many_microbatches_as_stages():
    config = parse_config(
        tiny.config("s", "r", model={"num_layers": 4}, mesh={"pp": 2, "vpp": 2}, train={"micro_batch_size": 4})
    )
    with pytest.raises(ValueError, match=r"mesh.vpp=2 needs at least mesh.pp=2 microbatches, but a step has 1: .*mesh.vpp=1"):
        check(config, 2)
    assert pipeline_facts(config, 2).startswith("2 stages of 1+1, 1+1 layers; with 2 microbatches each waits 20% of a pass")


@pytest.fixture(scope="module")
def outcomes(place):
    """Command lines that get as far as training, in one process, one after another; their results by name."""
    latents = [torch.zeros(4, 2, 4, 4 if i % 3 == 0 else 6) for i in range(48)]
    mixed = [Sample(latent=latent, embed=torch.ones(1, 8), prompt="sample") for latent in latents]
    write_shards(mixed, place / "mixed_shards", samples_per_shard=3)  # the first of each is good
    runs, cases = place / "runs", {}

    def case(name, run, *arguments, config="pretrain", sabotage=None):
        argv = [
            str(place / f"{config}.yaml"),
            f"checkpoint.dir={runs / run}",
            "checkpoint.every=1",
            "checkpoint.keep_last=9",
            *arguments,
        ]
        cases[name] = {"argv": argv, "sabotage": sabotage}

    case("good", "good", "train.steps=2")
    case("other model", "good", "model.ffn_hidden_size=96")
    case("other objective", "good", config="distill")
    case("other networks", "scm", "distill.method=scm", "train.steps=1", config="distill")
    case("more networks", "scm", config="distill")
    case("no ema", "good", "optim.ema_length=null")
    case("odd teacher", "never", f"distill.teacher={place}/odd", config="distill")
    case("other shards", "good", f"data.shards={place}/mixed_shards/*.tar")
    case("done already", "good", "train.steps=2")
    case("full disk", "full", sabotage="full disk")
    case("space again", "full")
    case("bad samples", "bad", f"data.shards={place}/mixed_shards/*.tar", "data.max_bad_samples=0")
    case("more patience", "bad", f"data.shards={place}/mixed_shards/*.tar", "data.max_bad_samples=50", "train.steps=2")
    case("nan weight", "nan", sabotage="nan weight")
    case("nan sample", "share", sabotage="nan sample")
    case("below the share", "below", "train.max_nonfinite_share=0.24", sabotage="nan sample")
    case("at the share", "at", "train.max_nonfinite_share=0.25", sabotage="nan sample")
    case("signal", "signal", "checkpoint.every=9", sabotage="signal")
    case("signal again", "signal", "checkpoint.every=9")
    case("signal under torchrun", "signal_torchrun", sabotage="signal under torchrun")
    case("no time left", "late", "checkpoint.every=9", sabotage="no time left")
    case("no time", "late", sabotage="no time")
    case("wandb", "wandb", "train.steps=1", "log.wandb=true")
    case("wandb again", "wandb", "train.steps=2", "log.wandb=true")

    (place / "cases.json").write_text(json.dumps(list(cases.values())))
    homes = {f"WANDB_{kind}_DIR": str(place / "wandb" / kind.lower()) for kind in ("CONFIG", "CACHE", "DATA")}
    env = launch.environment(WANDB_MODE="offline", WANDB_SILENT="true", **homes)
    command = [sys.executable, launch.HERE / "runs_cli.py", place]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-8000:]
    return dict(zip(cases, json.loads((place / "results.json").read_text()), strict=True))


def error_line(outcome):
    """The one line that tells why the run ended; the progress bar shares its stream."""
    assert "Traceback" not in outcome["err"]
    (line,) = [line for line in outcome["err"].replace("\r", "\n").splitlines() if "error: " in line]
    return line


def run_folder(place, name):
    return place / "runs" / name


def newest(place, name, mesh):
    return CheckpointFolder(run_folder(place, name)).newest()


@pytest.mark.parametrize(
    "name, words",
    {
        "other model": ["checkpoint.dir=", "/runs/good", "model.ffn_hidden_size is 64 there and 96 here"],
        "other objective": ["checkpoint.dir=", "/runs/good", "train.objective=pretrain", "distill"],
        "more networks": ["checkpoint.dir=", "/runs/scm", "['student']", "['fake_score', 'student']"],
        "no ema": ["checkpoint.dir=", "/runs/good", "optim.ema_length"],
        "other shards": ["data.shards", "differ"],
    }.items(),
)
def test_a_run_of_another_kind_is_not_resumed(outcomes, place, mesh, name, words):
    assert outcomes[name]["code"] == 2
    line = error_line(outcomes[name])
    assert [word for word in words if word not in line] == [], line
    assert [line["step"] for line in tiny.log_lines(run_folder(place, "good"))] == [1, 2]
    assert newest(place, "good", mesh) == run_folder(place, "good") / "step_000000002"
    assert sorted(path.name for path in run_folder(place, "good").iterdir()) == [
        ".lock", "events.jsonl", "latest", "log.jsonl", "step_000000001", "step_000000002",
    ]  # fmt: skip


def test_a_run_that_cannot_start_leaves_no_folder(outcomes, place):
    """The teacher's configuration fits, its tensors do not: known only when it is loaded."""
    assert outcomes["odd teacher"]["code"] == 2
    line = error_line(outcomes["odd teacher"])
    assert "/odd does not fit the network" in line and "unknown ['a']" in line
    assert not run_folder(place, "never").exists()


def test_a_finished_run_has_nothing_to_do(outcomes, place):
    assert outcomes["good"]["code"] == outcomes["done already"]["code"] == 0
    assert [line["step"] for line in tiny.log_lines(run_folder(place, "good"))] == [1, 2]
    stored = load_config(run_folder(place, "good") / "step_000000002" / "config.yaml")
    assert parse_config(yaml.safe_load(outcomes["good"]["out"])) == stored
    assert stored.checkpoint.dir == str(run_folder(place, "good"))


def test_log_lines_have_the_documented_keys(outcomes, place):
    lines = tiny.log_lines(run_folder(place, "good")) + tiny.log_lines(run_folder(place, "scm"))
    assert len(lines) == 3 and all(tuple(line) == KEYS for line in lines)
    documented = sys.modules["rcm_mcore.training.log"].__doc__
    assert all(f"\n    {key} " in documented for key in KEYS)
    assert [line["phase"] for line in lines] == ["pretrain", "pretrain", "student"]
    assert all(isinstance(line[k], float) for line in lines for k in ("loss", "grad_norm", "lr", "seconds", "bad_samples"))
    assert lines[0]["loss_scm"] is None and lines[2]["loss_scm"] is not None
    for line in lines:
        parts = [line[key] for key in ("data_seconds", "forward_backward_seconds")]
        assert all(part > 0 for part in parts) and sum(parts) < line["seconds"]
        assert line["tokens_per_second"] == pytest.approx(4 * 8 / line["seconds"]) and line["tflops_per_rank"] > 0
    assert [line["save_seconds"] is None for line in lines] == [True, False, True]
    told = [json.loads(text) for text in (run_folder(place, "good") / "events.jsonl").read_text().splitlines()]
    assert [event["saved_step"] for event in told if event["event"] == "saved"] == [1, 2]
    assert lines[1]["save_seconds"] >= next(event["stalled_seconds"] for event in told if event["event"] == "saved")
    assert [line["optimizer_seconds"] is None for line in lines] == [True, False, True]  # of the network's step before


def test_a_save_that_fails_leaves_a_run_to_resume(outcomes, place, mesh):
    assert outcomes["full disk"]["code"] == 1
    line = error_line(outcomes["full disk"])
    assert "the checkpoint of step 3 could not be written" in line and "the checkpoint of step 1 is untouched" in line
    kinds = [(e["event"], e["saved_step"]) for e in tiny.events(run_folder(place, "full")) if "saved_step" in e]
    assert kinds[:3] == [("saved", 1), ("save_failed", 2), ("save_failed", 3)]  # one is forgiven
    assert outcomes["space again"]["code"] == 0
    assert [line["step"] for line in tiny.log_lines(run_folder(place, "full"))] == [1, 2, 3]
    assert newest(place, "full", mesh).name == "step_000000003"
    unbroken = run_folder(place, "good") / "step_000000002"
    found = tiny.differences(run_folder(place, "full") / "step_000000002", unbroken)
    assert {key: value for key, value in found.items() if not value <= 1e-5} == {}


def test_too_many_bad_samples_end_the_run(outcomes, place, mesh):
    assert outcomes["bad samples"]["code"] == 2
    assert "data.max_bad_samples=0" in error_line(outcomes["bad samples"])
    assert outcomes["more patience"]["code"] == 0
    lines = tiny.log_lines(run_folder(place, "bad"))
    assert [line["bad_samples"] for line in lines] == [0, 8]
    state = json.loads((newest(place, "bad", mesh) / "state.json").read_text())
    assert state["step"] == 2 and state["data"]["bad_samples"] == 8


def test_a_nan_weight_stops_the_run(outcomes, place, mesh):
    assert outcomes["nan weight"]["code"] == 1
    line = error_line(outcomes["nan weight"])
    assert "100% of the samples are not finite (4 outputs, 0 targets)" in line
    assert "train.max_nonfinite_share=0.1" in line
    last = newest(place, "nan", mesh)
    assert last.name == "step_000000001"
    assert all(bool(tensor.isfinite().all()) for tensor in tiny.all_tensors(last).values())


@pytest.mark.parametrize("name, run", [("nan sample", "share"), ("below the share", "below")])
def test_more_nonfinite_samples_than_allowed_stop_the_run(outcomes, place, mesh, name, run):
    assert outcomes[name]["code"] == 1
    share = {"share": 0.1, "below": 0.24}[run]
    words = f"25% of the samples are not finite (1 outputs, 0 targets), above train.max_nonfinite_share={share}"
    assert words in error_line(outcomes[name])
    assert newest(place, run, mesh).name == "step_000000001"


def test_as_many_nonfinite_samples_as_allowed_are_counted_and_left_out(outcomes, place, mesh):
    assert outcomes["at the share"]["code"] == 0
    lines = tiny.log_lines(run_folder(place, "at"))
    assert [line["nonfinite_output"] for line in lines] == [0, 1, 0]
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 for line in lines)
    last = newest(place, "at", mesh)
    assert last.name == "step_000000003"
    assert all(bool(tensor.isfinite().all()) for tensor in tiny.all_tensors(last).values())


def test_a_run_that_was_asked_to_stop_exits_with_75(outcomes, place, mesh):
    """Under torchrun, which starts again what exits with anything but 0, with 0."""
    assert [outcomes[name]["code"] for name in ("signal", "signal again", "signal under torchrun")] == [75, 0, 0]
    assert "error: " not in outcomes["signal"]["err"]
    names = [sorted(path.name for path in run_folder(place, name).glob("step_*")) for name in ("signal", "signal_torchrun")]
    assert names == [["step_000000002", "step_000000003"], ["step_000000001", "step_000000002"]]


def test_a_job_whose_time_is_over_stops_at_once(outcomes, place):
    """Without a signal: it may have come before Python could take note of it."""
    assert outcomes["no time left"]["code"] == 75 and "error: " not in outcomes["no time left"]["err"]
    assert not list(run_folder(place, "late").glob("step_*"))
    assert [e["event"] for e in tiny.events(run_folder(place, "late"))][-1] == "stopped"
    assert outcomes["no time"]["code"] == 2
    assert "SLURM_JOB_END_TIME=soon: must be seconds since 1970" in error_line(outcomes["no time"])


def test_wandb_continues_the_same_run(outcomes, place):
    assert outcomes["wandb"]["code"] == outcomes["wandb again"]["code"] == 0, outcomes["wandb"]["err"][-4000:]
    folder = run_folder(place, "wandb")
    ids = [json.loads((folder / f"step_{step:09d}" / "state.json").read_text())["wandb_id"] for step in (1, 2)]
    assert ids[0] == ids[1] and len(ids[0]) > 4
    runs = {path.name.rpartition("-")[2] for path in (folder / "wandb").glob("offline-run-*")}
    assert runs == {ids[0]}
    good = json.loads((run_folder(place, "good") / "step_000000001" / "state.json").read_text())
    assert good["wandb_id"] is None
