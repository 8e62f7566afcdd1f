"""An rCM cycle under every mesh against one rank: losses, |g|, gradients, weights, EMA."""

import pytest
import ranks_sample
import tiny
import torch
from launch import run_ranks

# A smaller rate: at 1e-2 the third step magnifies rounding, 4e-6 after the first, to 3e-5.
FRAMES = dict(model=tiny.VARIANTS["frames"], data={"given_frames": [1]}, optim={"lr": 1e-3, "fake_score_lr": 1e-3})
CASES = {
    "tp2": (2, dict(mesh={"tp": 2})),
    "tp2-sp": (2, dict(mesh={"tp": 2, "sp": True})),
    "dp2": (2, dict()),
    "dp2-overlap": (2, dict(optim={"overlap_grad_reduce": True})),
    # A step of one loss term, then steps of two.
    "dp2-overlap-warmup": (2, dict(optim={"overlap_grad_reduce": True}, distill={"tangent_warmup": 1})),
    "cp2": (2, dict(mesh={"cp": 2, "cp_mode": "all_to_all"})),
    "cp3": (3, dict(mesh={"cp": 3})),  # eight tokens: they do not divide
    "cp2-ring": (2, dict(mesh={"cp": 2, "cp_mode": "ring"})),
    "cp4-two_level": (4, dict(mesh={"cp": 4, "cp_mode": "two_level"})),
    "tp2-sp-cp2": (4, dict(mesh={"tp": 2, "sp": True, "cp": 2})),
    "cp2-dp2": (4, dict(mesh={"cp": 2}, optim={"overlap_grad_reduce": True})),
    "pp2": (2, dict(mesh={"pp": 2})),
    "pp4": (4, dict(mesh={"pp": 4}, model={"num_layers": 5}, train={"micro_batch_size": 1})),
    "pp2-tp2": (4, dict(mesh={"tp": 2, "sp": True, "pp": 2})),
    "pp2-cp2": (4, dict(mesh={"cp": 2, "pp": 2})),
    "pp2-dp2": (4, dict(mesh={"pp": 2}, optim={"overlap_grad_reduce": True})),
    "pp2-vpp2": (2, dict(mesh={"pp": 2, "vpp": 2}, model={"num_layers": 5}, train={"micro_batch_size": 1})),
    "pp2-vpp2-dp2": (
        4,
        dict(
            mesh={"pp": 2, "vpp": 2},
            model={"num_layers": 5},
            train={"micro_batch_size": 1},
            optim={"overlap_grad_reduce": True},
        ),
    ),
    "pp2-recompute": (2, dict(mesh={"pp": 2}, model={"recompute": "full"}, train={"micro_batch_size": 1})),
    "tp2-dp2": (4, dict(mesh={"tp": 2, "sp": True})),
    "first_last-tp2-sp": (2, dict(mesh={"tp": 2, "sp": True}, model=tiny.VARIANTS["first_last"])),
    "first_last-pp2": (2, dict(mesh={"pp": 2}, model=tiny.VARIANTS["first_last"])),
    "frames-pp2": (2, dict(mesh={"pp": 2}, **FRAMES)),
    "frames-tp2-sp-cp2": (
        4,
        dict(mesh={"tp": 2, "sp": True, "cp": 2}, **FRAMES),
    ),
    "accumulate": (1, dict(train={"micro_batch_size": 1})),
    "recompute": (1, dict(model={"recompute": "full"})),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A teacher, then three steps (student, critic, student) under each mesh, a checkpoint after each."""
    folder = tmp_path_factory.mktemp("cycle")
    tiny.make_shards(folder / "shards")
    pretraining = lambda **model: tiny.config(
        folder / "shards", "", train={"steps": 20}, optim={"eps": 1e-8, "lr": 1e-3}, model={**tiny.MODEL, **model}
    )
    pretrained = {(1, "teacher"): pretraining(), (1, "teacher5"): pretraining(num_layers=5)}
    pretrained |= {(1, f"teacher_{name}"): pretraining(**model) for name, model in tiny.VARIANTS.items()}
    pretrained[1, "teacher_frames"]["data"]["given_frames"] = [0, 1]
    tiny.train_all(folder, pretrained)

    def cycle(**sections):
        model = sections.get("model", {})
        variant = {"first_last": "_first_last", "frames": "_frames"}.get(model.get("condition"), "")
        teacher = "teacher5" if "num_layers" in model else f"teacher{variant}"
        tree = tiny.config(
            folder / "shards", "", "distill", checkpoint={"every": 1, "keep_last": 9},
            distill={"teacher": str(folder / teacher), "student_every": 2, "guidance": 2.0, "rollout_max_steps": 2},
        )  # fmt: skip
        for name, fields in sections.items():
            tree[name] = {**tree[name], **fields}
        return tree

    configs = {
        (1, "one"): cycle(),
        (1, "one5"): cycle(model={"num_layers": 5}),
        (1, "one_warmup"): cycle(distill={"tangent_warmup": 1}),
        (1, "one_first_last"): cycle(model=tiny.VARIANTS["first_last"]),
        (1, "one_frames"): cycle(**FRAMES),
    }
    configs |= {(world, name): cycle(**sections) for name, (world, sections) in CASES.items()}
    tiny.train_all(folder, configs)
    return folder


def reference_of(sections):
    """The run of one rank that a case is compared with."""
    model = sections.get("model", {})
    if "condition" in model:
        return f"one_{model['condition']}"
    return "one5" if "num_layers" in model else "one_warmup" if "distill" in sections else "one"


def test_the_cycle_is_student_critic_student(runs):
    lines = tiny.log_lines(runs / "one")
    assert [line["phase"] for line in lines] == ["student", "critic", "student"]
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 for line in lines)
    assert lines[0]["g_norm"] > 0.1 and lines[0]["dmd_weight"] > 0


@pytest.mark.parametrize("name", CASES)
def test_equals_one_rank(runs, name):
    reference = reference_of(CASES[name][1])
    for ours, one in zip(tiny.log_lines(runs / name), tiny.log_lines(runs / reference), strict=True):
        for key in (
            "loss",
            "loss_scm",
            "loss_dmd",
            "loss_critic",
            "g_norm",
            "teacher_gap",
            "score_gap",
            "dmd_weight",
            "grad_norm",
        ):
            assert (ours[key] is None) == (one[key] is None)
            assert one[key] is None or abs(ours[key] - one[key]) <= 2e-4 * abs(one[key]), (ours["step"], key)
    for step in (1, 2, 3):
        # After its first step the second moment of a network is (1 - beta2) g^2: the gradient, element by element.
        found = tiny.differences(runs / name / f"step_{step:09d}", runs / reference / f"step_{step:09d}")
        gradients = {k: v for k, v in found.items() if "exp_avg_sq" in k}
        others = {k: v for k, v in found.items() if k not in gradients}
        assert {k: v for k, v in gradients.items() if not v <= 1e-3} == {}
        assert {k: v for k, v in others.items() if not v <= 2e-5} == {}


@pytest.fixture(scope="module")
def samples(runs):
    for world_size in ranks_sample.MESHES:
        run_ranks(world_size, "ranks_sample.py", runs)
    return lambda name: torch.load(runs / f"samples_{name}.pt")


@pytest.mark.parametrize("name", ranks_sample.MESHES[2])
def test_samples_equal_those_of_one_rank(samples, name):
    """Twelve tokens in latents longer than those trained on."""
    assert samples("one").std() > 0.1
    torch.testing.assert_close(samples(name), samples("one"), rtol=1e-4, atol=1e-5)
