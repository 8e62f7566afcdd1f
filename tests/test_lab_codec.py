"""The learned codec of the laboratory's scenes, and the stream of scenes that it is trained on."""

import os
import stat

import pytest
import torch
from sklearn.decomposition import TruncatedSVD
from torch import nn

from rcm_mcore.lab import codec as codec_module
from rcm_mcore.lab import stream
from rcm_mcore.lab.codec import SceneCodec, _start_linear, psnr, train_codec
from rcm_mcore.lab.scenes import draw_scenes, is_heldout, render
from rcm_mcore.lab.stream import batches, scenes_for
from rcm_mcore.lab.weights import write_network

TINY = {"batch_size": 4, "width": 8, "heldout": 16, "show": False}


@pytest.fixture(scope="module")
def codec() -> SceneCodec:
    return train_codec(seed=0, steps=12, **TINY)


@pytest.fixture(scope="module")
def videos() -> torch.Tensor:
    return render(draw_scenes(4, 5))


def random_codec(**options) -> SceneCodec:
    """A codec all of whose layers do something."""
    torch.manual_seed(0)
    codec = SceneCodec(**{"width": 8, **options}).eval().requires_grad_(False)
    for parameter in codec.parameters():
        parameter.normal_(std=0.1)
    return codec


def test_training_makes_videos_of_latents(codec, videos):
    """Better than the mean colour of each video, which no blind codec reaches; on held-out scenes and on others."""
    means = videos.mean((2, 3, 4), keepdim=True).expand_as(videos)
    assert psnr(videos, codec.decode(codec.encode(videos))) > psnr(videos, means) + 1
    assert codec.facts["psnr"] > psnr(videos, means) + 1
    assert codec.facts["steps"] == 12 and 0 <= codec.facts["legible"] <= 1


def test_latents_are_standardized_over_real_videos(codec):
    latents = codec.encode(render(scenes_for("held out", 32, seed=3)))
    assert latents.shape == (32, *codec.latent_shape) and codec.latent_shape == (16, 5, 16, 16)
    assert latents.mean((0, 2, 3, 4)).abs().max() < 0.25
    assert (latents.std((0, 2, 3, 4)) - 1).abs().max() < 0.25


def test_training_depends_on_the_seed_alone(monkeypatch):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    taught, losses = codec_module._loss, []
    monkeypatch.setattr(codec_module, "_loss", lambda *args: (losses.append(taught(*args)), losses[-1])[1])
    first, again, other = (train_codec(seed=seed, steps=1, **TINY) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before), "the global random state is left as it was"
    # Not exactly: convolutions on a CPU round differently from run to run.
    torch.testing.assert_close(losses[1], losses[0])
    assert (losses[2] - losses[0]).abs() > 1e-4 * losses[0]
    torch.testing.assert_close(again.encoder[0].weight, first.encoder[0].weight, rtol=0, atol=1e-4)
    assert not torch.allclose(other.encoder[0].weight, first.encoder[0].weight, rtol=0, atol=1e-4)


