"""Random numbers that do not know about the mesh: one CPU generator per (purpose, seed, step, slot in the global batch)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def generator(purpose: str, *, seed: int, step: int, slot: int) -> torch.Generator:
    """A CPU generator for one use of randomness in one sample of one step; the same on every rank and after a resume.

    torch seeds its CPU generator with 32 bits, so among millions of generators some pairs share their numbers.
    """
    digest = hashlib.sha256(f"{purpose}/{seed}/{step}/{slot}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def noise(purpose: str, shape: tuple[int, ...], *, seed: int, step: int, slots: Iterable[int]) -> Tensor:
    """Standard normal noise [len(slots), *shape], float32 on the CPU.

    `shape` must be that of the whole sample: a shorter draw, or one in another dtype, is not a part of a longer one.
    """
    return torch.stack([torch.randn(shape, generator=generator(purpose, seed=seed, step=step, slot=s)) for s in slots])
