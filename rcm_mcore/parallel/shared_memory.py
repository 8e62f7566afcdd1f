"""Tensors that GPUs of one machine read from each other's memory over NVLink.

torch's symmetric memory maps a buffer of every rank into all of them; a copy from it is done by a copy engine, which leaves
the multiprocessors to the computation beside it (docs/benchmarks/context_parallel_h200_202611.md compares with NCCL).
"""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_ALIGNMENT = 1 << 20  # bytes; buffers are rarely made anew when sizes differ a little
_peers: dict[dist.ProcessGroup, Peers | None] = {}


def peers_of(group: dist.ProcessGroup, device: torch.device) -> Peers | None:
    """The ranks of `group` as peers, or None where they cannot read each other's memory. Collective when first called."""
    if device.type != "cuda":
        return None
    if group not in _peers:
        index = torch.cuda.current_device() if device.index is None else device.index
        mine = socket.gethostname(), Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"), index
        everyone: list[Any] = [None] * group.size()
        dist.all_gather_object(everyone, mine, group=group)
        devices = {other[2] for other in everyone}
        reachable = (
            len({other[:2] for other in everyone}) == 1
            and len(devices) == group.size() <= torch.cuda.device_count()
            and all(torch.cuda.can_device_access_peer(index, other) for other in devices - {index})
        )
        votes: list[Any] = [None] * group.size()
        dist.all_gather_object(votes, reachable, group=group)
        _peers[group] = Peers(group, device) if all(votes) else None
    return _peers[group]


def forget() -> None:
    """Free every buffer; for when the groups are gone."""
    _peers.clear()


class Peers:
    """Ranks whose tensors this rank can read. Every rank must call `blocks` in the same order with the same shapes."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.device, self.stream = group, device, torch.cuda.Stream(device)
        self.published: list[tuple[Tensor, Any]] = []  # two, used in turn: while one is read the other may be written
        self.turn = 0
        timeout = group._get_backend(device).options._timeout  # a process group shows it nowhere else
        self.timeout_ms = int(timeout.total_seconds() * 1000)

    def blocks(self, own: tuple[Tensor, ...]) -> Iterator[Tensor]:
        """The stacked tensors of this rank, then those of the rank before it, and so on round the group.

        Each is copied here while the caller works on the one before. Tensors [...] of one shape and dtype -> [n, ...].
        """
        size, rank = self.group.size(), self.group.rank()
        shape, dtype = (len(own), *own[0].shape), own[0].dtype
        buffer, handle = self._next(math.prod(shape) * dtype.itemsize)
        block = buffer[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
        for part, x in zip(block, own):
            part.copy_(x)  # torch.stack is several times slower where x is strided
        # After it, what the others published may be read; and their reads of the call before the last are over.
        handle.barrier(channel=0, timeout_ms=self.timeout_ms)
        computing = torch.cuda.current_stream(self.device)
        for step in range(1, size + 1):
            coming = None
            if step < size:
                coming = torch.empty(shape, dtype=dtype, device=self.device)
                self.stream.wait_stream(computing)  # the memory of `coming` may still be read there
                with torch.cuda.stream(self.stream):
                    coming.copy_(handle.get_buffer((rank - step) % size, shape, dtype))
            yield block
            if coming is not None:
                computing.wait_stream(self.stream)
                block = coming

    def _next(self, count: int) -> tuple[Tensor, Any]:
        """The buffer to publish in, of at least `count` bytes, and its handle."""
        if not self.published or self.published[0][0].numel() < count:
            import torch.distributed._symmetric_memory as symmetric

            torch.cuda.synchronize(self.device)
            dist.barrier(self.group)  # nobody reads the old buffers any more
            self.published.clear()
            for _ in range(2):
                buffer = symmetric.empty(-(-count // _ALIGNMENT) * _ALIGNMENT, dtype=torch.uint8, device=self.device)
                self.published.append((buffer, symmetric.rendezvous(buffer, self.group)))
        self.turn ^= 1
        return self.published[self.turn]
