"""On every rank: sample a checkpoint under each mesh of this world size, with random texts (test_training.py)."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from rcm_mcore.data import text
from rcm_mcore.parallel.mesh import init_distributed
from rcm_mcore.sampling import SampleRequest, sample

MESHES = {
    1: {"one": {}},
    2: {
        "cp2": {"cp": 2},
        "cp2-all_to_all": {"cp": 2, "cp_mode": "all_to_all"},
        "tp2-sp": {"tp": 2, "sp": True},
        "pp2": {"pp": 2},
    },
}


class RandomTexts:
    """In the place of a text encoder: rows that depend on the prompt alone."""

    def __init__(self, folder, **_):
        pass

    def token_counts(self, prompts):
        return [3] * len(prompts)

    def encode(self, prompts):
        return [torch.randn(3, 8, generator=torch.Generator().manual_seed(int(p))) for p in prompts]


def main(folder):
    init_distributed()
    text.TextEncoder = RandomTexts
    for name, mesh in MESHES[dist.get_world_size()].items():
        request = SampleRequest(
            checkpoint=str(folder / "teacher"), prompts=("1", "2", "3"), text_encoder="", latent_shape=(4, 3, 4, 4),
            sampler="euler", which="student", steps=2, guidance=2.0, batch_size=2, **mesh,
        )  # fmt: skip
        result = sample(request)
        if dist.get_rank() == 0:
            torch.save(result.latents, folder / f"samples_{name}.pt")
    if dist.get_rank() == 0:
        (folder / f"results_{dist.get_world_size()}.json").write_text("{}")
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
