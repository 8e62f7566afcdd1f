"""`prepare_shards.py encode`: tensors against diffusers and transformers, ranks, kills, skipped and refused input."""

import importlib.util
import json
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import launch
import pytest
import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline
from encode_samples import CAPTIONS, write_components, write_inputs
from media_samples import picture
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPVisionModel, UMT5EncoderModel

from rcm_mcore.data import load_embedding
from rcm_mcore.data.encode import EncodeRequest, encode_dataset
from rcm_mcore.data.shards import Shard
from rcm_mcore.data.text import WAN_NEGATIVE_PROMPT

TOOL = Path(__file__).parent.parent / "tools" / "prepare_shards.py"
GOOD = 8
REASONS = {
    "01a.mp4": "cannot be decoded: ",
    "03a.mp4": "the caption is empty",
    "04a.mp4": "there is no caption file 04a.txt",
    "05a.mp4": "the caption has 601 tokens, at most 512 are encoded",
    "06a.mp4": "0.25 s are too short: 5 frames at 16 a second need 0.25 s",
}


@pytest.fixture(scope="module")
def components(tmp_path_factory):
    return write_components(tmp_path_factory.mktemp("components"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs") / "videos", GOOD)


def make_request(components, inputs, out, **fields):
    defaults = dict(
        source=inputs, out=out, vae=str(components), text_encoder=str(components), sizes=((32, 48), (48, 32)), frames=5,
        negative_prompt="a hen", samples_per_shard=2, store_dtype=torch.float32, text_dtype=torch.float32, decode_workers=1,
    )  # fmt: skip
    return EncodeRequest(**{**defaults, **fields})


@pytest.fixture(scope="module")
def undisturbed(components, inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    manifest = encode_dataset(make_request(components, inputs, out), device="cpu")
    return out, manifest


def samples_of(folder):
    """{key: sample} of all shards of a folder."""
    found = {}
    for path in sorted(folder.rglob("shard_*.tar")):
        with Shard(path) as shard:
            for key, members in shard.samples():
                assert key not in found, f"{key} is there twice"
                found[key] = shard.read(key, members)
    return found


def contents(folder):
    """Bytes of every file; the progress of a run and its result."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def frames_of(index, count=5):
    """The video [1, 3, count, H, W] in [-1, 1] that input `index` holds, from its pictures."""
    shape = dict(height=32, width=48) if index % 3 else dict(height=48, width=32)
    pictures = [torch.from_numpy(picture(index + k, **shape)) for k in range(count)]
    return torch.stack(pictures).permute(3, 0, 1, 2)[None] / 255 * 2 - 1


def test_samples_are_what_diffusers_and_transformers_encode(undisturbed, components, inputs):
    out, _ = undisturbed
    names = sorted(path.name for path in inputs.glob("*.mp4"))
    samples = samples_of(out)
    assert len(samples) == GOOD
    vae = AutoencoderKLWan.from_pretrained(components / "vae")
    mean, std = (torch.tensor(v).view(16, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    tokenizer = AutoTokenizer.from_pretrained(components / "tokenizer")
    umt5 = UMT5EncoderModel.from_pretrained(components / "text_encoder")
    for index in range(GOOD):
        sample = samples[f"{names.index(f'{index:02d}.mp4'):09d}"]
        with torch.no_grad():
            latent = (vae.encode(frames_of(index)).latent_dist.mode()[0] - mean) / std
            tokens = tokenizer(CAPTIONS[index % 4].replace("&amp;", "&"), return_tensors="pt")
            embed = umt5(**tokens).last_hidden_state[0]
        torch.testing.assert_close(sample.latent, latent, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sample.embed, embed, rtol=1e-5, atol=1e-5)  # not padded
        assert sample.prompt == CAPTIONS[index % 4] and sample.given is None and sample.image is None
    rows = load_embedding(out / "negative_embedding.safetensors", text_len=8, text_dim=32)
    with torch.no_grad():
        negative = umt5(**tokenizer("a hen", return_tensors="pt")).last_hidden_state[0]
    torch.testing.assert_close(rows[: len(negative)], negative, rtol=1e-5, atol=1e-5)


def test_buckets_counts_and_reasons_are_in_the_manifest(undisturbed):
    out, manifest = undisturbed
    assert json.loads((out / "dataset.json").read_text()) == manifest
    assert manifest["counts"] == {"inputs": GOOD + 5, "samples": GOOD, "skipped": 5, "shards": len(manifest["shards"])}
    assert manifest["samples_by_folder"] == {"32x48": 5, "48x32": 3}
    skipped = {entry["name"]: entry["reason"] for entry in manifest["skipped"]}
    assert skipped.keys() == REASONS.keys()
    assert all(skipped[name].startswith(reason) for name, reason in REASONS.items())
    assert {sample.latent.shape[2:] for sample in samples_of(out / "32x48").values()} == {(4, 6)}
    assert {sample.latent.shape[2:] for sample in samples_of(out / "48x32").values()} == {(6, 4)}
    assert set(manifest["shards"]) == {path.relative_to(out).as_posix() for path in out.rglob("shard_*.tar")}
    assert not list(out.rglob(".*")), "nothing is left over"


@pytest.mark.parametrize("condition", ["image", "first_last"])
def test_given_frames_are_what_wans_pipeline_prepares(components, inputs, tmp_path, condition):
    request = make_request(
        components, inputs, tmp_path / "out", sizes=((32, 48),), condition=condition, image_encoder=str(components)
    )
    encode_dataset(request, device="cpu")
    sample = samples_of(tmp_path / "out")["000000001"]
    pipeline = SimpleNamespace(
        vae=AutoencoderKLWan.from_pretrained(components / "vae"),
        config=SimpleNamespace(expand_timesteps=False),
        vae_scale_factor_temporal=4,
        vae_scale_factor_spatial=8,
        image_encoder=CLIPVisionModel.from_pretrained(components / "image_encoder"),
        image_processor=CLIPImageProcessor.from_pretrained(components / "image_processor"),
        _execution_device=torch.device("cpu"),
    )
    video = frames_of(1)
    last = video[:, :, -1] if condition == "first_last" else None
    with torch.no_grad():
        _, prepared = WanImageToVideoPipeline.prepare_latents(
            pipeline, video[:, :, 0], 1, 16, 32, 48, 5, torch.float32, torch.device("cpu"), last_image=last
        )
        images = [Image.fromarray(picture(index)) for index in ([1, 5] if condition == "first_last" else [1])]
        rows = WanImageToVideoPipeline.encode_image(pipeline, images)
    torch.testing.assert_close(sample.given, prepared[0, 4:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sample.image, rows.reshape(-1, 24), rtol=1e-5, atol=1e-5)
    assert sample.image.shape == (5 * len(images), 24) and (sample.given - sample.latent).norm() > 0.1


def test_images_become_samples_of_one_frame(components, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(picture(4)).save(folder / "a.png")
    (folder / "table.csv").write_text('path,caption\na.png,"a fox, red"\nb.png,none\n')
    request = make_request(components, folder / "table.csv", tmp_path / "out", sizes=((32, 48),), frames=1)
    manifest = encode_dataset(request, device="cpu")
    assert [entry["reason"] for entry in manifest["skipped"]] == ["there is no such file"]
    (sample,) = samples_of(tmp_path / "out").values()
    assert sample.prompt == "a fox, red" and sample.latent.shape == (16, 1, 4, 6)
    assert (tmp_path / "out" / "shard_000000.tar").is_file(), "no subfolder for a single size"


# Ranks and kills


@pytest.mark.parametrize("ranks", [[1, 0], [2, 0, 1]])
def test_any_number_of_ranks_writes_the_same(undisturbed, components, inputs, tmp_path, ranks):
    request = make_request(components, inputs, tmp_path / "out")
    for rank in ranks:
        manifest = encode_dataset(request, device="cpu", rank=rank, world_size=len(ranks))
        assert (manifest is None) == (rank != ranks[-1]), "the last one to finish writes it"
    assert contents(tmp_path / "out") == contents(undisturbed[0])


def test_killed_and_continued_is_undisturbed(undisturbed, components, inputs, tmp_path):
    """A process that writes as rank 0 of 2 is killed in mid-shard; three ranks finish."""
    out = tmp_path / "out"
    script = (
        "import sys, time, torch, test_encode as t; from pathlib import Path; import rcm_mcore.data.encode as e\n"
        "torch.set_num_threads(1)\n"
        "request = t.make_request(*map(Path, sys.argv[1:]))\n"
        "encode = e.MediaEncoder.encode\n"
        "def slow(*args): time.sleep(0.3); return encode(*args)\n"  # so that the kill finds it at work
        "e.MediaEncoder.encode = slow\n"
        "e.encode_dataset(request, device='cpu', rank=0, world_size=2)\n"
    )
    command = [sys.executable, "-c", script, str(components), str(inputs), str(out)]
    with subprocess.Popen(command, env=launch.environment(), stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 200
        while not (list(out.glob("progress/block_*.json")) and list(out.rglob(".shard_*.partial"))):
            assert process.poll() is None and time.monotonic() < deadline, "it ended, or hangs"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    done = {path: path.stat().st_mtime_ns for path in out.rglob("shard_*.tar")}
    assert done and not (out / "dataset.json").exists()
    request = make_request(components, inputs, out)
    for rank in (2, 0, 1):
        encode_dataset(request, device="cpu", rank=rank, world_size=3)
    assert contents(out) == contents(undisturbed[0])
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in done.items()), "complete shards are left alone"


def test_a_complete_folder_is_left_alone_and_a_lost_or_cut_shard_is_written_anew(components, inputs, undisturbed, tmp_path):
    out = tmp_path / "out"
    request = make_request(components, inputs, out)
    encode_dataset(request, device="cpu")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    encode_dataset(make_request(components, inputs, out, decode_workers=3), device="cpu")  # does not change what is written
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before
    (out / "32x48" / "shard_000001.tar").unlink()
    cut = out / "48x32" / "shard_000000.tar"
    cut.write_bytes(cut.read_bytes()[:-512])
    (out / "dataset.json").unlink()
    encode_dataset(request, device="cpu")
    assert contents(out) == contents(undisturbed[0])
    rewritten = {path for path, time_ns in before.items() if path.stat().st_mtime_ns != time_ns}
    blocks = {path for number in (0, 1) for path in out.rglob(f"*_{number:06d}.*")}
    assert rewritten <= {out / "dataset.json"} | blocks


def test_an_error_leaves_no_shard_under_its_name(components, inputs, tmp_path, monkeypatch):
    from rcm_mcore.data.encode import MediaEncoder

    def fail(self, caption, pixels):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(MediaEncoder, "encode", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        encode_dataset(make_request(components, inputs, tmp_path / "out"), device="cpu")
    assert set(contents(tmp_path / "out")) == {"arguments.json", "negative_embedding.safetensors"}


# Refused


def test_an_interrupted_run_with_other_arguments_is_refused(components, inputs, tmp_path):
    out = tmp_path / "out"
    request = make_request(components, inputs, out)
    assert encode_dataset(request, device="cpu", rank=1, world_size=2) is None
    for fields, message in (
        ({"fps": Fraction(8)}, "fps was '16', is '8'"),
        ({"samples_per_shard": 3}, "samples_per_shard was 2, is 3"),
        ({"store_dtype": torch.bfloat16}, "store_dtype was 'float32', is 'bfloat16'"),
        ({"long_captions": "cut"}, "long_captions was 'skip', is 'cut'"),
    ):
        with pytest.raises(ValueError, match=f"begun with other arguments .*{message}"):
            encode_dataset(make_request(components, inputs, out, **fields), device="cpu")
    before = contents(out)
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match=r"not empty and no data set of this tool \(mine\.txt\)"):
        encode_dataset(make_request(components, inputs, other), device="cpu")
    assert contents(out) == before and set(contents(other)) == {"mine.txt"}


def test_a_wrong_encoder_leaves_nothing_behind(components, inputs, tmp_path):
    for field, message in (("vae", "VAE folder"), ("text_encoder", "text encoder folder")):
        with pytest.raises(ValueError, match=message):
            encode_dataset(make_request(components, inputs, tmp_path / "out", **{field: str(tmp_path)}), device="cpu")
    assert not (tmp_path / "out").exists()


def test_nothing_but_skipped_inputs_is_an_error(components, inputs, tmp_path):
    (tmp_path / "table.csv").write_text(f"path,caption\n{inputs / '01a.mp4'},a fox\n{inputs / '00.mp4'},\n")
    with pytest.raises(ValueError, match=r"all 2 inputs were skipped, the first .*01a\.mp4: cannot be decoded"):
        encode_dataset(make_request(components, tmp_path / "table.csv", tmp_path / "out"), device="cpu")
    assert not (tmp_path / "out" / "dataset.json").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"frames": 80}, r"frames=80: must be 4n \+ 1, such as 77 or 81"),
        ({"sizes": ()}, "sizes is empty"),
        ({"sizes": ((32, 48), (32, 48))}, "names one twice"),
        ({"fps": Fraction(0)}, "fps=0: must be positive"),
        ({"condition": "image"}, "condition=image needs an image encoder"),
        ({"image_encoder": "x"}, "condition=text has no use for an image encoder"),
        ({"condition": "first_last", "image_encoder": "x", "frames": 1}, "frames=1 is an image"),
        ({"decode_workers": 0}, "decode_workers=0: must be at least 1"),
    ],
)
def test_requests_that_cannot_work_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        make_request(Path("c"), Path("i"), Path("o"), **fields)


# Command line


def load_main():
    spec = importlib.util.spec_from_file_location("prepare_shards_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_command_line(components, inputs, tmp_path, monkeypatch, capsys):
    main = load_main()
    given = [str(inputs), str(tmp_path / "out"), "--vae", str(components), "--text-encoder", str(components), "--frames", "5"]
    assert main(["encode", *given, "--size", "32x40"]) == 2
    assert "width 40 must be a multiple of 16, such as 32" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    given += ["--size", "32x48", "--samples-per-shard", "4", "--long-captions", "cut"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        assert main(["encode", *given]) == 0
    manifest = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert manifest["counts"] == {"inputs": GOOD + 5, "samples": GOOD + 1, "skipped": 4, "shards": 4}
    assert manifest["arguments"]["negative_prompt"] == WAN_NEGATIVE_PROMPT
    samples = samples_of(tmp_path / "out")
    assert max(len(sample.embed) for sample in samples.values()) == 512
    assert {sample.latent.dtype for sample in samples.values()} == {torch.bfloat16}
