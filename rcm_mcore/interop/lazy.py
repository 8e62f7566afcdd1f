"""Weights that are read when they are needed, so that a network larger than memory can be converted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LazyTensor:
    """A tensor by shape and dtype; `load` reads it, anew at every call."""

    shape: torch.Size
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]

    @property
    def ndim(self) -> int:
        """Dimensions."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.numel() * self.dtype.itemsize

    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)


Weight = torch.Tensor | LazyTensor
Weights = Mapping[str, Weight]


def loaded(weight: Weight) -> torch.Tensor:
    """The tensor itself."""
    return weight.load() if isinstance(weight, LazyTensor) else weight


def lazily(function: Callable[..., torch.Tensor], *parts: Weight) -> Weight:
    """function(*parts), computed when it is loaded if any part is lazy. `function` must work on the meta device."""
    if all(isinstance(part, torch.Tensor) for part in parts):
        return function(*parts)
    result = function(*(torch.empty(part.shape, dtype=part.dtype, device="meta") for part in parts))
    return LazyTensor(result.shape, result.dtype, lambda: function(*map(loaded, parts)))
