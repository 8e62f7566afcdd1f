"""Host memory of exactly the size that is needed, page-locked where a GPU copies to it and from it."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)
_ALIGNMENT = 64


class HostMemory:
    """Room in host memory for copies of `tensors`, one after another; page-locked if one of them is on a GPU.

    Where it cannot be locked a warning says so, and copies are slower.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        tensors = list(tensors)
        self.room = torch.empty(sum(map(padded_bytes, tensors)), dtype=torch.uint8, device="cpu")
        self._used = 0
        self.is_locked = False
        if any(x.is_cuda for x in tensors):
            # Of exactly this size, which torch's pinned allocator would round up to a power of two.
            code = int(_cudart().cudaHostRegister(self.room.data_ptr(), self.room.numel(), 0))
            self.is_locked = code == 0
            if not self.is_locked:
                forget_cuda_error()
                log.warning(
                    "%.1f GiB of host memory could not be page-locked (CUDA error %d): copies to it take longer",
                    self.room.nbytes / 2**30,
                    code,
                )

    def take(self, x: Tensor) -> Tensor:
        """A copy of `x` in the room behind the last one; on a GPU it is only under way, in the order of the stream."""
        place = self.room[self._used : self._used + x.nbytes].view(x.dtype).view(x.shape)
        self._used += padded_bytes(x)
        place.copy_(x, non_blocking=True)
        return place

    def forget_copies(self) -> None:
        """The next copy goes where the first one is."""
        self._used = 0

    def close(self) -> None:
        """Give the memory back."""
        if self.is_locked:
            _cudart().cudaHostUnregister(self.room.data_ptr())
            self.is_locked = False
        self.room = torch.empty(0, dtype=torch.uint8, device="cpu")

    def __del__(self) -> None:
        self.close()  # memory that is given back locked can be neither locked again nor copied to in part


def padded_bytes(x: Tensor) -> int:
    """Bytes that a copy of `x` takes."""
    return math.ceil(x.nbytes / _ALIGNMENT) * _ALIGNMENT


def forget_cuda_error() -> None:
    """The runtime keeps the error of a call that failed, and torch would raise it at its next kernel."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda").add_(1)


def _cudart() -> Any:
    return torch.cuda.cudart()
