"""Checkpoints: whole ones only, damage noticed, single networks in and out of them, conversion."""

import importlib.util
import json
import logging
import pickle
import shutil
from pathlib import Path

import oracle
import pytest
import safetensors.torch
import tiny
import torch
import yaml
from diffusers import WanTransformer3DModel

from rcm_mcore.checkpoint import CheckpointError, CheckpointFolder, load_network, network, read_network, write_network
from rcm_mcore.config import parse_config
from rcm_mcore.models import build_model
from rcm_mcore.training.networks import make_trained
from rcm_mcore.training.state import RunState, pieces_to_save, save_state

CONFIG = parse_config(tiny.config("shards", "run", "distill", distill={"teacher": "teacher"}))
MODEL = yaml.safe_load(yaml.safe_dump(tiny.MODEL | {"patch_size": [1, 2, 2]}))


def fill(text):
    """A checkpoint of two files, one of them in a folder."""

    def write(path):
        (path / "part").mkdir()
        (path / "weights.bin").write_bytes(text.encode() * 100)
        (path / "part" / "state.json").write_text(text)

    return write


def fail(path):
    (path / "weights.bin").write_bytes(b"half")
    raise OSError(28, "No space left on device")


@pytest.fixture
def folder(tmp_path, mesh):
    folder = CheckpointFolder(tmp_path / "run")
    for step in (1, 2, 3):
        folder.save(step, fill(f"step {step}"), keep_last=3)
    return folder


def names(folder):
    return sorted(path.name for path in folder.root.iterdir())


def test_saves_keeps_the_last_and_marks_the_newest(folder):
    assert folder.steps() == [1, 2, 3]
    assert folder.newest() == folder.path(3) == folder.root / "step_000000003"
    assert (folder.root / "latest").read_text() == "step_000000003"
    assert (folder.path(2) / "part" / "state.json").read_text() == "step 2"
    sizes = {name: size for name, (size, _) in json.loads((folder.path(2) / "manifest.json").read_text()).items()}
    assert sizes == {"weights.bin": 600, "part/state.json": 6}
    folder.save(4, fill("step 4"), keep_last=2)
    assert names(folder) == ["latest", "step_000000003", "step_000000004"]
    folder.save(4, fill("again"), keep_last=1)
    assert names(folder) == ["latest", "step_000000004"]
    assert (folder.newest() / "part" / "state.json").read_text() == "again"


