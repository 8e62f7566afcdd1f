"""From a configuration to everything a run needs, checked in the order of what it costs."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from rcm_kernels import backends, use_backends
from torch import Tensor

from rcm_mcore.checkpoint import CheckpointFolder, load_network, model_of, require_network
from rcm_mcore.checkpoint.network import Which
from rcm_mcore.config import Config, chunks_of_stages, parse_model, resolve_mesh, tokens_per_sample, validate_mesh
from rcm_mcore.data import DataLoader, DataStalled, load_embedding, merge_states
from rcm_mcore.distill.phases import steps_by_kind
from rcm_mcore.distill.steps import Roles
from rcm_mcore.interop import expected_shapes
from rcm_mcore.models import DiffusionTransformer
from rcm_mcore.models.common.fp8 import require_fp8
from rcm_mcore.models.common.linears import parallel_linears
from rcm_mcore.parallel.mesh import Mesh, init_distributed, make_mesh
from rcm_mcore.training.estimate import estimate, interval_parameters, refuse_what_cannot_fit
from rcm_mcore.training.networks import INTERVAL, Trained, build_network, make_trained
from rcm_mcore.training.offload import StreamedBlocks
from rcm_mcore.training.preflight import Preflight, preflight, require_same
from rcm_mcore.training.sheets import check_sheets
from rcm_mcore.training.state import RunState, read_state
from rcm_mcore.training.step import with_draws

# What may differ between a teacher's stored model section and ours: numerics and execution, not architecture.
_EXECUTION = ("size", "dtype", "fp32_residual", "bf16_time", "recompute", "compile", "transformer_impl", "fp8_forwards")


@dataclass(kw_only=True)
class Run:
    """A run, ready to step. `trained` maps the kind of a phase to the network that learns in it."""

    config: Config
    mesh: Mesh
    roles: Roles
    trained: dict[str, Trained]
    networks: list[Trained]
    loader: DataLoader
    folder: CheckpointFolder
    state: RunState
    preflight: Preflight | None = None


def check(config: Config, world_size: int) -> dict[str, Any]:
    """Everything that can be checked without a process group or a GPU: mesh, batch sizes, shards, teacher, disk.

    Returns facts about the run. Raises ValueError naming the field, its value and what would work.
    """
    parallel_linears(config.model.transformer_impl)
    require_fp8(config.model)
    attention = choose_attention(config)
    tokens = tokens_per_sample(config.model, config.data.latent_shape)
    dp = validate_mesh(config.model, config.mesh, world_size, tokens=tokens)
    train = config.train
    microbatches = microbatches_of_a_step(config, dp)
    if config.data.readers % (dp * max(1, config.data.workers)):
        raise ValueError(
            f"data.readers={config.data.readers} must be a multiple of the data-parallel size {dp}"
            + (f" times data.workers={config.data.workers}" if config.data.workers else "")
        )
    if torch.cuda.is_available():
        refuse_what_cannot_fit(config, world_size, torch.cuda.get_device_properties(0).total_memory)
    negative(config)
    check_sheets(config)
    check_starts(config)
    with DataLoader(
        config=replace(config.data, workers=0),
        model=config.model,
        seed=train.seed,
        global_batch_size=dp,
        dp_rank=0,
        dp_size=dp,
    ) as loader:
        try:
            sample = next(loader)
        except DataStalled as error:  # before the run has begun, like shards that are not there
            raise ValueError(str(error)) from error
    parameters = count_parameters(config)
    needed = checkpoint_bytes(config)
    free = check_output(config, needed, world_size)
    return {
        "data_parallel_size": dp,
        "tokens_per_sample": tokens,
        "context_parallel": resolve_mesh(config.model, config.mesh, ranks_per_node=ranks_per_node())[1],
        "pipeline": pipeline_facts(config, microbatches),
        "attention": ", ".join(f"{function} {name}" for function, name in attention.items()),
        "parameters": parameters,
        "states_gib_per_rank": estimate(config, world_size).states / 2**30,
        "checkpoint_gib": needed / 2**30,
        "free_gib": free / 2**30,
        "first_prompt": sample.prompts[0],
    }


def microbatches_of_a_step(config: Config, dp: int) -> int:
    """Of each of `dp` data-parallel ranks; ValueError where the batch does not divide or has too few for mesh.vpp."""
    train = config.train
    if train.global_batch_size % (dp * train.micro_batch_size):
        raise ValueError(
            f"train.global_batch_size={train.global_batch_size} must be a multiple of the data-parallel size {dp} times "
            f"train.micro_batch_size={train.micro_batch_size}"
        )
    microbatches = train.global_batch_size // (dp * train.micro_batch_size)
    if config.mesh.vpp > 1 and microbatches < config.mesh.pp:
        raise ValueError(
            f"mesh.vpp={config.mesh.vpp} needs at least mesh.pp={config.mesh.pp} microbatches, but a step has {microbatches}: "
            f"train.global_batch_size={train.global_batch_size} over {dp} data-parallel ranks in microbatches of "
            f"train.micro_batch_size={train.micro_batch_size}; use mesh.vpp=1 or more microbatches"
        )
    return microbatches


def pipeline_facts(config: Config, microbatches: int) -> str:
    """The layers of each stage, and how long a stage waits for others in a pass over the microbatches of a step."""
    stages, chunks = config.mesh.pp, config.mesh.vpp
    if stages == 1:
        return "one stage holds all layers"
    ranges = chunks_of_stages(config.model.num_layers, stages, chunks)
    layers = ", ".join("+".join(str(len(chunk)) for chunk in stage) for stage in ranges)
    idle = (stages - 1) / (chunks * microbatches + stages - 1)
    more = (
        "; more microbatches (a smaller train.micro_batch_size, fewer data-parallel ranks) or mesh.vpp make it less"
        if idle > 0.2
        else ""
    )
    return f"{stages} stages of {layers} layers; with {microbatches} microbatches each waits {idle:.0%} of a pass{more}"


def choose_attention(config: Config) -> dict[str, str]:
    """Make this process use the backends of `config.attention`; returns which those are for each function.

    Raises ValueError if one that is asked for by name cannot run here.
    """
    wanted = asdict(config.attention)
    # The GPU this rank will use, set here already so that no rank leaves a context on another's.
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else "cpu"
    states = backends(getattr(torch, config.model.dtype), config.model.head_dim, device)
    usable = {f: [name for name, state in names.items() if state in ("used", "available")] for f, names in states.items()}
    for function, name in wanted.items():
        if name != "auto" and name not in usable[function]:
            raise ValueError(
                f"attention.{function}={name}: here {states[function][name]}; use auto or one of {', '.join(usable[function])}"
            )
    use_backends(**wanted)
    return {function: usable[function][0] if name == "auto" else name for function, name in wanted.items()}


def count_parameters(config: Config) -> int:
    """Parameters of one network of `config.model`."""
    return sum(math.prod(s) for s in expected_shapes(config.model).values()) + interval_parameters(config.model)


def checkpoint_bytes(config: Config) -> int:
    """Size of one checkpoint: weights, float32 masters and second moments of each trained network, and the EMA."""
    width = {"bfloat16": 2, "float32": 4, "float64": 8}[config.model.dtype]
    networks = 2 if config.train.objective == "distill" and config.distill.has_fake_score else 1
    ema = 4 if config.optim.ema_length is not None else 0
    return count_parameters(config) * (networks * (width + 8) + ema)


def check_output(config: Config, needed: int, world_size: int) -> int:
    """Bytes free where checkpoints go. ValueError where they cannot be written, or a copy of the state has no room here."""
    root = Path(config.checkpoint.dir)
    there = root
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise ValueError(f"checkpoint.dir={root}: {there} is a file; give a folder, which is made if it is not there")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"checkpoint.dir={root}: {there} cannot be written (read-only, or not yours): choose another place")
    free = shutil.disk_usage(there).free
    if needed > free:
        raise ValueError(
            f"checkpoint.dir={root} has {free / 2**30:.1f} GiB free; one checkpoint needs about {needed / 2**30:.1f} GiB and a "
            "new one is complete before an old one goes"
        )
    ranks = min(ranks_per_node(), world_size)
    copies = needed * ranks / world_size if config.checkpoint.asynchronous else 0
    available, offloaded = host_memory(), estimate(config, world_size).host * ranks
    if copies + offloaded > available:
        what = f"checkpoint.asynchronous=true copies {copies / 2**30:.1f} GiB of state to this machine's memory"
        if offloaded:
            what = f"train.offload={list(config.train.offload)} keeps {offloaded / 2**30:.1f} GiB, and {what}"
        raise ValueError(
            f"{what}, of which {available / 2**30:.1f} GiB are available: set checkpoint.asynchronous=false, offload less, "
            "or use more machines"
        )
    return free


def host_memory(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes of host memory that this process can still have: the machine's, or what the job's control groups (v2) allow."""
    free = psutil.virtual_memory().available
    try:
        group = groups / own.read_text().strip().rpartition("::/")[2]
    except OSError:
        return free
    while group.is_relative_to(groups):
        try:
            limit = (group / "memory.max").read_text().strip()
            if limit != "max":
                free = min(free, int(limit) - int((group / "memory.current").read_text()))
        except (OSError, ValueError):
            pass  # the root has none
        if group == groups:
            break
        group = group.parent
    return max(free, 0)


