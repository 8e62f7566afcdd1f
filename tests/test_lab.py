"""The laboratory's command line, its rows and its tables."""

import importlib.util
import json
import math
import os
import queue
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import tiny
import torch
from matplotlib import pyplot

from rcm_mcore.checkpoint import read_network, write_network
from rcm_mcore.config import load_config, parse_config
from rcm_mcore.lab import plane_task, results, rows, scene_task, videos
from rcm_mcore.lab.adherence import judge, mean_of
from rcm_mcore.lab.codec import SceneCodec, psnr
from rcm_mcore.lab.plane import make_config
from rcm_mcore.lab.plane_task import scaled
from rcm_mcore.lab.reader import SceneReader
from rcm_mcore.lab.scenes import prompt_of, render
from rcm_mcore.lab.stream import scenes_for

ROOT = Path(__file__).resolve().parent.parent


def lab(*arguments):
    command = [sys.executable, str(ROOT / "tools" / "lab.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def tool():
    """tools/lab.py as a module."""
    spec = importlib.util.spec_from_file_location("lab", ROOT / "tools" / "lab.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_row_is_a_configuration():
    for row in rows.ROWS:
        row = rows.with_warmup(row, 100)
        assert row.distill.get("tangent_warmup", 25) == 25
        for fields in row.plan:
            assert make_config(**scaled(fields)).distill.method == fields["method"]
    assert len({row.slug for row in rows.ROWS}) == len(rows.ROWS)


def test_the_weights_of_the_score_term():
    """lambda = dmd_weight / scm_weight; rCM's own is the paper's 0.01."""
    for name, weight in (("rCM", 0.01), ("rCM, lambda 1", 1.0), ("rCM, lambda 0.1", 0.1), ("rCM, lambda 0.001", 0.001)):
        tree = {
            "model": {"size": "tiny"},
            "data": {"shards": "x.tar", "latent_shape": [32, 2, 4, 4]},
            "checkpoint": {"dir": "x"},
        }
        tree["train"] = {"objective": "distill", "steps": 1, "global_batch_size": 1, "micro_batch_size": 1}
        distill = parse_config({**tree, "distill": {"teacher": "t", **rows.BY_NAME[name].distill}}).distill
        assert distill.dmd_weight / distill.scm_weight == pytest.approx(weight)


def test_variants_of_scm_are_compared_with_scm(tmp_path):
    for name, value in (("rCM", 1.0), ("sCM", 3.0), ("sCM, bfloat16 time", 3.5)):
        for seed in range(2):
            result = {"row": name, "seed": seed, "by_steps": {"2": {"Frechet": value}}}
            results.write_json(tmp_path / rows.BY_NAME[name].slug / f"seed_{seed}" / results.RESULT, result)
    text = results.tables(tmp_path, rows.ROWS, compared=["Frechet"]).split("### Time embedding")[1]
    assert "| rCM, 2 " not in text and "| sCM, 2 | 3 ± 0 |" in text
    assert "| sCM, bfloat16 time - sCM, 2 | 0.5 ± 0 |" in text and text.count(" - ") == 1
    for row in rows.find(None):
        assert rows.BY_NAME[row.against].group == rows.METHODS
        methods = {"rcm": "rCM", "scm": "sCM"}
        assert row.group == rows.METHODS or methods[row.distill["method"]] == row.against


def test_logs_of_stages(tmp_path):
    row = rows.BY_NAME["dCM, sCM, rCM in turn"]
    for stage in (2, 1, 3):
        results.write_lines(tmp_path / row.slug / "seed_0" / f"stage_{stage}" / "log.jsonl", [{"loss_scm": 0.5}])
    found = results.logs(tmp_path, [rows.BY_NAME["rCM"], row])
    assert {title: log.parent.name for title, log in found.items()} == {
        f"{row.name}, stage {i}": f"stage_{i}" for i in (1, 2, 3)
    }
    assert json.loads(found[f"{row.name}, stage 1"].read_text()) == {"step": 1, "loss_scm": 0.5}


def test_differences_are_of_the_same_seed(tmp_path):
    """Seeds whose common luck is ten times as large as what the rows differ by; sCM lacks a seed that rCM has."""
    luck = {0: 10.0, 1: -10.0, 2: 0.0}
    for name, add, seeds in (("rCM", 0.0, (0, 1, 2)), ("sCM", 1.0, (0, 1)), ("DMD2", 0.0, (0,))):
        for seed in seeds:
            by_steps = {"1": {"Frechet": luck[seed] + add + 0.1 * seed * add, "diversity": 1.0}}
            result = {"row": name, "group": "methods", "seed": seed, "by_steps": by_steps}
            results.write_json(tmp_path / name / f"seed_{seed}" / results.RESULT, result)
    results.write_json(tmp_path / "baselines.json", {"real data": [{"Frechet": 0.25, "diversity": 2.0}]})
    text = results.tables(tmp_path, rows.ROWS, compared=["Frechet"])
    assert [line for line in text.splitlines() if "real data" in line] == ["| real data | 0.250 | 2.00 |"]
    assert [line for line in text.splitlines() if "DMD2" in line] == ["| DMD2, 1 | 10.0 | 1.00 |"]
    several, alone = text.split("### Of one run only, and so without an interval")
    assert several.count("### ") == 1 and "| DMD2, 1 |" in alone
    lines = several.split("Differences of runs with the same seed:")[1].strip().splitlines()[2:]
    assert lines == ["| sCM - rCM, 1 | 1.05 ± 0.64 | 2 |"]


def test_rows_by_name_and_group():
    assert [row.name for row in rows.find(["sCM", "tangent"])] == ["sCM", "rCM, finite differences", "sCM, finite differences"]
    assert rows.find(None) == [row for row in rows.ROWS if row.group != rows.LONGER]
    for row, short in zip(rows.find([rows.LONGER]), rows.find([rows.METHODS]), strict=True):
        assert (row.times, row.plan, row.model, row.name) == (3, short.plan, short.model, f"{short.name}, 3x")
        assert row.against == ("rCM" if short.name == "rCM" else "rCM, 3x")
    with pytest.raises(ValueError, match=r"--rows \['xCM'\]: there are rCM; sCM"):
        rows.find(["sCM", "xCM"])


@pytest.mark.parametrize(
    "count, visible, expected",
    [(0, None, [None] * 3), (1, "3", [None] * 3), (2, None, ["0", "1", "0"]), (2, "5,GPU-ab", ["5", "GPU-ab", "5"])],
)
def test_jobs_are_dealt_to_the_gpus(monkeypatch, count, visible, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert tool().gpus_of_jobs(3) == expected
    assert tool().default_jobs("scenes") == (4 * count or os.cpu_count())
    assert tool().default_jobs("plane") == os.cpu_count()


def test_a_job_sees_its_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    gpus = queue.Queue()
    for gpu in ("1", None):
        gpus.put(gpu)
        tool().begin(gpus)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"


@pytest.mark.parametrize("count, ranks", [(0, 1), (1, 1), (3, 2), (5, 4)])
def test_the_teacher_of_scenes_is_trained_on_all_gpus_that_divide_its_batch(monkeypatch, tmp_path, count, ranks):
    called = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(
        scene_task.videos, "train", lambda path, overrides, ranks, show: called.append((path, overrides, ranks))
    )
    monkeypatch.setattr(scene_task, "step_of", lambda run: scene_task.SIZES["teacher"])
    monkeypatch.setattr(scene_task, "read_network", lambda *_, **__: ())
    monkeypatch.setattr(scene_task, "write_network", lambda *_: None)
    scene_task.train_teacher(tmp_path)
    frames, videos = (load_config(path, overrides) for path, overrides, _ in called)
    for config, batch, at_once in ((frames, 3072, 1536), (videos, 768, 384)):
        assert config.train.global_batch_size == batch and config.train.micro_batch_size == min(batch // ranks, at_once)
    assert [found for *_, found in called] == [ranks, ranks]
    assert frames.pretrain.network == "" and videos.pretrain.network == frames.checkpoint.dir == f"{tmp_path}/frames_run"
    assert frames.data.latent_shape == (16, 1, 16, 16) and videos.data.latent_shape == scene_task.LATENT
    assert [config.data.shards for config in (frames, videos)] == [
        (f"{tmp_path}/{name}/shard_*.tar",) for name in ("frames", "data")
    ]


def test_a_stage_that_was_stopped_is_not_done(monkeypatch, tmp_path):
    """Under torchrun a run that is told to stop saves and ends well."""
    monkeypatch.setattr(scene_task.videos, "train", lambda *_, **__: None)
    run = tmp_path / "frames_run"
    write_network(run / "step_000000003", {"a": torch.zeros(1)}, {})
    (run / "latest").write_text("step_000000003")
    with pytest.raises(RuntimeError, match=r"frames_run was stopped after 3 of \d+ steps; the same command goes on"):
        scene_task.train_teacher(tmp_path)
    assert scene_task.step_of(run) == 3 and not (tmp_path / "teacher").exists()


@pytest.mark.parametrize("left", ["teacher", "teacher_run"])
def test_scenes_of_an_earlier_version_are_refused(monkeypatch, tmp_path, left):
    monkeypatch.setattr(scene_task, "write_dataset", lambda *_, **__: pytest.fail("data are written beside it"))
    (tmp_path / left).mkdir()
    with pytest.raises(ValueError, match=r"holds a teacher and no frames_run, .* give another --out"):
        scene_task.prepare(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [left]


def test_scenes_are_judged_by_the_networks_of_the_example(monkeypatch, tmp_path):
    monkeypatch.setattr(scene_task, "train_teacher", lambda root, quick: None)
    monkeypatch.setattr(scene_task, "write_dataset", lambda *_, **__: None)
    monkeypatch.setattr(scene_task, "train_codec", lambda **_: pytest.fail("the codec of the example was not taken"))
    scene_task.prepare(tmp_path)
    shipped = ROOT / "examples" / "scenes"
    codec, reader = (SceneCodec.load(tmp_path / "codec.safetensors"), SceneReader.load(tmp_path / "reader.safetensors"))
    for name in ("codec.safetensors", "reader.safetensors"):
        assert (tmp_path / name).read_bytes() == (shipped / name).read_bytes()
    scenes = scenes_for("held out", 64, seed=7)  # as rendered by the code of today
    videos = render(scenes, "cpu")
    decoded = codec.decode(codec.encode(videos))
    found = mean_of(judge(reader.read(decoded), prompt_of(scenes)))
    assert psnr(videos, decoded) > 28 and found.all > 0.6 and found.characters > 0.98
    assert abs(codec.facts["psnr"] - psnr(videos, decoded)) < 1
    # Of a folder with a codec of its own the reader is not to be another codec's.
    own = tmp_path / "own"
    own.mkdir()
    codec.facts["seed"] = 1
    codec.save(own / "codec.safetensors")
    monkeypatch.setattr(scene_task, "train_reader", lambda **_: SceneReader(width=8))
    scene_task.prepare(own)
    assert (own / "reader.safetensors").stat().st_size < (shipped / "reader.safetensors").stat().st_size / 2


def test_a_training_ends_with_its_caller(tmp_path, monkeypatch):
    tiny.make_shards(tmp_path / "shards")
    config = tiny.write_config(tmp_path / "c.yaml", tiny.config(tmp_path / "shards", tmp_path / "run", train={"steps": 10**6}))
    monkeypatch.setattr("builtins.print", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        videos.train(config, [], show=True)
    assert not psutil.Process().children()


def test_a_run_on_two_ranks(tmp_path, capsys):
    tiny.make_shards(tmp_path / "shards")
    config = tiny.write_config(tmp_path / "c.yaml", tiny.config(tmp_path / "shards", tmp_path / "run", train={"steps": 2}))
    with pytest.raises(RuntimeError, match=r"train\.steps=0"):
        videos.train(config, ["train.steps=0"])
    videos.train(config, [], ranks=2, show=True)
    assert "step 2 of 2: pretrain" in capsys.readouterr().out
    started = json.loads((tmp_path / "run" / "events.jsonl").read_text().splitlines()[0])
    assert started["event"] == "started" and started["ranks"] == 2


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A rehearsal in the plane, interrupted and gone on with."""
    out = tmp_path_factory.mktemp("lab")
    first = lab("plane", "--quick", "--rows", "sCM", "--seeds", 2, "--jobs", 1, "--out", out)
    assert first.returncode == 0, first.stderr
    before = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    known = results.read_baselines(out / "plane_quick")
    results.write_json(out / "plane_quick" / "baselines.json", {label: runs[:1] for label, runs in known.items()})
    second = lab("plane", "--quick", "--rows", "sCM", "MeanFlow", "--seeds", 2, "--jobs", 2, "--out", out)
    assert second.returncode == 0, second.stderr
    return out, before


def test_what_is_there_is_not_done_again(study):
    out, before = study
    after = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    assert {len(runs) for runs in results.read_baselines(out / "plane_quick").values()} == {2}, "of as many seeds as the rows"
    assert len(before) == 2 and len(after) == 4 and before.items() <= after.items()


def test_the_report(study):
    out, _ = study
    done = lab("report", "plane", "--quick", "--out", out)
    assert done.returncode == 0, done.stderr
    text = (out / "report" / "plane.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| sCM, 1 ")]
    found = [json.loads(path.read_text()) for path in (out / "plane_quick" / "sCM").rglob("result.json")]
    mean = sum(result["by_steps"]["1"]["outside"] for result in found) / 2
    column = next(line for line in text.splitlines() if line.startswith("| sampler")).split("|").index(" outside ")
    assert text.count("### ") == 1 and "Differences" not in text, (
        "groups without a row of their own, and no rCM to compare with"
    )
    value, half_width = map(float, lines[0].split("|")[column].split("±"))
    assert abs(value - mean) <= half_width / 20 + 1e-12
    record = json.loads((out / "report" / "plane.json").read_text())
    assert [(r["row"], r["seed"]) for r in record["results"]] == [(n, s) for n in ("MeanFlow", "sCM") for s in (0, 1)]
    assert "teacher, Euler 50" in record["baselines"] and record["results"][2] in found
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    assert commit.startswith((found[0]["facts"]["commit"] or "").removesuffix("-dirty"))
    logs = results.logs(out / "plane_quick", rows.ROWS)
    assert list(logs) == ["sCM", "MeanFlow"] and [len(log.read_text().splitlines()) for log in logs.values()] == [60, 60]
    for name in ("plane.png", "plane_trade_off.png", "plane_curves.png"):
        assert (out / "report" / name).stat().st_size > 5000


def test_a_task_of_videos_from_nothing_to_a_report(tmp_path):
    """Codec, data, reader, teacher, three stages of a student, its samples and what is read in them; tiny, on a CPU."""
    name = "dCM, sCM, rCM in turn"
    done = lab("scenes", "--quick", "--rows", name, "--seeds", 1, "--jobs", 1, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "scenes_quick" / rows.BY_NAME[name].slug / "seed_0"
    result = json.loads((folder / results.RESULT).read_text())
    found = result["by_steps"]
    assert result["facts"]["updates"] == 6
    assert [(steps, measured["evaluations"]) for steps, measured in found.items()] == [("1", 1), ("2", 2), ("4", 4)]
    assert {"adherence %", "legible %", "Frechet", "diversity", "Vendi", "jitter off"} <= found["1"].keys()
    assert all(math.isfinite(value) for measured in found.values() for value in measured.values())
    assert read_network(folder / "student")
    assert not list(folder.glob("stage_*/step_*")), "the checkpoints of stages are several times what they led to"
    assert [len(path.read_text().splitlines()) for path in sorted(folder.glob("stage_*/log.jsonl"))] == [2, 2, 4]
    done = lab("guidance", "scenes", "--quick", "--values", 3, 1.5, "--jobs", 2, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("|")][2:] == ["1.50", "3.00"]
    weak, strong = results.read_guidance(tmp_path / "scenes_quick")
    assert weak["guidance"] == 1.5 and weak["Frechet"] != strong["Frechet"]
    done = lab("report", "scenes", "--quick", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "report" / "scenes.md").read_text()
    assert text.startswith("### Of one run only") and "| real data |" in text and f"| {name}, 4 |" in text
    assert "### The teacher at several strengths of guidance" in text and "| 1.50 |" in text
    assert json.loads((tmp_path / "report" / "scenes.json").read_text())["guidance"] == [weak, strong]
    for picture in ("scenes.png", "scenes_trade_off.png", "scenes_curves.png"):
        assert (tmp_path / "report" / picture).stat().st_size > 5000


def test_a_trade_off_leaves_out_the_teacher_of_one_and_two_steps(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    for seed in range(2):
        result = {"row": "rCM", "group": "methods", "seed": seed, "by_steps": {"1": {"Frechet": 3.0 + seed, "diversity": 2.0}}}
        results.write_json(tmp_path / "rCM" / f"seed_{seed}" / results.RESULT, result)
    labels = ["real data", *(f"teacher, Euler {steps}" for steps in (50, 4, 2, 1))]
    results.write_json(tmp_path / "baselines.json", {label: [{"Frechet": 1.0, "diversity": 1.0}] for label in labels})
    results.trade_off(tmp_path, tmp_path / "x.png", quality="Frechet", diversity="diversity", order=["rCM"], title="x")
    shown = set(figures[0].axes[0].get_legend_handles_labels()[1])
    assert shown == {"real data", "teacher, Euler 50", "teacher, Euler 4", "rCM"}


def test_longer_rows_have_three_times_the_updates(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(videos, "train", lambda config, overrides: ran.append([x for x in overrides if "train.steps" in x]))
    task = scene_task.video_task(tmp_path)
    for name in ("sCM, 3x", "dCM, sCM, rCM in turn, 3x"):
        videos.train_student(task, rows.BY_NAME[name], 0, tmp_path)
    assert ran == [["train.steps=1200"], ["train.steps=400"], ["train.steps=400"], ["train.steps=800"]]
    monkeypatch.setattr(videos, "train_student", lambda *given: tmp_path)
    made = SimpleNamespace(evaluations=1, seconds=1.0, latents=torch.zeros(len(task.prompts), 1))
    monkeypatch.setattr(videos, "sample", lambda request: made)
    monkeypatch.setattr(videos, "read_network", lambda *given, **which: ({}, {}))
    monkeypatch.setattr(videos, "write_network", lambda *given: None)
    judge_nothing = SimpleNamespace(measures=lambda latents, prompts: {})
    assert videos.run(task, judge_nothing, rows.BY_NAME["sCM, 3x"], 0, tmp_path)["facts"]["updates"] == 1200
    short, longer = (plane_task.run(rows.BY_NAME[name], 0, tmp_path / name, quick=True) for name in ("sCM", "sCM, 3x"))
    assert [result["facts"]["updates"] for result in (short, longer)] == [60, 180]
    logs = [[json.loads(x) for x in (tmp_path / name / "stage_1/log.jsonl").open()] for name in ("sCM", "sCM, 3x")]
    assert [len(log) for log in logs] == [60, 180]
    assert logs[0][0] == logs[1][0], "from the same pretrained network"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("plane", "--rows", "xCM"), r"--rows ['xCM']: there are rCM"),
        (("plane", "--rows", "time embedding"), "the networks of the plane have no time embedding"),
        (("plane", "--seeds", "0"), "--seeds 0"),
        (("plane", "--jobs", "0"), "--jobs 0"),
        (("guidance", "scenes", "--values", "2", "-1"), "--values -1: must be at least 0"),
        (("report", "plane"), "holds no results: run `python tools/lab.py plane` first"),
    ],
)
def test_what_makes_no_sense(tmp_path, arguments, message):
    done = lab(*arguments, "--out", tmp_path)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_tables_name_what_has_one_run(tmp_path):
    for row, seeds in (("rCM", 2), ("sCM", 1)):
        for seed in range(seeds):
            found = {"row": row, "group": "methods", "seed": seed, "facts": {}, "by_steps": {"1": {"quality": seed + 1.0}}}
            results.write_json(tmp_path / row / f"seed_{seed}" / "result.json", found)
    text = results.tables(tmp_path, rows.ROWS, compared=["quality"])
    assert "| rCM, 1 | 1.5 ± 6.4 |" in text.split("### Of one run only")[0]
    (tmp_path / "rCM" / "seed_0" / "result.json").write_text("{")
    with pytest.raises(ValueError, match=r"seed_0/result.json cannot be read"):
        results.read_results(tmp_path)
    (tmp_path / "baselines.json").write_text("{")
    with pytest.raises(ValueError, match=r"baselines.json cannot be read"):
        results.read_baselines(tmp_path)
