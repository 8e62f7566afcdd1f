"""tools/compare_videos.py on tiny videos: against measures of features that are taken by hand, cache, prompts, errors."""

import importlib.util
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from media_samples import steady, write_video
from test_extractor import Means

from rcm_mcore.evaluation.digits import DigitClassifier
from rcm_mcore.evaluation.metrics import (
    density_coverage,
    frechet_distance,
    median_distance,
    precision_recall,
    within_group_diversity,
    within_group_vendi,
)
from rcm_mcore.evaluation.temporal import temporal_consistency, wasserstein
from rcm_mcore.lab import folders
from rcm_mcore.lab.reader import SceneReader

PROMPTS = ("a cat", "24-7 shop", "x.y", "alone")
READ = ["--size", "16", "16", "--frames", "4"]
SAME = 1e-3 if torch.cuda.is_available() else 1e-6  # of features, which by_hand's network makes on a CPU


def load_tool():
    path = Path(__file__).parents[1] / "tools" / "compare_videos.py"
    spec = importlib.util.spec_from_file_location("compare_videos", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = load_tool()


def clips(count, seed, *, spread=1.0):
    """uint8 [n, 4, 16, 16, 3]: a colour for each, and noise that changes from frame to frame."""
    rng = np.random.default_rng(seed)
    colours = 0.5 + 0.3 * spread * rng.uniform(-1, 1, (count, 1, 1, 1, 3))
    return (255 * np.clip(colours + 0.05 * rng.normal(size=(count, 4, 16, 16, 3)), 0, 1)).astype(np.uint8)


def name_of(index):
    """Of 4 prompts: 7 samples of the first, 4 of the second and third, 1 of the last."""
    prompt = [0] * 7 + [1] * 4 + [2] * 4 + [3]
    return f"{PROMPTS[prompt[index]]}-{prompt[:index].count(prompt[index])}.npy"


@pytest.fixture
def site(tmp_path, monkeypatch):
    """16 real and 15 generated videos, and a network."""
    monkeypatch.setattr(folders, "_RESAMPLES", 50)
    torch.manual_seed(0)
    DigitClassifier().eval().save(tmp_path / "digits.safetensors")
    for folder, count, spread in (("real", 16, 1.0), ("generated", 15, 0.5)):
        (tmp_path / folder).mkdir()
        for index, clip in enumerate(clips(count, seed=count, spread=spread)):
            np.save(tmp_path / folder / name_of(index), clip)
    return tmp_path


def run(site, *more, code=0):
    words = [site / "real", site / "generated", "--features", site / "digits.safetensors", *READ, "--out", site / "out", *more]
    assert tool.main([str(word) for word in words]) == code
    return json.loads((site / "out" / "comparison.json").read_text()) if code == 0 else None


def by_hand(site, folder):
    """Names, features and videos [n, F, C, H, W] in [0, 1]."""
    paths = sorted((site / folder).iterdir(), key=lambda path: path.name)
    videos = torch.from_numpy(np.stack([np.load(path) for path in paths])).float().div(255).permute(0, 1, 4, 2, 3)
    return [path.name for path in paths], DigitClassifier.load(site / "digits.safetensors").features(videos.mean(2)), videos


def test_the_measures_are_those_of_the_features(site, capsys):
    result = run(site)
    (real_names, real, real_videos), (names, generated, videos) = by_hand(site, "real"), by_hand(site, "generated")
    row = result["rows"][1]
    assert row["Frechet"] == pytest.approx(frechet_distance(real, generated), rel=SAME)
    assert (row["precision"], row["recall"]) == precision_recall(real, generated)
    assert (row["density"], row["coverage"]) == density_coverage(real, generated)
    # 4 samples of each of the 3 prompts that have so many
    kept = [[name for name in found if int(name[-5]) < 4 and not name.startswith("alone")] for found in (real_names, names)]
    groups = [[name[:-6] for name in found] for found in kept]
    rows = [[found.index(name) for name in some] for found, some in zip((real_names, names), kept)]
    bandwidth = median_distance(real[rows[0]], groups[0])
    assert (result["per_prompt"], result["bandwidth"]) == (4, pytest.approx(bandwidth, rel=SAME))
    for found, features, some, labels in zip(result["rows"], (real, generated), rows, groups):
        assert found["distance within prompts"] == pytest.approx(within_group_diversity(features[some], labels), rel=SAME)
        vendi = within_group_vendi(features[some], labels, bandwidth=bandwidth)
        assert found["Vendi within prompts"] == pytest.approx(vendi, rel=SAME)
    times = [temporal_consistency(given) for given in (real_videos, videos)]
    for name in ("change", "jitter"):
        values = [getattr(found, name) for found in times]
        assert [found[name] for found in result["rows"]] == pytest.approx([float(v.mean()) for v in values], rel=1e-6)
        assert row[f"{name} W1"] == pytest.approx(wasserstein(*values), rel=1e-6)
        low, high = result["intervals"][1][name]
        assert low < row[name] < high
    assert 1.4 < row["jitter"] < 1.6, "noise that is new in every frame"
    assert row["distance within prompts"] < result["rows"][0]["distance within prompts"]
    assert [found["n"] for found in result["rows"]] == [8, 15]
    assert result["counts"]["real"] == {"videos": 16, "prompts": 4, "skipped": {}}
    text = (site / "out" / "comparison.md").read_text()
    assert text == capsys.readouterr().out and "| generated | 15 |" in text and "4 samples of each; bandwidth" in text


def test_the_first_row_is_one_half_of_the_real_against_the_other(site):
    result, again, other = run(site), run(site), run(site, "--seed", 1)
    _, real, _ = by_hand(site, "real")
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    expected = frechet_distance(real[order[:8]], real[order[8:]])
    assert result["rows"][0]["Frechet"] == pytest.approx(expected, rel=SAME)
    assert result["rows"][0]["Frechet"] == again["rows"][0]["Frechet"]
    assert other["rows"][0]["Frechet"] != result["rows"][0]["Frechet"]
    assert other["rows"][1]["Frechet"] == result["rows"][1]["Frechet"]


def test_a_batch_is_not_seen_in_the_result(site):
    rows = [run(site, "--batch-size", size, "--workers", 1)["rows"][1] for size in (1, 4, 100)]
    for other in rows[1:]:
        assert {name: other[name] for name in other if name != "videos"} == pytest.approx(
            {name: value for name, value in rows[0].items() if name != "videos"}, rel=1e-3
        )


def test_the_cache_is_used_for_the_same_and_for_nothing_else(site, monkeypatch):
    calls = []
    read = folders.read_video
    monkeypatch.setattr(folders, "read_video", lambda path, **how: calls.append(path.name) or read(path, **how))

    def reads(*more):
        calls.clear()
        result = run(site, "--cache", site / "cache", *more)
        return len(calls), result["rows"]

    first = reads()
    assert first[0] == 31 and reads() == (0, first[1]), "taken from the cache"
    assert reads("--batch-size", 3, "--seed", 2)[0] == 0, "which does not depend on these"
    assert reads("--fps", 8)[0] == 31
    torch.jit.script(Means()).save(site / "means.pt")
    other = ("--features", site / "means.pt", "--run-extractor")
    assert [reads(*other, *more)[0] for more in ((), (), ("--frames", 3), ("--size", 8, 8), ("--size", 8, 8))] == [
        31,
        0,
        31,
        31,
        0,
    ]
    assert reads("--real-pattern", "[a2x]*")[0] == 0, "the same files"
    changed = site / "real" / name_of(3)
    os.utime(changed, ns=(0, 10**9))
    assert reads()[0] == 16, "of the folder with the change"
    np.save(site / "generated" / "new-0.npy", clips(1, seed=3)[0])
    assert reads()[0] == 16
    classifier = DigitClassifier().eval()  # other weights
    classifier.save(site / "digits.safetensors")
    count, rows = reads()
    assert count == 32 and rows[1]["Frechet"] != first[1][1]["Frechet"], "features of another extractor are not mixed in"
    assert not list((site / "cache").glob(".*")), "nothing half-written is left"


def test_a_damaged_cache_is_named(site, capsys):
    run(site, "--cache", site / "cache")
    for path in (site / "cache").iterdir():
        path.write_bytes(b"nothing")
    run(site, "--cache", site / "cache", code=2)
    assert "is damaged" in capsys.readouterr().err


def test_prompts_from_a_file(site):
    names = [[path.name for path in (site / folder).iterdir()] for folder in ("real", "generated")]
    for which, some in zip(("real", "generated"), names):
        (site / f"{which}.json").write_text(json.dumps({name: f"p{ord(name[0])}" for name in some}))
    words = ("--real-groups", site / "real.json", "--generated-groups", site / "generated.json")
    taken = run(site, *words)
    assert taken["counts"]["real"]["prompts"] == 3, "a cat and alone are one now"
    assert taken["per_prompt"] == 4 and run(site, *words, "--per-prompt", 2)["per_prompt"] == 2


def test_without_prompts_there_is_nothing_within_them(site, capsys):
    for folder in ("real", "generated"):
        for index, path in enumerate(sorted((site / folder).iterdir())):
            path.rename(path.with_name(f"v{index}.npy"))
    result = run(site)
    assert result["per_prompt"] is None and result["rows"][1]["Vendi within prompts"] is None
    assert result["rows"][1]["Frechet"] > 0 and "no prompt has two samples" in capsys.readouterr().out


def test_real_videos_without_prompts_give_no_bandwidth(site, capsys):
    for index, path in enumerate(sorted((site / "real").iterdir())):
        path.rename(path.with_name(f"v{index}.npy"))
    row = run(site)["rows"][1]
    assert row["Vendi within prompts"] is None and row["distance within prompts"] > 0
    assert "no bandwidth" in capsys.readouterr().out


def test_videos_that_cannot_be_read(site, capsys):
    (site / "generated" / name_of(2)).write_bytes(b"nothing")
    run(site, "--cache", site / "cache", code=2)
    assert "a cat-2.npy: cannot be read" in capsys.readouterr().err
    result = run(site, "--skip-bad", "--cache", site / "cache")
    assert list(result["counts"]["generated"]["skipped"]) == ["a cat-2.npy"] and result["counts"]["generated"]["videos"] == 14
    assert "1 skipped" in capsys.readouterr().out
    run(site, "--cache", site / "cache", code=2)  # the cache does not hide it
    assert "a cat-2.npy: cannot be read" in capsys.readouterr().err
    for path in (site / "generated").iterdir():
        path.write_bytes(b"nothing")
    run(site, "--skip-bad", code=2)
    assert "none of 15 videos could be read, such as 24-7 shop-0.npy: cannot be read" in capsys.readouterr().err


def test_mp4_and_pictures(site):
    """Files with times and folders of pictures go the same way; one frame has no motion."""
    shutil.rmtree(site / "generated")
    (site / "generated").mkdir()
    for index in range(4):
        write_video(site / "generated" / f"a cat-{index}.mp4", steady(4, 16), first=index, height=32, width=48)
    row = run(site)["rows"][1]
    assert row["n"] == 4 and row["change"] > 0
    extract = {"format": "mean"}
    (site / "mean.safetensors").write_bytes(safetensors.torch.save({"w": torch.ones(1)}, metadata=extract))
    class_of = lambda path: type(
        "Means", (), {"to": lambda self, device: self, "features": lambda self, v: v.mean((2, 3, 4))}
    )()
    extractor = folders.Extractor(site / "mean.safetensors", formats={"mean": class_of})
    reading = folders.Reading(size=(8, 8), frames=1)
    videos = folders.embed_folder(site / "generated", reading, extractor, minimum=4)
    assert videos.features.shape == (4, 3) and bool(videos.jitter.isnan().all())
    real = folders.embed_folder(site / "real", reading, extractor, minimum=4)
    row = folders.compare(real, videos, groups=(real.names, ["a cat"] * 4))["rows"][1]
    assert row["change"] is row["change W1"] is None and row["Frechet"] > 0


def test_the_reader_of_the_laboratory(tmp_path):
    torch.manual_seed(0)
    network = SceneReader(width=4).eval()
    network.save(tmp_path / "reader.safetensors")
    extractor = folders.Extractor(tmp_path / "reader.safetensors", formats=folders.FORMATS)
    videos = torch.rand(2, 3, 17, 64, 64)
    assert torch.allclose(extractor(videos), network.features(videos), atol=1e-5)


def test_features_that_are_not_finite_are_refused(site):
    (site / "mean.safetensors").write_bytes(safetensors.torch.save({"w": torch.ones(1)}, metadata={"format": "nan"}))

    class Network:
        def to(self, device):
            return self

        def features(self, videos):
            return torch.where(videos.mean((2, 3, 4)) > 0.6, torch.nan, 1.0)

    extractor = folders.Extractor(site / "mean.safetensors", formats={"nan": lambda path: Network()})
    with pytest.raises(ValueError, match=r"videos of .*real get NaN or infinite features, such as"):
        folders.embed_folder(site / "real", folders.Reading(size=(8, 8), frames=2), extractor, minimum=2)


@pytest.mark.parametrize(
    "words, text",
    [
        (["--frames", "0"], "frames=0"),
        (["--size", "0", "8"], "size=0x8"),
        (["--fps", "0"], "fps=0"),
        (["--size", "8", "8"], r"does not take videos [15, 3, 4, 8, 8]"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--workers", "0"], "--workers 0"),
        (["--per-prompt", "1"], "--per-prompt 1"),
        (["--features", "no.safetensors"], "no.safetensors"),
        (["--features", "tool.py"], "must end in .safetensors"),
        (["--real-pattern", "*.mov"], "nothing matches '*.mov'"),
        (["--real-pattern", "a cat-*"], "7 videos; at least 12 are needed"),
        (["--generated-pattern", "x*-[012].npy"], "3 videos; at least 4 are needed"),
        (["--real-groups", "no.json"], "no.json"),
        (["--real-groups", "tool.py"], "is no JSON"),
        (["--real-groups", "some.json"], "has no prompt for 15 of 16 videos, such as 24-7 shop-1.npy"),
    ],
)
def test_errors_end_with_2_and_say_what_is_wrong(site, capsys, monkeypatch, words, text):
    monkeypatch.chdir(site)
    Path("tool.py").write_text("nothing")
    Path("some.json").write_text(json.dumps({"24-7 shop-0.npy": "shop"}))
    more = ["--batch-size", "15"] if words[:1] == ["--size"] else []
    run(site, *more, *words, code=2)
    assert text in capsys.readouterr().err


def test_help_says_what_a_program_can_do(capsys):
    with pytest.raises(SystemExit):
        tool.main(["--help"])
    assert "whoever wrote the file can do what you can" in " ".join(capsys.readouterr().out.split())
