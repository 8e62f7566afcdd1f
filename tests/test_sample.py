"""From prompts to files: what is written, a kill and what comes after it, decoding beside sampling, bad requests."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import version

import av
import numpy as np
import pytest
import torch
from components import PROMPTS, VIDEO_MODEL, tiny_checkpoint, tiny_pipeline, tiny_vae
from launch import environment, run_ranks
from PIL import Image
from safetensors.torch import load_file

from rcm_mcore import sample
from rcm_mcore.checkpoint import write_network
from rcm_mcore.data import media
from rcm_mcore.data.digits import DigitCodec
from rcm_mcore.data.vae import VideoVAE
from rcm_mcore.diffusion.samplers import few_step_times, shifted_sigmas
from rcm_mcore.sampling import Draw, Output, SampleRequest, draws_of
from rcm_mcore.sampling.background import Background
from rcm_mcore.sampling.folder import SampleFolder, checkpoint_digest
from rcm_mcore.sampling.generate import Finisher

NAMES = ["000_a-red-fox.mp4", "001_a-blue-whale-at-night.mp4", "002_a-green-bird.mp4"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory, mesh):
    folder = tmp_path_factory.mktemp("sample")
    (folder / "pipeline").mkdir()
    tiny_pipeline(folder / "pipeline")
    tiny_checkpoint(folder / "checkpoint", mesh)
    return folder


@pytest.fixture(scope="module")
def runs(parts):
    """The folder of every command line, and what came of each."""
    return parts, run_ranks(1, "ranks_generate.py", parts)


def latents(folder):
    return load_file(folder / "latents.safetensors")["latents"]


def facts(folder):
    return json.loads((folder / "samples.json").read_text())


def test_every_sample_has_its_video(runs):
    folder, results = runs
    assert results["video"]["code"] == 0, results["video"]["error"]
    assert results["video"]["calls"] == [[0, 1], [2]]
    names = sorted(path.name for path in (folder / "video").iterdir())
    assert names == [*NAMES, "contact_sheet.png", "latents.safetensors", "samples.json"]
    vae = VideoVAE(folder / "pipeline")
    decoded = [media.to_pixels(vae.decode(row[None])[0]).numpy() for row in latents(folder / "video")]
    for number, name in enumerate(NAMES):
        with av.open(str(folder / "video" / name)) as container:
            assert container.streams.video[0].average_rate == 16
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        assert frames.shape == decoded[number].shape == (5, 32, 32, 3)
        # In brightness: random weights make noise, of whose colors an mp4 keeps a quarter.
        errors = [np.abs((frames.astype(float) - pixels) @ (0.2126, 0.7152, 0.0722)).mean() for pixels in decoded]
        assert errors[number] < 2 and 2 * errors[number] < min(errors[:number] + errors[number + 1 :]), errors
    assert np.asarray(Image.open(folder / "video" / "contact_sheet.png")).std() > 10


def test_the_record_says_how(runs):
    folder, _ = runs
    there = facts(folder / "video")
    assert there["complete"] and there["request"]["steps"] == there["evaluations"] == there["timed_videos"] - 1 == 2
    assert there["times"] == few_step_times(2) and there["seconds_per_video"] == there["seconds"] / 3 > 0
    assert there["checkpoint"]["path"] == str(folder / "checkpoint") and there["model"]["in_channels"] == 16
    assert there["video"] == {"frames": 5, "height": 32, "width": 32, "fps": 16.0}
    assert there["mesh"]["ranks"] == there["mesh"]["dp"] == 1 and there["versions"]["torch"] == version("torch")
    for number, (record, name) in enumerate(zip(there["samples"], NAMES, strict=True)):
        digest = hashlib.sha256((folder / "video" / name).read_bytes()).hexdigest()
        record = record | {"prompt": PROMPTS[number]}
        assert record == {
            "number": number,
            "prompt": PROMPTS[number],
            "seed": 5,
            "index": number,
            "file": name,
            "sha256": digest,
        }


def test_one_sample_again_from_its_record(runs):
    folder, _ = runs
    torch.testing.assert_close(latents(folder / "alone"), latents(folder / "video")[2:], rtol=1e-4, atol=1e-5)


def test_a_finished_run_is_left_alone(runs):
    _, results = runs
    assert results["again"]["code"] == 0 and results["again"]["calls"] == results["again"]["touched"] == []


def test_another_request_is_refused(runs):
    _, results = runs
    assert results["other"]["code"] == 2 and results["other"]["calls"] == []
    assert "holds samples of another request: request.seed is 5 there and 6 here" in results["other"]["error"]


def test_a_killed_run_leaves_complete_files_and_goes_on(runs):
    folder, results = runs
    killed, resumed = results["killed"], results["resumed"]
    assert killed["code"] == "killed" and killed["calls"] == [[0], [1], [2]]
    # What was in the queue is dropped; the first was written, at least.
    assert set(killed["files"]) <= {"samples.json", *NAMES[:2], ".parts/0.safetensors", ".parts/1.safetensors"}
    assert NAMES[0] in killed["files"] and not killed["facts"]["complete"] and len(killed["facts"]["samples"]) == 3
    assert resumed["code"] == 0, resumed["error"]
    kept = [i for i in range(3) if f".parts/{i}.safetensors" in killed["files"]]
    assert resumed["calls"] == [[i] for i in range(3) if i not in kept]
    assert sorted(p.name for p in (folder / "killed").iterdir()) == sorted(p.name for p in (folder / "video").iterdir())
    torch.testing.assert_close(latents(folder / "killed"), latents(folder / "video"), rtol=1e-4, atol=1e-5)
    assert facts(folder / "killed")["timed_videos"] == 3 - len(kept)


def test_an_error_of_the_thread_ends_the_run(runs):
    _, results = runs
    assert results["full"]["code"] == 2 and "No space left on device" in results["full"]["error"]
    assert results["full"]["files"] in (["000_a-red-fox.mp4", "samples.json"], [NAMES[0], NAMES[2], "samples.json"])


def test_decoding_goes_on_beside_the_next_batch(runs):
    folder, results = runs
    assert results["overlap"]["code"] == 0, results["overlap"]["error"]
    assert len(list((folder / "overlap").glob("*.mp4"))) == 3


def test_one_frame_is_a_picture(runs):
    folder, _ = runs
    (row, _) = latents(folder / "image")
    pixels = media.to_pixels(VideoVAE(folder / "pipeline").decode(row[None])[0]).numpy()
    shown = np.asarray(Image.open(folder / "image" / "000_a-red-fox.png"))
    assert shown.shape == (32, 32, 3) and np.abs(shown.astype(int) - pixels[0]).max() <= 1


def test_samples_of_several_seeds(runs):
    folder, results = runs
    rows = latents(folder / "seeds")
    found = [(r["prompt"], r["seed"], r["index"]) for r in facts(folder / "seeds")["samples"]]
    assert found == [(PROMPTS[p], seed, p) for p in (0, 1) for seed in (7, 5)]
    assert (rows[0] - rows[1]).std() > 0.1 and results["several"]["code"] == 0
    one, other, *_ = latents(folder / "several")
    assert (one - other).std() > 0.1, "one prompt, two noises"
    found = [(r["prompt"], r["seed"], r["index"]) for r in facts(folder / "several")["samples"]]
    assert found == [(PROMPTS[i // 2], 0, i) for i in range(4)]


def test_teacher(runs):
    folder, results = runs
    assert results["teacher"]["code"] == 0, results["teacher"]["error"]
    there = facts(folder / "teacher")
    assert there["sigmas"] == shifted_sigmas(2, 5.0) and there["evaluations"] == 4 and there["output"]["tiled"]


def test_digits_and_latents_without_a_vae(runs):
    folder, results = runs
    assert results["digits"]["code"] == 0, results["digits"]["error"]
    names = ["latents.safetensors", "samples.json", "videos.gif", "videos.safetensors"]
    assert sorted(path.name for path in (folder / "digits").iterdir()) == names
    torch.testing.assert_close(latents(folder / "digits"), latents(folder / "video")[:1], rtol=1e-4, atol=1e-5)
    videos = load_file(folder / "digits" / "videos.safetensors")["videos"]
    assert torch.equal(videos, DigitCodec.load(folder / "codec.json").decode(latents(folder / "digits")))


def test_a_prompt_that_is_too_long_is_named(runs):
    _, results = runs
    assert results["long"]["code"] == 2 and results["long"]["calls"] == []
    message = r"prompt 'red red .* has \d+ tokens: at most 24 reach the network \(model.text_len=24\)"
    assert re.search(message, results["long"]["error"])


def test_two_ranks_write_the_same(runs):
    folder, _ = runs
    results = run_ranks(2, "ranks_generate.py", folder)
    for name, dp in (("dp2", 2), ("tp2", 1)):
        assert results[name]["code"] == 0, results[name]["error"]
        torch.testing.assert_close(latents(folder / name), latents(folder / "video"), rtol=1e-4, atol=1e-5)
        assert sorted(p.name for p in (folder / name).iterdir()) == sorted(p.name for p in (folder / "video").iterdir())
        assert facts(folder / name)["mesh"]["dp"] == dp
    assert results["dp2"]["calls"] == [[0], [2]]


def request(**fields):
    needed = dict(checkpoint="c", text_encoder="t", latent_shape=(4, 2, 4, 4), prompts=("a", "b"))
    return SampleRequest(**{**needed, **fields})


def test_samplers_leave_nothing_behind(parts):
    """A mesh's groups poll in dozens of threads."""
    code = f"""
import os, torch.distributed as dist
from rcm_mcore.sampling import SampleRequest, sample
request = SampleRequest(checkpoint={str(parts / "checkpoint")!r}, which="student", prompts=("a red fox",), steps=1,
                        text_encoder={str(parts / "pipeline")!r}, latent_shape=(16, 1, 4, 4))
counts = [len(os.listdir("/proc/self/task")) for _ in range(3) if sample(request).seconds > 0]
assert not dist.is_initialized()
assert counts[1] == counts[2], counts
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_draws():
    pairs = lambda **fields: [(d.number, d.prompt, d.seed, d.index) for d in draws_of(request(**fields))]
    assert pairs(seed=3) == [(0, "a", 3, 0), (1, "b", 3, 1)]
    assert pairs(num_per_prompt=2, first_index=9) == [(0, "a", 0, 9), (1, "a", 0, 10), (2, "b", 0, 11), (3, "b", 0, 12)]
    assert pairs(seeds=(3, 1), first_index=4) == [(0, "a", 3, 4), (1, "a", 1, 4), (2, "b", 3, 5), (3, "b", 1, 5)]


@pytest.fixture
def refused(parts, monkeypatch, capsys):
    """What a command line is refused with."""
    monkeypatch.setattr(sample, "_leave_process_group", lambda: None)  # that of other tests
    monkeypatch.setattr("rcm_mcore.sampling.sampler.make_mesh", lambda *_: pytest.fail("too late"))

    def run(out, *more):
        if "VAE4" in more:
            tiny_vae(out.parent, z_dim=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
            more = ["--vae", str(out.parent)]
        if "WIDE" in more:
            write_network(out.parent / "wide", {"a": torch.zeros(2)}, VIDEO_MODEL | {"text_dim": 24})
            more = ["--checkpoint", str(out.parent / "wide")]
        argv = ["--checkpoint", str(parts / "checkpoint"), "--which", "student", "--pipeline", str(parts / "pipeline")]
        prompt = [] if "--prompt" in more else ["--prompt", "a red fox"]
        assert sample.main([*argv, *prompt, "--size", "32x32", "--out", str(out), *more]) == 2
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    "more, message",
    [
        (["--size", "480"], "--size 480: must be HxW in pixels, such as 480x832"),
        (["--size", "480x840"], "--size 480x840: height and width must be multiples of 16"),
        (["--size", "0x16"], "--size 0x16: height and width"),
        (["--frames", "80"], r"--frames 80: must be 4n \+ 1, such as 77 or 81"),
        (["--latent-shape", "16", "2", "4", "4"], "--latent-shape says what --size and --frames say"),
        (["--prompts", "FILE"], "give prompts either by --prompt TEXT or by --prompts FILE"),
        (["--prompt", "  "], "--prompt '': a prompt must not be empty"),
        (["--batch-size", "0"], "--batch-size 0: must be at least 1"),
        (["--num-per-prompt", "0"], "--num-per-prompt 0: must be at least 1"),
        (["--first-index", "-1"], "--first-index -1: must be at least 0"),
        (["--seeds", "1", "2", "1"], "--seeds 1 2 1: each must be there once"),
        (["--seeds", "1", "--num-per-prompt", "2"], "--num-per-prompt 2 goes with --seed"),
        (["--steps", "9"], "steps=9: must be from 1 to 4"),
        (["--guidance", "5"], "--guidance 5.0: a distilled student is sampled without guidance"),
        (["--negative-prompt", "bad"], "--negative-prompt: without guidance nothing looks at it"),
        (["--sampler", "euler", "--guidance", "2", "--negative-prompt", "x", "--negative-embedding", "y"], "give one of them"),
        (["--which", "ema"], "holds no ema network; it holds: student"),
        (["--fps", "0"], "--fps 0.0: must be positive"),
        (["--fps", "inf"], "--fps inf: must be positive"),
        (["--sigma-max", "nan"], "must fall from arctan"),
        (["--steps", "2", "--mid-times", "nan"], "must fall from arctan"),
        (["--sampler", "unipc", "--shift", "nan"], "shift=nan positive"),
        (["--sampler", "euler", "--guidance", "nan"], "--guidance nan: must be a number"),
        (["--vae", "VAE4"], "--vae .*: its latents have 4 channels, the network's 16"),
        (["--text-encoder", "nowhere"], "--text-encoder nowhere: no tokenizer_config.json in it or in tokenizer/"),
        (["--checkpoint", "WIDE"], "--text-encoder .*: its rows have 16 numbers, the network takes model.text_dim=24"),
        (["--codec", "x"], "--codec is for the digits task and --vae for videos"),
        (["--vae", "nowhere"], "VAE folder nowhere: no config.json in it or in vae/"),
        (["--tp", "2"], "mesh.tp=2 does not divide the 1 ranks"),
        (["--checkpoint", "nowhere"], "nowhere is no checkpoint of ours"),
    ],
)
def test_bad_command_lines(refused, tmp_path, more, message):
    """Refused before there is a mesh, or anything on disk."""
    assert re.search(message, refused(tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_refused(refused, tmp_path):
    (tmp_path / "thesis.tex").touch()
    assert "is not empty and holds no samples.json" in refused(tmp_path)
    for content in ("{}", "[]", '{"request": 1, "output": {}, "checkpoint": {}}'):
        (tmp_path / "samples.json").write_text(content)
        assert "is not of this program" in refused(tmp_path)


def test_latents_that_are_not_finite_are_not_written(parts, tmp_path):
    output = Output(folder=str(tmp_path))
    folder = SampleFolder(request(checkpoint=str(parts / "checkpoint")), output)
    finisher = Finisher(folder, output, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"sample 3 \('a fox', seed 5\): the network gave numbers that are not finite"):
        finisher(Draw(3, "a fox", 5, 0), torch.tensor([1.0, float("inf")]))
    assert not list(tmp_path.iterdir())


def test_background_is_bounded_and_raises():
    done = []
    with Background(done.append, ahead=2) as background:
        for i in range(9):
            background.put(i)
            assert len(done) >= i - 2
    assert done == list(range(9))
    with pytest.raises(ZeroDivisionError), Background(lambda x: 1 / x) as background:
        background.put(0)
    with pytest.raises(ZeroDivisionError), Background(lambda x: 1 / x) as background:
        for i in range(9):
            background.put(i)
        pytest.fail("too late")


def test_a_converted_checkpoint_that_changes_is_told_apart(parts, tmp_path):
    """Converted again under the same name: its samples are others."""
    shutil.copytree(parts / "checkpoint", tmp_path / "checkpoint")
    digests = []
    for content in ("a  x\n", "b  x\n"):
        (tmp_path / "checkpoint" / "SHA256SUMS").write_text(content)
        digests.append(checkpoint_digest(tmp_path / "checkpoint"))
    assert None not in digests and digests[0] != digests[1]


@pytest.mark.parametrize("made", [None, ".parts/0.safetensors", "latents.safetensors"])
def test_a_request_that_made_nothing_stands_in_nobodys_way(parts, tmp_path, made):
    """A prompt that is too long is known when the network is there: the corrected one goes to the same folder."""
    shape = dict(latent_shape=(16, 1, 4, 4), checkpoint=str(parts / "checkpoint"), text_encoder="")
    output = Output(folder=str(tmp_path))
    first = SampleFolder(SampleRequest(prompts=("too long",), **shape), output)
    (tmp_path / ".parts").mkdir()
    (tmp_path / "samples.json").write_text(json.dumps({"complete": False, **first._asked}))
    if made is None:
        assert not SampleFolder(SampleRequest(prompts=("shorter",), **shape), output).is_complete
        return
    (tmp_path / made).touch()
    with pytest.raises(ValueError, match="another request"):
        SampleFolder(SampleRequest(prompts=("shorter",), **shape), output)