def flip(path):
    data = bytearray(path.read_bytes())
    data[17] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "truncated": (lambda path: (path / "weights.bin").write_bytes(b"step 3"), "weights.bin has 6 bytes, not 600"),
    "flipped": (lambda path: flip(path / "weights.bin"), "weights.bin has changed"),
    "missing": (lambda path: (path / "part" / "state.json").unlink(), "state.json"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json"),
    "half a manifest": (lambda path: (path / "manifest.json").write_text('{"weights.bin": [600'), "manifest.json"),
    "no list of files": (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json lists no files"),
    "an empty list": (lambda path: (path / "manifest.json").write_text("{}"), "manifest.json lists no files"),
    "empty": (lambda path: [shutil.rmtree(path), path.mkdir()], "manifest.json"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_newest_is_passed_over_loudly(folder, kind, caplog):
    damage, reason = DAMAGE[kind]
    damage(folder.path(3))
    with caplog.at_level(logging.ERROR):
        assert folder.newest() == folder.path(2)
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert str(folder.path(3)) in record.getMessage() and reason in record.getMessage()
    assert folder.steps() == [1, 2, 3]  # nothing is removed by looking


def test_nothing_usable_is_none(folder, tmp_path, caplog):
    for step in (1, 2, 3):
        (folder.path(step) / "weights.bin").unlink()
    assert folder.newest() is None
    assert len(caplog.records) == 3
    assert CheckpointFolder(tmp_path / "nowhere").newest() is None


def test_a_folder_that_is_not_a_checkpoint_is_no_step(folder):
    (folder.root / ".partial_step_000000009").mkdir()
    (folder.root / "step_old").mkdir()
    (folder.root / "step_000000008").write_text("a file")
    assert folder.steps() == [1, 2, 3]


def test_a_resumed_run_replaces_what_it_passed_over(folder):
    """The checkpoint just written is never the one that goes, however many damaged ones follow it."""
    (folder.path(3) / "weights.bin").unlink()
    (folder.path(2) / "weights.bin").unlink()
    assert folder.newest() == folder.path(1)
    folder.save(2, fill("new"), keep_last=1)
    assert names(folder) == ["latest", "step_000000002"]
    assert folder.newest() == folder.path(2)


def test_a_failed_save_leaves_the_earlier_ones(folder):
    before = {path: path.read_bytes() for path in folder.root.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError) as error:
        folder.save(4, fail, keep_last=1)
    assert isinstance(error.value, RuntimeError)
    message = str(error.value)
    assert "the checkpoint of step 4 could not be written" in message and "No space left on device" in message
    assert "the checkpoint of step 3 is untouched" in message
    assert {path: path.read_bytes() for path in folder.root.rglob("*") if path.is_file()} == before
    assert folder.newest() == folder.path(3)


def test_a_failed_first_save_says_that_there_is_none(tmp_path, mesh):
    folder = CheckpointFolder(tmp_path / "run")
    with pytest.raises(CheckpointError, match="there is no earlier checkpoint"):
        folder.save(1, fail, keep_last=1)
    assert names(folder) == []


@pytest.mark.parametrize("call", ["manifest.json", "latest"])
def test_a_failure_to_publish_is_a_failed_save(folder, call, monkeypatch):
    from rcm_mcore.checkpoint import folder as module

    write = module._write_text

    def fail_at(path, text):
        if path.name == call:
            raise OSError(28, "No space left on device")
        write(path, text)

    monkeypatch.setattr(module, "_write_text", fail_at)
    with pytest.raises(CheckpointError, match="No space left on device"):
        folder.save(4, fill("step 4"), keep_last=1)
    assert folder.steps()[:3] == [1, 2, 3] and not list(folder.root.glob(".partial*"))
    assert (folder.root / "latest").read_text() == "step_000000003"


def test_leftovers_of_a_killed_save_are_removed(folder):
    for step in (3, 9):
        left = folder.root / f".partial_step_{step:09d}"
        left.mkdir()
        (left / "weights.bin").write_bytes(b"half")
    folder.save(4, fill("step 4"), keep_last=9)
    assert names(folder) == ["latest", *(f"step_{step:09d}" for step in (1, 2, 3, 4))]


@pytest.fixture(scope="module")
def trained(mesh, tmp_path_factory):
    """A run folder with one checkpoint: student, EMA and fake score of random, different weights."""
    generator = torch.Generator().manual_seed(0)
    networks = []
    for name, has_ema in (("student", True), ("fake_score", False)):
        net = build_model(CONFIG.model, CONFIG.mesh, mesh.groups)
        with torch.no_grad():
            for p in net.parameters():
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
        one = make_trained(name, net, CONFIG, mesh, peak_lr=1e-2, total_steps=9, has_ema=has_ema)
        if has_ema:
            for part in one.optimizer.parts.values():
                for p in (p for group in part.optimizer.param_groups for p in group["params"]):
                    part.optimizer.state[p]["ema"].add_(torch.randn(p.shape, generator=generator), alpha=0.1)
        networks.append(one)
    folder = CheckpointFolder(tmp_path_factory.mktemp("trained") / "run")
    state = RunState(step=5, own_steps={"student": 3, "fake_score": 2}, data={})
    save_state(folder, pieces_to_save(networks, mesh), state, CONFIG)
    return folder.root, {one.name: dict(one.net.named_parameters()) for one in networks}


@pytest.fixture
def fresh(mesh):
    """A network with weights of its own."""
    return build_model(CONFIG.model, CONFIG.mesh, mesh.groups, seed=9, trainable=False)


@pytest.mark.parametrize("which", ["student", "fake_score"])
def test_reads_the_network_asked_for(trained, which):
    root, nets = trained
    tensors, model = read_network(root, which=which)
    assert tensors.keys() == nets[which].keys()
    assert all(torch.equal(tensors[name], p) for name, p in nets[which].items())
    assert model == read_network(root / "step_000000005")[1]
    assert model["hidden_size"] == 48 and model["patch_size"] == [1, 2, 2]


@pytest.mark.parametrize("which", ["student", "ema", "fake_score"])
def test_loads_what_is_read(trained, fresh, mesh, which):
    tensors, _ = read_network(trained[0], which=which)
    load_network(fresh, trained[0], which=which)
    assert all(torch.equal(p, tensors[name]) for name, p in fresh.named_parameters())


def test_the_three_networks_differ(trained):
    student, ema, fake = (read_network(trained[0], which=which)[0] for which in ("student", "ema", "fake_score"))
    assert student.keys() == ema.keys() == fake.keys()
    assert all(not torch.equal(student[k], ema[k]) and not torch.equal(student[k], fake[k]) for k in student)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_write_and_read_back_bit_for_bit(tmp_path, mesh, dtype):
    """Of any dtype, contiguous or not."""
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(5, 3, generator=generator).to(dtype).t() for name in ("a.weight", "b")}
    write_network(tmp_path / "net", tensors, MODEL)
    back, model = read_network(tmp_path / "net")
    assert model == MODEL
    assert back.keys() == tensors.keys()
    assert all(back[k].dtype == dtype and torch.equal(back[k], tensors[k]) for k in tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["net"]


def test_a_missing_network_is_named(trained, fresh, mesh, tmp_path):
    write_network(tmp_path / "net", read_network(trained[0])[0], MODEL)
    for which in ("ema", "fake_score"):
        with pytest.raises(ValueError, match=f"holds no {which} network; it holds: student"):
            read_network(tmp_path / "net", which=which)
        with pytest.raises(ValueError, match=f"holds no {which} network; it holds: student"):
            load_network(fresh, tmp_path / "net", which=which)


MISFITS = {
    "shape": (lambda t: t | {"head.head.bias": torch.zeros(3)}, r"head.head.bias is \[3\], the network has \[16\]"),
    "missing": (lambda t: {k: v for k, v in t.items() if k != "head.head.bias"}, r"missing \['head.head.bias'\], unknown \[\]"),
    "unknown": (lambda t: t | {"head.head.scale": torch.zeros(3)}, r"missing \[\], unknown \['head.head.scale'\]"),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_a_network_that_does_not_fit_changes_nothing(trained, fresh, mesh, tmp_path, kind):
    change, message = MISFITS[kind]
    write_network(tmp_path / "net", change(read_network(trained[0])[0]), MODEL)
    before = {name: p.clone() for name, p in fresh.named_parameters()}
    with pytest.raises(ValueError, match=message):
        load_network(fresh, tmp_path / "net", which="student")
    assert all(torch.equal(p, before[name]) for name, p in fresh.named_parameters())


def test_write_refuses_an_existing_path(tmp_path, mesh):
    (tmp_path / "net").mkdir()
    (tmp_path / "file").write_text("mine")
    for name in ("net", "file"):
        with pytest.raises(ValueError, match=f"{name} exists already"):
            write_network(tmp_path / name, {"a": torch.zeros(2)}, MODEL)
    assert (tmp_path / "file").read_text() == "mine" and not any((tmp_path / "net").iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "net"]


def test_a_failed_write_leaves_nothing(tmp_path, mesh, monkeypatch):
    (tmp_path / ".net.partial").mkdir()  # of an earlier kill

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(network.yaml, "safe_dump", full)  # after the tensors are written
    with pytest.raises(OSError, match="No space left"):
        write_network(tmp_path / "net", {"a": torch.zeros(2)}, MODEL)
    assert list(tmp_path.iterdir()) == []


class Runs:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


NO_CHECKPOINTS = {
    "nothing": lambda path: shutil.rmtree(path),
    "no index": lambda path: (path / ".metadata").unlink(),
    "no configuration": lambda path: (path / "config.yaml").unlink(),
    "an empty index": lambda path: (path / ".metadata").write_bytes(b""),
    "a pickle of something else": lambda path: (path / ".metadata").write_bytes(pickle.dumps({"weights": [1, 2]})),
    "a pickle that runs code": lambda path: (path / ".metadata").write_bytes(pickle.dumps(Runs(path / "it ran"))),
    "half an index": lambda path: (path / ".metadata").write_bytes((path / ".metadata").read_bytes()[:500]),
    "configuration of a list": lambda path: (path / "config.yaml").write_text("- model\n"),
    "configuration without a model": lambda path: (path / "config.yaml").write_text("train: {steps: 3}\n"),
    "configuration that is no YAML": lambda path: (path / "config.yaml").write_text("model: {"),
}


@pytest.mark.parametrize("kind", NO_CHECKPOINTS)
def test_what_is_no_checkpoint_is_refused_by_name(trained, fresh, mesh, tmp_path, kind):
    path = tmp_path / "net"
    shutil.copytree(trained[0] / "step_000000005", path)
    NO_CHECKPOINTS[kind](path)
    for read in (read_network, network.model_of):
        with pytest.raises(ValueError, match=f"^{path}"):
            read(path)
    if "configuration" not in kind:
        with pytest.raises(ValueError, match=f"^{path}"):
            load_network(fresh, path, which="student")
    assert not (path / "it ran").exists()


def convert(*arguments):
    spec = importlib.util.spec_from_file_location("convert", Path(__file__).parent.parent / "tools" / "convert_checkpoint.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([str(a) for a in arguments])


@pytest.mark.parametrize("which", ["student", "ema", "fake_score"])
def test_converts_to_diffusers_and_back_bit_for_bit(trained, tmp_path, mesh, which):
    to_hub = ("--from", "mcore", "--to", "diffusers", "--which", which)
    assert convert(*to_hub, trained[0], tmp_path / "hub") == 0
    assert convert("--from", "diffusers", "--to", "mcore", tmp_path / "hub", tmp_path / "back") == 0
    ours, model = read_network(trained[0], which=which)
    back, model_back = read_network(tmp_path / "back")
    assert back.keys() == ours.keys()
    assert all(back[k].dtype == ours[k].dtype and torch.equal(back[k], ours[k]) for k in ours)
    sizes = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "in_channels", "freq_dim", "text_dim")
    assert {k: model_back[k] for k in sizes} == {k: model[k] for k in sizes}
    assert convert("--from", "mcore", "--to", "diffusers", tmp_path / "back", tmp_path / "again") == 0
    for path in (tmp_path / "hub").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_the_exported_network_computes_the_same(trained, fresh, tmp_path, mesh):
    """diffusers' own network on the exported EMA against ours, float32."""
    assert convert("--from", "mcore", "--to", "diffusers", "--which", "ema", trained[0], tmp_path / "hub") == 0
    theirs = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(tmp_path / "hub"))
    theirs.load_state_dict(safetensors.torch.load_file(tmp_path / "hub" / "diffusion_pytorch_model.safetensors"))
    assert theirs.config.num_attention_heads == 2 and theirs.config.attention_head_dim == 24
    theirs.condition_embedder.timesteps_proj = oracle.Sinusoid(CONFIG.model.freq_dim)
    load_network(fresh, trained[0], which="ema")
    x, _, s, _, condition = oracle.inputs(CONFIG.model, grid=(2, 4, 6), dtype=torch.float32)
    with torch.no_grad(), oracle.islands_in_fp64():
        want = theirs(hidden_states=x, timestep=1000 * s.double(), encoder_hidden_states=condition.text, return_dict=False)[0]
        got = fresh(x, s, condition)
    assert want.dtype == got.dtype == torch.float32 and float(want.norm()) > 1
    assert float((got - want).norm() / want.norm()) <= 2e-5


def test_conversion_refuses_without_a_traceback(trained, tmp_path, capsys, mesh):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    assert convert("--from", "mcore", "--to", "diffusers", trained[0], tmp_path / "taken") == 2
    assert convert("--from", "mcore", "--to", "diffusers", tmp_path / "nowhere", tmp_path / "hub") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "taken" in lines[0] and "nowhere" in lines[1]
    assert [path.name for path in tmp_path.rglob("*")] == ["taken", "file"]


def test_a_changed_bit_is_not_read(tmp_path, mesh):
    """Of a run's checkpoint, whose manifest tells; nothing else would."""
    fill = lambda path: (write_network(path / "in", {"a": torch.ones(1000)}, MODEL), lift(path / "in"))
    path = CheckpointFolder(tmp_path / "run").save(5, fill, keep_last=1)
    assert read_network(path)[0]["a"].eq(1).all()
    data = path / "__0_0.distcp"
    content = bytearray(data.read_bytes())
    content[content.find(torch.ones(100).numpy().tobytes()) + 2] ^= 64
    data.write_bytes(content)
    with pytest.raises(ValueError, match=r"step_000000005 is damaged: __0_0\.distcp has changed"):
        read_network(path)


def lift(folder):
    """The files of a folder into the one that holds it."""
    for file in folder.iterdir():
        file.rename(folder.parent / file.name)
    folder.rmdir()
