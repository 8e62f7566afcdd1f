"""Random parts of a pipeline, small enough for tests, in folders as diffusers writes them."""

import torch
from diffusers import AutoencoderKLWan


def tiny_vae(folder, seed=0, **fields):
    """Writes folder/vae; returns the model. The statistics of latents are not the usual ones: they must be read."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = dict(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True])
        stats = dict(latents_mean=[0.1 * i - 0.7 for i in range(16)], latents_std=[1 + 0.1 * i for i in range(16)])
        model = AutoencoderKLWan(**{**sizes, **stats, **fields})
    model.save_pretrained(folder / "vae")
    return model
