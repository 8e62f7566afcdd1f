"""What a run needs on a GPU and in host memory, and sends per step, under a mesh, by arithmetic.

Memory of one rank, the fullest pipeline stage; states are exact but for the padding of shards:

    weights        of every network of the run, in the model's dtype
    gradients      float32, of one network at a time (the others' buffers are freed)
    optimizer      second moments and, for bfloat16, float32 masters of the trained networks, sharded; and the student's EMA
    activations    what the microbatches in flight keep for their backward, and what the pass at work needs besides: the most of
                   a teacher's pass over both branches, a pass with tangents, and a backward through one block

What train.offload names is counted as `host` instead. Nothing here is fitted to a measurement. What a block needs at work is
counted: the most that a pass on the CPU in bfloat16 allocates for a token and channel, compiled (model.compile) or not, linear
in the width of the feed-forward (tests/test_estimate.py counts again). Messages, rings and gathers are read off the code. The
measured peaks of docs/benchmarks are within 10 % of it (tests/test_estimate.py lists them); exchanges of heads
(mesh.cp_mode all_to_all, two_level) have no buffers here and were not measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from rcm_mcore.config import Config, MeshConfig, ModelConfig, chunks_of_stages, microbatches_of_a_chunk, tokens_per_sample
from rcm_mcore.interop import expected_shapes

GIB = 2**30
RECOMPUTE = ("none", "selective", "full")  # model.recompute, the cheapest first
_WIDTHS = {"bfloat16": 2, "float32": 4, "float64": 8}
# Parameters that tensor parallelism does not split, within a block, and those of embedders (hub names).
_WHOLE = ("modulation", "norm3.weight", "norm3.bias", "ffn.2.bias")
_WHOLE_ENDINGS = (".o.bias", "_attn.q_norm.weight", "_attn.k_norm.weight")
_EMBEDDERS = ("text_embedding", "time_embedding", "time_projection", "img_emb", "t_embedder", "t_embedding_norm")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes on one rank, and bytes that it sends."""

    layers: int  # parameters of the fullest stage, embedders apart
    embedders: int  # parameters that every stage holds
    weights: int
    gradients: int
    optimizer: int
    activations: int
    host: int  # page-locked host memory of train.offload
    sent_tp: int  # in a forward of a microbatch with tangents
    sent_cp: int
    sent_pp: int
    sent_dp: int  # in an optimizer step

    @property
    def states(self) -> int:
        """What is there between steps, with the gradients of the network that trains."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        return self.states + self.activations


def estimate(config: Config, world_size: int) -> Estimate:
    """Of a run under `config.mesh`, which must be valid, on `world_size` ranks."""
    model, mesh, train = config.model, config.mesh, config.train
    dp = world_size // (mesh.tp * mesh.cp * mesh.pp)
    width = _WIDTHS[model.dtype]
    layers, embedders = _parameters(config)
    distill = train.objective == "distill"
    trained = ["student", "fake_score"] if distill and config.distill.has_fake_score else ["student"]
    # An optimizer's shard: of the layers over data- and context-parallel ranks, of the embedders over stages too.
    shard = math.ceil(layers / (dp * mesh.cp)) + math.ceil(embedders / (dp * mesh.cp * mesh.pp))
    moments, masters = 4 * shard, 4 * shard if model.dtype == "bfloat16" else 0
    state = dict.fromkeys(trained, moments + masters) | {"ema": 4 * shard if config.optim.ema_length is not None else 0}
    away = sum(state[name] for name in state if name in train.offload)

    rows, residual = _rows(config), _residual_width(config)
    stages = chunks_of_stages(model.num_layers, mesh.pp, mesh.vpp)
    stage_layers = max(sum(map(len, chunks)) for chunks in stages)
    streamed = 0
    if "teacher" in train.offload:  # all blocks but the two that are on the GPU
        streamed = width * layers * max(0, stage_layers - 2) // stage_layers

    dual = 2 * rows * model.hidden_size
    split = rows * (mesh.tp if mesh.sp else 1) * model.hidden_size // mesh.tp  # keys of this rank's heads
    return Estimate(
        layers=layers,
        embedders=embedders,
        weights=width * (layers + embedders) * (len(trained) + distill) - streamed,
        gradients=4 * (layers + embedders),
        optimizer=sum(state.values()) - away,
        activations=_activations(config, train.global_batch_size // (dp * train.micro_batch_size)),
        host=away + (width * layers if "teacher" in train.offload else 0),
        # Three gathers and three scatters a layer, of this rank's rows to or from each other rank (an all-reduce is both).
        sent_tp=stage_layers * 6 * (mesh.tp - 1) * dual * width // (1 if mesh.sp else mesh.tp),
        sent_cp=stage_layers * (mesh.cp - 1) * 4 * split * width,
        sent_pp=0 if mesh.pp == 1 else mesh.vpp * dual * residual,
        sent_dp=(4 + width) * (layers + embedders) * (dp * mesh.cp - 1) // (dp * mesh.cp),
    )


def _activations(config: Config, microbatches: int) -> int:
    """Bytes of the most that is alive beside the states, of a step of so many microbatches."""
    model, mesh = config.model, config.mesh
    distill = config.train.objective == "distill"
    stages = chunks_of_stages(model.num_layers, mesh.pp, mesh.vpp)
    chunks, layers = _chunks_in_flight(mesh, microbatches), max(len(chunk) for chunks in stages for chunk in chunks)
    unit = _rows(config) * model.hidden_size
    work = _Work.of(config)
    teacher = 2 * work.forward if distill and config.distill.guidance != 1.0 else work.forward if distill else 0
    # A plain pass with a graph. The teacher comes while it waits for its backward; over stages, before it.
    kept = chunks * layers * kept_of_a_layer(config, dual=False)
    backward = work.backward if model.recompute != "none" else work.backward - work.graph
    most = max(kept + unit * backward, (kept if mesh.pp == 1 else 0) + unit * teacher)
    if distill and config.distill.carries_tangents:
        kept = chunks * layers * kept_of_a_layer(config, dual=True)
        most = max(most, kept + unit * max(work.backward, work.dual))
    return round(most) + chunks * _kept_of_a_chunk(config) + _of_other_ranks(config, microbatches)


def _of_other_ranks(config: Config, microbatches: int) -> int:
    """Bytes of buffers for what other ranks hold, or that are on their way to them."""
    model, mesh = config.model, config.mesh
    unit, width = _rows(config) * model.hidden_size, _WIDTHS[model.dtype]
    distill = config.train.objective == "distill"
    total = 0
    if mesh.sp:  # megatron's buffer for gathered rows of both branches or tangents, kept for good; and a gathered gradient
        total += unit * width * (mesh.tp * (2 if distill else 1) + mesh.tp - 1)
    if mesh.cp > 1 and mesh.cp_mode in ("auto", "ring"):
        # Two buffers that others read, of keys and values with their tangents, two of gradients of keys and values; the parts
        # of these from every rank, and float32 gradients of queries.
        total += unit * (width * (2 * 4 + 2 * 2 + 2 * mesh.cp) + 4)
    if mesh.pp > 1:
        # The gradient of the message that was sent, and messages of the teacher's pass that may still be on their way.
        total += unit * _residual_width(config) * (2 + (2 * microbatches if distill else 0))
    return total


class _Work(NamedTuple):
    """Bytes for a token of this rank and a channel: what a pass needs besides what is kept of the layers before.

    Counted in bfloat16; wider dtypes take as much more, an upper bound.
    """

    forward: float  # without gradients
    dual: float
    graph: float  # that autograd keeps of a block
    backward: float  # of a block, recomputed first: its graph and what its backward adds

    @classmethod
    def of(cls, config: Config) -> _Work:
        model, mesh = config.model, config.mesh
        # With sequence parallelism a rank has a share of the tokens and works on all of them with a share of the channels.
        ratio = model.ffn_hidden_size / model.hidden_size / (1 if mesh.sp else mesh.tp)
        wide = _residual_width(config) - _WIDTHS[model.dtype]  # what the residual stream has more
        if model.compile and model.family == "wan":
            forward, graph, backward = max(26 + 2 * wide, 12 + 3 * wide + 4 * ratio), 34 + 4 * ratio, 40 + 10 * ratio
        elif model.compile:
            forward, graph = max(26 + 2 * wide, 8 + 3 * wide + 4 * ratio), 36 + 4 * ratio
            backward = max(70, 24 + 10 * ratio)
        elif model.family == "wan":
            forward, graph, backward = max(42 + 2 * wide, 12 + 3 * wide + 10 * ratio), 58 + 6 * ratio, 74 + 12 * ratio
        else:
            forward, graph, backward = 8 + 3 * wide + 10 * ratio, 62 + 6 * ratio, 66 + 12 * ratio
        if model.compile:
            graph, backward = graph + 2 * wide, backward + 3 * wide
        elif model.condition == "frames":  # shift, scale and gate of every token
            graph, backward = graph + 20, backward + 16
        # A compiled pass with tangents has two more alive where it is not the feed-forward that needs most.
        dual = max(60 + 4 * wide, 2 * forward) if model.compile else 2 * forward
        return cls(*(x * _WIDTHS[model.dtype] / 2 for x in (forward, dual, graph, backward)))


def kept_of_a_layer(config: Config, *, dual: bool) -> int:
    """Bytes that a layer keeps for its backward, on each rank, of one microbatch, in a pass with tangents or a plain one.

    Under recompute its input. With tangents, or `selective`, also the output and the log-sum-exp of the self-attention, which
    backward does not redo.
    """
    recompute: str = config.model.recompute
    if recompute == "none" and not dual:
        return round(_rows(config) * config.model.hidden_size * _Work.of(config).graph)
    kept = _rows(config) * config.model.hidden_size * _residual_width(config)
    return kept + (_attended(config) if dual or recompute == "selective" else 0)


def _attended(config: Config) -> int:
    """Bytes of the output and the log-sum-exp of a self-attention."""
    model, mesh = config.model, config.mesh
    split = _rows(config) * (mesh.tp if mesh.sp else 1)  # of all tokens that the heads of this rank see
    return split * (model.hidden_size * _WIDTHS[model.dtype] + 4 * model.num_attention_heads) // mesh.tp


def _rows(config: Config) -> int:
    """Tokens of a microbatch on a rank, between the layers."""
    mesh = config.mesh
    ranks = mesh.cp * (mesh.tp if mesh.sp else 1)
    return math.ceil(tokens_per_sample(config.model, config.data.latent_shape) / ranks) * config.train.micro_batch_size


def _residual_width(config: Config) -> int:
    """Bytes of an element of the hidden states between layers."""
    width = _WIDTHS[config.model.dtype]
    return max(width, 4) if config.model.fp32_residual else width


def _chunks_in_flight(mesh: MeshConfig, microbatches: int) -> int:
    """Forwards of a chunk whose backward is to come, at most, on the first stage.

    Those of megatron's 1F1B: forwards before the first backward, and the one beside it.
    """
    before = mesh.pp - 1
    if mesh.vpp > 1:
        before = 2 * (mesh.pp - 1) + (mesh.vpp - 1) * microbatches_of_a_chunk(mesh, microbatches)
    return min(before + 1, microbatches * mesh.vpp)


def _kept_of_a_chunk(config: Config) -> int:
    """Bytes that a chunk of layers keeps besides its layers: its messages, and the time embedder's weights in float32."""
    model, mesh = config.model, config.mesh
    # What came in and, with chunks, what was sent, which is else freed; of a pass with tangents.
    messages = 0 if mesh.pp == 1 else 1 if mesh.vpp == 1 else 2
    width = model.hidden_size
    weights = width * (7 * width + model.freq_dim) if model.family == "wan" else 4 * width * width
    weights += interval_parameters(model)
    return messages * 2 * _rows(config) * width * _residual_width(config) + (4 * weights if model.dtype == "bfloat16" else 0)


