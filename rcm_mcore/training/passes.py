"""Single passes of one network under any mesh, and whether they compute the right thing: for benchmarks.

Weights and inputs depend on names and not on the mesh. Shapes: latents [B, C, F, H, W] as a microbatch has them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from rcm_mcore.condition import Condition
from rcm_mcore.config import Config
from rcm_mcore.config.schema import AttentionConfig
from rcm_mcore.dual import Dual, MaybeDual, primal
from rcm_mcore.models import DiffusionTransformer
from rcm_mcore.models.common.parameters import full_shape, local_shard
from rcm_mcore.parallel.mesh import Mesh
from rcm_mcore.parallel.random import noise
from rcm_mcore.parallel.stages import Call, Stages
from rcm_mcore.training.networks import build_network
from rcm_mcore.training.pipeline import forward_backward_schedule
from rcm_mcore.training.setup import choose_attention, microbatches_of_a_step

PASSES = ("forward", "forward and backward", "dual", "dual and backward")
BUDGET = 2.0  # of the error of plain PyTorch in the same dtype
# Plain PyTorch: what the settings of a run are held against.
_PLAIN: dict[str, Any] = {"recompute": "full", "compile": False, "fp8_forwards": False, "transformer_impl": "local"}
_PLAIN_ATTENTION = AttentionConfig(jvp="blockwise", forward="blockwise", backward="blockwise")
_EXACT: dict[str, Any] = {"bfloat16": "float32", "float32": "float64", "float64": "float64"}


@torch.no_grad()
def random_weights(net: DiffusionTransformer, *, dtype: torch.dtype) -> None:
    """By name, none of them zero, so that gradients reach every layer; drawn where the network is, and rounded to `dtype`."""
    for name, param in net.named_parameters():
        draws = torch.Generator(param.device).manual_seed(crc32(name.encode()))
        full = 0.02 * torch.randn(full_shape(param, net.tp_group), generator=draws, device=param.device)
        if "norm" in name and name.endswith("weight"):
            full += 1
        param.copy_(local_shard(full.to(dtype), param, net.tp_group))


def calls_of(config: Config, mesh: Mesh, *, tangents: bool) -> list[Call]:
    """Arguments of a network for every microbatch that a rank has in a step."""
    model, size = config.model, config.train.micro_batch_size

    def gaussian(purpose: str, shape: tuple[int, ...], step: int) -> Tensor:
        return noise(purpose, shape, seed=0, step=step, slots=range(size)).to(mesh.device)

    calls = []
    for i in range(microbatches_of_a_step(config, mesh.dp_size)):
        latents = config.data.latent_shape
        s = torch.linspace(0.3, 0.9, size, device=mesh.device)
        x: MaybeDual = gaussian("x", latents, i)
        time: MaybeDual = s
        if tangents:
            x, time = Dual(primal(x), gaussian("x-dot", latents, i)), Dual(s, torch.full_like(s, 0.5))
        condition = Condition(gaussian("text", (model.text_len, model.text_dim), i))
        if model.condition != "text":
            condition = condition._replace(latents=gaussian("given", latents, i))
        if model.image_tokens:
            condition = condition._replace(image=gaussian("image", (model.image_tokens, model.image_dim), i))
        if model.condition == "frames":
            condition = condition._replace(frames=torch.ones(size, dtype=torch.int64, device=mesh.device))
        calls.append(Call(x, time, condition))
    return calls


def run_pass(net: DiffusionTransformer, mesh: Mesh, calls: Sequence[Call], *, backward: bool) -> list[MaybeDual]:
    """The outputs for `calls`; on the last stage alone with `backward`, which adds gradients of the sum of weighted outputs."""
    if not backward and mesh.pp_size > 1:
        stages = Stages(mesh)
        outputs = [coming.wait() for coming in stages.forward(net, calls)]
        stages.finish()
        return outputs
    if not backward:
        with torch.no_grad():
            return [net(*call) for call in calls]
    like = primal(calls[0].x)
    weight = noise("weight", tuple(like.shape[1:]), seed=0, step=0, slots=range(len(like))).to(like.device)

    def forward_step(items: Iterator[Call], chunk: Any) -> tuple[Any, Any]:
        output = chunk(*next(items))
        if not (mesh.is_last_stage and chunk.index == net.num_chunks - 1):
            return output, None
        loss = (primal(output) * weight).sum()
        kept = Dual(*(x.detach() for x in output)) if isinstance(output, Dual) else output.detach()
        return loss, lambda value: (value, {"output": kept})

    done = forward_backward_schedule(net, forward_step, list(calls), mesh, like=calls[0].x)
    return [report["output"] for report in done]


def gate(config: Config, mesh: Mesh) -> dict[str, dict[str, float]]:
    """Collective: relative errors of passes of a network cut to two layers (one for each chunk of a stage, if more).

    As configured, and in plain PyTorch in the same dtype, both against plain PyTorch in a wider one under the same mesh:
    {"output" | "tangent" | ...: {"error", "plain"}}. That meshes agree with one another, the first steps show.

    Raises RuntimeError where the error is more than twice that of plain PyTorch.
    """
    layers = max(2, config.mesh.pp * config.mesh.vpp)
    tested = replace(config, model=replace(config.model, num_layers=layers))
    same = replace(tested, model=replace(tested.model, **_PLAIN), attention=_PLAIN_ATTENTION)
    exact = replace(same, model=replace(same.model, dtype=_EXACT[config.model.dtype]))
    dtype = getattr(torch, config.model.dtype)
    truth = _values(exact, mesh, dtype)
    plain = _errors(_values(same, mesh, dtype), truth)
    found = _errors(_values(tested, mesh, dtype), truth)  # last: what it chooses as attention stays chosen
    errors = {name: {"error": found[name], "plain": plain[name]} for name in found}
    # What an 8-bit forward costs is another question than whether it is computed right.
    ungated = ("forward",) if config.model.fp8_forwards else ()
    for name, error in errors.items():
        if name not in ungated and not error["error"] <= BUDGET * error["plain"] + 1e-13:
            raise RuntimeError(
                f"the check failed: {name} of {layers} layers has a relative error of {error['error']:.2e}, plain PyTorch in "
                f"{config.model.dtype} {error['plain']:.2e}; nothing is reported"
            )
    return errors


def _values(config: Config, mesh: Mesh, dtype: torch.dtype) -> dict[str, dict[str, Tensor]]:
    """What the passes give on this rank, in float64: of each quantity, tensors by name."""
    choose_attention(config)
    net = build_network(config.model, mesh, trainable=True)
    random_weights(net, dtype=dtype)
    values: dict[str, dict[str, Tensor]] = {}
    duals, plain = (calls_of(config, mesh, tangents=tangents) for tangents in (True, False))
    for i, output in enumerate(run_pass(net, mesh, plain, backward=False)):
        values.setdefault("forward", {})[str(i)] = primal(output)
    for name, calls in (("plain", plain), ("dual", duals)):
        for i, output in enumerate(run_pass(net, mesh, calls, backward=True)):
            values.setdefault(f"{name} output", {})[str(i)] = primal(output)
            if isinstance(output, Dual):
                values.setdefault("tangent", {})[str(i)] = output.tangent
        gradients = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
        assert len(gradients) == len(list(net.parameters())), "every parameter has a gradient"
        values[f"gradients of {name}"] = gradients
        net.zero_grad()
    return values


def _errors(values: dict[str, dict[str, Tensor]], truth: dict[str, dict[str, Tensor]]) -> dict[str, float]:
    """Collective: relative error of each quantity, that of the worst of its tensors.

    So a wrong gradient of a small parameter counts. An element is held against a hundredth of a typical one at least: what
    cancels to next to nothing (of cross-attention's queries, where it hardly attends) is rounding in any dtype.
    """
    sums: dict[str, dict[str, Tensor]] = {}  # of squares: difference, truth, and the number of elements
    for quantity, tensors in values.items():
        for name, x in tensors.items():
            y = truth[quantity][name].double()
            numbers = [(x.double() - y).square().sum(), y.square().sum(), torch.tensor(float(y.numel()), device=y.device)]
            sums.setdefault(quantity, {})[name] = torch.stack(numbers).cpu()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, sums)
    errors = {}
    for quantity in sorted({quantity for found in everyone for quantity in found}):
        names = {name for found in everyone for name in found.get(quantity, {})}
        table = torch.stack([sum(f[quantity][n] for f in everyone if n in f.get(quantity, {})) for n in sorted(names)])
        wrong, right, count = table.unbind(1)
        least = 1e-4 * right.sum() * count / count.sum()
        errors[quantity] = math.sqrt(float((wrong / torch.maximum(right, least)).max()))
    return errors
