"""Scenes: captions that can be read, a text encoder that binds words, shards, and the sheet."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from rcm_mcore.data.shards import Shard
from rcm_mcore.data.text import TextEncoder
from rcm_mcore.lab import scene_shards
from rcm_mcore.lab.glyphs import glyph_bitmaps
from rcm_mcore.lab.scene_shards import write_dataset
from rcm_mcore.lab.scene_sheet import scene_sheet
from rcm_mcore.lab.scene_text import TEXT_LENGTH, TEXT_WIDTH, build_scene_text_encoder
from rcm_mcore.lab.scenes import (
    COLOURS,
    GLYPHS,
    OBJECTS,
    UNUSED,
    draw_scenes,
    is_heldout,
    legibility,
    parse_prompts,
    prompt_of,
    read_captions,
    render,
)

ROOT = Path(__file__).resolve().parents[1]


class Cells(nn.Module):
    """A codec: means of cells of 4x4 pixels and four frames, less a constant."""

    def __init__(self, mean: float = 0.25) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean))

    def encode(self, videos: Tensor) -> Tensor:
        frames = torch.cat([videos[:, :, :1].expand(-1, -1, 3, -1, -1), videos], 2)
        return nn.functional.avg_pool3d(frames, 4) - self.mean


# captions


@pytest.fixture(scope="module")
def pictures():
    scenes = draw_scenes(60, seed=1)
    return scenes, render(scenes)


def test_captions_are_read_on_every_real_video(pictures) -> None:
    scenes, videos = pictures
    glyphs, correlation = read_captions(videos, scenes.place)
    assert torch.equal(glyphs, scenes.caption) and correlation.min() > 0.999
    assert legibility(videos, scenes.caption, scenes.place).all()


def test_captions_are_read_through_noise_and_blur(pictures) -> None:
    """Noise at a PSNR of 25 dB in each frame alike, blur over three pixels, and a shift by a pixel."""
    scenes, videos = pictures
    generator = torch.Generator().manual_seed(0)
    noise = 10 ** (-25 / 20) * torch.randn(videos[:, :, :1].shape, generator=generator)
    blurred = nn.functional.avg_pool3d(videos, (1, 3, 3), stride=1, padding=(0, 1, 1), count_include_pad=False)
    for changed in (videos + noise, blurred, videos.roll((1, -1), (3, 4)), 1 - videos):
        assert legibility(changed, scenes.caption, scenes.place).double().mean() > 0.98


def test_what_is_not_there_is_not_read(pictures) -> None:
    scenes, videos = pictures
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(400, 3, 2, 64, 64, generator=generator)
    captions, places = scenes.caption[:40].repeat(10, 1), scenes.place[:40].repeat(10)
    guessed = (read_captions(noise, places)[0] == captions).double().mean()
    assert 0.02 < guessed < 0.09, "one in twenty by chance"
    assert legibility(noise, captions, places).double().mean() < 0.005
    empty = torch.full_like(videos, 0.3)
    assert (read_captions(empty, scenes.place)[1] == 0).all() and not legibility(empty, scenes.caption, scenes.place).any()
    assert not legibility(videos, (scenes.caption + 1) % len(GLYPHS), scenes.place).any()
    assert legibility(videos, scenes.caption, 1 - scenes.place).double().mean() < 0.05
    flicker = videos.clone()
    flicker[:, :, ::2] = 1 - flicker[:, :, ::2]  # light and dark by turns: hardly there on average
    assert legibility(flicker + 0.1 * torch.randn_like(videos), scenes.caption, scenes.place).double().mean() > 0.9
    flicker[:, :, 16] = 0.5
    assert not legibility(flicker, scenes.caption, scenes.place).any(), "as often light as dark"


def test_glyphs_are_told_apart() -> None:
    bitmaps = glyph_bitmaps()
    assert bitmaps.shape == (len(GLYPHS), 12, 10) and bitmaps.min() == 0 and bitmaps.max() == 1
    correlation = torch.corrcoef(bitmaps.flatten(1)) - 2 * torch.eye(len(GLYPHS))
    assert correlation.max() < 0.78
    assert bitmaps[:, 0].max() < 0.2, "none is cut off at the top"
    assert (bitmaps[:, :, 0] + bitmaps[:, :, -1]).sum(1).max() < 4, "or at the sides"


def test_captions_of_another_shape_are_refused(pictures) -> None:
    scenes, videos = pictures
    for wrong in (videos[0], videos[:, :1], videos[..., :32], videos[:, :, :0]):
        with pytest.raises(ValueError, match=r"videos: shape .* expected \[n, 3, F, 64, 64\]"):
            read_captions(wrong, scenes.place)
    with pytest.raises(ValueError, match="places"):
        read_captions(videos, scenes.place + 1)
    with pytest.raises(ValueError, match="captions: shape"):
        legibility(videos, scenes.caption[:, :2], scenes.place)


# text


@pytest.fixture(scope="module", params=["built", "shipped"])
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    if request.param == "shipped":
        return TextEncoder(ROOT / "examples" / "scenes" / "text_encoder")
    folder = tmp_path_factory.mktemp("text") / "text_encoder"
    build_scene_text_encoder(folder, seed=0)
    return TextEncoder(folder)


def test_every_word_is_one_token(encoder: TextEncoder) -> None:
    prompts = prompt_of(draw_scenes(500, seed=2))
    words = {word for prompt in prompts for word in prompt.replace(",", "").split()}
    assert len(words) == 71
    assert encoder.token_counts(sorted(words)) == [2] * 71, "and the end token"
    counts = encoder.token_counts(prompts)
    assert counts == [len(prompt.replace(",", " ,").split()) + 1 for prompt in prompts]
    longest = "a large plain red handwritten zero drifting up"
    assert encoder.token_counts([" in front of ".join([longest] * 3) + ", caption A C E at the top"]) == [TEXT_LENGTH]
    assert max(counts) <= TEXT_LENGTH


def probe(rows: list[Tensor], labels: list[int]) -> float:
    """Share of the last third of the rows whose label a linear map, fitted to the others, tells."""
    inputs = nn.functional.pad(torch.stack(rows).double(), (0, 1), value=1.0)
    targets = nn.functional.one_hot(torch.tensor(labels)).double()
    n = 2 * len(rows) // 3
    gram = inputs[:n].T @ inputs[:n] + 1e-3 * torch.eye(inputs.shape[1], dtype=torch.float64)
    guessed = (inputs[n:] @ torch.linalg.solve(gram, inputs[:n].T @ targets[:n])).argmax(1)
    return float((guessed == torch.tensor(labels)[n:]).double().mean())


def test_rows_tell_what_belongs_together(encoder: TextEncoder) -> None:
    scenes = draw_scenes(1500, seed=3)
    prompts = prompt_of(scenes)
    rows = encoder.encode(prompts, batch_size=250)
    assert rows[0].shape[1] == TEXT_WIDTH == encoder.width
    colours: list[Tensor] = []
    characters: list[Tensor] = []
    for prompt, row in zip(prompts, rows):
        words = prompt.replace(",", " ,").split()
        colours += [row[i] for i, word in enumerate(words) if word in COLOURS]
        start = words.index("caption") + 1
        characters += row[start : start + 3]
    used = scenes.shape != UNUSED
    assert probe(characters, [0, 1, 2] * len(prompts)) > 0.99
    for name in ("shape", "texture", "size", "motion"):
        assert probe(colours, getattr(scenes, name)[used].tolist()) > 0.97, name
    slot = torch.arange(OBJECTS)
    neighbours = 2 * (slot > 0) + (slot < used.sum(1, keepdim=True) - 1)  # whether one is in front of it, and one behind
    assert probe(colours, neighbours[used].tolist()) > 0.9


# shards


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "scenes"
    manifest = write_dataset(out, Cells(), count=10, seed=5, samples_per_shard=4, show=False)
    assert manifest["counts"] == {"inputs": 10, "samples": 10, "skipped": 0, "shards": 3}
    return out


def contents(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_shards_hold_latents_and_text_rows_of_the_scenes(written: Path) -> None:
    encoder = TextEncoder(written / "text_encoder")
    samples = []
    for path in sorted(written.glob("shard_*.tar")):
        with Shard(path) as shard:
            samples += [shard.read(key, members) for key, members in shard.samples()]
    assert [sample.key for sample in samples] == [f"{index:09d}" for index in range(10)]
    assert not is_heldout(parse_prompts([sample.prompt for sample in samples])).any()
    assert len({sample.prompt for sample in samples}) == 10, "every shard has scenes of its own"
    for block, count in enumerate((4, 4, 2)):
        scenes = draw_scenes(count, (5, block))
        part = samples[4 * block : 4 * block + count]
        prompts = prompt_of(scenes)
        latents = Cells().encode(render(scenes)).bfloat16()
        for sample, prompt, latent, rows in zip(part, prompts, latents, encoder.encode(prompts)):
            assert sample.prompt == prompt and torch.equal(sample.latent, latent)
            assert sample.embed.dtype == torch.bfloat16
            torch.testing.assert_close(sample.embed, rows.bfloat16(), atol=0.02, rtol=0.02)
    rows = safetensors.torch.load_file(written / "negative_embedding.safetensors")["embed"]
    torch.testing.assert_close(rows, encoder.encode([""])[0])


def test_shards_of_single_frames(tmp_path: Path) -> None:
    """Every latent frame with its prompt, the first ones of a block's videos before the second ones."""
    out = tmp_path / "frames"
    manifest = write_dataset(out, Cells(), count=13, seed=5, samples_per_shard=10, single_frames=True, show=False)
    assert manifest["counts"]["samples"] == 13 and manifest["arguments"]["single_frames"] is True
    for block, (videos, samples) in enumerate(((2, 10), (1, 3))):
        scenes = draw_scenes(videos, (5, block))
        latents, prompts = Cells().encode(render(scenes)).bfloat16(), prompt_of(scenes)
        with Shard(out / f"shard_{block:06d}.tar") as shard:
            read = [shard.read(key, members) for key, members in shard.samples()]
        assert len(read) == samples
        for i, sample in enumerate(read):
            assert torch.equal(sample.latent, latents[i % videos, :, i // videos][:, None])
            assert sample.prompt == prompts[i % videos]
    with pytest.raises(ValueError, match="single_frames was True, is None"):
        write_dataset(out, Cells(), count=13, seed=5, samples_per_shard=10)


def test_a_text_encoder_that_is_given(written: Path, tmp_path: Path) -> None:
    """That of the example, which other versions of transformers and sentencepiece would not build again."""
    shipped, out = ROOT / "examples" / "scenes" / "text_encoder", tmp_path / "scenes"
    write_dataset(out, Cells(), count=2, seed=5, samples_per_shard=4, text_encoder=shipped, show=False)
    for path in shipped.iterdir():
        assert (out / "text_encoder" / path.name).read_bytes() == path.read_bytes()
    with Shard(out / "shard_000000.tar") as shard:
        (sample, _) = (shard.read(key, members) for key, members in shard.samples())
    (rows,) = TextEncoder(shipped).encode([sample.prompt])
    torch.testing.assert_close(sample.embed, rows.bfloat16(), atol=0.02, rtol=0.02)
    for given in (None, written / "text_encoder"):
        with pytest.raises(ValueError, match="text_encoder_sha256 was"):
            write_dataset(out, Cells(), count=2, seed=5, samples_per_shard=4, text_encoder=given)
    other = tmp_path / "other"
    shutil.copytree(shipped, other)
    with (other / "spiece.model").open("ab") as file:  # the same weights, another tokenizer
        file.write(b"x")
    with pytest.raises(ValueError, match="text_encoder_sha256 was"):
        write_dataset(out, Cells(), count=2, seed=5, samples_per_shard=4, text_encoder=other)
    (other / "tokenizer.json").unlink()
    for folder, name in ((other, "tokenizer.json"), (tmp_path / "nowhere", "config.json")):
        with pytest.raises(ValueError, match=f"text_encoder={folder}: no {name} in it"):
            write_dataset(tmp_path / "new", Cells(), count=2, seed=5, text_encoder=folder)
    assert not (tmp_path / "new").exists()


def test_processes_are_dealt_to_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    devices = [[scene_shards._device_of(rank, device) for rank in range(3)] for device in ("cuda", "cuda:1", "cpu")]
    assert devices == [["cuda:0", "cuda:1", "cuda:0"], ["cuda:1"] * 3, ["cpu"] * 3]


def test_what_is_lost_is_written_anew_and_nothing_else(written: Path, tmp_path: Path) -> None:
    whole = contents(written)
    out = tmp_path / "scenes"
    shutil.copytree(written, out)
    for name in ("dataset.json", "shard_000001.tar", "progress/block_000002.json", "negative_embedding.safetensors"):
        (out / name).unlink()
    kept = (out / "shard_000000.tar").stat().st_mtime_ns
    write_dataset(out, Cells(), count=10, seed=5, samples_per_shard=4, show=False)
    assert contents(out) == whole and (out / "shard_000000.tar").stat().st_mtime_ns == kept
    (out / "shard_000000.tar").unlink()  # a complete folder is not looked through
    assert write_dataset(out, Cells(), count=10, seed=5, samples_per_shard=4) == json.loads(whole["dataset.json"])
    for changed in ({"seed": 6}, {"count": 11}, {"dtype": torch.float32}):
        with pytest.raises(ValueError, match="begun with other arguments"):
            write_dataset(out, Cells(), **({"count": 10, "seed": 5, "samples_per_shard": 4} | changed))
    with pytest.raises(ValueError, match="codec_sha256"):
        write_dataset(out, Cells(0.3), count=10, seed=5, samples_per_shard=4)


def test_several_processes_write_the_same(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, last rank first, each with its arguments as they travel: real ones take half a minute to start."""
    ranks: list[int] = []

    def spawn(function, args, nprocs: int) -> None:
        for rank in reversed(range(nprocs)):
            ranks.append(rank)
            function(rank, *pickle.loads(pickle.dumps(args)))

    monkeypatch.setattr(torch.multiprocessing, "spawn", spawn)
    threads = torch.get_num_threads()
    write_dataset(tmp_path / "scenes", Cells(), count=10, seed=5, samples_per_shard=4, processes=8, show=False)
    torch.set_num_threads(threads)
    assert ranks == [2, 1, 0], "no more than there are shards"
    assert contents(tmp_path / "scenes") == contents(written)


def test_what_cannot_be_written_is_refused_before_anything_is(tmp_path: Path) -> None:
    out = tmp_path / "scenes"
    with pytest.raises(ValueError, match="count=0, processes=1"):
        write_dataset(out, Cells(), count=0, seed=0)
    with pytest.raises(ValueError, match="codec is a Linear"):
        write_dataset(out, nn.Linear(1, 1), count=4, seed=0)
    assert not out.exists()


# the sheet


def test_sheet_shows_frames_and_prompts(tmp_path: Path, pictures) -> None:
    from PIL import Image

    scenes, videos = pictures
    path = tmp_path / "sheet.png"
    scene_sheet(videos[:3], prompt_of(scenes)[:3], path, frames=(0, 16), columns=2, scale=3)
    with Image.open(path) as sheet:
        assert sheet.width == 2 * (2 * 64 * 3 + 8) + 8
        pixels = torch.tensor(list(sheet.getdata())).view(sheet.height, sheet.width, 3)
    last = (videos[2, :, 16] * 255).round().long().permute(1, 2, 0)
    bottom = sheet.height - 8
    assert torch.equal(pixels[bottom - 192 : bottom : 3, 8 + 192 : 8 + 384 : 3], last)
    assert (pixels[: bottom - 192 - 192, :400].sum(2) < 200).any(), "there is text"
    for wrong, prompts, frames, message in (
        (videos[:2, 0], ["a", "b"], (0,), "videos: shape"),
        (videos[:2], ["a"], (0,), "prompts: 1 for 2 videos"),
        (videos[:2], ["a", "b"], (17,), r"frames: \[17\]"),
        (videos[:2] / 0, ["a", "b"], (0,), "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            scene_sheet(wrong, prompts, path, frames=frames)
