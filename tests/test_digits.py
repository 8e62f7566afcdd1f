"""The digits task: videos, codec, prompts, text encoder, shards, classifier."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import sentencepiece
import torch
from transformers import AutoTokenizer, T5Config, T5EncoderModel, UMT5EncoderModel

from rcm_mcore.data import digits as data
from rcm_mcore.data.digits import DigitCodec, all_prompts, parse_prompt, prompt_of
from rcm_mcore.data.shards import Shard
from rcm_mcore.data.text import TextEncoder, build_text_encoder, clean_prompt, train_tokenizer
from rcm_mcore.evaluation import digits as evaluation
from rcm_mcore.evaluation.digits import DigitClassifier, DigitPrediction, adherence, train_classifier


@pytest.fixture(scope="module")
def splits() -> tuple[data.DigitVideos, data.DigitVideos]:
    return data.train_heldout_videos(seed=0)


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text") / "text_encoder"
    train_tokenizer(all_prompts(), folder)
    build_text_encoder(folder, seed=0)
    return folder


# videos


def test_split_is_stratified_and_disjoint() -> None:
    images = data.load_images()
    train, heldout = data.split_indices(images.digits, seed=0)
    assert (len(train), len(heldout)) == (1433, 364)
    assert sorted([*train.tolist(), *heldout.tolist()]) == list(range(1797))
    total, kept = images.digits.bincount(), images.digits[heldout].bincount()
    assert (kept == (0.2 * total.double()).ceil()).all()
    assert torch.equal(heldout, data.split_indices(images.digits, seed=0)[1])
    assert not torch.equal(heldout, data.split_indices(images.digits, seed=1)[1])


def test_videos_of_the_splits_share_no_image(splits) -> None:
    """Every image once per direction; whole digits are found in each frame, so crops identify the image."""
    train, heldout = splits
    assert (len(train.videos), len(heldout.videos)) == (5732, 1456)
    found = []
    for split in splits:
        positions: dict[bytes, set[int]] = {}
        for video, direction in zip(split.videos, split.directions.tolist()):
            crop, cross = first_crop(video, direction)
            positions.setdefault(crop, set()).add(cross)
        counts = torch.stack([split.digits[split.directions == way].bincount() for way in range(4)])
        assert (counts == counts[0]).all()
        assert sum(len(crosses) > 1 for crosses in positions.values()) > 0.9 * len(positions), "drawn per direction"
        found.append(positions.keys())
    assert not found[0] & found[1]


def first_crop(video: torch.Tensor, direction: int) -> tuple[bytes, int]:
    """The 8x8 scan in the first frame, and its offset across the motion."""
    name = data.DIRECTIONS[direction]
    along = 8 if name in ("left", "up") else 0
    line = video[0].sum(0 if name in ("up", "down") else 1)
    cross = max((0, 4, 8), key=lambda offset: float(line[offset : offset + 8].sum()))
    top, left = (cross, along) if name in ("left", "right") else (along, cross)
    return video[0, top : top + 8, left : left + 8].contiguous().numpy().tobytes(), cross


@pytest.mark.parametrize("name, step", [("left", (0, -2)), ("right", (0, 2)), ("up", (-2, 0)), ("down", (2, 0))])
def test_digit_moves_two_pixels_a_frame(name: str, step: tuple[int, int]) -> None:
    image = data.load_images().images[5]
    for cross in data.CROSS_POSITIONS:
        (video,) = data.render_videos(image[None], data.DIRECTIONS.index(name), cross)
        assert video.shape == (4, 16, 16)
        top, left = (cross, 8 if name == "left" else 0) if step[0] == 0 else (8 if name == "up" else 0, cross)
        for frame in range(4):
            y, x = top + frame * step[0], left + frame * step[1]
            assert torch.equal(video[frame, y : y + 8, x : x + 8], image)
            assert torch.isclose(video[frame].sum(), image.sum()), "and nothing else"


def test_positions_vary_and_depend_on_the_seed_alone(splits) -> None:
    again = data.train_heldout_videos(seed=0)
    assert all(torch.equal(a, b) for x, y in zip(splits, again) for a, b in zip(x, y))
    left = splits[0].videos[splits[0].directions == 0][:, 0]
    rows = left.sum(2)  # [n, 16]: rows 0-3 are lit only at offset 0, rows 12-15 only at 8
    at_top, at_bottom = (rows[:, :4].sum(1) > 0).double().mean(), (rows[:, 12:].sum(1) > 0).double().mean()
    assert 0.28 <= float(at_top) <= 0.38 and 0.28 <= float(at_bottom) <= 0.38
    assert len(set(splits[0].digits[:20].tolist())) > 3 and len(set(splits[0].directions[:20].tolist())) == 4


def test_prompts_round_trip(splits) -> None:
    assert prompt_of(7, 0) == "a handwritten seven moving left"
    prompts = all_prompts()
    assert len(set(prompts)) == 40
    assert [parse_prompt(prompt) for prompt in prompts] == [(digit, way) for digit in range(10) for way in range(4)]
    labels = [parse_prompt(prompt) for prompt in splits[1].prompts()]
    assert labels == list(zip(splits[1].digits.tolist(), splits[1].directions.tolist()))


@pytest.mark.parametrize(
    "text",
    ["", "a handwritten seven moving", "a handwritten ten moving left", "a handwritten seven moving back",
     "a printed seven moving left", "a handwritten seven moving left now", "a handwritten seven staying left"],
)  # fmt: skip
def test_other_prompts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected 'a handwritten DIGIT moving DIRECTION'"):
        parse_prompt(text)


def test_prompt_of_refuses_what_does_not_exist() -> None:
    for digit, direction in ((10, 0), (-1, 0), (0, 4), (0, -1)):
        with pytest.raises(ValueError, match="must be 0 to"):
            prompt_of(digit, direction)


# codec


def test_codec_is_exact_and_standardises(splits) -> None:
    train, heldout = splits
    codec = DigitCodec.fit(train.videos)
    assert abs(codec.mean - 0.0762) <= 5e-4 and abs(codec.std - 0.2296) <= 5e-4
    latents = codec.encode(train.videos)
    assert latents.shape == (5732, 32, 2, 4, 4) and codec.channels == 32
    assert abs(float(latents.double().mean())) <= 1e-5 and abs(float(latents.double().std()) - 1) <= 1e-5
    assert float((codec.decode(codec.encode(heldout.videos)) - heldout.videos).abs().max()) <= 1e-6


def test_codec_puts_a_cell_of_pixels_and_frames_into_channels() -> None:
    codec = DigitCodec(mean=0.25, std=0.5, space=2, time=3)
    video = torch.rand(2, 6, 4, 8, generator=torch.Generator().manual_seed(0))
    latents = codec.encode(video)
    assert latents.shape == (2, 12, 2, 2, 4)
    for n, f, h, w in ((0, 0, 0, 0), (1, 4, 3, 2), (1, 5, 2, 7), (0, 2, 1, 5)):
        channel = (f % 3) * 4 + (h % 2) * 2 + w % 2
        assert torch.isclose(latents[n, channel, f // 3, h // 2, w // 2], (video[n, f, h, w] - 0.25) / 0.5)
    assert float((codec.decode(latents) - video).abs().max()) <= 1e-6
    wild = codec.decode(10 * torch.ones_like(latents)), codec.decode(-10 * torch.ones_like(latents))
    assert float(wild[0].min()) == 1.0 and float(wild[1].max()) == 0.0, "decoded videos are clamped"


def test_codec_file(tmp_path: Path) -> None:
    codec = DigitCodec(mean=0.1, std=1 / 3, space=2, time=1)
    codec.save(tmp_path / "codec.json")
    assert DigitCodec.load(str(tmp_path / "codec.json")) == codec
    good = json.loads((tmp_path / "codec.json").read_text())
    missing = {name: value for name, value in good.items() if name != "std"}
    for content in ("", "[]", json.dumps({**good, "format": "other"}), json.dumps(missing), json.dumps({**good, "x": 1})):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match=r"bad.json: no digit codec"):
            DigitCodec.load(tmp_path / "bad.json")


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda codec: codec.encode(torch.zeros(2, 3, 16, 16)), "F a multiple of 2"),
        (lambda codec: codec.encode(torch.zeros(2, 4, 16, 18)), r"shape \[2, 4, 16, 18\]"),
        (lambda codec: codec.encode(torch.zeros(4, 16, 16)), r"expected \[n, F, H, W\]"),
        (lambda codec: codec.decode(torch.zeros(2, 16, 2, 4, 4)), r"expected \[n, 32, f, h, w\]"),
        (lambda codec: DigitCodec(mean=0.0, std=0.0), "std = 0.0"),
        (lambda codec: DigitCodec(mean=float("nan"), std=1.0), "mean = nan"),
        (lambda codec: DigitCodec(mean=0.0, std=1.0, space=0), "space = 0"),
    ],
)
def test_codec_refuses_other_shapes_and_values(call, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call(DigitCodec(mean=0.0, std=1.0))


# text


def test_tokenizer_has_t5_ids_and_whole_words(text_folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(text_folder, local_files_only=True)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(text_folder / "spiece.model"))
    assert (reference.pad_id(), reference.eos_id(), reference.unk_id(), reference.bos_id()) == (0, 1, 2, -1)
    for prompt in [*all_prompts(), "", "a seven?", "sevenleft  up"]:
        assert tokenizer(prompt).input_ids == [*reference.encode(prompt), 1]
    assert {len(reference.encode(prompt)) for prompt in all_prompts()} == {5}, "a word is a piece"
    train_tokenizer(all_prompts()[::-1] * 2, tmp_path / "again")
    assert (tmp_path / "again" / "spiece.model").read_bytes() == (text_folder / "spiece.model").read_bytes()
    with pytest.raises(ValueError, match="at least one non-empty prompt"):
        train_tokenizer(["", "  "], tmp_path / "none")


def test_encoder_gives_the_rows_of_real_tokens(text_folder: Path) -> None:
    encoder = TextEncoder(text_folder)
    prompts = ["a handwritten seven moving left", "", "seven", "a handwritten three moving up and down"]
    rows = encoder.encode(prompts)
    assert [len(row) for row in rows[:3]] == [6, 1, 2] and encoder.width == 64
    tokenizer = AutoTokenizer.from_pretrained(text_folder, local_files_only=True)
    model = UMT5EncoderModel.from_pretrained(text_folder, local_files_only=True).eval()
    for prompt, row in zip(prompts, rows):
        with torch.no_grad():
            alone = model(**tokenizer(prompt, return_tensors="pt")).last_hidden_state[0]
        assert row.shape == alone.shape and row.dtype == torch.float32
        assert float((row - alone).abs().max()) <= 1e-5, "padding in a batch changes nothing"
        assert row.untyped_storage().nbytes() == row.nbytes, "no row keeps the padded batch alive"
    for one, other in zip(rows, TextEncoder(str(text_folder)).encode(prompts, batch_size=3)):
        assert float((one - other).abs().max()) <= 1e-5
    assert encoder.encode([]) == []
    assert torch.equal(encoder.encode(["  a handwritten\n seven &amp;lt; "])[0], encoder.encode(["a handwritten seven <"])[0])
    long = encoder.encode(["seven " * 600])[0]
    assert len(long) == 512


def test_random_encoder_tells_words_apart(text_folder: Path) -> None:
    """Rows of unit root mean square; those of different words nearly orthogonal, of the others close."""
    rows = torch.stack(TextEncoder(text_folder).encode(all_prompts())).reshape(10, 4, 6, 64)
    assert float((rows.square().mean(-1).sqrt() - 1).abs().max()) <= 1e-3
    norm = rows.norm(dim=-1, keepdim=True)
    for words in ((rows / norm)[:, 0, 2], (rows / norm)[0, :, 4]):  # the digit's and the direction's
        similar = (words @ words.T).fill_diagonal_(0.0)
        assert float(similar.abs().max()) <= 0.5
    context = torch.cosine_similarity(rows[7, 0], rows[7, 1], dim=-1)
    assert float(context[:4].min()) >= 0.5 and float(context[:4].max()) <= 0.999, "but every row carries its context"


def test_encoder_weights_depend_on_the_seed_alone(text_folder: Path, tmp_path: Path) -> None:
    weights = {}
    for name, seed in (("same", 0), ("other", 1)):
        train_tokenizer(all_prompts(), tmp_path / name)
        torch.manual_seed(99)
        before = torch.random.get_rng_state()
        build_text_encoder(tmp_path / name, seed=seed)
        assert torch.equal(before, torch.random.get_rng_state())
        weights[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert weights["same"] == (text_folder / "model.safetensors").read_bytes()
    assert weights["other"] != weights["same"]


def test_encoder_folders(text_folder: Path, tmp_path: Path) -> None:
    """The layout of pipelines, tokenizer and encoder apart, and folders that lack one of them."""
    for part, names in (
        ("tokenizer", ("spiece.model", "tokenizer_config.json")),
        ("text_encoder", ("config.json", "model.safetensors")),
    ):
        (tmp_path / part).mkdir()
        for name in names:
            os.symlink(text_folder / name, tmp_path / part / name)
    prompt = all_prompts()[3:4]
    assert torch.equal(TextEncoder(tmp_path).encode(prompt)[0], TextEncoder(text_folder).encode(prompt)[0])
    with pytest.raises(ValueError, match=r"no tokenizer_config.json in it or in tokenizer/"):
        TextEncoder(tmp_path / "text_encoder")
    with pytest.raises(ValueError, match=r"no config.json in it or in text_encoder/"):
        TextEncoder(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="heads = 5 does not divide d_model = 64"):
        build_text_encoder(text_folder, seed=0, heads=5)


def test_clean_prompt() -> None:
    assert clean_prompt("  a &amp;amp;  b\n\tc &lt;d&gt; ") == "a & b c <d>"


# shards


@pytest.fixture(scope="module")
def tool():
    path = Path(__file__).resolve().parent.parent / "tools" / "prepare_shards.py"
    spec = importlib.util.spec_from_file_location("prepare_shards", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def small(splits, monkeypatch: pytest.MonkeyPatch):
    """The data set cut to 50 and 10 videos."""
    cut = [data.DigitVideos(*(field[:n] for field in split)) for split, n in zip(splits, (50, 10))]
    monkeypatch.setattr(data, "train_heldout_videos", lambda *, seed: tuple(cut))
    return cut


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_prepare_writes_what_training_reads(tool, small, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "data"
    assert tool.main(["digits", str(out), "--samples-per-shard", "16"]) == 0
    assert [path.name for path in sorted(out.iterdir())] == [
        "codec.json", "dataset.json", "heldout", "negative_embedding.safetensors", "text_encoder", "train",
    ]  # fmt: skip
    facts = json.loads((out / "dataset.json").read_text())
    assert facts["counts"] == {"train_samples": 50, "train_shards": 4, "heldout_samples": 10, "heldout_shards": 1}
    codec, encoder = DigitCodec.load(out / "codec.json"), TextEncoder(out / "text_encoder")
    assert codec == DigitCodec.fit(small[0].videos), "statistics of the training split"
    negative = safetensors.torch.load_file(out / "negative_embedding.safetensors")
    assert negative.keys() == {"embed"} and negative["embed"].shape == (1, 64)
    assert float((negative["embed"] - encoder.encode([""])[0]).abs().max()) <= 1e-5
    for split, expected in zip(("train", "heldout"), small):
        samples = []
        for path in sorted((out / split).glob("shard_*.tar")):
            with Shard(path) as shard:
                samples += [shard.read(key, members) for key, members in shard.samples()]
        assert [sample.prompt for sample in samples] == expected.prompts()
        videos = codec.decode(torch.stack([sample.latent for sample in samples]))
        assert float((videos - expected.videos).abs().max()) <= 1e-6
        rows = encoder.encode([sample.prompt for sample in samples])
        assert all(float((sample.embed - row).abs().max()) <= 1e-5 for sample, row in zip(samples, rows))


def test_prepare_again_and_after_an_interruption(tool, small, tmp_path: Path, monkeypatch, capsys) -> None:
    out = tmp_path / "data"
    out.mkdir()  # an empty folder is as good as none
    monkeypatch.setattr(DigitCodec, "fit", classmethod(lambda cls, videos: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        tool.main(["digits", str(out)])
    monkeypatch.undo()
    monkeypatch.setattr(data, "train_heldout_videos", lambda *, seed: tuple(small))
    assert not any(out.iterdir()), "nothing half-written under the name"
    (tmp_path / "data.partial" / "train").mkdir(parents=True, exist_ok=True)
    (tmp_path / "data.partial" / "train" / "shard_000099.tar").write_text("left over")
    assert tool.main(["digits", str(out), "--seed", "3"]) == 0
    before = contents(out)
    assert "train/shard_000099.tar" not in before and not (tmp_path / "data.partial").exists()
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert tool.main(["digits", str(out), "--seed", "3"]) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == times, "complete: left as it is"
    assert tool.main(["digits", str(tmp_path / "second"), "--seed", "3"]) == 0
    assert contents(tmp_path / "second") == before, "the same arguments give the same bytes"
    capsys.readouterr()
    assert tool.main(["digits", str(out), "--seed", "4"]) == 2
    assert '"seed": 3' in (message := capsys.readouterr().err) and '"seed": 4' in message
    (out / "dataset.json").write_text("{")
    assert tool.main(["digits", str(out), "--seed", "3"]) == 2
    assert "dataset.json is damaged" in capsys.readouterr().err


def test_prepare_leaves_other_folders_alone(tool, tmp_path: Path, capsys) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    assert tool.main(["digits", str(tmp_path)]) == 2
    assert "is no data set of this tool" in capsys.readouterr().err
    assert tool.main(["digits", str(tmp_path / "mine.txt")]) == 2
    assert contents(tmp_path) == {"mine.txt": b"precious"}
    for bad in (["--samples-per-shard", "0"], ["--seed", "-1"], ["--seed", "x"]):
        with pytest.raises(SystemExit) as exit_:
            tool.main(["digits", str(tmp_path / "new"), *bad])
        assert exit_.value.code == 2
    assert not (tmp_path / "new").exists()


# classifier


@pytest.fixture(scope="module")
def trained(splits) -> tuple[DigitClassifier, list[tuple[int, float]]]:
    losses: list[tuple[int, float]] = []
    before = torch.random.get_rng_state()
    classifier = train_classifier(*few(splits[0]), seed=0, steps=60, log=lambda *line: losses.append(line))
    assert torch.equal(before, torch.random.get_rng_state()), "the global random state is left alone"
    return classifier, losses


def few(split: data.DigitVideos) -> data.DigitVideos:
    return data.DigitVideos(*(field[:400] for field in split))


def test_classifier_learns(splits, trained) -> None:
    classifier, losses = trained
    assert [step for step, _ in losses] == list(range(1, 61))
    first, last = losses[0][1], sum(loss for _, loss in losses[-5:]) / 5
    assert 3.2 <= first <= 4.4, "log 10 + log 4 at first"
    assert last <= 0.7 * first
    prediction = classifier.predict(splits[1].videos[:300])
    assert float((prediction.directions == splits[1].directions[:300]).double().mean()) >= 0.5
    assert float((prediction.digits == splits[1].digits[:300]).double().mean()) >= 0.2


def test_features_are_standardised_and_of_each_video_alone(splits, trained) -> None:
    classifier, _ = trained
    assert evaluation.VIDEO_SHAPE == (data.FRAMES, data.CANVAS, data.CANVAS)
    videos = few(splits[0]).videos
    features = classifier.features(videos)
    assert features.shape == (400, 48) and features.dtype == torch.float32
    assert float(features.mean(0).abs().max()) <= 1e-4 and float((features.std(0) - 1).abs().max()) <= 1e-4
    assert float((classifier.features(videos[7:9]) - features[7:9]).abs().max()) <= 1e-4
    flipped = classifier.features(videos.flip(1)) - features
    assert float(flipped[:, :32].abs().max()) <= 1e-4, "digit features do not see the order of the frames"
    assert float(flipped[:, 32:].abs().mean()) >= 0.1, "motion features do"
    assert not classifier.training and not features.requires_grad


def test_training_is_deterministic(splits) -> None:
    def weights(seed: int) -> torch.Tensor:
        return train_classifier(*few(splits[0]), seed=seed, steps=3).digit_head[-1].weight

    first = weights(0)
    assert torch.equal(first, weights(0)) and not torch.equal(first, weights(1))


def test_classifier_file(splits, trained, tmp_path: Path) -> None:
    classifier, _ = trained
    classifier.save(tmp_path / "classifier.safetensors")
    loaded = DigitClassifier.load(str(tmp_path / "classifier.safetensors"))
    videos = splits[1].videos[:20]
    assert torch.equal(loaded.features(videos), classifier.features(videos))
    assert all(torch.equal(a, b) for a, b in zip(loaded.predict(videos), classifier.predict(videos)))
    state = loaded.state_dict()
    missing = {name: value for name, value in state.items() if name != "feature_std"}
    safetensors.torch.save_file(missing, tmp_path / "missing", metadata={"format": "digit-classifier-1"})
    safetensors.torch.save_file(dict(state), tmp_path / "other")
    (tmp_path / "text").write_text("no tensors at all")
    for name in ("missing", "other", "text"):
        with pytest.raises(ValueError, match=f"{name}: no digit-classifier-1 file"):
            DigitClassifier.load(tmp_path / name)


def test_adherence_wants_both_right() -> None:
    prediction = DigitPrediction(torch.tensor([1, 2, 3, 4]), torch.tensor([0, 1, 2, 3]))
    assert adherence(prediction, torch.tensor([1, 2, 0, 0]), torch.tensor([0, 0, 2, 0])) == 0.25
    with pytest.raises(ValueError, match="4 predictions for 3 digits"):
        adherence(prediction, torch.tensor([1, 2, 3]), torch.tensor([0, 1, 2, 3]))


def test_classifier_refuses_other_videos(trained) -> None:
    classifier, _ = trained
    labels = torch.zeros(2, dtype=torch.long)
    for shape in ((2, 16, 16), (2, 3, 16, 16), (0, 4, 16, 16)):
        for call in (classifier.features, classifier.predict, lambda v: train_classifier(v, labels, labels, seed=0, steps=1)):
            with pytest.raises(ValueError, match=r"expected \[n, 4, 16, 16\]"):
                call(torch.zeros(shape))
    with pytest.raises(ValueError, match="counts must agree"):
        train_classifier(torch.zeros(3, 4, 16, 16), labels, labels, seed=0, steps=1)


def test_text_encoders_of_both_kinds(tmp_path: Path) -> None:
    """T5, that of Cosmos-Predict2, has biases of positions in its first layer alone: as a UMT5 the others were random."""
    train_tokenizer(["a red square", "a blue disc"], tmp_path)
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    encoder = T5EncoderModel(config).eval()
    encoder.save_pretrained(tmp_path)
    (rows,) = TextEncoder(tmp_path).encode(["a red square"])
    ids = AutoTokenizer.from_pretrained(tmp_path)("a red square", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(rows, encoder(ids).last_hidden_state[0])
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    del weights["encoder.block.1.layer.0.SelfAttention.q.weight"]
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"its weights lack \['encoder.block.1.layer.0.SelfAttention.q.weight'\]"):
        TextEncoder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="model_type=bert: must be one of umt5, t5"):
        TextEncoder(tmp_path)
