"""The learned judge of the laboratory's scenes: what it is taught, how readings are judged, features, files."""

import math

import pytest
import torch

from rcm_mcore.lab import reader_training
from rcm_mcore.lab.adherence import Reading, judge, mean_of
from rcm_mcore.lab.codec import SceneCodec
from rcm_mcore.lab.motion import centres
from rcm_mcore.lab.reader import PAIRS, Outputs, SceneReader, _moves
from rcm_mcore.lab.reader_training import measured, targets_of, train_reader
from rcm_mcore.lab.scenes import COLOURS, MOTIONS, SHAPES, SIZES, TEXTURES, UNUSED, Scenes, draw_scenes, prompt_of, render

PARTS = ("number", "colour", "shape", "texture", "motion", "size", "order", "characters", "place")


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    """Twelve, of one, two and three objects."""
    return draw_scenes(12, 1)


@pytest.fixture(scope="module")
def videos(scenes) -> torch.Tensor:
    return render(scenes)


@pytest.fixture(scope="module")
def random_reader() -> SceneReader:
    """All of whose layers do something."""
    torch.manual_seed(0)
    reader = SceneReader(width=4).eval().requires_grad_(False)
    for parameter in reader.parameters():
        parameter.normal_(std=0.3)
    return reader


def objects(scenes):
    """(row, slot, colour) of every object."""
    return [(*where, int(scenes.colour[*where])) for where in (scenes.colour != UNUSED).nonzero().tolist()]


def perfect(scenes) -> Reading:
    """What is to be read in the scenes; nothing is known of absent colours, and no order is seen."""
    n = len(scenes.place)
    present = torch.zeros(n, len(COLOURS), dtype=torch.bool)
    attributes = {name: torch.zeros(n, len(COLOURS), dtype=torch.int64) for name in ("shape", "texture", "motion", "size")}
    for row, slot, colour in objects(scenes):
        present[row, colour] = True
        for name, values in attributes.items():
            values[row, colour] = getattr(scenes, name)[row, slot]
    front = torch.zeros(n, len(COLOURS), len(COLOURS), dtype=torch.bool)
    return Reading(present=present, front=front, caption=scenes.caption.clone(), place=scenes.place.clone(), **attributes)


# judgement


def test_a_perfect_reading_is_all_right(scenes):
    judgement = judge(perfect(scenes), prompt_of(scenes))
    single = scenes.colour[:, 1] == UNUSED
    assert 0 < single.sum() < 12
    for name, field in judgement._asdict().items():
        expected = torch.ones(12, dtype=torch.float64)
        if name == "order":
            expected[single] = math.nan
        torch.testing.assert_close(field, expected, equal_nan=True)
    assert mean_of(judgement) == (1.0,) * 10


def changed(reading, row, **values):
    """The reading with fields replaced in a row."""
    fields = {name: field.clone() for name, field in reading._asdict().items()}
    for name, (index, value) in values.items():
        fields[name][(row, *index)] = value
    return Reading(**fields)


def wrong_parts(reading, scenes, row) -> dict[str, float]:
    """Parts of the row's judgement that are not 1; no other row may have any."""
    judgement = judge(reading, prompt_of(scenes))
    others = torch.arange(12) != row
    found = {}
    for name in PARTS:
        field = getattr(judgement, name)
        assert not (field[others] < 1).any()
        if field[row] < 1:
            found[name] = float(field[row])
    assert judgement.all[others].all() and judgement.all[row] == (not found)
    return found


def test_each_mistake_counts_where_it_belongs(scenes):
    row = int((scenes.colour[:, 2] != UNUSED).nonzero()[0])  # three objects
    right = perfect(scenes)
    near, _, far = scenes.colour[row].tolist()
    absent = next(colour for colour in range(len(COLOURS)) if colour not in scenes.colour[row])
    for name, classes in (("shape", SHAPES), ("texture", TEXTURES), ("motion", MOTIONS), ("size", SIZES)):
        other = (int(getattr(right, name)[row, far]) + 1) % len(classes)
        assert wrong_parts(changed(right, row, **{name: ((far,), other)}), scenes, row) == {name: pytest.approx(2 / 3)}
        assert not wrong_parts(changed(right, row, **{name: ((absent,), other)}), scenes, row), "of a colour that is not there"
    seen = wrong_parts(changed(right, row, caption=((1,), (scenes.caption[row, 1] + 1) % 20)), scenes, row)
    assert seen == {"characters": pytest.approx(2 / 3)}
    assert wrong_parts(changed(right, row, place=((), 1 - scenes.place[row])), scenes, row) == {"place": 0.0}
    assert wrong_parts(changed(right, row, present=((absent,), True)), scenes, row) == {"number": 0.0, "colour": 0.0}
    assert wrong_parts(changed(right, row, front=((far, near), True)), scenes, row) == {"order": pytest.approx(2 / 3)}
    assert not wrong_parts(changed(right, row, front=((near, far), True)), scenes, row)
    assert not wrong_parts(changed(right, row, front=((absent, near), True)), scenes, row)


