"""The VAE against diffusers' pipelines: normalization, sizes, tiles, folders that cannot be used."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from components import tiny_vae
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel, WanVideoToVideoPipeline
from safetensors.torch import load_file, save_file

from rcm_mcore.data.vae import VideoVAE, latent_shape


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline")
    tiny_vae(path)
    return path


@pytest.fixture(scope="module")
def vae(folder):
    return VideoVAE(folder)


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_encode_is_the_video_pipelines(vae):
    video = normal(2, 3, 5, 16, 24).clamp(-1, 1)
    scheduler = SimpleNamespace(add_noise=lambda latents, *_: latents)
    kwargs = dict(height=16, width=24, dtype=torch.float32, device="cpu", timestep=None, batch_size=2, generator=None)
    stock = WanVideoToVideoPipeline.prepare_latents(
        SimpleNamespace(vae=vae.model, scheduler=scheduler, vae_scale_factor_temporal=4, vae_scale_factor_spatial=8),
        video,
        **kwargs,
    )
    assert stock.shape == (2, *latent_shape(5, 16, 24))
    torch.testing.assert_close(vae.encode(video), stock, rtol=1e-5, atol=1e-5)


def test_decode_is_the_text_pipelines(vae):
    """The pipeline's own latents, and what it makes of them."""
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=8, freq_dim=16, ffn_dim=32, num_layers=1
    )
    parts = dict(tokenizer=None, text_encoder=None, transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler())
    pipeline = WanPipeline(vae=vae.model, **parts)
    pipeline.set_progress_bar_config(disable=True)
    run = lambda kind: pipeline(
        prompt_embeds=normal(1, 4, 8), guidance_scale=1.0, height=32, width=16, num_frames=5, num_inference_steps=1,
        generator=torch.Generator().manual_seed(0), output_type=kind,
    ).frames  # fmt: skip
    video = vae.decode(run("latent"))
    assert video.shape == (1, 3, 5, 32, 16) and video.dtype == torch.float32
    assert video.std() > 0.02 and video.abs().max() <= 1
    torch.testing.assert_close(video / 2 + 0.5, run("pt").transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_tiles_are_for_decoding_alone(folder, vae):
    tiled = VideoVAE(folder, tiled=True)
    tiled.model.enable_tiling(32, 32, 16, 16)
    latents, video = normal(1, 16, 2, 6, 8), normal(1, 3, 1, 48, 64)
    whole, parts = vae.decode(latents), tiled.decode(latents)
    assert parts.shape == whole.shape
    assert 0 < (parts - whole).norm() / whole.norm() < 0.5, "other borders, the same picture"
    assert torch.equal(tiled.encode(video), vae.encode(video))


def test_bfloat16_gives_float32(folder):
    vae = VideoVAE(folder, dtype=torch.bfloat16)
    assert vae.encode(normal(1, 3, 1, 16, 16)).dtype == vae.decode(normal(1, 16, 1, 2, 2)).dtype == torch.float32


def test_shape_of_latents():
    assert latent_shape(81, 480, 832) == (16, 21, 60, 104)
    assert latent_shape(1, 16, 24, channels=4) == (4, 1, 2, 3)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ((80, 480, 832), r"frames=80: must be 4n \+ 1, such as 77 or 81"),
        ((0, 480, 832), r"frames=0: must be 4n \+ 1, such as 1 or 5"),
        ((81, 484, 832), "height=484: must be a multiple of 8, such as 480"),
        ((81, 480, 0), "width=0: must be a multiple of 8, such as 8"),
    ],
)
def test_sizes_that_do_not_fit(sizes, message, vae):
    with pytest.raises(ValueError, match=message):
        latent_shape(*sizes)
    with pytest.raises(ValueError, match=message):
        vae.encode(torch.zeros(1, 3, *sizes, device="meta"))


def test_tensors_of_another_shape(vae):
    with pytest.raises(ValueError, match=r"video \[1, 1, 5, 16, 16\]: must be \[B, 3, F, H, W\]"):
        vae.encode(torch.zeros(1, 1, 5, 16, 16))
    with pytest.raises(ValueError, match=r"latents \[4, 2, 4, 4\]: must be \[B, 16, F, H, W\]"):
        vae.decode(torch.zeros(4, 2, 4, 4))


def config_with(**fields):
    def spoil(path):
        file = path / "vae" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return spoil


def without_a_weight(path):
    file = path / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights.pop("quant_conv.bias")
    save_file(weights, file, metadata={"format": "pt"})


def cut_off(path):
    file = path / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda path: shutil.rmtree(path / "vae"), r"no config.json in it or in vae/"),
        (lambda path: (path / "vae" / "config.json").write_text("["), "config.json cannot be read"),
        (config_with(_class_name="AutoencoderKL"), "holds AutoencoderKL: must be an AutoencoderKLWan"),
        (config_with(patch_size=2), "patch_size=2 is Wan2.2's"),
        (config_with(latents_mean=[0.0]), "latents_mean of its config.json must have z_dim=16 values"),
        (config_with(base_dim=16), "cannot be loaded|does not fit"),
        (lambda path: (path / "vae" / "diffusion_pytorch_model.safetensors").unlink(), "cannot be loaded"),
        (without_a_weight, "does not fit its config.json: {'missing_keys': .'quant_conv.bias'"),
        (cut_off, "cannot be loaded"),
    ],
)
def test_folders_that_cannot_be_used(folder, tmp_path, spoil, message):
    shutil.copytree(folder, tmp_path / "copy")
    spoil(tmp_path / "copy")
    with pytest.raises(ValueError, match=message) as error:
        VideoVAE(tmp_path / "copy")
    assert str(tmp_path / "copy") in str(error.value)