def negative(config: Config) -> Tensor:
    """The text of the unconditional branch, [1, text_len, text_dim]: a file's rows, or zeros."""
    model = config.model
    section = config.distill if config.train.objective == "distill" else config.pretrain
    if section.negative_embedding is None:
        return torch.zeros(1, model.text_len, model.text_dim)
    rows = load_embedding(section.negative_embedding, text_len=model.text_len, text_dim=model.text_dim)
    return rows[None]


def starts_of(config: Config) -> dict[str, tuple[str, Which]]:
    """Role -> checkpoint folder and network that it starts from, where the run names one."""
    distill, pretrain = config.distill, config.pretrain
    if config.train.objective == "pretrain":
        named = {"network": (pretrain.network, pretrain.network_weights)}
    else:
        named = {"teacher": (distill.teacher, distill.teacher_weights), "student": (distill.student, distill.student_weights)}
    return {role: start for role, start in named.items() if start[0]}


def check_starts(config: Config) -> None:
    """The checkpoints that the run's networks start from exist, hold the network asked for, and fit `config.model`."""
    section = config.train.objective
    for role, (path, which) in starts_of(config).items():
        try:
            saved = asdict(parse_model(model_of(path)))  # fields that came after it was written have their defaults
            require_network(path, which)
        except ValueError as error:
            raise ValueError(f"{section}.{role}={path}, {section}.{role}_weights={which}: {error}") from None
        ours = asdict(config.model) | ({"interval": False} if role == "teacher" else {})
        for name, value in ours.items():
            if name not in _EXECUTION and saved[name] != value:
                raise ValueError(f"{section}.{role}={path} has model.{name}={saved[name]}, this run has {value}")


