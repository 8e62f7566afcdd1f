"""Inputs of `encode`: lists, times of frames, resizing against pillow, what cannot be used."""

import re
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from media_samples import indices, picture, steady, write_image, write_video
from PIL import Image

from rcm_mcore.data import media_input
from rcm_mcore.data.media_input import BadInput, list_inputs, nearest_size, parse_size, read_media, resize_and_crop

SIZES = [(32, 48)]


def nearest(times, count, fps):
    """By the definition: the frame nearest in time, the earlier of two."""
    times = [time - times[0] for time in times]
    return [min(range(len(times)), key=lambda i: (abs(times[i] - Fraction(k) / fps), i)) for k in range(count)]


@pytest.mark.parametrize(
    ("times", "count", "fps"),
    [
        (steady(9, 16), 9, 16),
        (steady(9, 24), 5, 16),
        (steady(9, 30, start=Fraction(1, 2)), 5, 15),
        (steady(5, 8), 9, 16),  # frames are repeated
        ([Fraction(round(1000 * k / 16), 1000) for k in range(9)], 9, 16),  # times in whole milliseconds, as in .mkv
        ([Fraction(t, 10) for t in (0, 1, 4, 5, 9)], 5, 5),  # unsteady
    ],
)
def test_frames_are_the_nearest_in_time(tmp_path, times, count, fps):
    path = write_video(tmp_path / "a.mp4", times)
    video = read_media(path, frames=count, fps=Fraction(fps), sizes=SIZES)
    assert video.shape == (3, count, 32, 48) and video.dtype == torch.uint8
    assert indices(video) == nearest(times, count, fps)
    assert torch.equal(video[:, 0], torch.from_numpy(picture(0)).permute(2, 0, 1))


def test_a_frame_more_than_there_is_is_refused(tmp_path):
    path = write_video(tmp_path / "a.mp4", steady(8, 16))
    assert indices(read_media(path, frames=8, fps=Fraction(16), sizes=SIZES)) == list(range(8))
    with pytest.raises(BadInput, match=r"0\.50 s are too short: 9 frames at 16 a second need 0\.50 s"):
        read_media(path, frames=9, fps=Fraction(16), sizes=SIZES)


@pytest.mark.parametrize(("shape", "size"), [((40, 64), (32, 48)), ((90, 50), (32, 48)), ((20, 24), (32, 48))])
def test_resizing_is_pillows_and_the_crop_is_the_centre(shape, size):
    frame = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    ours = resize_and_crop(frame, size)
    scale = max(size[0] / shape[0], size[1] / shape[1])
    h, w = round(shape[0] * scale), round(shape[1] * scale)
    whole = np.asarray(Image.fromarray(frame).resize((w, h), Image.Resampling.BICUBIC))
    top, left = (h - size[0]) // 2, (w - size[1]) // 2
    theirs = torch.from_numpy(whole[top : top + size[0], left : left + size[1]].copy()).permute(2, 0, 1)
    assert ours.shape == (3, *size) and top + left > 0
    assert (ours.int() - theirs.int()).abs().max() <= 1


def test_each_video_goes_to_the_bucket_of_nearest_shape(tmp_path):
    sizes = [(32, 48), (48, 32), (32, 32)]
    for (height, width), size in (((64, 100), (32, 48)), ((100, 64), (48, 32)), ((64, 70), (32, 32))):
        assert nearest_size(height, width, sizes) == size
        path = write_video(tmp_path / "a.mp4", steady(2, 16), height=height, width=width)
        assert read_media(path, frames=1, fps=Fraction(16), sizes=sizes).shape == (3, 1, *size)


def test_images(tmp_path):
    image = read_media(write_image(tmp_path / "a.png", 3), frames=1, fps=Fraction(16), sizes=SIZES)
    assert torch.equal(image[:, 0], torch.from_numpy(picture(3)).permute(2, 0, 1))
    turned = Image.fromarray(picture(3, height=48, width=32))
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    turned.save(tmp_path / "b.png", exif=exif)
    image = read_media(tmp_path / "b.png", frames=1, fps=Fraction(16), sizes=SIZES)
    assert torch.equal(image[:, 0], torch.from_numpy(np.rot90(picture(3, height=48, width=32), -1).copy()).permute(2, 0, 1))


