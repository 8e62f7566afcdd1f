"""Files of videos and pictures, read back by PyAV and Pillow."""

import av
import numpy as np
import pytest
import torch
from PIL import Image

from rcm_mcore.data import media


def moving_square(frames=9, height=32, width=48):
    """Saturated colors, which another color matrix would change."""
    video = -torch.ones(3, frames, height, width)
    for f in range(frames):
        video[0, f, 8:24, 2 * f : 2 * f + 16] = 1.0
        video[1, f, 24:] = 1.0
        video[2, f, :8] = 0.5
    return video


def read(path):
    with av.open(str(path)) as container:
        rate, name = container.streams.video[0].average_rate, container.streams.video[0].codec_context.name
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]), rate, name


def test_pixels():
    video = torch.tensor([-1.0, 1.0, 0.0, 7.0, -7.0, 0.004]).view(1, 1, 1, 6).expand(3, 1, 1, 6)
    assert media.to_pixels(video)[0, 0, :, 0].tolist() == [0, 255, 128, 255, 0, 128]
    assert media.to_pixels(moving_square()).shape == (9, 32, 48, 3)


@pytest.mark.parametrize("codecs, name", [({"libx264", "mpeg4"}, "h264"), ({"mpeg4"}, "mpeg4")])
def test_an_mp4_decodes_to_the_video(tmp_path, monkeypatch, codecs, name):
    monkeypatch.setattr(av, "codecs_available", codecs)
    pixels = media.to_pixels(moving_square()).numpy()
    media.write_media(tmp_path / "a.mp4", pixels, fps=16)
    frames, rate, codec = read(tmp_path / "a.mp4")
    assert frames.shape == pixels.shape and rate == 16 and codec == name
    error = np.abs(frames.astype(float) - pixels)
    assert error.mean() < 6 and np.median(error) < 3, "half the colors of an edge"
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_fractional_rates(tmp_path):
    media.write_media(tmp_path / "a.mp4", media.to_pixels(moving_square()).numpy(), fps=23.976)
    assert float(read(tmp_path / "a.mp4")[1]) == pytest.approx(23.976, abs=1e-3)


def test_a_png_is_exact(tmp_path):
    pixels = media.to_pixels(moving_square(1, 15, 31)).numpy()
    media.write_media(tmp_path / "a.png", pixels, fps=0)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), pixels[0])


@pytest.mark.parametrize(
    "name, pixels, fps, message",
    [
        ("a.mp4", np.zeros((2, 8, 8), np.uint8), 16, r"pixels are uint8 \[2, 8, 8\]: must be uint8 \[F, H, W, 3\]"),
        ("a.mp4", np.zeros((2, 8, 8, 3)), 16, "pixels are float64"),
        ("a.png", np.zeros((2, 8, 8, 3), np.uint8), 16, "2 frames go to a .mp4"),
        ("a.mp4", np.zeros((1, 8, 8, 3), np.uint8), 16, "1 frames go to a .png"),
        ("a.mp4", np.zeros((2, 8, 8, 3), np.uint8), 0, "fps=0 must be positive"),
        ("a.mp4", np.zeros((2, 8, 9, 3), np.uint8), 16, "8x9 pixels; an mp4 with 4:2:0 colors needs even sizes"),
    ],
)
def test_what_cannot_be_written(tmp_path, name, pixels, fps, message):
    with pytest.raises(ValueError, match=message):
        media.write_media(tmp_path / name, pixels, fps=fps)
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(media.os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        media.write_media(tmp_path / "a.mp4", np.zeros((2, 16, 16, 3), np.uint8), fps=16)
    assert not list(tmp_path.iterdir())


def test_thumbnails_are_the_first_middle_and_last_frame(tmp_path):
    pixels = np.zeros((5, 16, 32, 3), np.uint8)
    pixels += np.array([0, 60, 120, 180, 240], np.uint8).reshape(5, 1, 1, 1)
    media.write_media(tmp_path / "a.mp4", pixels, fps=16)
    shown = media.thumbnails(tmp_path / "a.mp4", height=8)
    assert [picture.shape for picture in shown] == [(8, 16, 3)] * 3
    assert [picture.mean() for picture in shown] == pytest.approx([0, 120, 240], abs=4)
    media.write_media(tmp_path / "a.png", pixels[:1], fps=16)
    assert len(media.thumbnails(tmp_path / "a.png", height=8)) == 1


def test_contact_sheet(tmp_path):
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    cells = [(f"00{i} " + "long " * 99, [np.full((40, 600, 3), c, np.uint8) for c in colors[:2]]) for i in range(3)]
    media.write_contact_sheet(tmp_path / "sheet.png", cells)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (3 * 64, 1216, 3), "one column"
    for row in range(3):
        assert tuple(sheet[row * 64 + 40, 300]) == colors[0] and tuple(sheet[row * 64 + 40, 900]) == colors[1]
        assert (sheet[row * 64 + 4 : row * 64 + 18].min(axis=(0, 2)) < 128).nonzero()[0].max() > 1000, (
            "a caption over the width"
        )
    with pytest.raises(ValueError, match=r"pictures of one size, not \[\]"):
        media.write_contact_sheet(tmp_path / "none.png", [])