def test_a_missing_object_has_none_of_its_attributes(scenes):
    row = int((scenes.colour[:, 2] != UNUSED).nonzero()[0])
    gone = changed(perfect(scenes), row, present=((scenes.colour[row, 0],), False))
    expected = {"number": 0, "colour": 0, "shape": 2 / 3, "texture": 2 / 3, "motion": 2 / 3, "size": 2 / 3, "order": 1 / 3}
    assert wrong_parts(gone, scenes, row) == pytest.approx(expected)


def test_prompts_of_other_videos_are_wrong(scenes):
    prompts = prompt_of(scenes)
    assert mean_of(judge(perfect(scenes), prompts[1:] + prompts[:1])).all == 0
    with pytest.raises(ValueError, match="prompts: 11 for 12 videos"):
        judge(perfect(scenes), prompts[1:])
    with pytest.raises(ValueError, match="expected 1 to 3 times"):
        judge(perfect(scenes), [*prompts[1:], "a cat"])


# what the reader is taught


def middle(heat):
    """Pixels right and down [..., 2] of heat [..., cells] that is 1 in total."""
    torch.testing.assert_close(heat.sum(-1), torch.ones(heat.shape[:-1]))
    at = 4 * (torch.arange(16) + 0.5)
    grid = heat.unflatten(-1, (16, 16))
    return torch.stack([grid.sum(-2) @ at, grid.sum(-1) @ at], -1)


def test_targets_are_what_scenes_are(scenes):
    targets, right = targets_of(scenes, torch.device("cpu")), perfect(scenes)
    assert torch.equal(targets.present.bool(), right.present)
    for name in ("shape", "texture", "motion", "size"):
        field = getattr(targets, name)
        assert torch.equal(field[right.present], getattr(right, name)[right.present]) and (field[~right.present] == -100).all()
    for row, slot, colour in objects(scenes):
        torch.testing.assert_close(middle(targets.heat[row, :, colour]), centres(scenes)[row, slot], rtol=0, atol=0.2)
    absent = ~right.present[:, None].expand(-1, 17, -1)
    assert not targets.heat[:, :, : len(COLOURS)][absent].any()
    letters = middle(targets.heat[:, 3, len(COLOURS) :])
    torch.testing.assert_close(letters[..., 0], torch.tensor([22.0, 32.0, 42.0]).expand(12, 3), rtol=0, atol=0.2)
    torch.testing.assert_close(
        letters[..., 1], torch.where(scenes.place == 0, 8.0, 56.0)[:, None].expand(12, 3), rtol=0, atol=0.2
    )
    words = targets.words.split([len(COLOURS), len(SHAPES), len(TEXTURES), len(SIZES)], 1)
    for row in range(12):
        for name, found in zip(("colour", "shape", "texture", "size"), words):
            assert found[row].max() == 1
            assert set(found[row].nonzero().flatten().tolist()) == set(getattr(scenes, name)[row].tolist()) - {UNUSED}
        assert set(targets.motions[row].nonzero().flatten().tolist()) == set(scenes.motion[row].tolist()) - {UNUSED}


def test_the_front_of_a_pair_is_that_of_the_prompt(scenes):
    pairs = targets_of(scenes, torch.device("cpu")).pairs
    for row in range(12):
        colours = [colour for colour in scenes.colour[row].tolist() if colour != UNUSED]
        for index, (first, second) in enumerate(PAIRS):
            state = int(pairs[row, index])
            if not {first, second} <= set(colours):
                assert state == 0
            elif state > 0:
                assert state == (1 if colours.index(first) < colours.index(second) else 2)
            else:
                assert state in (0, -100)