def set_up(config: Config) -> Run:
    """Collective: build the run and resume it if `checkpoint.dir` holds a usable checkpoint."""
    resolved = resolve_mesh(config.model, config.mesh, ranks_per_node=ranks_per_node())[0]
    init_distributed(timeout_minutes=resolved.timeout_minutes)
    require_same(replace(config, mesh=resolved))  # before the groups of a mesh: of two meshes they would wait for ever
    mesh = make_mesh(resolved)
    measured = preflight(config, mesh) if config.guard.preflight else None
    folder = CheckpointFolder(config.checkpoint.dir, mesh.checkpoint_group)
    folder.lock_if_there()
    resume_from = folder.newest()
    starts = {role: partial(load_network, path=path, which=which) for role, (path, which) in starts_of(config).items()}
    if "teacher" in starts:
        starts["teacher"] = partial(starts["teacher"], new=INTERVAL)
    networks, roles, trained = build_networks(config, mesh, resuming=resume_from is not None, starts=starts)
    state = RunState(step=0, own_steps={t.name: 0 for t in networks}, data={})
    if resume_from is not None:
        state = read_state(resume_from, networks, config=config, mesh=mesh)
    loader = make_loader(config, mesh, state)
    folder.make()  # last, so that a run that cannot start leaves nothing behind
    return Run(
        config=config,
        mesh=mesh,
        roles=roles,
        trained=trained,
        networks=networks,
        loader=loader,
        folder=folder,
        state=state,
        preflight=measured,
    )


