"""Sheets of samples during a run: what is on them, on any mesh, and that a run with them is the run without them."""

import json

import launch
import numpy as np
import pytest
import tiny
import torch
from components import tiny_vae
from PIL import Image

from rcm_mcore.config import parse_config
from rcm_mcore.data import Sample, write_shards
from rcm_mcore.data.vae import VideoVAE
from rcm_mcore.models import build_model
from rcm_mcore.train import main
from rcm_mcore.training.networks import make_trained
from rcm_mcore.training.sheets import TEACHER_STEPS, colours, pictures

OVERLAP = {"optim": {"lr": 3e-2, "overlap_grad_reduce": True}}
MESHES = {
    "tp2": {"mesh": {"tp": 2, "sp": True}}, "dp2": OVERLAP, "cp2": {"mesh": {"cp": 2}}, "pp2": {"mesh": {"pp": 2}},
}  # fmt: skip
DEEP = {"model": {"num_layers": 5}, "train": {"steps": 1, "micro_batch_size": 1}}
SHEETS = {"sheet_every": 1, "sheet_samples": 3, "sheet_steps": [1, 4]}
COLUMNS = ["student 1", "student 4", "ema 1", "ema 4"]
STUDENTS = [("one", "student", 1), ("one", "student", 4), ("one", "ema", 1), ("one", "ema", 4)]
STUDENTS_OF_MEANFLOW = [("student", 1), ("student", 4), ("ema", 4)]
STUDENTS += [("bfloat16", "student", 1), ("bfloat16", "ema", 1)]
MEANFLOW = {"method": "meanflow"}
TEACHER = {"sampler": "euler", "steps": TEACHER_STEPS, "shift": 3.0, "guidance": 2.0}
TEACHERS = [("teacher", "student"), ("teacher", "ema"), ("first_last", "student"), ("frames", "ema")]


WIDE = [16, *tiny.LATENT[1:]]


def make_wide_shards(folder):
    """Latents of the VAE."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)
    write_shards(
        (Sample(latent=draw(*WIDE), embed=draw(3, 8), prompt="wide\nand long") for _ in range(8)), folder, samples_per_shard=2
    )
    return folder


def run(folder, name, objective="distill", *, sheets=SHEETS, fails=False, **sections):
    """A run of four steps, student and critic in turn, to be carried out on every rank."""
    tree = tiny.config(
        folder / "shards", folder / name, objective, train={"steps": 4, "seed": 7}, log=dict(sheets),
        distill={"teacher": str(folder / "teacher"), "student_every": 2, "guidance": 2.0, "rollout_max_steps": 2},
        optim={"lr": 3e-2, "ema_length": 0.25},
    )  # fmt: skip
    for section, fields in sections.items():
        tree[section] = tree[section] | fields
    return ["run", [str(tiny.write_config(folder / f"{name}.yaml", tree))], {"fails": fails}]


def carry_out(folder, world_size, plan):
    (folder / "plan.json").write_text(json.dumps(plan))
    with pytest.MonkeyPatch.context() as patch:
        for kind in ("CONFIG", "CACHE", "DATA"):
            patch.setenv(f"WANDB_{kind}_DIR", str(folder / "wandb" / kind.lower()))
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("MKL_CBWR", "COMPATIBLE")  # else rounding depends on where in memory an operand lies
        launch.run_ranks(world_size, "ranks_sheets.py", folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of one rank, with sheets and without, and what the sampler makes of their last checkpoints."""
    folder = tmp_path_factory.mktemp("sheets")
    tiny.make_shards(folder / "shards")
    tiny_vae(folder)
    last = SHEETS | {"sheet_every": 4}
    of_vae = {
        "sheets": last | {"sheet_vae": str(folder), "wandb": True},
        "model": {"in_channels": 16},
        "data": {"shards": [f"{make_wide_shards(folder / 'wide')}/*.tar"], "latent_shape": WIDE},
    }
    frames = {"model": tiny.VARIANTS["frames"], "data": {"given_frames": [0, 1]}}
    sample = lambda name, which, **how: ["sample", [str(folder / f"{name}.yaml"), which], how]
    carry_out(
        folder,
        1,
        [
            run(folder, "teacher", "pretrain", sheets=last),
            run(folder, "one"),
            run(folder, "one_without", sheets={}),
            run(folder, "bfloat16", model={"dtype": "bfloat16"}),
            run(folder, "meanflow", model={"interval": True}, distill=MEANFLOW),
            run(folder, "bfloat16_without", sheets={}, model={"dtype": "bfloat16"}),
            run(folder, "full_disk", sheets=SHEETS | {"sheet_every": 2}, fails=True),
            run(folder, "no_ema", sheets=SHEETS | {"sheet_every": 3}, optim={"ema_length": None}),
            run(folder, "vae", "pretrain", **of_vae),
            run(folder, "first_last", "pretrain", sheets=last, model=tiny.VARIANTS["first_last"]),
            run(folder, "frames", "pretrain", sheets=last, **frames),
            run(folder, "deep", "pretrain", **DEEP),
            *(sample(name, which, steps=steps) for name, which, steps in STUDENTS),
            *(sample("meanflow", which, steps=steps, sampler="mean_flow") for which, steps in STUDENTS_OF_MEANFLOW),
            *(sample(name, which, **TEACHER) for name, which in TEACHERS),
        ],
    )
    return folder


