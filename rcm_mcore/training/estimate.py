"""What a run needs on a GPU and sends per step under a mesh, by arithmetic; states are exact but for the padding of shards.

Memory of one rank, the fullest pipeline stage:

    weights        of every network of the run, in the model's dtype
    gradients      float32, of one network at a time (the others' buffers are freed)
    optimizer      second moments and, for bfloat16, float32 masters of the trained networks, sharded; and the student's EMA
    activations    what recompute keeps of the layers of the microbatches in flight, and one block at work

One block at work is taken as WORKING bytes a token and channel, and more where keys travel round a ring, both fitted to steps
of Wan 14B (docs/benchmarks/step_h200_202611.md: uncompiled, recompute full), where it is up to 9 % off. Without recompute the
estimate of activations is too low.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rcm_mcore.config import Config, MeshConfig, chunks_of_stages, microbatches_of_a_chunk, tokens_per_sample
from rcm_mcore.interop import expected_shapes

GIB = 2**30
WORKING = 150
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
    trained = 2 if distill and config.distill.method != "scm" else 1
    has_ema = config.optim.ema_length is not None
    # An optimizer's shard: of the layers over data- and context-parallel ranks, of the embedders over stages too.
    shard = math.ceil(layers / (dp * mesh.cp)) + math.ceil(embedders / (dp * mesh.cp * mesh.pp))
    per_element = 4 + (4 if model.dtype == "bfloat16" else 0)

    rows, residual = _rows(config), _residual_width(config)
    stages = chunks_of_stages(model.num_layers, mesh.pp, mesh.vpp)
    stage_layers = max(sum(map(len, chunks)) for chunks in stages)
    microbatches = train.global_batch_size // (dp * train.micro_batch_size)
    chunks_in_flight = _chunks_in_flight(mesh, microbatches)
    in_flight = chunks_in_flight * max(len(chunk) for chunks in stages for chunk in chunks)
    # Of a ring: two buffers of keys and values with their tangents, parts of the output in float32, parts of the gradients.
    ring = 0 if mesh.cp == 1 else 16 + 12 * mesh.cp
    at_work = (WORKING + ring) * rows * model.hidden_size

    dual = 2 * rows * model.hidden_size
    split = rows * (mesh.tp if mesh.sp else 1) * model.hidden_size // mesh.tp  # keys of this rank's heads
    return Estimate(
        layers=layers,
        embedders=embedders,
        weights=width * (layers + embedders) * (trained + distill),
        gradients=4 * (layers + embedders),
        optimizer=shard * (per_element * trained + (4 if has_ema else 0)),
        activations=in_flight * kept_of_a_layer(config) + chunks_in_flight * _kept_of_a_chunk(config) + at_work,
        # Three gathers and three scatters a layer, of this rank's rows to or from each other rank (an all-reduce is both).
        sent_tp=stage_layers * 6 * (mesh.tp - 1) * dual * width // (1 if mesh.sp else mesh.tp),
        sent_cp=stage_layers * (mesh.cp - 1) * 4 * split * width,
        sent_pp=0 if mesh.pp == 1 else mesh.vpp * dual * residual,
        sent_dp=(4 + width) * (layers + embedders) * (dp * mesh.cp - 1) // (dp * mesh.cp),
    )


def kept_of_a_layer(config: Config) -> int:
    """Bytes that a layer keeps for its backward, on each rank, of one microbatch: under recompute its input.

    In a pass with tangents also the output and the log-sum-exp of the self-attention, which backward does not redo.
    """
    model, mesh = config.model, config.mesh
    rows, attended = _rows(config), 0
    if config.train.objective == "distill" and config.distill.method != "dmd":
        split = rows * (mesh.tp if mesh.sp else 1)  # of all tokens that the heads of this rank see
        attended = split * (model.hidden_size * _WIDTHS[model.dtype] + 4 * model.num_attention_heads) // mesh.tp
    return rows * model.hidden_size * _residual_width(config) + attended


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
    """Bytes that a chunk of layers keeps besides its layers: its message, and the time embedder's weights in float32."""
    model = config.model
    message = 2 * _rows(config) * model.hidden_size * _residual_width(config) if config.mesh.pp > 1 else 0
    width = model.hidden_size
    weights = width * (7 * width + model.freq_dim) if model.family == "wan" else 4 * width * width
    return message + (4 * weights if model.dtype == "bfloat16" else 0)


def _parameters(config: Config) -> tuple[int, int]:
    """Parameters of one network on a rank of the fullest stage: of layers, patches and head; of the embedders."""
    model, mesh = config.model, config.mesh
    stages = chunks_of_stages(model.num_layers, mesh.pp, mesh.vpp)
    counts, embedders = [0] * mesh.pp, 0
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
            f"{gpu_bytes / GIB:.1f}: raise mesh.tp or mesh.pp, or see tools/suggest_mesh.py"
        )
