"""The networks of a run: a frozen teacher, and trained networks with their gradients, optimizer and EMA."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from torch import nn

from rcm_mcore.config import Config, ModelConfig
from rcm_mcore.models import DiffusionTransformer, build_model
from rcm_mcore.models.common.parameters import initialize
from rcm_mcore.parallel.mesh import Mesh
from rcm_mcore.training.optim import NetworkOptimizer, make_optimizer
from rcm_mcore.training.schedule import learning_rate
from rcm_mcore.training.stopwatch import Stopwatch

INTERVAL = "interval_embedding."  # names of what students of meanflow have beside the teacher's weights


@dataclass
class Trained:
    """A network that learns. `steps` counts its optimizer steps, of `total_steps` in the run."""

    name: str  # its prefix in checkpoints
    net: DiffusionTransformer
    ddp: DistributedDataParallel
    optimizer: NetworkOptimizer
    peak_lr: float
    total_steps: int
    watch: Stopwatch  # of its updates
    steps: int = 0

    def sleep(self) -> None:
        """Free the gradient buffer while another network trains.

        To the allocator, which hands it on in the order of the stream. To the device (`empty_cache`, megatron's default) would
        cost every step the allocation of all that it needs, and whatever else the GPU does would have to stop for it.
        """
        self.ddp.offload_grad_buffers(synchronize=False, empty_cache=False)

    def wake(self) -> None:
        """Have a gradient buffer again, all zeros."""
        self.ddp.restore_grad_buffers(synchronize=False)

    def lr(self, config: Config) -> float:
        """Learning rate of the next step."""
        return learning_rate(config.optim, self.peak_lr, self.steps, self.total_steps)


def build_network(model: ModelConfig, mesh: Mesh, *, seed: int | None = None, trainable: bool) -> DiffusionTransformer:
    """A network on this rank's device, whose weights are to be loaded unless there is a seed for them.

    What a teacher has no weights for is there already, and without effect.
    """
    net = build_model(model, mesh.config, mesh.groups, seed=seed, trainable=trainable)
    if model.interval and seed is None:
        initialize(net, net.initial_values, seed=0, group=mesh.groups.tp, only=INTERVAL)
    return net


def make_trained(
    name: str, net: DiffusionTransformer, config: Config, mesh: Mesh, *, peak_lr: float, total_steps: int, has_ema: bool
) -> Trained:
    """Wrap a network, whose weights are already there, for training under `mesh`; it sleeps until its first step."""
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=True, grad_reduce_in_fp32=True, overlap_grad_reduce=config.optim.overlap_grad_reduce
    )
    ddp = DistributedDataParallel(net.config, ddp_config, net, pg_collection=mesh.groups)
    ddp.offload_grad_buffers()  # until its first step; the room is needed for the optimizer's state
    offload = {"optimizer" if part == name else part for part in config.train.offload if part in (name, "ema")}
    optimizer = make_optimizer(config.optim, ddp, mesh, lr=peak_lr, has_ema=has_ema, offload=offload)
    return Trained(name, net, ddp, optimizer, peak_lr, total_steps, Stopwatch(mesh.device))


def finalize_on(trained: Trained, finalize: bool, *, before: Callable[[], None] | None = None) -> None:
    """Whether the next schedule call is the one that reduces the gradients over ranks: one call an optimizer step.

    `before` is called just before that reduction.
    """

    def run(model: Any, *args: Any, **kwargs: Any) -> None:
        if before is not None:
            before()
        # The schedules hand over what they ran, which may be chunks of the network.
        finalize_model_grads([trained.ddp], *args, **kwargs)

    net_config: Any = trained.net.config
    net_config.finalize_model_grads_func = run if finalize else None
    # Only the schedule that finalizes may let gradients go over ranks while it runs: leaving no_sync does that.
    net_config.no_sync_func = trained.ddp.no_sync if finalize else contextlib.nullcontext


def count_parameters(net: nn.Module) -> int:
    """Parameters held by this rank."""
    return sum(p.numel() for p in net.parameters())
