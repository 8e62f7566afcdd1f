"""AdamW without a first moment, sharded over the data-parallel ranks, with the EMA of the master weights in its state.

With beta1 = 0 (method.md 5) the first moment of Adam is the gradient itself, so it is not stored: 4 bytes a parameter saved
for every trained network.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, _get_param_groups_and_buffers
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from rcm_mcore.config import OptimConfig
from rcm_mcore.interop.dcp import Pieces, boxes_of_range
from rcm_mcore.parallel.mesh import Mesh
from rcm_mcore.training.gather import WeightGather
from rcm_mcore.training.offload import Offloaded


class AdamWNoMomentum(torch.optim.AdamW):
    """AdamW with beta1 = 0; equal to torch.optim.AdamW(betas=(0, beta2)), without its first moment.

    State of a parameter: `exp_avg_sq`, float32, and `ema` if asked for. The step count is a field of the group. Parameters and
    state that are `offloaded` come to the device for their update.
    """

    def __init__(self, params: Iterable[Any], *, lr: float, beta2: float, eps: float, weight_decay: float) -> None:
        super().__init__(params, lr=lr, betas=(0.0, beta2), eps=eps, weight_decay=weight_decay)
        self.offloaded = Offloaded()
        for group in self.param_groups:
            group["step"] = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update from the gradients of the parameters; every parameter must have one."""
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            params: list[Tensor] = group["params"]
            if not params:
                continue
            group["step"] += 1
            for some in _at_a_time(params):
                with self.offloaded.here([*some, *(self.state[p]["exp_avg_sq"] for p in some)]):
                    self._update(some, group)

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        grads: list[Tensor] = [p.grad for p in params]  # type: ignore[misc]
        moments = [self.state[p]["exp_avg_sq"] for p in params]
        steps = [torch.full((), float(group["step"]), device=params[0].device)] * len(params)
        torch._fused_adamw_(
            params,
            grads,
            grads,  # for first moments: 0 times what they hold, plus the gradient
            moments,
            [],
            steps,
            lr=group["lr"],
            beta1=0.0,
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )


def _at_a_time(params: list[Tensor], elements: int = 1 << 26) -> Iterator[list[Tensor]]:
    """`params` in order, in lists of at most so many elements, or of one: so much that is offloaded is here at once."""
    some: list[Tensor] = []
    held = 0
    for param in params:
        if some and held + param.numel() > elements:
            yield some
            some, held = [], 0
        some.append(param)
        held += param.numel()
    if some:
        yield some


