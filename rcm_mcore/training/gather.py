"""The weights that every rank has updated a shard of, to all ranks that hold them."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.param_and_grad_buffer import shard_buffer


class WeightGather:
    """The gather of one network's weights, layers and embedders each over the ranks that shard them.

    With `overlap` it goes on while other networks compute and is waited for when this one does: the fake score's beside the
    next rollout, the student's beside the next critic step. Whoever reads weights otherwise calls `wait` before.
    """

    def __init__(self, ddp: DistributedDataParallel, *, overlap: bool) -> None:
        self._ddp, self._overlap = ddp, overlap
        self._on_their_way: list[Any] = []
        if overlap:
            ddp.module.register_forward_pre_hook(lambda *_: self.wait())

    def start(self) -> None:
        """Collective: send this rank's shards; without `overlap` the weights are there at once."""
        self.wait()
        for group in self._ddp.bucket_groups + self._ddp.expert_parallel_bucket_groups:
            ranks = group.intra_distributed_optimizer_instance_group
            for bucket in group.buckets:
                own = shard_buffer(bucket.param_data, ranks.size())[ranks.rank()]
                self._on_their_way.append(dist.all_gather_into_tensor(bucket.param_data, own, group=ranks, async_op=True))
        if not self._overlap:
            self.wait()

    def wait(self) -> None:
        """Until the weights are there (on a GPU: what is launched from here on sees them)."""
        while self._on_their_way:
            self._on_their_way.pop(0).wait()
