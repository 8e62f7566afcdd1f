"""Weights of a network between naming schemes, whatever its family: into the hub names and out of them, with exact inverses.

    official   the hub names; Cosmos' with `net.` before each
    diffusers  other names, equal tensors
    rcm        `net.` + hub name; Wan's patch_embedding.weight flattened to [D, channels*pt*ph*pw]
    mcore      ours: flattened likewise, and projections fused per head

A weight is a tensor or a LazyTensor, and what comes out is lazy where what went in is.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from types import ModuleType

import torch

from rcm_mcore.config import SIZES, ModelConfig, parse_model
from rcm_mcore.interop import cosmos_names, wan_names
from rcm_mcore.interop.lazy import Weight, Weights, lazily
from rcm_mcore.interop.tables import Table, compare, count_blocks, fuse_heads, match, select, split_heads
from rcm_mcore.interop.wan_names import PATCH

_log = logging.getLogger(__name__)
_FAMILIES: dict[str, ModuleType] = {"wan": wan_names, "cosmos": cosmos_names}
# Marks of a family and a condition, of the official names and of diffusers'.
_COSMOS = ("transformer_blocks.", "x_embedder.", "t_embedder.", "t_embedding_norm.")  # at the start of a name
_FIRST_LAST = ("img_emb.emb_pos", "image_embedder.pos_embed")
_IMAGE = ("img_emb.", "k_img.", "v_img.", "image_embedder.", "add_k_proj.", "add_v_proj.", "norm_added_k.")


def expected_shapes(model: ModelConfig) -> dict[str, torch.Size]:
    """Hub name -> shape of every tensor of the network."""
    return _FAMILIES[model.family].expected_shapes(model)


def check_hub(hub: Weights, model: ModelConfig) -> None:
    """Checks names, shapes and dtypes of a hub dict against a network.

    Raises: ValueError listing unknown and missing names, or the first tensors of another shape with both shapes, or
        tensors that are no floating-point weights.
    """
    names = table_of(model)
    expected = expected_shapes(model)
    match(hub, expected, names.title, names.scheme)
    compare(hub, expected)


def infer_model(hub: Weights, *, head_dim: int | None = None) -> ModelConfig:
    """The network that a hub dict is of, every tensor of which is then checked.

    head_dim: head width, which Wan's weights do not tell: default 128, that of every released network.
    Raises: ValueError for missing or unknown names, for shapes that contradict each other, and for a width that
        head_dim does not divide.
    """
    family, condition = _kind(hub)
    num_layers = count_blocks(hub)
    names = _FAMILIES[family].table(condition)
    match(hub, names.to_diffusers(num_layers), names.title, names.scheme)
    fields = _FAMILIES[family].infer_fields(hub, condition, num_layers=num_layers, head_dim=head_dim)
    model = make_model(family=family, **{"condition": condition, **fields})
    check_hub(hub, model)
    return model


def make_model(*, family: str, condition: str, text_len: int = 512, **fields) -> ModelConfig:
    """The ModelConfig of a network with these sizes; `size` is that of the family with the same, or else a mere name."""
    sizes = (name for name, size in SIZES[family].items() if name != "tiny" and size.items() <= fields.items())
    return parse_model({"family": family, "condition": condition, "size": next(sizes, "tiny"), "text_len": text_len, **fields})


def table_of(model: ModelConfig) -> Table:
    """The names of a network."""
    return _FAMILIES[model.family].table(model.condition)


def official_to_hub(weights: Weights, *, which: str = "student") -> dict[str, Weight]:
    """An official state dict as a hub dict: checks names, drops `net.`, wrapper infixes, `_extra_state`, counters of Cosmos."""
    return _checked(select(weights, which), None)


def hub_to_diffusers(hub: Weights) -> dict[str, Weight]:
    """A hub dict under the names of diffusers' transformer of its family. Raises: ValueError for unmatched names."""
    names = _table(hub).to_diffusers(count_blocks(hub))
    hub = _checked(hub, None)
    return {names[name]: weight for name, weight in hub.items()}


def diffusers_to_hub(weights: Weights) -> dict[str, Weight]:
    """Inverse of hub_to_diffusers. Raises: ValueError for unmatched names."""
    weights = select(weights, "student")
    if _kind(weights)[0] == "cosmos":
        weights = cosmos_names.without_residue(weights)
    table = _table(weights)
    num_layers = count_blocks(weights, table.diffusers_blocks)
    names = {theirs: name for name, theirs in table.to_diffusers(num_layers).items()}
    match(weights, names, table.title, "diffusers")
    return {names[name]: weight for name, weight in weights.items()}