class ShardedOptimizer(DistributedOptimizer):
    """megatron's DistributedOptimizer around AdamWNoMomentum, with the EMA; it hands out its state for checkpoints itself."""

    has_ema: bool

    def initialize_state(self, *, has_ema: bool, offload: Collection[str] = ()) -> None:
        """Allocate the state: zero second moments and, with `has_ema`, an EMA equal to the weights.

        What `offload` names goes to host memory: "optimizer", the second moments and the masters (float32 weights are their own
        and stay), "ema".
        """
        self.has_ema = has_ema
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                self.optimizer.state[param] = {"exp_avg_sq": torch.zeros_like(param, dtype=torch.float32)}
                if has_ema:
                    self.optimizer.state[param]["ema"] = param.detach().clone()
        leaving: list[Tensor] = []
        if "optimizer" in offload:
            leaving += [main for mains in self.shard_fp32_from_float16_groups for main in mains]
            leaving += [state["exp_avg_sq"] for state in self.optimizer.state.values()]
        if "ema" in offload and has_ema:
            leaving += [state["ema"] for state in self.optimizer.state.values()]
        self.optimizer.offloaded = Offloaded(leaving)

    def update(self) -> None:
        """The update, of this rank's shard of the weights alone."""
        super(DistributedOptimizer, self).step_with_ready_grads()  # DistributedOptimizer's would send all parts' each time

    @torch.no_grad()
    def update_ema(self, beta: float) -> None:
        """ema <- beta ema + (1 - beta) weights, from the float32 masters."""
        for group in self.optimizer.param_groups:
            for mains in _at_a_time(group["params"]):
                emas = [self.optimizer.state[main]["ema"] for main in mains]
                with self.offloaded.here(mains, changed=False), self.offloaded.here(emas):
                    torch._foreach_lerp_(emas, mains, 1 - beta)

    @torch.no_grad()
    def exchange_ema(self) -> None:
        """Masters and EMA take each other's place, and what is now the masters goes to this rank's shard of the weights.

        Done twice, everything is as it was, bit for bit. Float32 masters are the weights themselves, so a copy of the masters
        would be needed if the EMA did not hold it.
        """
        for group in self.optimizer.param_groups:
            for main in group["params"]:
                ema = self.optimizer.state[main]["ema"]
                with self.offloaded.here([main, ema]):
                    kept = main.detach().clone()
                    main.copy_(ema)
                    ema.copy_(kept)
        self._copy_main_params_to_model_params()

    @torch.no_grad()
    def _copy_main_params_to_model_params(self) -> None:
        """megatron's, for masters that may be offloaded: to this rank's shard of the weights."""
        for mains, shards in zip(self.shard_fp32_from_float16_groups, self.shard_float16_groups):
            shard_of = dict(zip(mains, shards))
            for some in _at_a_time(mains):
                with self.offloaded.here(some, changed=False):
                    for main in some:
                        shard_of[main].copy_(main)

    @property
    def offloaded(self) -> Offloaded:
        """What of the state is in host memory."""
        return self.optimizer.offloaded

    def set_lr(self, lr: float) -> None:
        """Learning rate of the next step."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def pieces(self) -> dict[Tensor, dict[str, Pieces]]:
        """This rank's elements of every parameter of which it has some: `param` (float32), `exp_avg_sq`, and the EMA as `ema`.

        Pieces of the parameter as this tensor-parallel rank holds it. They share memory with the state, offloaded or not.
        """
        found = {}
        for param in self.model_param_group_index_map:
            owned = self._get_model_param_range_map(param)["param"]
            main, state = self._main_and_state(param)
            boxes = list(boxes_of_range(tuple(param.shape), owned.start, owned.end))
            sizes = [math.prod(shape) for _, shape in boxes]
            found[param] = {
                kind: Pieces(
                    param.shape,
                    tuple((at, x.view(shape)) for (at, shape), x in zip(boxes, flat.detach().view(-1).split(sizes))),
                )
                for kind, flat in {"param": main, **state}.items()
            }
        return found

    def set_steps(self, steps: int) -> None:
        """How many updates there have been: the bias correction of the second moment depends on it."""
        for group in self.optimizer.param_groups:
            group["step"] = steps

    def _main_and_state(self, model_param: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        group, order = self.model_param_group_index_map[model_param]
        main = self.optimizer.param_groups[group]["params"][order]
        state = self.optimizer.state[main]
        return self.offloaded.value(main), {kind: self.offloaded.value(x) for kind, x in state.items()}


class NetworkOptimizer:
    """The optimizers of one trained network: of its layers, and of the embedders, which every pipeline stage holds.

    Each shards over the ranks that sum its gradients, so every element has one owner and replicas cannot drift.
    """

    def __init__(self, parts: dict[str, ShardedOptimizer], weights: WeightGather, *, clip_grad: float) -> None:
        self.parts, self.weights, self.clip_grad = parts, weights, clip_grad

    @property
    def has_ema(self) -> bool:
        return all(part.has_ema for part in self.parts.values())

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for part in self.parts.values():
            part.zero_grad()

    def set_lr(self, lr: float) -> None:
        """Learning rate of the next step."""
        for part in self.parts.values():
            part.set_lr(lr)

    def prepare_and_clip(self) -> float:
        """Collective: gradients to float32 masters, clipped if so configured; returns their norm over the whole network."""
        for part in self.parts.values():
            part.prepare_grads()
        norm = math.hypot(*(float(part.get_grad_norm()) for part in self.parts.values()))
        if self.clip_grad > 0:
            for part in self.parts.values():
                if params := part.get_parameters():
                    clip_grad_by_total_norm_fp32(params, self.clip_grad, norm)
        return norm

    def step(self) -> None:
        """Collective: the update; the new weights are on every rank, or with optim.overlap_param_gather on their way."""
        for part in self.parts.values():
            part.update()
        self.weights.start()

    def update_ema(self, beta: float) -> None:
        """ema <- beta ema + (1 - beta) weights."""
        for part in self.parts.values():
            part.update_ema(beta)

    def pieces(self) -> dict[Tensor, dict[str, Pieces]]:
        """This rank's part of the state, by parameter (see ShardedOptimizer.pieces); the weights too are there then."""
        self.weights.wait()
        return {param: kinds for part in self.parts.values() for param, kinds in part.pieces().items()}

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Collective over the ranks that share the weights: inside, the network has the EMA for weights.

        At the end weights, masters and EMA are what they were, bit for bit. An error that leaves puts back what this rank
        owns and does not wait for the others, who may be elsewhere.
        """
        self.weights.wait()
        self._exchange_ema()
        self.weights.start()
        self.weights.wait()
        try:
            yield
        finally:
            self._exchange_ema()
        self.weights.start()

    def offloaded_bytes(self) -> int:
        """Of this rank's state, in host memory."""
        return sum(part.offloaded.nbytes for part in self.parts.values())

    def _exchange_ema(self) -> None:
        for part in self.parts.values():
            part.exchange_ema()

    def set_steps(self, steps: int) -> None:
        """How many updates there have been."""
        for part in self.parts.values():
            part.set_steps(steps)