@pytest.fixture(scope="module")
def ranks(runs):
    """Runs of two ranks, in the same folder."""
    meshes = [run(runs, mesh, **fields) for mesh, fields in MESHES.items()]
    vpp = run(runs, "vpp", "pretrain", **DEEP, mesh={"pp": 2, "vpp": 2})
    carry_out(runs, 2, [*meshes, run(runs, "dp2_without", sheets={}, **OVERLAP), vpp])
    return runs


def sheets_of(runs, name):
    """[sheets, prompts, columns, C, F, H, W]."""
    return torch.load(runs / f"{name}.yaml.sheets.pt")


def error(x, reference):
    return float((x.double() - reference.double()).norm() / reference.double().norm())


def events(folder):
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_a_sheet_is_written_every_so_many_steps(runs):
    steps = {"teacher": [4], "one": [1, 2, 3, 4], "no_ema": [3]}
    for name, at in steps.items():
        paths = [runs / name / "sheets" / f"step_{step:09d}.png" for step in at]
        assert sorted((runs / name / "sheets").iterdir()) == paths
        told = [event for event in events(runs / name) if event["event"] == "sheet"]
        assert [(event["step"], event["path"]) for event in told] == list(zip(at, map(str, paths)))
        assert all(event["seconds"] > 0 for event in told)
    assert not (runs / "one_without" / "sheets").exists()


def test_rows_are_prompts_and_columns_are_networks(runs):
    for name, columns in {"one": 4, "no_ema": 2, "teacher": 2, "first_last": 2, "frames": 2}.items():
        latents = sheets_of(runs, name)
        assert latents.shape[1:] == (3, columns, *tiny.LATENT) and latents.isfinite().all()
        with Image.open(sorted((runs / name / "sheets").iterdir())[-1]) as image:
            # Two frames of 120 x 120, gaps of 4, a line of 12 for the caption.
            assert image.size == (columns * (2 * 124 + 8), 3 * (120 + 12 + 12))
            assert np.asarray(image).std() > 10


def compare(runs, name, which, steps, columns):
    """The column of the last sheet against the sampler's, and all others further from it."""
    theirs, last = torch.load(runs / f"{name}.yaml.{which}_{steps}.pt"), sheets_of(runs, name)[-1]
    errors = {column: error(last[:, i], theirs) for i, column in enumerate(columns)}
    ours = errors.pop(f"{which} {steps}")
    assert ours <= 1e-6 and min(errors.values()) > 1e-4, (ours, errors)


@pytest.mark.parametrize("name, which, steps", STUDENTS)
def test_samples_are_those_of_the_sampler(runs, name, which, steps):
    """Of the checkpoint of the same step, for the same texts and noise."""
    compare(runs, name, which, steps, COLUMNS)


@pytest.mark.parametrize("which, steps", STUDENTS_OF_MEANFLOW)
def test_students_of_meanflow_have_their_sampler(runs, which, steps):
    compare(runs, "meanflow", which, steps, COLUMNS)


@pytest.mark.parametrize("name, which", TEACHERS)
def test_a_teacher_is_sampled_with_guidance_and_what_is_given(runs, name, which):
    compare(runs, name, which, TEACHER_STEPS, [f"student {TEACHER_STEPS}", f"ema {TEACHER_STEPS}"])


@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_makes_the_same_samples(ranks, mesh):
    one, ours = sheets_of(ranks, "one"), sheets_of(ranks, mesh)
    assert ours.shape == one.shape
    for step in range(len(one)):
        for column in range(4):
            assert error(ours[step, :, column], one[step, :, column]) <= 5e-6, (step, COLUMNS[column])
    # The student of step 2 is that of step 1, since step 2 is the critic's; all others differ.
    assert torch.equal(one[1], one[0])
    assert min(error(one[2, i], one[1, i]) for i in range(3)) > 1e-3


@pytest.mark.parametrize("name", ["one", "bfloat16"])
def test_a_run_with_sheets_is_the_run_without_them(runs, name):
    equal(runs, name)


def test_so_is_one_of_data_parallel_ranks(ranks):
    equal(ranks, "dp2")


def equal(runs, name):
    """Bit for bit: losses, weights, masters, moments, EMA, the position of the data."""
    ours, plain = runs / name, runs / f"{name}_without"
    assert set(tiny.differences(ours / "step_000000004", plain / "step_000000004").values()) == {0.0}
    state = [json.loads((folder / "step_000000004" / "state.json").read_text()) for folder in (ours, plain)]
    assert state[0] == state[1]
    lines = [tiny.metrics(folder) for folder in (ours, plain)]
    assert lines[0] == lines[1] and len(lines[0]) == 4


