"""What is kept in host memory: values bit for bit those of a run without, and device memory that is given back."""

import json

import launch
import pytest
import tiny
import torch

from rcm_mcore.condition import Condition
from rcm_mcore.config import parse_config
from rcm_mcore.models import build_model
from rcm_mcore.training.networks import make_trained
from rcm_mcore.training.offload import Offloaded, StreamedBlocks

ALL = ["teacher", "student", "fake_score", "ema"]
MESHES = {
    "dp2": {"model": {"dtype": "bfloat16"}},
    "dp2-float32": {},
    # Chunks of three layers and two, which microbatches go through in turn.
    "pp2-vpp2": {
        "mesh": {"pp": 2, "vpp": 2},
        "model": {"dtype": "bfloat16", "num_layers": 5},
        "train": {"micro_batch_size": 1},
        "log": {},
    },
}
SHEETS = {"sheet_every": 2, "sheet_samples": 2}
SAME = [(name, "there") for name in MESHES] + [("dp2", "here-and-on"), ("dp2", "there-and-on")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, same_rounding):
    """Runs of six steps with all of it in host memory and with none, and each continued from the other's third step."""
    folder = tmp_path_factory.mktemp("offload")
    tiny.make_shards(folder / "shards")

    def config(name, offload, sections):
        teacher = "teacher5" if "num_layers" in sections.get("model", {}) else "teacher"
        tree = tiny.config(
            folder / "shards", folder / name, "distill", checkpoint={"every": 3, "keep_last": 9}, log=SHEETS,
            train={"steps": 6, "offload": offload},
            distill={"teacher": str(folder / teacher), "student_every": 2, "guidance": 2.0, "rollout_max_steps": 2},
            optim={"lr": 3e-2, "eps": 1e-8, "clip_grad": 0.5, "ema_length": 0.25},
        )  # fmt: skip
        tree |= {key: tree[key] | fields if fields else fields for key, fields in sections.items()}
        return str(tiny.write_config(folder / f"{name}.yaml", tree))

    tiny.train_all(
        folder,
        {(1, name): tiny.config(folder / "shards", "", train={"steps": 3}, model=model)
         for name, model in (("teacher", {}), ("teacher5", {"num_layers": 5}))},
    )  # fmt: skip
    plan = []
    for name, sections in MESHES.items():
        there, here = f"{name}-there", f"{name}-here"
        plan += [["run", config(here, [], sections)], ["run", config(there, ALL, sections)]]
    for source, offload in (("dp2-here", ALL), ("dp2-there", [])):
        plan += [["cut", str(folder / source), str(folder / f"{source}-and-on"), 3]]
        plan += [["run", config(f"{source}-and-on", offload, MESHES["dp2"])]]
    (folder / "plan.json").write_text(json.dumps(plan))
    launch.run_ranks(2, "ranks_resume.py", folder)
    return folder


@pytest.mark.parametrize("name, which", SAME)
def test_a_run_is_the_same_bit_for_bit(runs, name, which):
    """Losses, weights, masters, second moments, EMA, and after sheets, which are drawn with the EMA."""
    plain, ours = runs / f"{name}-here", runs / f"{name}-{which}"
    assert tiny.metrics(ours) == tiny.metrics(plain)
    for step in (3, 6):
        found = tiny.differences(ours / f"step_{step:09d}", plain / f"step_{step:09d}")
        assert {key: value for key, value in found.items() if value != 0.0} == {}
    for sheet in (plain / "sheets").glob("*.png"):
        assert sheet.read_bytes() == (ours / "sheets" / sheet.name).read_bytes()
    # The last three steps changed every master, second moment and EMA, so equality says something.
    moved = tiny.differences(plain / "step_000000003", plain / "step_000000006")
    assert {key: value for key, value in moved.items() if key.startswith(("optimizer.", "ema.")) and not value > 1e-9} == {}


def trained(mesh, folder, dtype, offload):
    tree = tiny.config("shards", folder, model={"dtype": dtype}, train={"offload": offload})
    config = parse_config(tree)
    net = build_model(config.model, mesh.config, mesh.groups)
    return make_trained("student", net, config, mesh, peak_lr=1e-2, total_steps=3, has_ema=True)


def held(network):
    """Bytes on the device of masters, second moments and EMA."""
    counts = [0, 0, 0]
    for part in network.optimizer.parts.values():
        for main, state in part.optimizer.state.items():
            for i, x in enumerate((main, state["exp_avg_sq"], state["ema"])):
                counts[i] += x.untyped_storage().nbytes() if i or main.dtype != network.net.config.params_dtype else 0
    return [bool(count) for count in counts]