def test_a_frame_filmed_sideways_is_turned_counterclockwise_by_its_rotation():
    for rotation, turns in ((0, 0), (90, 1), (-90, 3), (180, 2)):
        frame = SimpleNamespace(rotation=rotation, to_ndarray=lambda format: picture(1))
        assert np.array_equal(media_input._pixels(frame), np.rot90(picture(1), turns))


def bad_files(folder):
    video = write_video(folder / "good.mp4", steady(8, 16)).read_bytes()
    files = {
        "cut.mp4": video[: len(video) // 2],
        "garbage.mp4": b"garbage" * 100,
        "empty.mp4": b"",
        "garbage.png": b"garbage",
        "cut.png": write_image(folder / "good.png", 1).read_bytes()[:60],
        "notes.txt": b"",
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return [*files, "none.mp4"]


def test_what_does_not_decode_is_named(tmp_path):
    reasons = {"notes.txt": ".txt is neither a video's nor an image's suffix", "none.mp4": "there is no such file"}
    for name in bad_files(tmp_path):
        with pytest.raises(BadInput, match=re.escape(reasons.get(name, "cannot be decoded: "))) as error:
            read_media(tmp_path / name, frames=1, fps=Fraction(16), sizes=SIZES)
        assert len(str(error.value).splitlines()) == 1
    with pytest.raises(BadInput, match="an image is one frame, 5 are wanted"):
        read_media(tmp_path / "good.png", frames=5, fps=Fraction(16), sizes=SIZES)


def test_a_video_that_breaks_off_is_refused_where_its_frames_are_wanted(tmp_path):
    path = write_video(tmp_path / "a.mkv", steady(40, 16), lossless=False)
    path.write_bytes(path.read_bytes()[:-1000])
    assert read_media(path, frames=5, fps=Fraction(16), sizes=SIZES).shape[1] == 5
    with pytest.raises(BadInput, match=r"too short|cannot be decoded"):
        read_media(path, frames=40, fps=Fraction(16), sizes=SIZES)


def test_folders_and_tables_are_listed(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("c.MP4", "b/a.png", "a.jpg", "readme.md"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "c.txt").write_text("a caption\n")
    (tmp_path / "a.txt").write_text("")
    listed = [(entry.name, entry.caption) for entry in list_inputs(tmp_path)]
    assert listed == [("a.jpg", ""), ("b/a.png", None), ("c.MP4", "a caption\n")]
    (tmp_path / "t.csv").write_text('﻿caption,path,more\n"one, two",b/a.png,1\n,c.MP4,2\nno path\n', encoding="utf-8")
    table = list_inputs(tmp_path / "t.csv")
    assert [(entry.name, entry.caption) for entry in table] == [("b/a.png", "one, two"), ("c.MP4", ""), ("row 3", "no path")]
    assert table[0].path == tmp_path / "b" / "a.png"


def test_sources_that_cannot_be_used(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "columns.csv").write_text("file,caption\na,b\n")
    (tmp_path / "rows.csv").write_text("path,caption\n")
    (tmp_path / "bytes.csv").write_bytes(b"path,caption\na.mp4,\xff\xfe\n")
    refused = {
        "none": "must be a folder of videos and images, or a .csv file",
        "empty": "there is nothing to encode in it",
        "columns.csv": r"path is missing \(found file, caption\)",
        "rows.csv": "there is nothing to encode",
        "bytes.csv": "is no table in UTF-8",
    }
    for name, message in refused.items():
        with pytest.raises(ValueError, match=message):
            list_inputs(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("480", "write HEIGHTxWIDTH in pixels, such as 480x832"),
        ("480x", "write HEIGHTxWIDTH"),
        ("480x830", "width 830 must be a multiple of 16, such as 832"),
        ("8x16", "height 8 must be a multiple of 16, such as 16"),
    ],
)
def test_sizes_not_divisible_by_16_are_refused(text, message):
    assert parse_size("480x832") == (480, 832)
    with pytest.raises(ValueError, match=message):
        parse_size(text)
