"""Process groups of a run. The only place, with its neighbours in this package, that reads megatron's parallel_state."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from rcm_mcore.config import MeshConfig
from rcm_mcore.parallel import cpu, shared_memory

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Mesh:
    """Groups and ranks of this process.

    `groups` is megatron's collection (tp, dp, dp_cp, mp, ...); `device` is where tensors of this rank live.
    """

    config: MeshConfig
    groups: ProcessGroupCollection
    device: torch.device
    embedders_gloo_group: dist.ProcessGroup  # groups.expt_dp over gloo
    results_group: dist.ProcessGroup  # the pipeline ranks again, for what the last of them tells the others
    checkpoint_group: dist.ProcessGroup  # all ranks over gloo, for the threads that write checkpoints

    @property
    def tp_group(self) -> dist.ProcessGroup:
        return self.groups.tp

    @property
    def tp_size(self) -> int:
        return self.groups.tp.size()

    @property
    def sample_group(self) -> dist.ProcessGroup:
        """The ranks that work on the same samples: tensor- and context-parallel ones."""
        return self.groups.tp_cp

    @property
    def pp_group(self) -> dist.ProcessGroup:
        return self.groups.pp

    @property
    def pp_size(self) -> int:
        return self.groups.pp.size()

    @property
    def reads(self) -> bool:
        """Whether this rank is the one that reads, of those that work on the same samples."""
        return self.groups.tp_cp.rank() == 0 and self.groups.pp.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        return self.groups.pp.rank() == self.groups.pp.size() - 1

    @property
    def cp_size(self) -> int:
        return self.groups.cp.size()

    @property
    def dp_group(self) -> dist.ProcessGroup:
        return self.groups.dp

    @property
    def dp_cp_gloo_group(self) -> dist.ProcessGroup:
        """The data-parallel ranks over gloo, on any platform: for gathering on the host."""
        return parallel_state.get_data_parallel_group_gloo(with_context_parallel=True)

    @property
    def dp_rank(self) -> int:
        return self.groups.dp.rank()

    @property
    def dp_size(self) -> int:
        return self.groups.dp.size()

    @property
    def is_main(self) -> bool:
        """Whether this process speaks for the run (progress, logs)."""
        return dist.get_rank() == 0


def init_distributed(*, timeout_minutes: float = 30.0) -> torch.device:
    """Join the default process group that torchrun describes (alone without it); NCCL where a GPU exists, else gloo.

    Returns the device of this rank.
    """
    cpu.install()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
        if "TORCH_NCCL_TRACE_BUFFER_SIZE" not in os.environ:  # its former name
            os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # collectives that NCCL's flight recorder keeps
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        timeout = timedelta(minutes=timeout_minutes)
        if "RANK" in os.environ:
            _warn_of_a_used_store()
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return device


def _warn_of_a_used_store() -> None:
    """torchrun lends ranks that it starts again the store of those before, whose addresses they may take (pytorch#135712)."""
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if again and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ["RANK"] == "0":
        log.warning(
            "torchrun has started the ranks again: if they do not find each other (connection refused), set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment of torchrun"
        )


def make_mesh(config: MeshConfig) -> Mesh:
    """Build megatron's process groups for `config`, which `resolve_mesh` has settled, on the ranks of the default group.

    Call `destroy_mesh` before another.
    """
    device = init_distributed(timeout_minutes=config.timeout_minutes)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tp,
        context_parallel_size=config.cp,
        pipeline_model_parallel_size=config.pp,
        virtual_pipeline_model_parallel_size=config.vpp if config.vpp > 1 else None,
        distributed_timeout_minutes=config.timeout_minutes,
    )
    model_parallel_cuda_manual_seed(0)  # the trackers must exist; no layer of ours draws from them
    groups = ProcessGroupCollection.use_mpu_process_groups()
    groups.hcp = _levels(groups.cp, config)
    # megatron's expert path is made for parameters whose gradients are summed over other ranks than those of the rest: ours
    # are the embedders, which every pipeline stage holds (stack.md 5).
    groups.expt_dp, gloo = _holders_of_embedders(config)
    groups.intra_expt_dp = groups.expt_dp
    timeout = timedelta(minutes=config.timeout_minutes)
    writers = dist.new_group(list(range(dist.get_world_size())), timeout=timeout, backend="gloo")
    return Mesh(config, groups, device, gloo, _results_group(config), writers)


def _holders_of_embedders(config: MeshConfig) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """The ranks of all stages, context- and data-parallel ranks at this tensor-parallel rank, and the same over gloo."""
    timeout, mine = timedelta(minutes=config.timeout_minutes), None
    for first in range(config.tp):
        ranks = list(range(first, dist.get_world_size(), config.tp))
        groups = dist.new_group(ranks, timeout=timeout), dist.new_group(ranks, timeout=timeout, backend="gloo")
        if dist.get_rank() in ranks:
            mine = groups
    assert mine is not None, "every rank is in one of them"
    return mine


def _results_group(config: MeshConfig) -> dist.ProcessGroup:
    """This rank's pipeline stages in a group whose collectives take one multiprocessor while they wait for other stages."""
    options = None
    if torch.cuda.is_available():
        options = dist.ProcessGroupNCCL.Options()
        options.config.max_ctas = 1
    timeout, mine = timedelta(minutes=config.timeout_minutes), None
    stride = dist.get_world_size() // config.pp
    for first in range(stride):
        ranks = list(range(first, dist.get_world_size(), stride))
        group = dist.new_group(ranks, timeout=timeout, backend="nccl" if options else None, pg_options=options)
        if dist.get_rank() in ranks:
            mine = group
    assert mine is not None, "every rank is in one of them"
    return mine


def _levels(cp_group: dist.ProcessGroup, config: MeshConfig) -> list[dist.ProcessGroup | None]:
    """The context-parallel group as two levels: ranks that exchange heads, and a ring between them; none for one rank."""
    inner = config.cp_inner if config.cp > 1 else 1
    assert inner is not None, "resolve_mesh decides cp_inner"
    if inner == 1 or inner == config.cp:
        return [cp_group if inner > 1 else None, cp_group if config.cp > inner else None]
    everyone: list[list[int]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everyone, dist.get_process_group_ranks(cp_group))
    levels: list[dist.ProcessGroup | None] = [None, None]
    timeout = timedelta(minutes=config.timeout_minutes)
    for ranks in sorted({tuple(ranks) for ranks in everyone}):
        # Neighbours exchange heads; the ring joins ranks of the same place in each neighbourhood.
        exchanges = [ranks[i : i + inner] for i in range(0, len(ranks), inner)]
        rings = [ranks[i::inner] for i in range(inner)]
        for level, groups in enumerate((exchanges, rings)):
            for members in groups:
                group = dist.new_group(list(members), timeout=timeout)
                if dist.get_rank() in members:
                    levels[level] = group
    return levels


def destroy_mesh() -> None:
    """Forget megatron's groups (the default process group stays)."""
    shared_memory.forget()
    parallel_state.destroy_model_parallel()


@contextmanager
def local_mesh() -> Iterator[Mesh]:
    """A mesh of one process for tools: makes a process group of its own if there is none, and removes what it made."""
    fresh = not dist.is_initialized()
    mesh = make_mesh(MeshConfig())
    try:
        yield mesh
    finally:
        destroy_mesh()
        if fresh:
            dist.destroy_process_group()
