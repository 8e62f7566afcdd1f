"""Finding and reading videos that are measured: files, arrays, folders of pictures."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from media_samples import indices, picture, steady, write_image, write_video
from PIL import Image
from safetensors.numpy import save

from rcm_mcore.data.media_input import BadInput
from rcm_mcore.data.video_folder import group_of, list_videos, read_video

READ = {"frames": 3, "fps": Fraction(8), "size": (32, 48)}


def frames(count, first=0):
    """uint8 [F, 32, 48, 3]."""
    return np.stack([picture(first + index) for index in range(count)])


def names(folder, **options):
    return [name.as_posix() for name in list_videos(folder, **options)]


def test_listing(tmp_path):
    for name in ("a-0.mp4", "b.GIF", "c.npy", "d.safetensors", "e.txt", "sheet.png", "f/1.png", "f/2.jpg", ".hid/1.png",
                 "g/v.mp4", "g/preview.png", "f/.x.png.partial", "h/notes.txt"):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert names(tmp_path, frames=2) == ["a-0.mp4", "b.GIF", "c.npy", "d.safetensors", "f", "g/v.mp4"]
    assert names(tmp_path, frames=1) == [
        "a-0.mp4", "b.GIF", "c.npy", "d.safetensors", "f/1.png", "f/2.jpg", "g/preview.png", "g/v.mp4", "sheet.png"
    ]  # fmt: skip
    assert names(tmp_path, frames=1, pattern="*/[12].*") == ["f/1.png", "f/2.jpg"]
    with pytest.raises(ValueError, match=r"nothing matches '\*\.mov' that is a video"):
        list_videos(tmp_path, frames=2, pattern="*.mov")
    with pytest.raises(ValueError, match="h: nothing matches"):
        list_videos(tmp_path / "h", frames=2)
    with pytest.raises(ValueError, match="nowhere: is no folder"):
        list_videos(tmp_path / "nowhere", frames=2)


@pytest.mark.parametrize(
    "name, group",
    {
        "a cat-0.mp4": "a cat", "a cat-12.gif": "a cat", "24-7 shop-3.mp4": "24-7 shop", "cat-4": "cat",
        "00003/samples/0002.png": "00003/samples", "alone.mp4": "alone", "000_a-fox.mp4": "000_a-fox",
        "v1.5 car-1.mp4": "v1.5 car", "v1.5 car-1": "v1.5 car",
    }.items(),
)  # fmt: skip
def test_groups_from_names(name, group):
    assert group_of(Path(name)) == group


def test_every_kind_gives_the_same_frames(tmp_path):
    pixels = frames(5)
    write_video(tmp_path / "a.mp4", steady(5, 8))
    np.save(tmp_path / "b.npy", pixels)
    np.save(tmp_path / "c.npy", (pixels.transpose(3, 0, 1, 2) / 255).astype(np.float32))
    (tmp_path / "d.safetensors").write_bytes(save({"video": pixels}))
    (tmp_path / "e").mkdir()
    for index in range(12):  # without leading zeros: 10 comes behind 9
        write_image(tmp_path / "e" / f"frame{index}.png", index)
    expected = torch.from_numpy(pixels[:3]).permute(3, 0, 1, 2)
    for name in list_videos(tmp_path, frames=3):
        video = read_video(tmp_path / name, **READ)
        assert video.dtype == torch.uint8 and torch.equal(video, expected), name
    assert indices(read_video(tmp_path / "e", **READ | {"frames": 12})) == list(range(12))
    half = read_video(tmp_path / "a.mp4", **READ | {"fps": Fraction(4)})
    assert indices(half) == [0, 2, 4], "files with times are read at fps"


def test_a_gif_is_read_by_its_times(tmp_path):
    images = [Image.fromarray(np.full((32, 48, 3), value, np.uint8)) for value in (0, 51, 102, 153, 204)]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=100, loop=0)
    video = read_video(tmp_path / "a.gif", frames=3, fps=Fraction(5), size=(32, 48))
    assert [round(float(frame.float().mean())) for frame in video[0]] == [0, 102, 204]


def test_resized_to_cover_and_cut(tmp_path):
    wide = np.zeros((3, 20, 60, 3), np.uint8)
    wide[:, :, 20:40] = 200  # what is in the middle
    np.save(tmp_path / "a.npy", wide)
    video = read_video(tmp_path / "a.npy", frames=3, fps=Fraction(8), size=(10, 10))
    assert video.shape == (3, 3, 10, 10) and int(video[..., 2:8].min()) > 190


def bad(tmp_path, name, what):
    path = tmp_path / name
    if isinstance(what, np.ndarray):
        np.save(path, what, allow_pickle=True)
    elif isinstance(what, dict):
        path.write_bytes(save(what))
    elif isinstance(what, int):
        path.mkdir()
        for index in range(what):
            write_image(path / f"{index}.png", index)
    else:
        path.write_bytes(what)
    return path


@pytest.mark.parametrize(
    "name, what, text",
    [
        ("a.mp4", b"nothing", "cannot be decoded"),
        ("a.gif", b"GIF89a", "cannot be decoded"),
        ("a.npy", b"nothing", "cannot be read"),
        ("a.npy", np.array([{}, 1], dtype=object), "cannot be read: ValueError: Object arrays"),
        ("a.npy", np.array(["x"]), "cannot be read: TypeError"),
        ("a.npy", frames(2), "has 2 frames, 3 are wanted"),
        ("a.npy", frames(3).transpose(3, 0, 1, 2), r"uint8 \[3, 3, 32, 48\]: must be uint8 \[F, H, W, 3\]"),
        ("a.npy", frames(3).astype(np.float32), r"float32 \[3, 32, 48, 3\]: must be uint8|values from"),
        ("a.npy", np.full((3, 3, 4, 4), 1.5), "values from 1.5 to 1.5: floating point must lie in"),
        ("a.npy", np.full((3, 3, 4, 4), -0.1), "values from -0.1"),
        ("a.npy", np.full((3, 3, 4, 4), np.nan), "values from nan"),
        ("a.npy", np.zeros((3, 4, 4), np.uint8), r"uint8 \[3, 4, 4\]"),
        ("a.npy", np.zeros((3, 0, 4, 3), np.uint8), r"uint8 \[3, 0, 4, 3\]"),
        ("a.safetensors", b"nothing", "cannot be read: SafetensorError"),
        ("a.safetensors", {"x": frames(3), "y": frames(3)}, "holds 2 tensors, must hold one"),
        ("folder", 2, "has 2 frames, 3 are wanted"),
    ],
)
def test_what_cannot_be_used(tmp_path, name, what, text):
    with pytest.raises(BadInput, match=text):
        read_video(bad(tmp_path, name, what), **READ)


def test_a_damaged_picture_is_named(tmp_path):
    path = bad(tmp_path, "folder", 3)
    (path / "1.png").write_bytes(b"nothing")
    with pytest.raises(BadInput, match=r"1\.png cannot be decoded"):
        read_video(path, **READ)
