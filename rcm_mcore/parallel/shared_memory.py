"""Tensors that GPUs of one machine read from each other's memory over NVLink.

torch's symmetric memory maps a buffer of every rank into all of them; a copy from it is done by a copy engine, which leaves
the multiprocessors to the computation beside it (docs/benchmarks/context_parallel_h200_202611.md compares with NCCL).
"""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

log = logging.getLogger(__name__)
# torch reads it when the first buffer is shared. Multicast is not used here, and some drivers fail to set it up.
os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
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
        shares = _all_agree(reachable, group) and _all_agree(_can_share(group, device), group)
        _peers[group] = Peers(group, device) if shares else None
        if not shares and group.rank() == 0:
            log.info("context parallelism passes keys on through NCCL: its ranks cannot read each other's memory")
    return _peers[group]


def _all_agree(vote: bool, group: dist.ProcessGroup) -> bool:
    votes: list[Any] = [None] * group.size()
    dist.all_gather_object(votes, vote, group=group)
    return all(votes)


def _can_share(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether a trial with a small buffer works."""
    try:
        _Shown(group, device)._grow(1)
    except RuntimeError as error:
        log.warning("sharing memory between GPUs failed: %s", error)
        return False
    return True


def shared_bytes() -> int:
    """Memory of this rank that is shared with others; torch's caching allocator does not count it."""
    shown = [s for peers in _peers.values() if peers is not None for s in (peers.blocks_shown, peers.parts_shown)]
    return sum(buffer.numel() for s in shown for buffer, _ in s.buffers)


def forget() -> None:
    """Free every buffer; for when the groups are gone."""
    _peers.clear()


class Peers:
    """Ranks whose tensors this rank can read. Every rank must make the same calls in the same order with the same shapes."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.device, self.stream = group, device, torch.cuda.Stream(device)
        self.blocks_shown, self.parts_shown = _Shown(group, device), _Shown(group, device)

    def blocks(self, own: tuple[Tensor, ...]) -> Iterator[Tensor]:
        """The stacked tensors of this rank, then those of the rank before it, and so on round the group.

        Each is copied here while the caller works on the one before. Tensors [...] of one shape and dtype -> [n, ...].
        """
        size, rank = self.group.size(), self.group.rank()
        block, theirs = self.blocks_shown.show((len(own), *own[0].shape), own[0].dtype, own)
        computing = torch.cuda.current_stream(self.device)
        for step in range(1, size + 1):
            coming: Tensor | None = None
            arrived: Any = None
            if step < size:
                coming = torch.empty_like(block)
                self.stream.wait_stream(computing)  # the memory of `coming` may still be read there
                with torch.cuda.stream(self.stream):
                    coming.copy_(theirs((rank - step) % size))
                    arrived = torch.cuda.current_stream(self.device).record_event()
            yield block
            if coming is not None:
                computing.wait_event(arrived)  # and not for parts that came after it
                block = coming


class PartsHome:
    """Sums of what each rank of a ring contributes to every block: those of block i end on rank i."""

    def __init__(self, peers: Peers, like: tuple[Tensor, ...]) -> None:
        """like: tensors [B, s, ...] in the shape and dtype of a whole block."""
        self.peers, self.step = peers, 0
        # Parts to this rank's block, by how far round the ring they were computed.
        shape = (peers.group.size(), len(like), *like[0].shape)
        self.parts = torch.empty(shape, dtype=like[0].dtype, device=peers.device)

    def add(self, parts: tuple[Tensor, ...]) -> None:
        """What this rank contributes to the block that `Peers.blocks` gave last; shorter than a block where it is padded."""
        peers, size = self.peers, self.peers.group.size()
        computing = torch.cuda.current_stream(peers.device)
        if self.step == 0:
            _fill(self.parts[0], parts)
        else:
            computing.wait_stream(peers.stream)  # reads of the step before the last are over, here and after the barrier
            _, theirs = peers.parts_shown.show(self.parts.shape[1:], self.parts.dtype, parts)
            peers.stream.wait_stream(computing)
            with torch.cuda.stream(peers.stream):
                self.parts[self.step].copy_(theirs((peers.group.rank() + self.step) % size))
        self.step += 1

    def total(self) -> tuple[Tensor, ...]:
        """The sums, formed in float32 and rounded once."""
        assert self.step == len(self.parts), f"{self.step} of {len(self.parts)} blocks were visited"
        torch.cuda.current_stream(self.peers.device).wait_stream(self.peers.stream)
        return self.parts.sum(0).unbind(0)


class _Shown:
    """Memory of this rank that the others read: two buffers used in turn, so that one may be written while one is read."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.device, self.turn = group, device, 0
        self.buffers: list[tuple[Tensor, Any]] = []
        timeout = group._get_backend(device).options._timeout  # a process group shows it nowhere else
        self.timeout_ms = int(timeout.total_seconds() * 1000)

    def show(
        self, shape: tuple[int, ...], dtype: torch.dtype, tensors: tuple[Tensor, ...]
    ) -> tuple[Tensor, Callable[[int], Tensor]]:
        """`tensors` stacked and padded to `shape` in the next buffer, and a function from a rank to its buffer.

        Waits, on the stream, until every rank has shown its own; their reads of the buffer before the last must be over.
        """
        count = math.prod(shape) * dtype.itemsize
        if not self.buffers or self.buffers[0][0].numel() < count:
            self._grow(count)
        self.turn ^= 1
        buffer, handle = self.buffers[self.turn]
        mine = buffer[:count].view(dtype).view(shape)
        _fill(mine, tensors)
        handle.barrier(channel=0, timeout_ms=self.timeout_ms)
        return mine, lambda rank: handle.get_buffer(rank, shape, dtype)

    def _grow(self, count: int) -> None:
        import torch.distributed._symmetric_memory as symmetric

        torch.cuda.synchronize(self.device)
        dist.barrier(self.group)  # nobody reads the old buffers any more
        self.buffers.clear()
        for _ in range(2):
            buffer = symmetric.empty(-(-count // _ALIGNMENT) * _ALIGNMENT, dtype=torch.uint8, device=self.device)
            self.buffers.append((buffer, symmetric.rendezvous(buffer, self.group)))


def _fill(block: Tensor, tensors: tuple[Tensor, ...]) -> None:
    """Tensors [B, s', ...] into block [n, B, s, ...], zeros behind them. (torch.stack is slow where they are strided.)"""
    for part, x in zip(block, tensors):
        part[:, : x.shape[1]].copy_(x)
        part[:, x.shape[1] :].zero_()
