"""Everything a run needs to continue, in one checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing

from rcm_mcore.checkpoint import config_of
from rcm_mcore.config import Config, parse_model, to_yaml
from rcm_mcore.parallel.cpu import write_checkpoints_in_process
from rcm_mcore.parallel.mesh import Mesh
from rcm_mcore.training.networks import Trained


@dataclass
class RunState:
    """What is not a tensor. `step`: optimizer steps done; `own_steps`: of each trained network; `data`: all readers."""

    step: int
    own_steps: dict[str, int]
    data: dict[str, Any]
    wandb_id: str | None = None


def write_state(path: Path, trained: list[Trained], state: RunState, *, config: Config, mesh: Mesh) -> None:
    """Collective: fill the folder of a checkpoint (weights, master weights, second moments, EMA, counters)."""
    write_checkpoints_in_process()
    sharded = _sharded(trained, mesh, is_loading=False)
    dist_checkpointing.save(sharded, str(path), content_metadata=_metadata(mesh, plain=True))
    if mesh.is_main:
        (path / "state.json").write_text(json.dumps(asdict(state)))
        (path / "config.yaml").write_text(to_yaml(config))


def read_state(path: Path, trained: list[Trained], *, config: Config, mesh: Mesh) -> RunState:
    """Collective: load a checkpoint into the networks and their optimizers, whatever mesh wrote it.

    Raises ValueError when it is of another model or of another kind of run.
    """
    stored = config_of(path)
    # Parsed: a run of an older version lacks the fields that came since.
    saved, ours = asdict(parse_model(stored["model"])), asdict(config.model)
    different = [k for k in ours if ours[k] != saved[k] and k not in ("recompute", "transformer_impl", "dtype")]
    if different:
        raise ValueError(
            f"checkpoint.dir={config.checkpoint.dir} holds a run of another model: "
            + ", ".join(f"model.{k} is {saved[k]} there and {ours[k]} here" for k in different)
        )
    for name, was, now in (
        ("train.objective", stored["train"]["objective"], config.train.objective),
        ("an EMA (optim.ema_length)", stored["optim"]["ema_length"] is not None, config.optim.ema_length is not None),
    ):
        if was != now:
            raise ValueError(
                f"checkpoint.dir={config.checkpoint.dir} holds a run with {name}={was}, this one has {now}: "
                "use another checkpoint.dir, or the configuration that the run was started with"
            )
    state = RunState(**json.loads((path / "state.json").read_text()))
    if state.own_steps.keys() != {t.name for t in trained}:
        raise ValueError(
            f"checkpoint.dir={config.checkpoint.dir} holds a run that trains {sorted(state.own_steps)}, "
            f"this one trains {sorted(t.name for t in trained)}: use another checkpoint.dir"
        )
    loaded = dist_checkpointing.load(_sharded(trained, mesh, is_loading=True), str(path))
    for one in trained:
        params = dict(one.net.named_parameters())
        for name, value in loaded[one.name].items():
            params[name].data.copy_(value)
        one.optimizer.load_state_dict(loaded[f"optimizer_{one.name}"])
        one.steps = state.own_steps[one.name]
    return state


def _sharded(trained: list[Trained], mesh: Mesh, *, is_loading: bool) -> dict[str, Any]:
    metadata = _metadata(mesh)
    sharded: dict[str, Any] = {}
    for one in trained:
        weights = one.net.sharded_state_dict(prefix=f"{one.name}.", metadata=metadata)
        state = one.optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=metadata)
        sharded[one.name] = {key.removeprefix(f"{one.name}."): tensor for key, tensor in weights.items()}
        sharded[f"optimizer_{one.name}"] = state
    return sharded


def _metadata(mesh: Mesh, *, plain: bool = False) -> dict[str, Any]:
    """How megatron lays the optimizer's state out; `plain` leaves out what cannot be stored."""
    metadata: dict[str, Any] = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": True,  # gathered by one rank, on the host
    }
    return metadata if plain else metadata | {"dp_cp_group": mesh.groups.dp_cp}