def make_optimizer(
    config: OptimConfig,
    model: DistributedDataParallel,
    mesh: Mesh,
    *,
    lr: float,
    has_ema: bool,
    offload: Collection[str] = (),
) -> NetworkOptimizer:
    """The optimizer of one trained network (float32 or bfloat16 parameters); `offload` as for `initialize_state`."""
    groups = mesh.groups
    megatron_config = OptimizerConfig(
        optimizer="adam",
        lr=lr,
        bf16=model.config.bf16,
        params_dtype=model.config.params_dtype,
        clip_grad=0.0,  # NetworkOptimizer clips
        use_distributed_optimizer=True,
    )

    def part(*, embedders: bool) -> ShardedOptimizer:
        param_groups, buffers = _get_param_groups_and_buffers(
            [model],
            0,
            megatron_config,
            {},
            filter_fn=lambda group: group["is_expert_parallel"] == embedders,
            buffer_name="expert_parallel_buffers" if embedders else "buffers",
        )
        optimizer = ShardedOptimizer(
            AdamWNoMomentum(param_groups, lr=lr, beta2=config.beta2, eps=config.eps, weight_decay=config.weight_decay),
            megatron_config,
            None,
            None,
            model_chunks=[model],
            per_model_buffers=buffers,
            data_parallel_group=groups.expt_dp if embedders else groups.dp_cp,
            data_parallel_group_gloo=mesh.embedders_gloo_group if embedders else mesh.dp_cp_gloo_group,
            data_parallel_group_idx=groups.tp.rank() if embedders else groups.mp.rank(),
            distributed_optimizer_instance_id=0,
        )
        optimizer.grad_stats_parallel_group = groups.intra_dist_opt  # every rank of the run
        optimizer.tp_group = groups.tp
        optimizer.initialize_state(has_ema=has_ema, offload=offload)
        return optimizer

    parts = {"layers": part(embedders=False), "embedders": part(embedders=True)}
    weights = WeightGather(model, overlap=config.overlap_param_gather)
    return NetworkOptimizer(parts, weights, clip_grad=config.clip_grad)