def make_loader(config: Config, mesh: Mesh, state: RunState) -> DataLoader:
    """Batches of this rank from where a run stands on."""
    loader = DataLoader(
        config=config.data,
        model=config.model,
        seed=config.train.seed,
        start_step=state.step,
        global_batch_size=config.train.global_batch_size,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size,
        reads=mesh.reads,
        transform=partial(with_draws, config, rollbacks=state.rollbacks),
    )
    if state.data:
        loader.load_state_dict(state.data)
    return loader


def build_networks(
    config: Config,
    mesh: Mesh,
    *,
    resuming: bool = False,
    starts: Mapping[str, Callable[[DiffusionTransformer], object]],
) -> tuple[list[Trained], Roles, dict[str, Trained]]:
    """Networks of the objective with their first weights; when resuming the trained ones are filled later.

    `starts` fill a network with stored weights: in distillation `teacher`, which the others start from too, the student unless
    there is `student`; in pretraining `network`, without which its weights are random.
    """
    has_ema = config.optim.ema_length is not None
    steps, distill = config.train.steps, config.distill
    wrap = partial(make_trained, config=config, mesh=mesh)
    text = negative(config).to(mesh.device)
    group = mesh.sample_group
    if config.train.objective == "pretrain":
        start = starts.get("network")
        seed = None if resuming or start else config.train.seed
        student_net = build_network(config.model, mesh, seed=seed, trainable=True)
        if start and not resuming:
            start(student_net)
        student = wrap("student", student_net, peak_lr=config.optim.lr, total_steps=steps, has_ema=has_ema)
        roles = Roles(student=student_net, teacher=student_net, fake_score=student_net, negative=text, sample_group=group)
        return [student], roles, {"pretrain": student}

    student_steps, critic_steps = steps_by_kind(steps, distill)
    teacher = build_network(replace(config.model, interval=False), mesh, trainable=False)
    starts["teacher"](teacher)
    if "teacher" in config.train.offload:
        StreamedBlocks(list(teacher.blocks.values()))
    student_net = build_network(config.model, mesh, trainable=True)
    if not resuming:
        starts.get("student", starts["teacher"])(student_net)
    student = wrap("student", student_net, peak_lr=config.optim.lr, total_steps=student_steps, has_ema=has_ema)
    networks, trained = [student], {"student": student}
    fake_score: Any = teacher
    if distill.has_fake_score:
        fake_net = build_network(config.model, mesh, trainable=True)
        if not resuming:
            starts["teacher"](fake_net)
        lr = config.optim.fake_score_lr
        critic = wrap("fake_score", fake_net, peak_lr=lr, total_steps=critic_steps, has_ema=False)
        networks.append(critic)
        trained["critic"], fake_score = critic, fake_net
    roles = Roles(student=student_net, teacher=teacher, fake_score=fake_score, negative=text, sample_group=group)
    return networks, roles, trained


def gather_data_state(run: Run) -> dict[str, Any]:
    """Collective: the position of every reader of the run."""
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, run.loader.state_dict())
    first_stage = states[: len(states) // run.mesh.pp_size]
    return merge_states(first_stage[:: run.mesh.sample_group.size()])  # of those that read


def world_size() -> int:
    """Ranks that torchrun launched."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def ranks_per_node() -> int:
    """Ranks that torchrun launched on this machine; without torchrun, 8."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "8"))
