"""Shards: formats, bad samples, damaged tars, writing, inspection."""

import functools
import importlib.util
import io
import logging
import os
import re
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
import webdataset
from shard_samples import (
    SHAPE,
    TEXT_LEN,
    make_config,
    make_loader,
    make_model,
    make_sample,
    own_members,
    rcm_members,
    saved,
    without,
    write_good,
    write_tar,
)

from rcm_mcore.data import Sample, inspect_shard, pad_text, write_shards

NAN, INF = float("nan"), float("inf")


def planted(sample, name, value):
    tensor = getattr(sample, name).clone()
    tensor[-1, -1] = value
    return Sample(**{**vars(sample), name: tensor})


class Malicious:
    """Pickles to a call that creates the file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@functools.cache
def bad_members():
    good, rcm, own = make_sample(1), rcm_members(make_sample(1)), own_members(make_sample(1))
    return {
        "no latent": (without(rcm, "latent.pt"), "missing member latent.pt"),
        "no embed": (without(rcm, "embed.pt"), "missing member embed.pt"),
        "no prompt": (without(own, "prompt.txt"), "missing member prompt.txt"),
        "only prompt": (without(own, "tensors.safetensors"), "missing member tensors.safetensors"),
        "no embed in safetensors": (
            {**own, "tensors.safetensors": safetensors.torch.save({"latent": good.latent})},
            "embed is missing",
        ),
        "channels": (rcm_members(make_sample(1, shape=(3, 3, 2, 2))), r"latent is \[3, 3, 2, 2\].*\[2, 2, 2, 2\]"),
        "height": (own_members(make_sample(1, shape=(2, 3, 1, 2))), r"latent is \[2, 3, 1, 2\]"),
        "width": (own_members(make_sample(1, shape=(2, 3, 2, 4))), r"latent is \[2, 3, 2, 4\]"),
        "frames": (own_members(make_sample(1, shape=(2, 1, 2, 2))), r"latent is \[2, 1, 2, 2\]"),
        "rank": (own_members(make_sample(1, shape=(3, 2, 2))), "latent has 3 dimensions"),
        "text width": (rcm_members(make_sample(1, width=3)), "text rows are 3 wide, the model takes 4"),
        "text rows": (rcm_members(make_sample(1, rows=6)), "text has 6 rows, the model takes 5"),
        "nan latent": (rcm_members(planted(good, "latent", NAN)), "latent holds 4 NaN"),  # in a frame that is cut off
        "inf latent": (own_members(planted(good, "latent", -INF)), "latent holds 4 NaN or infinite"),
        "nan text": (rcm_members(planted(good, "embed", NAN)), "embed holds 1 NaN"),
        "too large for float32": (
            rcm_members(planted(make_sample(1, dtype=torch.float64), "latent", 1e300)),
            "latent holds 4",
        ),
        "integers": ({**rcm, "latent.pt": saved(torch.ones(SHAPE, dtype=torch.int64))}, "latent is torch.int64"),
        "no tensor": ({**rcm, "embed.pt": saved({"embed": good.embed})}, "embed is dict"),
        "garbage": ({**rcm, "embed.pt": b"garbage"}, "cannot be decoded"),
        "garbage in safetensors": ({**own, "tensors.safetensors": b"garbage"}, "cannot be decoded: SafetensorError"),
        "prompt not UTF-8": ({**rcm, "prompt.txt": b"\xff\xfe"}, "cannot be decoded: UnicodeDecodeError"),
    }


def read_keys(folder, number, **fields):
    """Keys and count of bad samples, over one reader."""
    fields = {"readers": 1, "latent_shape": (2, 2, 2, 2), **fields}
    with make_loader(make_config(folder, **fields), batch=number) as loader:
        data = next(loader)
        return list(data.keys), data.state["bad_samples"]


@pytest.mark.parametrize("case", bad_members())
def test_bad_samples_are_skipped_counted_and_logged(tmp_path, caplog, case):
    members, reason = bad_members()[case]
    entries = [("000", rcm_members(make_sample(0))), ("001", members), ("002", own_members(make_sample(2)))]
    path = write_tar(tmp_path / "shard_000000.tar", entries)
    with caplog.at_level(logging.WARNING):
        assert read_keys(tmp_path, 2) == (["000", "002"], 1)
    assert f"bad sample 001 in {path}" in caplog.messages[0]
    assert len(caplog.messages[0].splitlines()) == 1
    assert re.search(reason, caplog.messages[0])


def test_a_malicious_pickle_is_refused_not_run(tmp_path, caplog):
    trap = tmp_path / "trap"
    entries = [
        ("000", {**rcm_members(make_sample(0)), "latent.pt": saved(Malicious(trap))}),
        ("001", rcm_members(make_sample(1))),
    ]
    write_tar(tmp_path / "shard_000000.tar", entries)
    assert read_keys(tmp_path, 1) == (["001"], 1)
    assert "cannot be decoded: UnpicklingError" in caplog.text
    assert not trap.exists()
    torch.load(io.BytesIO(entries[0][1]["latent.pt"]), weights_only=False)
    assert trap.exists(), "the trap does not work"


def member_offsets(path):
    with tarfile.open(path) as tar:
        return [(member.offset, member.offset_data) for member in tar]


def damage(path, how):
    """Damages a shard of three samples with three members each within or after the second sample."""
    data, offsets = bytearray(path.read_bytes()), member_offsets(path)
    if how == "cut in a payload":
        data = data[: offsets[4][1] + 10]
    elif how == "cut in a header":
        data = data[: offsets[4][0] + 100]
    elif how == "cut between members":
        data = data[: offsets[4][0]]
    elif how == "cut between samples":
        data = data[: offsets[6][0]]
    elif how == "corrupt header":
        data[offsets[4][0]] ^= 0xFF
    elif how == "garbage":
        data = bytearray(b"garbage" * 1000)
    elif how == "empty file":
        data = bytearray()
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("how", "good"),
    [
        ("cut in a payload", 1),
        ("cut in a header", 1),
        ("cut between members", 1),
        ("cut between samples", 1),  # whether the second sample is whole cannot be known
        ("corrupt header", 1),
        ("garbage", 0),
        ("empty file", 0),
    ],
)
def test_the_rest_of_a_damaged_shard_is_skipped_and_counted_once(tmp_path, caplog, how, good):
    path = write_good(tmp_path / "shard_000000.tar", range(3))
    write_good(tmp_path / "shard_000001.tar", range(10, 12))
    damage(path, how)
    keys, bad = read_keys(tmp_path, 2 + good)
    assert sorted(keys) == [f"{i:09d}" for i in [*range(good), 10, 11]]
    keys, bad = read_keys(tmp_path, 2 * (2 + good))
    assert sorted(keys) == sorted(2 * [f"{i:09d}" for i in [*range(good), 10, 11]])
    assert bad == 2  # once per epoch
    assert f"(rest of the shard) in {path}" in caplog.text


def test_above_max_bad_samples_the_run_stops(tmp_path):
    bad = without(rcm_members(make_sample(0)), "latent.pt")
    good = rcm_members(make_sample(1))
    write_tar(tmp_path / "shard_000000.tar", [("000", good), ("001", bad), ("002", bad), ("003", good)])
    config = make_config(tmp_path, readers=1, max_bad_samples=2)
    with make_loader(config, batch=1) as loader:
        assert [next(loader).keys for _ in range(3)] == [("000",), ("003",), ("000",)]
        assert loader.state_dict()["bad_samples"] == 2
        state = loader.state_dict()
        with pytest.raises(ValueError, match=r"data\.max_bad_samples=2: .* skipped 3, the last 001 .*missing member"):
            next(loader)
    with make_loader(config, batch=1) as loader:  # the count goes on in a resumed run
        loader.load_state_dict(state)
        with pytest.raises(ValueError, match=r"data\.max_bad_samples=2"):
            next(loader)


def test_shards_without_a_sample_are_passed_over_but_not_for_ever(tmp_path):
    write_tar(tmp_path / "shard_000000.tar", [])
    write_good(tmp_path / "shard_000001.tar", [1])
    assert read_keys(tmp_path, 2) == (["000000001"] * 2, 0)
    write_tar(tmp_path / "shard_000001.tar", [])
    with pytest.raises(ValueError, match=r"data\.shards: none of the 2 shards holds a good sample"):
        read_keys(tmp_path, 1)


# Formats


@pytest.mark.parametrize("as_folders", [False, True])
def test_rcm_shards_are_read_under_both_namings(tmp_path, as_folders):
    extra = {"video.mp4": b"ignored", "json": b"{}"}
    entries = [(f"{i:09d}", {**rcm_members(make_sample(i)), **extra}) for i in range(3)]
    path = write_tar(tmp_path / "shard_000000.tar", entries, as_folders=as_folders)
    with tarfile.open(path, "a") as tar:  # what tar itself adds
        for name in ("000000002", "extra.old"):
            folder = tarfile.TarInfo(name)
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
        for name in ("./000000003/._000000003.latent.pt", "README"):
            tar.addfile(tarfile.TarInfo(name))
        for extension, data in rcm_members(make_sample(3)).items():
            member = tarfile.TarInfo(f"./000000003.{extension}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    with make_loader(make_config(tmp_path, readers=1), batch=4) as loader:
        data = next(loader)
    assert data.keys == tuple(f"{i:09d}" for i in range(4)) and data.state["bad_samples"] == 0
    for i in range(4):
        assert torch.equal(data.latents[i], make_sample(i).latent.float())
        assert torch.equal(data.text[i], pad_text(make_sample(i).embed.float(), TEXT_LEN))


def test_written_shards_are_deterministic_webdatasets(tmp_path):
    samples = [make_sample(i) for i in range(5)]
    padded = [Sample(s.latent, pad_text(s.embed, 8), s.prompt, "a key of its own") for s in samples]
    paths = write_shards(samples, tmp_path / "a", samples_per_shard=2)
    assert [path.name for path in paths] == [f"shard_{i:06d}.tar" for i in range(3)]
    assert sorted((tmp_path / "a").iterdir()) == paths
    again = write_shards(iter(padded), tmp_path / "b", samples_per_shard=2)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in paths]
    read = list(webdataset.WebDataset([str(path) for path in paths], shardshuffle=False))
    assert [entry["__key__"] for entry in read] == [f"{i:09d}" for i in range(5)]
    for entry, sample in zip(read, samples, strict=True):
        tensors = safetensors.torch.load(entry["tensors.safetensors"])
        assert torch.equal(tensors["latent"], sample.latent) and torch.equal(tensors["embed"], sample.embed)
        assert tensors["latent"].dtype == torch.bfloat16
        assert entry["prompt.txt"].decode() == sample.prompt
    config = make_config(tmp_path / "a", readers=1)
    with make_loader(config, batch=5) as loader:
        data = next(loader)
    for key, latent, text in zip(data.keys, data.latents, data.text, strict=True):
        assert torch.equal(latent, samples[int(key)].latent.float())
        assert torch.equal(text, pad_text(samples[int(key)].embed.float(), TEXT_LEN))


def test_an_interrupted_writer_leaves_whole_shards_only(tmp_path):
    def interrupted():
        yield from (make_sample(i) for i in range(3))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(interrupted(), tmp_path, samples_per_shard=2)
    assert [path.name for path in tmp_path.iterdir()] == ["shard_000000.tar"]
    assert len(write_shards((make_sample(i) for i in range(4)), tmp_path, samples_per_shard=2)) == 2
    with pytest.raises(ValueError, match=r"1 shards of an earlier run, from shard_000001\.tar on"):
        write_shards([make_sample(0)], tmp_path, samples_per_shard=2)


def test_the_writer_refuses_what_could_not_be_read(tmp_path):
    good = make_sample(0)
    refused = [
        ([good, planted(good, "latent", NAN)], 1, "sample 1: latent holds 4 NaN"),
        ([make_sample(0, shape=(2, 2, 2))], 1, "sample 0: latent has 3 dimensions"),
        ([], 1, "samples is empty"),
        ([good], 0, "samples_per_shard=0: must be at least 1"),
    ]
    for samples, per_shard, message in refused:
        with pytest.raises(ValueError, match=message):
            write_shards(samples, tmp_path, samples_per_shard=per_shard)
    with pytest.raises(ValueError, match="text has 3 rows: more than text_len=2"):
        pad_text(torch.ones(3, 4), 2)


# Given frames and image rows


IMAGE = {"condition": "image", "image_len": 3, "image_dim": 6}
FIRST_LAST = {**IMAGE, "condition": "first_last"}


def image_sample(index, *, rows=3):
    given, image = torch.randn(SHAPE), torch.randn(rows, 6).bfloat16()
    return replace(make_sample(index), given=given, image=image)


def test_given_frames_and_image_rows_reach_the_batches_of_networks_that_take_them(tmp_path):
    samples = [image_sample(i) for i in range(3)]
    write_shards(samples, tmp_path, samples_per_shard=3)
    config = make_config(tmp_path, readers=1, latent_shape=(2, 2, 2, 2))
    with make_loader(config, batch=3, model=make_model(**IMAGE)) as loader:
        data = next(loader)
    assert data.given.dtype == data.image.dtype == torch.float32
    assert torch.equal(data.given, torch.stack([sample.given[:, :2] for sample in samples]))
    assert torch.equal(data.image, torch.stack([sample.image.float() for sample in samples]))
    with make_loader(config, batch=3) as loader:
        data = next(loader)
    assert data.given is None and data.image is None and len(data.latents) == 3
    with make_loader(config, batch=3, reads=False, model=make_model(**IMAGE)) as loader:
        data = next(loader)
    assert len(data.given) == len(data.image) == 0


def image_cases():
    good = image_sample(1)
    longer = torch.randn(2, 4, 2, 2)
    return {
        "no given": (replace(good, given=None), IMAGE, r"given is missing, model\.condition=image takes \[2, 3, 2, 2\]"),
        "no image": (replace(good, image=None), IMAGE, r"image is missing, model\.condition=image takes \[3, 6\]"),
        "neither, in the rCM format": (None, IMAGE, "given is missing"),
        "given of other frames": (replace(good, given=longer), IMAGE, r"given is \[2, 4, 2, 2\].*takes \[2, 3, 2, 2\]"),
        "one image of two": (good, FIRST_LAST, r"image is \[3, 6\], model\.condition=first_last takes \[6, 6\]"),
        "image width": (replace(good, image=torch.randn(3, 5)), IMAGE, r"image is \[3, 5\].*takes \[3, 6\]"),
        "nan given": (planted(good, "given", NAN), IMAGE, "given holds 4 NaN"),  # in channels of the last frames too
        "inf image": (planted(good, "image", INF), IMAGE, "image holds 1 NaN or infinite"),
        "integers": (replace(good, image=torch.ones(3, 6, dtype=torch.int64)), IMAGE, "image is torch.int64"),
        "a last frame cut off": (
            replace(image_sample(1, rows=6), latent=longer, given=longer.clone()),
            FIRST_LAST,
            "a cut would lose the given last frame",
        ),
    }  # fmt: skip


@pytest.mark.parametrize("case", image_cases())
def test_samples_without_what_an_image_network_takes_are_bad_and_fine_for_others(tmp_path, caplog, case):
    sample, condition, reason = image_cases()[case]
    rows = 6 if condition is FIRST_LAST else 3
    members = rcm_members(make_sample(1)) if sample is None else own_members(sample)
    entries = [("000", own_members(image_sample(0, rows=rows))), ("001", members)]
    write_tar(tmp_path / "shard_000000.tar", entries)
    config = make_config(tmp_path, readers=1)
    with caplog.at_level(logging.WARNING), make_loader(config, batch=2, model=make_model(**condition)) as loader:
        data = next(loader)
    assert data.keys == ("000", "000") and data.state["bad_samples"] == 1
    assert re.search(reason, caplog.messages[0])
    assert read_keys(tmp_path, 2, latent_shape=SHAPE) == (["000", "001"], 0)


# Inspection


@pytest.fixture(scope="module")
def tool():
    path = Path(__file__).parent.parent / "tools" / "inspect_shard.py"
    spec = importlib.util.spec_from_file_location("inspect_shard_tool", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_inspection_reports_contents_and_bad_samples(tmp_path, tool, capsys):
    samples = [make_sample(i) for i in (0, 1, 3)]
    entries = [(s.key, rcm_members(s)) for s in samples[:2]] + [(samples[2].key, own_members(samples[2]))]
    entries += [("bad", rcm_members(planted(samples[0], "latent", NAN)))]
    path = write_tar(tmp_path / "shard_000000.tar", entries)
    report = inspect_shard(path, prompts=2)
    values = torch.cat([sample.latent.double().flatten() for sample in samples])
    assert abs(report.latent_mean - values.mean()) <= 1e-12
    assert abs(report.latent_std - values.std(correction=0)) <= 1e-12
    assert report.text_rows == [1, 2, 4]
    assert report.formats == {"rcm": 2, "safetensors": 1}
    assert report.latents == {"bfloat16 [2, 3, 2, 2]": 3}
    assert report.prompts == ["prompt 0 é", "prompt 1 é"]
    assert report.bad == [("bad", "latent holds 4 NaN or infinite values")] and report.damage is None
    assert tool([str(path)]) == 0
    out = capsys.readouterr().out
    for line in ("3 good, 1 bad", "rcm (2), safetensors (1)", "rows min 1, mean 2.3, max 4", "prompt 1 é", "bad: latent"):
        assert line in out


def test_inspection_shows_given_frames_and_image_rows(tmp_path, tool, capsys):
    (path,) = write_shards([image_sample(0), make_sample(1)], tmp_path, samples_per_shard=2)
    assert tool([str(path)]) == 0
    out = capsys.readouterr().out
    assert "given     float32 [2, 3, 2, 2]" in out and "image     bfloat16 [3, 6]" in out


def test_inspection_exits_with_2_on_unreadable_input(tmp_path, tool, capsys):
    good = write_good(tmp_path / "good.tar", [0])
    cut = write_good(tmp_path / "cut.tar", range(3))
    damage(cut, "cut in a payload")
    garbage = tmp_path / "garbage.tar"
    garbage.write_bytes(b"garbage")
    for path, reason in ((tmp_path / "none.tar", "No such file"), (cut, "unexpected end"), (garbage, "not a readable")):
        assert tool([str(path), str(good)]) == 2
        captured = capsys.readouterr()
        assert f"{path}: " in captured.err and reason in captured.err
        assert str(good) in captured.out  # the others are still reported
