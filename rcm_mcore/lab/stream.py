"""Scenes and their videos as the networks of the laboratory take them: rendered where they are used, never stored."""

import os
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rcm_mcore.lab.scenes import Scenes, concatenate, draw_scenes, render, select

PURPOSES = ("codec", "reader", "statistics", "held out")
_DRAWN, _RENDERED = 2048, 512  # scenes at once: small calls cost as much as large ones, and 512 videos are 430 MB
_WORKERS = 8  # processes that draw scenes for a GPU, which one would keep waiting
_NOVEL = 4  # one scene in so many has a combination that generators are never trained on, as in uniform draws


def scenes_for(purpose: str, count: int, *, seed: int, part: int = 0) -> Scenes:
    """Scenes of all combinations of attributes, other ones for every purpose, seed and part.

    Judges and codecs are trained and measured on these, not on the training combinations alone: what a generator does with
    combinations that it never saw must not be mixed with what its judge does with them.
    """
    shares = {False: count - count // _NOVEL, True: count // _NOVEL}
    key = (seed, PURPOSES.index(purpose), part)
    drawn = concatenate([draw_scenes(n, (*key, heldout), heldout=heldout) for heldout, n in shares.items() if n])
    return select(drawn, torch.randperm(count, generator=torch.Generator().manual_seed(part)))


def batches(purpose: str, steps: int, size: int, *, seed: int, device: torch.device | str) -> Iterator[tuple[Scenes, Tensor]]:
    """`steps` times `size` fresh scenes, on the CPU, and their videos [size, 3, 17, 64, 64] on the device."""
    device = torch.device(device)
    workers = min(_WORKERS, os.cpu_count() or 1) if device.type == "cuda" else 0
    for scenes in DataLoader(_Chunks(purpose, steps, size, seed), batch_size=None, num_workers=workers):
        together = max(1, _RENDERED // size) * size
        for first in range(0, len(scenes.place), together):
            some = select(scenes, slice(first, first + together))
            videos = render(some, device)
            for start in range(0, len(videos), size):
                rows = slice(start, start + size)
                yield select(some, rows), videos[rows]


class _Chunks(Dataset):
    """The scenes of `steps` batches, as many batches at once as _DRAWN has room for."""

    def __init__(self, purpose: str, steps: int, size: int, seed: int) -> None:
        self.purpose, self.steps, self.size, self.seed = purpose, steps, size, seed
        self.together = max(1, _DRAWN // size)

    def __len__(self) -> int:
        return -(-self.steps // self.together)

    def __getitem__(self, part: int) -> Scenes:
        if part >= len(self):
            raise IndexError(part)
        steps = min(self.together, self.steps - part * self.together)
        return scenes_for(self.purpose, steps * self.size, seed=self.seed, part=part)