def interval_parameters(model: ModelConfig) -> int:
    """Parameters of the interval embedding (`model.interval`), of which no released network tells the shapes."""
    if not model.interval:
        return 0
    width = model.hidden_size
    return width * (model.freq_dim + 1 + width + 1) if model.family == "wan" else 4 * width**2


def _parameters(config: Config) -> tuple[int, int]:
    """Parameters of one network on a rank of the fullest stage: of layers, patches and head; of the embedders."""
    model, mesh = config.model, config.mesh
    stages = chunks_of_stages(model.num_layers, mesh.pp, mesh.vpp)
    counts, embedders = [0] * mesh.pp, interval_parameters(model)
    for name, shape in expected_shapes(model).items():
        size = math.prod(shape)
        if name.startswith("blocks."):
            _, layer, rest = name.split(".", 2)
            whole = rest in _WHOLE or rest.endswith(_WHOLE_ENDINGS) or rest.startswith("adaln_modulation")
            stage = next(i for i, chunks in enumerate(stages) if any(int(layer) in chunk for chunk in chunks))
            counts[stage] += size if whole else size // mesh.tp
        elif name.startswith(_EMBEDDERS):
            embedders += size
        else:
            counts[0 if name.startswith(("patch_embedding", "x_embedder")) else -1] += size
    return max(counts), embedders


def refuse_what_cannot_fit(config: Config, world_size: int, gpu_bytes: int) -> None:
    """ValueError, with the estimate, where the states alone are more than a GPU has."""
    needed = estimate(config, world_size)
    if needed.states > gpu_bytes:
        raise ValueError(
            f"mesh.tp={config.mesh.tp}, mesh.cp={config.mesh.cp}, mesh.pp={config.mesh.pp} on {world_size} ranks needs "
            f"{needed.states / GIB:.1f} GiB a GPU before activations (weights {needed.weights / GIB:.1f}, gradients "
            f"{needed.gradients / GIB:.1f}, optimizer and EMA {needed.optimizer / GIB:.1f}); this GPU has "
            f"{gpu_bytes / GIB:.1f}: raise mesh.tp or mesh.pp, set train.offload, or see tools/suggest_mesh.py"
        )
