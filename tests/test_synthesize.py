"""`prepare_shards.py synthesize`: what the sampler makes of each line, meshes, a kill, skipped and refused prompts."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import launch
import pytest
import torch
from components import tiny_checkpoint, tiny_pipeline
from ranks_synthesize import LINES, REFERENCES

from rcm_mcore.data import load_embedding
from rcm_mcore.data.shards import Shard
from rcm_mcore.data.text import TextEncoder

GOOD = [0, 1, 3, 5, 6, 7]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, mesh):
    path = tmp_path_factory.mktemp("synthesize")
    (path / "pipeline").mkdir()
    tiny_pipeline(path / "pipeline")
    tiny_checkpoint(path / "checkpoint", mesh)
    (path / "prompts.txt").write_text("\n".join(LINES) + "\n")
    (path / "empty.txt").write_text("\n\n")
    return path


@pytest.fixture(scope="module")
def killed(folder):
    """Times of the shards that a run had finished when it was killed in the next one."""
    out = folder / "killed"
    command = [sys.executable, str(Path(__file__).parent / "ranks_synthesize.py"), str(folder)]
    with subprocess.Popen(command, env=launch.environment()) as process:
        deadline = time.monotonic() + 200
        while not (list(out.glob("progress/block_*.json")) and list(out.rglob(".shard_*.partial"))):
            assert process.poll() is None and time.monotonic() < deadline, "it ended, or hangs"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and not (out / "dataset.json").exists()
    return {path: path.stat().st_mtime_ns for path in out.rglob("shard_*.tar")}


@pytest.fixture(scope="module")
def results(folder, killed):
    """What came of the command lines of one rank, which finish the killed run."""
    results = launch.run_ranks(1, "ranks_synthesize.py", folder)
    for name in ("one", "again", "killed"):
        assert results[name]["code"] == 0, results[name]["error"]
    return results


def samples_of(folder):
    found = {}
    for path in sorted(folder.rglob("shard_*.tar")):
        with Shard(path) as shard:
            found |= {key: shard.read(key, members) for key, members in shard.samples()}
    return found


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_sample_i_is_what_the_sampler_makes_of_line_i(folder, results):
    samples = samples_of(folder / "one")
    assert list(samples) == [f"{index:09d}" for index in GOOD]
    encoder = TextEncoder(folder / "pipeline")
    rows, expected = encoder.encode(LINES), torch.load(folder / "references.pt")
    for index in REFERENCES:
        made = samples[f"{index:09d}"]
        torch.testing.assert_close(made.latent, expected[str(index)], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(made.embed, rows[index], rtol=1e-5, atol=1e-5)
        assert made.prompt == LINES[index]
    assert (samples["000000000"].latent - samples["000000005"].latent).norm() > 0.1
    negative = load_embedding(folder / "one" / "negative_embedding.safetensors", text_len=24, text_dim=16)
    (hen,) = encoder.encode(["a hen"])
    torch.testing.assert_close(negative[: len(hen)], hen, rtol=1e-5, atol=1e-5)


def test_skipped_prompts_are_in_the_manifest(folder, results):
    manifest = json.loads((folder / "one" / "dataset.json").read_text())
    assert manifest["counts"] == {"inputs": 8, "samples": 6, "skipped": 2, "shards": 3}
    assert [(entry["name"], entry["reason"]) for entry in manifest["skipped"]] == [
        ("line 3", "the prompt is empty"),
        ("line 5", "the prompt has 31 tokens, the network takes 24"),
    ]
    assert manifest["arguments"]["steps"] == 2 and manifest["arguments"]["shift"] == 3.0


def test_killed_and_continued_is_undisturbed(folder, killed, results):
    assert contents(folder / "killed") == contents(folder / "one")
    assert killed and all(path.stat().st_mtime_ns == time_ns for path, time_ns in killed.items())


def test_meshes_write_the_same(folder, results):
    of_two = launch.run_ranks(2, "ranks_synthesize.py", folder)
    assert [result["code"] for result in of_two.values()] == [0, 0], of_two
    assert contents(folder / "dp2") == contents(folder / "one")
    one, tp2 = samples_of(folder / "one"), samples_of(folder / "tp2")
    assert one.keys() == tp2.keys()
    for key in one:
        torch.testing.assert_close(tp2[key].latent, one[key].latent, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("size", "width 40 must be a multiple of 16"),
        ("frames", "frames=4: must be 4n + 1, such as 1 or 5"),
        ("mesh", "mesh.tp"),
        ("checkpoint", "nowhere"),
        ("encoder", "text encoder folder nowhere"),
        ("prompts", "there is no prompt in it"),
        ("seed", "begun with other arguments (seed was 5, is 6)"),
    ],
)
def test_what_cannot_work_is_refused_and_leaves_nothing(folder, results, name, message):
    assert results[name]["code"] == 2 and message in results[name]["error"]
    assert not (folder / "refused").exists()
