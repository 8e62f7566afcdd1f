"""On every rank: runs with and without sheets, and what the sampler makes of their checkpoints (test_sheets.py)."""

import json
import logging
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from rcm_mcore.condition import Condition
from rcm_mcore.config import load_config
from rcm_mcore.data import DataLoader
from rcm_mcore.parallel.mesh import destroy_mesh, init_distributed
from rcm_mcore.parallel.random import noise
from rcm_mcore.sampling import Sampler, SamplerConfig, sampler
from rcm_mcore.training import loop, sheets
from rcm_mcore.training.setup import check

made = []


class Kept(sheets.Sheets):
    """Keeps the latents of the sheets."""

    def latents(self):
        latents = super().latents()
        made.append(latents)
        return latents


def unwritable(*_, **__):
    raise OSError("[Errno 28] No space left on device")


def run(path, fails=False):
    config = load_config(path)
    check(config, dist.get_world_size())
    made.clear()
    write = sheets.write_contact_sheet
    if fails:
        sheets.write_contact_sheet = unwritable
    try:
        loop.train(config)
    finally:
        sheets.write_contact_sheet = write
    if dist.get_rank() == 0 and made:
        torch.save(torch.stack(made), f"{path}.sheets.pt")
    elif dist.get_rank() > 0:
        assert all(latents is None for latents in made)
    destroy_mesh()


def sample(path, which, **how):
    """What `python -m rcm_mcore.sample` makes of the last checkpoint for the texts and the noise of the sheets."""
    config = load_config(path)
    count = config.log.sheet_samples
    with DataLoader(
        config=config.data, model=config.model, seed=config.train.seed, global_batch_size=count, dp_rank=0, dp_size=1
    ) as loader:
        batch = next(loader)
    sampler.noise = lambda purpose, *args, **kwargs: noise(purpose.replace("sample-", "sheet-"), *args, **kwargs)
    request = SamplerConfig(
        checkpoint=config.checkpoint.dir, text_encoder="", latent_shape=config.data.latent_shape, which=which,
        seed=config.train.seed, **how,
    )  # fmt: skip
    told = Condition(batch.text)
    if config.model.condition == "first_last":
        told = told._replace(latents=batch.given, image=batch.image)
    elif config.model.condition == "frames":
        told = told._replace(latents=batch.latents, frames=torch.tensor([0, 1, 0]))
    with Sampler(request) as ours:
        # One at a time, as on a sheet: matmuls of another height may round in another way.
        latents = [ours.latents([i], [batch.text[i]], given=told.rows([i])) for i in range(count)]
    torch.save(torch.cat(latents), f"{path}.{which}_{request.steps}.pt")


def main(folder):
    for name in ("megatron", "rcm_mcore"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    init_distributed()
    loop.Sheets = Kept
    for action, args, kwargs in json.loads((folder / "plan.json").read_text()):
        {"run": run, "sample": sample}[action](*args, **kwargs)
    if dist.get_rank() == 0:
        (folder / f"results_{dist.get_world_size()}.json").write_text("{}")
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