def test_pairs_are_taught_where_it_can_be_seen():
    """Two small objects, 16 pixels' sum of radii, apart by ever more; the second is the one in front."""
    scenes = draw_scenes(64, 0)
    two = (scenes.colour[:, 1] != UNUSED) & (scenes.colour[:, 2] == UNUSED)
    row = int((two & (scenes.colour[:, 0] > scenes.colour[:, 1])).nonzero()[0])
    for distance, state in ((0, 2), (12, 2), (14, -100), (19, -100), (21, 0)):
        start = torch.zeros(1, 3, 2)
        start[0, 1, 0] = distance
        still = Scenes(*(field[row : row + 1] for field in scenes))._replace(
            start=start, size=torch.tensor([[0, 0, UNUSED]]), motion=torch.tensor([[0, 0, UNUSED]])
        )
        pairs = targets_of(still, torch.device("cpu")).pairs[0]
        pair = PAIRS.index((int(still.colour[0, 1]), int(still.colour[0, 0])))
        assert pairs[pair] == state and (pairs != 0).sum() == (state != 0), distance


def test_augmented_videos(videos, monkeypatch):
    """Every fourth is the codec's; some are blurred; noise is of zero mean and at most _NOISE."""

    class Black:
        encode = staticmethod(lambda videos: videos)
        decode = staticmethod(torch.zeros_like)

    mixed = reader_training._mixture(videos, Black())
    assert [bool(video.any()) for video in mixed] == [row % 4 > 0 for row in range(12)]
    assert torch.equal(mixed[1::4], videos[1::4]) and videos[0].any(), "the caller's are left alone"
    torch.manual_seed(0)
    grey = torch.full((40, 3, 17, 64, 64), 0.5)
    noise = (reader_training._augmented(grey, None) - grey).flatten(1)
    strength = noise.std(1)
    assert strength.max() < 0.061 and strength.max() > 0.04 and 10 < (strength < 1e-6).sum() < 30
    assert noise.mean(1).abs().max() < 1e-3
    monkeypatch.setattr(reader_training, "_NOISE", 0.0)
    same = torch.stack(
        [(a == b).all() for a, b in zip(reader_training._augmented(videos.repeat(3, 1, 1, 1, 1), None), [*videos] * 3)]
    )
    assert 18 <= same.sum() <= 34, "about three quarters are not blurred"


# the network


TINY = {"batch_size": 4, "width": 4, "heldout": 4, "show": False}


@pytest.fixture
def losses(monkeypatch) -> list[torch.Tensor]:
    """Those of whatever is trained."""
    found: list[torch.Tensor] = []
    taught = reader_training._loss
    monkeypatch.setattr(reader_training, "_loss", lambda *args: (found.append(taught(*args)), found[-1])[1])
    return found


def test_training_lowers_the_loss(losses):
    reader = train_reader(seed=1, steps=8, **TINY)
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert set(reader.facts) == {"seed", "steps", "batch_size", "heldout", "chance"}


def test_training_depends_on_the_seed_alone(losses):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    for seed in (1, 1, 2):
        train_reader(seed=seed, steps=1, **TINY)
    assert torch.equal(torch.get_rng_state(), before), "the global random state is left as it was"
    torch.testing.assert_close(losses[1], losses[0])  # not exactly: convolutions on a CPU round differently from run to run
    assert (losses[2] - losses[0]).abs() > 1e-4 * losses[0]


def test_every_output_learns(videos, scenes):
    """No head is left out of the loss."""
    reader, painter = SceneReader(width=4), reader_training._Painter()
    reader_training._loss(reader, painter, targets_of(scenes, torch.device("cpu")), videos).backward()
    still = [name for network in (reader, painter) for name, parameter in network.named_parameters() if parameter.grad is None]
    assert not still


def test_reading_says_what_the_logits_say(random_reader, videos, monkeypatch):
    torch.manual_seed(0)
    out = Outputs(*(torch.randn(field.shape) for field in random_reader._evaluate(videos[:3])))
    monkeypatch.setattr(random_reader, "_evaluate", lambda videos: out)
    reading = random_reader.read(videos[:3])
    assert torch.equal(reading.present, out.present.sigmoid() > 0.5)
    for name in ("shape", "texture", "motion", "size", "caption", "place"):
        assert torch.equal(getattr(reading, name), getattr(out, name).argmax(-1))
    states = out.pairs.argmax(2)
    for index, (first, second) in enumerate(PAIRS):
        assert torch.equal(reading.front[:, first, second], states[:, index] == 1)
        assert torch.equal(reading.front[:, second, first], states[:, index] == 2)
    assert not reading.front.diagonal(dim1=1, dim2=2).any()