def hub_to_rcm(hub: Weights) -> dict[str, Weight]:
    """A hub dict as an rCM state dict, which for Cosmos is the official one. Raises: ValueError for unmatched names."""
    hub = _checked(hub, None)
    if PATCH in hub:
        hub[PATCH] = lazily(lambda x: x.flatten(1), hub[PATCH])
    return {"net." + name: weight for name, weight in hub.items()}


def rcm_to_hub(weights: Weights, *, which: str = "student") -> dict[str, Weight]:
    """Inverse of hub_to_rcm; the patch, which the flattened weight does not tell, is (1, 2, 2) as in every rCM network.

    Drops unknown int64 tensors: the counters of rCM's training wrapper, no parameters.
    Raises: ValueError for unmatched names, or a patch weight of Wan that is not [D, channels*4].
    """
    hub = select(weights, which)
    known = _table(hub).to_diffusers(count_blocks(hub))
    counters = [name for name, weight in hub.items() if name not in known and weight.dtype == torch.int64]
    for name in counters:
        _log.info("%s: a counter, left out", name)
        del hub[name]
    hub = _checked(hub, "rcm")
    if PATCH in hub:
        if hub[PATCH].ndim != 2 or hub[PATCH].shape[1] % 4:
            raise ValueError(f"{PATCH} has shape {list(hub[PATCH].shape)}, must be [width, channels x 4] in an rCM file")
        hub[PATCH] = lazily(lambda x: x.unflatten(1, (-1, 1, 2, 2)), hub[PATCH])
    return hub


def hub_to_mcore(hub: Weights, model: ModelConfig) -> dict[str, Weight]:
    """A hub dict under our names: whole weights, to be split over tensor-parallel ranks along dimension 0 or 1.

    Raises: ValueError when the hub dict is not of this network, or fused tensors differ in dtype.
    """
    check_hub(hub, model)
    weights: dict[str, Weight] = {}
    for name, sources in table_of(model).from_mcore(model.num_layers).items():
        parts = [hub[source] for source in sources]
        if len({part.dtype for part in parts}) > 1:
            dtypes = ", ".join(f"{source} {hub[source].dtype}" for source in sources)
            raise ValueError(f"cannot fuse tensors of different dtypes: {dtypes}; convert them to one dtype")
        weights[name] = fuse_heads(parts, model.num_attention_heads)
    if model.family == "wan":
        weights[PATCH] = lazily(lambda x: x.flatten(1), weights[PATCH])
    return weights


def mcore_to_hub(weights: Weights, model: ModelConfig) -> dict[str, Weight]:
    """Inverse of hub_to_mcore. Raises: ValueError for unmatched names and for tensors of another shape."""
    if model.interval:
        raise ValueError(
            "model.interval=true: no other format has the interval embedding of a student of distill.method=meanflow, and no "
            "other program its sampler; sample it with rcm_mcore.sample --sampler mean_flow"
        )
    weights = select(weights, "student")
    meta = {name: torch.empty(size, device="meta") for name, size in expected_shapes(model).items()}
    expected = {name: weight.shape for name, weight in hub_to_mcore(meta, model).items()}
    table = table_of(model)
    match(weights, expected, table.title, "mcore")
    compare(weights, expected)
    hub: dict[str, Weight] = {}
    for name, sources in table.from_mcore(model.num_layers).items():
        hub.update(zip(sources, split_heads(weights[name], model.num_attention_heads, len(sources))))
    if model.family == "wan":
        patch = (model.patch_channels, *model.patch_size)
        hub[PATCH] = lazily(lambda x: x.unflatten(1, patch), hub[PATCH])
    return hub


def _kind(names: Collection[str]) -> tuple[str, str]:
    """Family and condition of official or diffusers names; Cosmos' condition is in the shapes only."""
    has = lambda marks: any(mark in name for name in names for mark in marks)
    if any(name.startswith(_COSMOS) or ".adaln_modulation_" in name for name in names):
        return "cosmos", "text"
    return "wan", "first_last" if has(_FIRST_LAST) else "image" if has(_IMAGE) else "text"


def _table(names: Collection[str]) -> Table:
    family, condition = _kind(names)
    return _FAMILIES[family].table(condition)


def _checked(hub: Mapping[str, Weight], scheme: str | None) -> dict[str, Weight]:
    """A hub dict without residue, its names checked."""
    hub = cosmos_names.without_residue(hub) if _kind(hub)[0] == "cosmos" else dict(hub)
    table = _table(hub)
    match(hub, table.to_diffusers(count_blocks(hub)), table.title, scheme or table.scheme)
    return hub
