"""What a run keeps in host memory instead of on the GPU (train.offload): float32 optimizer state, EMA, a teacher's blocks.

State of an optimizer is needed only for its update, after the backward, when there are no activations: it passes through the
GPU a few tensors at a time and is updated there, so that every bit is what it would be without. The blocks of the teacher
follow each other through two buffers, each on its way while the one before it computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rcm_mcore.training.locked_memory import HostMemory, padded_bytes


class Offloaded:
    """Tensors, each with a storage of its own, whose values are in host memory but while they are used (`here`)."""

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        tensors = list(tensors)
        self._memory = HostMemory(tensors)
        self._copies: dict[Tensor, Tensor] = {}
        self._on_their_way = False
        for x in tensors:
            self._copies[x] = self._memory.take(x.detach())
            self._leave(x)

    def __bool__(self) -> bool:
        return bool(self._copies)

    @property
    def nbytes(self) -> int:
        """Of the values in host memory."""
        return sum(copy.nbytes for copy in self._copies.values())

    @contextmanager
    def here(self, tensors: Sequence[Tensor], *, changed: bool = True) -> Iterator[None]:
        """Inside, those of `tensors` that are offloaded have their values; with `changed` host memory gets these at the end."""
        away = [x for x in tensors if x in self._copies]
        for x in away:
            x.untyped_storage().resize_(x.nbytes)
            x.detach().copy_(self._copies[x], non_blocking=True)
        yield
        for x in away:
            if changed:
                self._copies[x].copy_(x.detach(), non_blocking=True)
            self._leave(x)

    def value(self, x: Tensor) -> Tensor:
        """The copy of `x` in host memory, if it is offloaded, or `x`: read and write that. Waits until the copy is there."""
        if x not in self._copies:
            return x
        if self._on_their_way and x.is_cuda:
            torch.cuda.current_stream(x.device).synchronize()
        self._on_their_way = False
        return self._copies[x]

    def _leave(self, x: Tensor) -> None:
        # The allocator gives the memory only to what comes later on the same stream.
        x.untyped_storage().resize_(0)
        self._on_their_way = True


class StreamedBlocks:
    """The weights of frozen blocks in host memory; on the device are those of the block that computes and of the next.

    The parameters of blocks 0, 2, 4, ... share one buffer, those of 1, 3, 5, ... another: they may be read only inside the
    block's forward. Lives as long as the blocks, which call it.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        """blocks: in the order of a pass, with their weights."""
        weights = [list(block.parameters()) for block in blocks]
        device = weights[0][0].device
        self._memory = HostMemory(p.detach() for params in weights for p in params)
        sizes = [sum(map(padded_bytes, params)) for params in weights]
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        self._copies = [self._memory.room[end - size : end] for end, size in zip(ends, sizes)]
        self._stream = torch.cuda.Stream()
        self._buffers = [torch.empty(max(sizes), dtype=torch.uint8, device=device) for _ in range(min(2, len(blocks)))]
        self._held: list[int | None] = [None] * len(self._buffers)  # whose weights a buffer has
        self._arrived: list[Any] = [None] * len(self._buffers)
        for i, (block, params) in enumerate(zip(blocks, weights)):
            buffer, used = self._buffers[i % 2], 0
            for param in params:
                self._memory.take(param.detach())
                place = buffer[used : used + param.nbytes].view(param.dtype).view(param.shape)
                used += padded_bytes(param)
                param.data = place
            block.register_forward_pre_hook(partial(self._before, i))

    @property
    def nbytes(self) -> int:
        """Of the weights in host memory."""
        return self._memory.room.nbytes

    def _before(self, i: int, *_: Any) -> None:
        """Before the forward of block `i`: its weights are there, and the next block's begin to come."""
        self._fetch(i)
        torch.cuda.current_stream().wait_event(self._arrived[i % 2])
        if i + 1 < len(self._copies):
            self._fetch(i + 1)

    def _fetch(self, i: int) -> None:
        """Begin to bring the weights of block `i`, unless they are there: they replace those of the block before the last."""
        if self._held[i % 2] == i:
            return
        self._stream.wait_stream(torch.cuda.current_stream())  # which may still compute with what is replaced
        with torch.cuda.stream(self._stream):
            self._buffers[i % 2][: len(self._copies[i])].copy_(self._copies[i], non_blocking=True)
            self._arrived[i % 2] = torch.cuda.current_stream().record_event()
        self._held[i % 2] = i
