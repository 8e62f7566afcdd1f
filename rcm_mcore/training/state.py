"""Everything a run needs to continue, in one checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import torch.distributed as dist
from torch import Tensor

from rcm_mcore.checkpoint import CheckpointFolder, config_of
from rcm_mcore.config import Config, parse_model, to_yaml
from rcm_mcore.interop.dcp import Pieces, Share, read_pieces, write_index, write_share
from rcm_mcore.models.common.parameters import full_shape, offset_of, on_every_stage, tensor_parallel_dim
from rcm_mcore.parallel.mesh import Mesh
from rcm_mcore.training.networks import Trained


@dataclass
class RunState:
    """What is not a tensor. `step`: optimizer steps done; `own_steps`: of each trained network; `data`: all readers."""

    step: int
    own_steps: dict[str, int]
    data: dict[str, Any]
    wandb_id: str | None = None
    rollbacks: int = 0  # to earlier checkpoints, because steps were not finite; each gives the run other noise


def pieces_to_save(trained: list[Trained], mesh: Mesh) -> dict[str, Pieces]:
    """By key, what this rank writes of the weights and of the optimizers' state: every element is some rank's, and one's alone.

    They share memory with the run. Keys: `student.` + parameter, `optimizer.state.param.student.` + parameter (float32),
    `optimizer.state.exp_avg_sq.student.`..., `ema.student.`...; likewise for `fake_score`.
    """
    found: dict[str, Pieces] = {}
    for one in trained:
        state = one.optimizer.pieces()
        for name, param in one.net.named_parameters():
            if tensor_parallel_dim(param) is None and mesh.tp_group.rank():
                continue  # the first tensor-parallel rank's copy is saved
            holders = mesh.groups.expt_dp if on_every_stage(param) else mesh.groups.dp_cp
            # By name, which is the same on every stage.
            if crc32(name.encode()) % holders.size() == holders.rank():
                found[f"{one.name}.{name}"] = _piece(param, mesh, Pieces(param.shape, (((0,) * param.ndim, param.detach()),)))
            for kind, pieces in state.get(param, {}).items():
                found[_key(kind, one.name, name)] = _piece(param, mesh, pieces)
    return found


def _key(kind: str, network: str, name: str) -> str:
    return f"ema.{network}.{name}" if kind == "ema" else f"optimizer.state.{kind}.{network}.{name}"


def _piece(param: Tensor, mesh: Mesh, pieces: Pieces) -> Pieces:
    """Pieces of this rank's part of a parameter as pieces of the whole."""
    start = offset_of(param, mesh.tp_group)
    parts = tuple((tuple(a + b for a, b in zip(start, offset)), part) for offset, part in pieces.parts)
    return Pieces(full_shape(param, mesh.tp_group), parts)


def save_state(folder: CheckpointFolder, pieces: dict[str, Pieces], state: RunState, config: Config) -> None:
    """Collective over the folder's group: write a checkpoint of what `pieces_to_save` gave, or of copies of it.

    Raises: CheckpointError on every rank.
    """

    def finish(path: Path, shares: list[Share]) -> dict[str, list[int]]:
        write_index(path, shares)
        (path / "state.json").write_text(json.dumps(asdict(state)))
        (path / "config.yaml").write_text(to_yaml(config))
        return {share.file: [share.bytes, share.crc] for share in shares}

    keep = config.checkpoint
    name = f"__{dist.get_rank()}_0.distcp"
    fill = lambda path: write_share(path, name, pieces.items())
    folder.save(state.step, fill, finish, keep_last=keep.keep_last, keep_every=keep.keep_every)


def read_state(path: Path, trained: list[Trained], *, config: Config, mesh: Mesh) -> RunState:
    """Collective: load a checkpoint into the networks and their optimizers, whatever mesh wrote it.

    Raises ValueError when it is of another model or of another kind of run.
    """
    stored = config_of(path)
    # Parsed: a run of an older version lacks the fields that came since.
    saved, ours = asdict(parse_model(stored["model"])), asdict(config.model)
    different = [k for k in ours if ours[k] != saved[k] and k not in ("recompute", "transformer_impl", "fp8_forwards", "dtype")]
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
    wanted: dict[str, Pieces] = {}
    for one in trained:
        owned = one.optimizer.pieces()
        wanted |= {f"{one.name}.{name}": pieces for name, pieces in one.net.pieces().items()}
        for name, param in one.net.named_parameters():
            wanted |= {_key(kind, one.name, name): _piece(param, mesh, p) for kind, p in owned.get(param, {}).items()}
    read_pieces(path, wanted)
    for one in trained:
        one.steps = state.own_steps[one.name]
        one.optimizer.set_steps(one.steps)
    return state