class _Nothing(nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


def test_pixels_are_where_they_were(videos):
    """With nothing in between, frames folded into groups and channels unfold to the same video."""
    codec = SceneCodec(width=8)
    codec.encoder = codec.decoder = nn.Identity()
    codec.to_latents = codec.to_pixels = _Nothing()
    torch.testing.assert_close(codec._videos(codec._latents(videos)), videos)
    latents = codec._latents(videos)
    assert latents.shape == (4, 48, 5, 32, 32)
    first = (2 * videos[:, 0, 0, ::2, ::2] - 1)[:, None].expand(-1, 4, -1, -1)
    torch.testing.assert_close(latents[:, 0:16:4, 0], first)  # red, upper left pixel, four times the first frame
    torch.testing.assert_close(latents[:, 0:16:4, 4], 2 * videos[:, 0, 13:, ::2, ::2] - 1)


@pytest.mark.parametrize("space, shape", [(4, (16, 5, 16, 16)), (8, (16, 5, 8, 8))])
def test_a_group_of_frames_sees_its_neighbours_alone(videos, space, shape):
    """Of the video and of the latents; and no video sees another of its batch."""
    codec = random_codec(space=space)
    changed = videos.clone()
    changed[1, :, 13:] = 0.5
    latents = codec.encode(videos)
    moved = (codec.encode(changed) - latents).abs().amax((1, 3, 4)) > 1e-4
    assert latents.shape == (4, *shape)
    assert moved.tolist() == [[False] * 5, [False, False, False, True, True], [False] * 5, [False] * 5]
    changed = latents.clone()
    changed[1, :, 0] += 1
    frames = (codec.decode(changed) - codec.decode(latents)).abs().amax((1, 3, 4)) > 1e-4
    assert frames.tolist() == [[row == 1 and frame < 5 for frame in range(17)] for row in range(4)]


@pytest.mark.parametrize("space, channels", [(4, 16), (8, 5)])
def test_training_starts_from_principal_components(videos, space, channels):
    """Those of scikit-learn, around the mean of each channel; the networks add nothing yet."""
    codec = SceneCodec(width=4, space=space, channels=channels)
    _start_linear(codec, videos)
    latents = codec.encode(videos)
    groups = torch.cat([videos[:, :, :1].expand(-1, -1, 3, -1, -1), videos], 2).unflatten(2, (5, 4))
    cut = groups.unflatten(5, (-1, space // 2, 2)).unflatten(4, (-1, space // 2, 2)).permute(0, 2, 4, 7, 1, 3, 5, 8, 6, 9)
    mean = cut.mean((0, 1, 2, 3, 6, 7), keepdim=True)  # [..., colour, frame, corner, corner, y, x]
    patches = (cut - mean).flatten(4).flatten(0, 3).numpy()
    components = TruncatedSVD(channels, algorithm="arpack", random_state=0).fit(patches)
    expected = torch.from_numpy(components.inverse_transform(components.transform(patches))).view(cut.shape) + mean
    expected = expected.permute(0, 4, 1, 5, 2, 6, 8, 3, 7, 9).reshape(4, 3, 20, 64, 64)[:, :, 3:].float()
    torch.testing.assert_close(codec.decode(latents), expected.clamp(0, 1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(latents.square().mean((0, 2, 3, 4)), torch.ones(channels), rtol=1e-3, atol=1e-3)


def test_batches_do_not_matter(videos, monkeypatch):
    codec = random_codec()
    latents = codec.encode(videos)
    monkeypatch.setattr("rcm_mcore.lab.codec._BATCH", 3)
    torch.testing.assert_close(codec.encode(videos), latents)
    torch.testing.assert_close(codec.decode(latents), torch.cat([codec.decode(row[None]) for row in latents]))


def test_videos_are_clamped():
    decoded = random_codec().decode(20 * torch.randn(2, 16, 5, 16, 16))
    assert decoded.dtype == torch.float32 and decoded.min() == 0 and decoded.max() == 1


def test_a_file_holds_all_of_it(codec, videos, tmp_path):
    umask = os.umask(0o027)
    try:
        codec.save(tmp_path / "codec.safetensors")
    finally:
        os.umask(umask)
    assert [path.name for path in tmp_path.iterdir()] == ["codec.safetensors"]
    assert stat.S_IMODE((tmp_path / "codec.safetensors").stat().st_mode) == 0o640
    loaded = SceneCodec.load(tmp_path / "codec.safetensors")
    assert loaded.facts == codec.facts and loaded.latent_shape == codec.latent_shape
    torch.testing.assert_close(loaded.encode(videos), codec.encode(videos))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_other_files_are_refused(codec, tmp_path):
    path = tmp_path / "other.safetensors"
    write_network(path, codec, "another-1", {})
    with pytest.raises(ValueError, match=r"no scene-codec-1 file \(its format is 'another-1'\)"):
        SceneCodec.load(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"other\.safetensors: no scene-codec-1 file"):
        SceneCodec.load(path)
    with pytest.raises(OSError):
        SceneCodec.load(tmp_path / "missing")


def test_a_file_that_cannot_be_completed_leaves_the_old_one(codec, tmp_path, monkeypatch):
    path = tmp_path / "codec.safetensors"
    path.write_text("old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        codec.save(path)
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("codec.safetensors", "old")]


def test_wrong_input_is_named(codec):
    with pytest.raises(ValueError, match=r"videos: shape \[2, 3, 16, 64, 64\]; expected \[n, 3, 17, 64, 64\]"):
        codec.encode(torch.zeros(2, 3, 16, 64, 64))
    with pytest.raises(ValueError, match=r"latents: shape \[2, 16, 5, 8, 8\]; expected \[n, 16, 5, 16, 16\]"):
        codec.decode(torch.zeros(2, 16, 5, 8, 8))
    with pytest.raises(ValueError, match="space=2"):
        SceneCodec(space=2)
    with pytest.raises(ValueError, match="batch_size=1"):
        train_codec(seed=0, batch_size=1)


def test_psnr():
    videos = torch.zeros(2, 3, 4, 5, 5)
    assert psnr(videos, videos + 0.1) == pytest.approx(20, abs=1e-5)
    assert psnr(videos, torch.cat([videos[:1], videos[1:] + 0.1])) == pytest.approx(23.0103, abs=1e-4)


# stream


def test_scenes_are_new_for_each_purpose_seed_and_part():
    drawn = [
        scenes_for(*key, seed=seed, part=part) for key in (("codec", 8), ("reader", 8)) for seed in (0, 1) for part in (0, 1)
    ]
    again = scenes_for("reader", 8, seed=1, part=1)
    assert all(torch.equal(a, b) for a, b in zip(drawn[-1], again))
    assert len({scenes.start.numpy().tobytes() for scenes in drawn}) == 8
    assert is_heldout(drawn[0]).sum() == 2, "one in four has a combination that generators are never shown"


def test_batches_are_rendered_scenes(monkeypatch):
    monkeypatch.setattr(stream, "_DRAWN", 12)
    monkeypatch.setattr(stream, "_RENDERED", 8)
    found = list(batches("codec", 6, 4, seed=0, device="cpu"))
    assert len(found) == 6
    for scenes, videos in found:
        assert len(scenes.place) == 4
        torch.testing.assert_close(render(scenes), videos)
    assert len({tuple(scenes.gradient.tolist()) for scenes, _ in found}) == 6
    assert sum(int(is_heldout(scenes).sum()) for scenes, _ in found) == 6, "three of each twelve"