def test_a_full_disk_does_not_end_the_run(runs):
    folder = runs / "full_disk"
    assert list((folder / "sheets").iterdir()) == []
    failed = [event for event in events(folder) if event["event"] == "sheet_failed"]
    assert [event["step"] for event in failed] == [2, 4]
    assert all("No space left" in event["reason"] and "/sheets/step_" in event["path"] for event in failed)
    assert [line["step"] for line in tiny.log_lines(folder)] == [1, 2, 3, 4]
    assert (folder / "step_000000004").is_dir()


def test_cells_show_what_the_vae_decodes(runs):
    """And wandb has the file."""
    (path,) = (runs / "vae" / "sheets").iterdir()
    sheet = np.asarray(Image.open(path))
    assert sheet.shape == (3 * 144, 2 * (3 * 124 + 8), 3)
    (latents,) = sheets_of(runs, "vae")
    vae = VideoVAE(runs)
    for row in range(3):
        for column in range(2):
            decoded = vae.decode(latents[row, column][None])[0]  # [3, 5, 32, 32]
            for place, frame in enumerate((0, 2, 4)):
                y, x = row * 144 + 4 + 12 + 4, column * 380 + 4 + place * 124
                shown = torch.from_numpy(sheet[y : y + 120, x : x + 120].copy()).permute(2, 0, 1)
                # Bicubic enlargement by 15 / 4 keeps means.
                want = (decoded[:, frame].clamp(-1, 1) + 1) * 127.5
                assert float((shown.double().mean((1, 2)) - want.double().mean((1, 2))).abs().max()) < 1.5
    logged = list((runs / "vae").glob("wandb/offline-run-*/files/media/images/samples_4_*.png"))
    assert [file.read_bytes() for file in logged] == [path.read_bytes()]


def test_stages_with_several_chunks_make_the_same_samples(ranks):
    assert error(sheets_of(ranks, "vpp"), sheets_of(ranks, "deep")) <= 5e-6


def test_colours_are_scaled_and_what_is_not_finite_is_grey():
    latents = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    latents[3:] = torch.nan  # channels that are not shown
    shown = colours(latents)
    assert shown.shape == (3, 3, 8, 8)
    torch.testing.assert_close(colours(7 * latents + 3), shown)
    assert float(shown.mean()) == pytest.approx(0, abs=1e-5) and float(shown.std()) == pytest.approx(0.5, abs=1e-2)
    assert torch.equal(colours(latents[:1])[2], colours(latents[:1])[0]) and colours(torch.ones(3, 1, 2, 2)).isfinite().all()
    first, middle, last = pictures(latents, None)
    assert first.shape == (120, 120, 3) and len({picture.tobytes() for picture in (first, middle, last)}) == 3
    assert all((picture == 128).all() for picture in pictures(latents * torch.nan, None))


def test_an_error_under_the_ema_puts_the_weights_back(mesh):
    config = parse_config(tiny.config("s", "r"))
    net = build_model(config.model, mesh.config, mesh.groups, seed=0)
    trained = make_trained("student", net, config, mesh, peak_lr=1.0, total_steps=1, has_ema=True)
    for part in trained.optimizer.parts.values():
        for state in part.optimizer.state.values():
            state["ema"].mul_(2)
    before = {name: param.detach().clone() for name, param in net.named_parameters()}
    with pytest.raises(ZeroDivisionError), trained.optimizer.ema_weights():
        assert all(torch.equal(param, 2 * before[name]) for name, param in net.named_parameters())
        1 / 0  # noqa: B018
    assert all(torch.equal(param, before[name]) for name, param in net.named_parameters())
    emas = [state["ema"] for part in trained.optimizer.parts.values() for state in part.optimizer.state.values()]
    assert float(sum(ema.double().square().sum() for ema in emas)) == pytest.approx(
        4 * float(sum(param.double().square().sum() for param in before.values()))
    )


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"sheet_every": -1}, "log.sheet_every=-1: must be at least 0"),
        ({"sheet_samples": 0}, "log.sheet_samples=0: must be at least 1"),
        ({"sheet_steps": []}, r"log.sheet_steps=\[\]: give at least one number, each from 1 to 4"),
        ({"sheet_steps": [1, 5]}, r"log.sheet_steps=\[1, 5\]: .*from 1 to 4"),
        ({"sheet_steps": [0]}, r"log.sheet_steps=\[0\]: .*from 1 to 4"),
    ],
)
def test_bad_fields_are_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        parse_config(tiny.config("s", "r", log=fields))


def test_a_vae_that_cannot_decode_is_refused_at_the_start(runs, capsys):
    for folder, words in (("nowhere", ["no config.json"]), ("", ["16 channels", "model.in_channels=4"])):
        argv = [str(runs / "teacher.yaml"), f"log.sheet_vae={runs / folder}", "--dry-run"]
        assert main(argv) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and all(word in err for word in ["log.sheet_vae=", *words])