def test_moves_are_in_pixels():
    """An object that drifts right by 2 pixels a frame."""
    where = torch.stack([torch.arange(17) / 16, torch.full((17,), 0.5)], 1)[None, :, None]
    moves = _moves(where)[0, :, 0]
    torch.testing.assert_close(moves[:, 0], (torch.arange(17) - 8) / 2)
    torch.testing.assert_close(moves[:, 2], torch.tensor([0.0] + [2.0] * 16))
    assert not moves[:, 1::2].any()


def test_videos_and_frames_are_seen_one_by_one(random_reader, videos, monkeypatch):
    """Features of a frame depend on it alone; those of a video on its frames and on their order."""
    frames, whole = random_reader.frame_features(videos), random_reader.features(videos)
    assert frames.shape == (12, 17, 64) and whole.shape == (12, 96) and frames.dtype == whole.dtype == torch.float32
    monkeypatch.setattr("rcm_mcore.lab.reader._BATCH", 5)
    torch.testing.assert_close(random_reader.features(videos), whole, rtol=1e-3, atol=1e-3)
    backwards = videos.flip(2)
    torch.testing.assert_close(random_reader.frame_features(backwards), frames.flip(1), rtol=1e-3, atol=1e-3)
    reversed_ = random_reader.features(backwards)
    torch.testing.assert_close(reversed_[:, :64], whole[:, :64], rtol=1e-3, atol=1e-3)
    assert ((reversed_ - whole)[:, 64:].abs().amax(1) > 0.01).sum() >= 10, "all but of what stands still"


def test_features_are_standardised_over_real_videos(videos):
    torch.manual_seed(0)
    reader = SceneReader(width=4).eval()
    reader.fit_features(videos)
    for features in (reader.features(videos), reader.frame_features(videos).flatten(0, 1)):
        torch.testing.assert_close(features.mean(0), torch.zeros(features.shape[1]), rtol=0, atol=1e-3)
        torch.testing.assert_close(features.std(0), torch.ones(features.shape[1]), rtol=1e-3, atol=1e-3)


def test_measured_on_held_out_scenes(random_reader, monkeypatch):
    """Own prompts, those of others, and through the codec: told apart by a reader that knows what it was shown."""
    drawn, blank = [], torch.zeros(6, 3, 17, 64, 64)
    monkeypatch.setattr(reader_training, "render", lambda scenes, device: (drawn.append(scenes), blank + 0.5)[1])
    monkeypatch.setattr(
        SceneReader,
        "read",
        lambda self, videos: perfect(drawn[0])._replace(place=drawn[0].place if videos.any() else 1 - drawn[0].place),
    )
    codec = SceneCodec(width=4)
    codec.encode, codec.decode = (lambda videos: videos), torch.zeros_like
    found = measured(random_reader, codec, 6, seed=0)
    assert found["heldout"]["all"] == found["heldout"]["place"] == found["heldout_codec"]["characters"] == 1
    assert found["heldout_codec"]["all"] == found["heldout_codec"]["place"] == 0
    assert found["chance"]["all"] == 0 and found["chance"]["characters"] < 0.5
    assert set(measured(random_reader, None, 6, seed=0)) == {"heldout", "chance"}


def test_a_file_holds_all_of_it(random_reader, scenes, videos, tmp_path):
    random_reader.facts = {"heldout": {"all": 0.25}}
    random_reader.save(tmp_path / "reader.safetensors")
    loaded = SceneReader.load(tmp_path / "reader.safetensors")
    assert loaded.facts == random_reader.facts
    torch.testing.assert_close(loaded.features(videos), random_reader.features(videos), rtol=1e-3, atol=1e-3)
    prompts = prompt_of(scenes)
    assert loaded.adherence(videos, prompts)[:8] == random_reader.adherence(videos, prompts)[:8]
    SceneCodec(width=4).save(tmp_path / "codec.safetensors")
    with pytest.raises(ValueError, match="no scene-reader-1 file"):
        SceneReader.load(tmp_path / "codec.safetensors")


def test_wrong_input_is_named(random_reader):
    with pytest.raises(ValueError, match=r"videos: shape \[1, 3, 17, 32, 32\]; expected \[n, 3, 17, 64, 64\]"):
        random_reader.read(torch.zeros(1, 3, 17, 32, 32))
    with pytest.raises(ValueError, match="width=0"):
        SceneReader(width=0)
    with pytest.raises(ValueError, match="heldout=1"):
        train_reader(seed=0, heldout=1)
