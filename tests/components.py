"""Random parts of a pipeline, small enough for tests, in folders as diffusers writes them; and a checkpoint of ours."""

import torch
from diffusers import AutoencoderKLWan
from tiny import MODEL

from rcm_mcore.checkpoint import write_network
from rcm_mcore.config import parse_model
from rcm_mcore.data.text import build_text_encoder, train_tokenizer
from rcm_mcore.models import build_model

VIDEO_MODEL = MODEL | {"in_channels": 16, "text_dim": 16, "text_len": 24}
PROMPTS = ("a red fox", "a blue whale, at night", "a green bird")


def tiny_vae(folder, seed=0, **fields):
    """Writes folder/vae; returns the model. The statistics of latents are not the usual ones: they must be read."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = dict(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True])
        stats = dict(latents_mean=[0.1 * i - 0.7 for i in range(16)], latents_std=[1 + 0.1 * i for i in range(16)])
        model = AutoencoderKLWan(**{**sizes, **stats, **fields})
    model.save_pretrained(folder / "vae")
    return model


def tiny_pipeline(folder):
    """Writes folder/vae and, beside each other, a tokenizer and a text encoder."""
    tiny_vae(folder)
    train_tokenizer(PROMPTS, folder)
    build_text_encoder(folder, seed=0, d_model=16, layers=1, heads=2, d_ff=32)


def tiny_checkpoint(folder, mesh, seed=0):
    """Writes a network whose latents are those of the VAE, with weights large enough that text and noise matter."""
    net = build_model(parse_model(VIDEO_MODEL), mesh.config, mesh.groups, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, entry in net.named_parameters():
        draw = torch.randn(entry.shape, generator=generator)
        weights[name] = 1 + 0.1 * draw if "norm" in name and name.endswith("weight") else 0.2 * draw
    write_network(folder, weights, VIDEO_MODEL)