@pytest.mark.parametrize(
    "dtype, offload, on_device",
    [
        ("bfloat16", [], [True, True, True]),
        ("bfloat16", ["ema"], [True, True, False]),
        ("bfloat16", ["student"], [False, False, True]),
        ("bfloat16", ["student", "ema"], [False, False, False]),
        ("float32", ["student"], [False, False, True]),  # masters are the weights, which are not counted here
    ],
)
def test_the_device_has_none_of_it_between_steps(mesh, tmp_path, dtype, offload, on_device):
    network = trained(mesh, tmp_path, dtype, offload)
    parameters = sum(p.numel() for p in network.net.parameters())
    width = {"student": 8 if dtype == "bfloat16" else 4, "ema": 4}
    assert network.optimizer.offloaded_bytes() == parameters * sum(width[name] for name in offload)
    plain = trained(mesh, tmp_path, dtype, [])
    for one in (plain, network):
        one.wake()
        for _ in range(2):
            assert one is plain or held(one) == on_device
            for p in one.net.parameters():
                p.main_grad.fill_(1.0)
            one.optimizer.prepare_and_clip()
            one.optimizer.step()
            one.optimizer.update_ema(0.5)
    assert held(network) == on_device
    for ours, theirs in zip(network.optimizer.pieces().values(), plain.optimizer.pieces().values(), strict=True):
        for kind, pieces in ours.items():
            assert all(
                torch.equal(a.cpu(), b.cpu()) for (_, a), (_, b) in zip(pieces.parts, theirs[kind].parts, strict=True)
            ), kind
    before = [p.clone() for p in network.net.parameters()]
    with network.optimizer.ema_weights():
        assert not all(torch.equal(a, b) for a, b in zip(before, network.net.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(before, network.net.parameters())) and held(network) == on_device


def test_gradients_go_back_to_the_allocator_alone(mesh, tmp_path, monkeypatch):
    """Not to the device, from which the next step would have to get all of its memory anew."""
    network, called = trained(mesh, tmp_path, "bfloat16", []), []
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: called.append(name))
    gradients = lambda: [buffer.grad_data.untyped_storage().nbytes() for buffer in network.ddp.buffers]
    for _ in range(2):  # a network that sleeps is told to sleep in every step of the other, one that is awake to wake up
        network.wake()
    assert all(gradients())
    for p in network.net.parameters():
        p.main_grad.fill_(1.0)
    network.wake()
    assert all(bool((p.main_grad == 1.0).all()) for p in network.net.parameters())
    for _ in range(2):
        network.sleep()
    assert not any(gradients())
    network.wake()
    assert all(gradients()) and not any(bool(p.main_grad.any()) for p in network.net.parameters())
    assert called == []


def test_what_is_read_only_is_not_copied_back(mesh):
    x, kept = torch.arange(4.0, device=mesh.device), torch.ones(2)
    away, room = Offloaded([x]), x.untyped_storage()  # never x itself in an assertion: there is nothing to show
    assert room.nbytes() == 0 and away.value(kept) is kept
    for changed, want in ((False, [0, 1, 2, 3]), (True, [7, 1, 2, 3])):
        with away.here([x, kept], changed=changed):
            assert x.tolist() == [0, 1, 2, 3] and kept.tolist() == [1, 1]
            x[0] = 7
        found = away.value(x).tolist()
        assert found == want and room.nbytes() == 0 and kept.tolist() == [1, 1]
    away.value(x).fill_(5)
    with away.here([x]):
        assert x.tolist() == [5, 5, 5, 5]


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_streamed_blocks_share_two_buffers(mesh, tmp_path, layers):
    """The whole network in any order of chunks computes what it did."""
    config = parse_config(tiny.config("shards", tmp_path, model={"num_layers": layers, "dtype": "bfloat16"}))
    net = build_model(config.model, mesh.config, mesh.groups, trainable=False)
    draw = lambda *shape: torch.rand(shape, device=mesh.device)
    arguments = (draw(2, *tiny.LATENT), draw(2), Condition(draw(2, config.model.text_len, config.model.text_dim)))
    for p in net.parameters():
        p.normal_(std=0.2)
    blocks = list(net.blocks.values())
    size = sum(p.nbytes for p in net.blocks.parameters())
    with torch.no_grad():
        want = net(*arguments)
        assert want.std() > 0.1
        streamed = StreamedBlocks(blocks)
        assert torch.equal(net(*arguments), want) and torch.equal(net(*arguments), want)
        if layers == 5:  # a pass that is given up in the middle, and one that begins there
            hidden = {}
            blocks[2].register_forward_pre_hook(lambda _, args: hidden.update(x=args[0], cond=args[1]))
            net(*arguments)
            blocks[1](hidden["x"], hidden["cond"])
            blocks[4](hidden["x"], hidden["cond"])
            assert torch.equal(net(*arguments), want)
    storages = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in net.blocks.parameters()}
    assert len(storages) == min(2, layers) and streamed.nbytes >= size
    assert sum(storages.values()) * layers <= 2 * streamed.nbytes + 1


@pytest.mark.parametrize(
    "objective, sections, message",
    [
        ("pretrain", {"train": {"offload": ["teacher"]}}, r"train.offload=\['teacher'\]: this run has no teacher .*; it has e"),
        ("distill", {"train": {"offload": ["fake_score"]}, "distill": {"method": "scm"}}, "this run has no fake_score"),
        ("distill", {"train": {"offload": ["ema"]}, "optim": {"ema_length": None}}, "this run has no ema"),
        ("distill", {"train": {"offload": ["gradients"]}}, r"train.offload\[0\]='gradients': must be one of teacher, student"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused_by_field(objective, sections, message):
    tree = tiny.config("shards", "run", objective)
    for name, fields in sections.items():
        tree[name] = tree.get(name, {}) | fields
    if objective == "distill":
        tree["distill"] = tree.get("distill", {}) | {"teacher": "x"}
    with pytest.raises(ValueError, match=message):
        parse_config(tree)
