"""Names and shapes of Wan2.1 text-to-video weights in four naming schemes.

The hub is a dict of full tensors under the official Wan2.1 names and shapes (patch_embedding.weight [D, C, pt, ph, pw]).
Every other scheme is a table of renames and reshapes from the hub, with an exact inverse:

    diffusers  other names, equal tensors
    rcm        `net.` + hub name, patch_embedding.weight flattened to [D, C*pt*ph*pw]
    mcore      ours: patch_embedding.weight flattened, and q, k, v of self-attention, k, v of cross-attention fused per
               head ([heads, 3 or 2, d, D]), so that a tensor-parallel split of dimension 0 is a split by heads

D model width, C latent channels, d head width, (pt, ph, pw) patch.
"""

import logging
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch

Tensors = dict[str, torch.Tensor]

RELEASED_HEAD_DIM = 128  # head width of every released Wan network; the weights do not tell it

_LISTED = 20  # names in an error message
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_log = logging.getLogger(__name__)

# hub -> diffusers, outside the blocks and inside one block; without .weight and .bias
_OUTER_TO_DIFFUSERS = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
}
_BLOCK_TO_DIFFUSERS = {
    "modulation": "scale_shift_table",
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "self_attn.norm_q": "attn1.norm_q",
    "self_attn.norm_k": "attn1.norm_k",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "cross_attn.norm_q": "attn2.norm_q",
    "cross_attn.norm_k": "attn2.norm_k",
    "norm3": "norm2",  # the norm before cross-attention, the only one of a block with parameters
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
# ours -> the hub tensors it is fused from, inside one block; outside the blocks our names are the hub's
_BLOCK_FROM_MCORE: dict[str, tuple[str, ...]] = {
    "modulation": ("modulation",),
    "self_attn.linear_qkv": ("self_attn.q", "self_attn.k", "self_attn.v"),
    "self_attn.linear_proj": ("self_attn.o",),
    "self_attn.norm_q": ("self_attn.norm_q",),
    "self_attn.norm_k": ("self_attn.norm_k",),
    "cross_attn.linear_q": ("cross_attn.q",),
    "cross_attn.linear_kv": ("cross_attn.k", "cross_attn.v"),
    "cross_attn.linear_proj": ("cross_attn.o",),
    "cross_attn.norm_q": ("cross_attn.norm_q",),
    "cross_attn.norm_k": ("cross_attn.norm_k",),
    "norm3": ("norm3",),
    "ffn.linear_fc1": ("ffn.0",),
    "ffn.linear_fc2": ("ffn.2",),
}
_IMAGE_TO_VIDEO = ("img_emb.", "k_img.", "v_img.", "image_embedder.", "add_k_proj.", "add_v_proj.", "norm_added_k.")
_PATCH = "patch_embedding.weight"


@dataclass(frozen=True, kw_only=True)
class WanShape:
    """Sizes of a Wan2.1 text-to-video network; the defaults are those shared by the released ones.

    Raises: ValueError for sizes below 1 and widths that the heads do not divide.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    ffn_hidden_size: int
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096  # width of the text encoder
    freq_dim: int = 256  # width of the sinusoid of time
    patch_size: tuple[int, int, int] = (1, 2, 2)  # (time, height, width) latent positions of a token
    text_len: int = 512  # rows of text; no weight depends on it

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_heads

    def __post_init__(self) -> None:
        sizes = {name: value for name, value in vars(self).items() if name != "patch_size"}
        for name, value in [*sizes.items(), *(("patch_size", p) for p in self.patch_size)]:
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: must be a whole number, at least 1")
        if len(self.patch_size) != 3:
            raise ValueError(f"patch_size={self.patch_size}: must be three numbers (time, height, width)")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}")


def expected_shapes(shape: WanShape) -> dict[str, torch.Size]:
    """Hub name -> shape of every tensor of the network: 15 outside the blocks, 27 in each block."""
    width, ffn = shape.hidden_size, shape.ffn_hidden_size
    sizes: dict[str, tuple[int, ...]] = {
        _PATCH: (width, shape.in_channels, *shape.patch_size),
        "patch_embedding.bias": (width,),
        "head.modulation": (1, 2, width),
    }
    linears = {  # name -> (outputs, inputs)
        "text_embedding.0": (width, shape.text_dim),
        "text_embedding.2": (width, width),
        "time_embedding.0": (width, shape.freq_dim),
        "time_embedding.2": (width, width),
        "time_projection.1": (6 * width, width),
        "head.head": (math.prod(shape.patch_size) * shape.out_channels, width),
    }
    for i in range(shape.num_layers):
        block = f"blocks.{i}."
        sizes[block + "modulation"] = (1, 6, width)
        sizes[block + "norm3.weight"] = sizes[block + "norm3.bias"] = (width,)
        for attention in ("self_attn.", "cross_attn."):
            for norm in ("norm_q", "norm_k"):
                sizes[f"{block}{attention}{norm}.weight"] = (width,)
            for linear in "qkvo":
                linears[block + attention + linear] = (width, width)
        linears[block + "ffn.0"] = (ffn, width)
        linears[block + "ffn.2"] = (width, ffn)
    for name, (outputs, inputs) in linears.items():
        sizes[name + ".weight"], sizes[name + ".bias"] = (outputs, inputs), (outputs,)
    return {name: torch.Size(size) for name, size in sizes.items()}


def infer_shape(hub: Mapping[str, torch.Tensor], *, head_dim: int = RELEASED_HEAD_DIM) -> WanShape:
    """The sizes of a hub dict, every tensor of which is then checked against them.

    head_dim: head width, which the weights do not tell: 128 in every released network.
    Raises: ValueError for missing or unknown names, for shapes that contradict each other, and for a width that
        head_dim does not divide.
    """
    num_layers = _count_blocks(hub)
    _match(hub, _hub_to_diffusers(num_layers), "wan")
    for name, dimensions in ((_PATCH, 5), ("head.head.weight", 2), ("blocks.0.ffn.0.weight", 2)):
        if hub[name].ndim != dimensions:
            hint = "; flattened like this it is an rCM file" if name == _PATCH and hub[name].ndim == 2 else ""
            raise ValueError(f"{name} has shape {list(hub[name].shape)}, must have {dimensions} dimensions{hint}")
    width, in_channels, *patch = hub[_PATCH].shape
    outputs = hub["head.head.weight"].shape[0]
    if outputs % math.prod(patch):
        raise ValueError(f"head.head.weight has {outputs} rows, not a multiple of the patch {patch}")
    if width % head_dim:
        raise ValueError(f"head width {head_dim} does not divide the model width {width}: give the right head_dim (--head-dim)")
    shape = WanShape(
        num_layers=num_layers,
        hidden_size=width,
        num_heads=width // head_dim,
        ffn_hidden_size=hub["blocks.0.ffn.0.weight"].shape[0],
        in_channels=in_channels,
        out_channels=outputs // math.prod(patch),
        text_dim=hub["text_embedding.0.weight"].shape[-1],
        freq_dim=hub["time_embedding.0.weight"].shape[-1],
        patch_size=(patch[0], patch[1], patch[2]),
    )
    check_hub(hub, shape)
    return shape


def check_hub(hub: Mapping[str, torch.Tensor], shape: WanShape) -> None:
    """Checks names, shapes and dtypes of a hub dict against the sizes of a network.

    Raises: ValueError listing unknown and missing names, or the first tensors of another shape with both shapes, or
        tensors that are no floating-point weights.
    """
    expected = expected_shapes(shape)
    _match(hub, expected, "wan")
    _compare(hub, expected)


def wan_to_hub(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """An official state dict as a hub dict: checks names, drops a leading `net.`, wrapper infixes, `_extra_state`."""
    hub = _clean(tensors)
    _match(hub, _hub_to_diffusers(_count_blocks(hub)), "wan")
    return hub


def hub_to_diffusers(hub: Mapping[str, torch.Tensor]) -> Tensors:
    """A hub dict under the names of diffusers' WanTransformer3DModel. Raises: ValueError for unmatched names."""
    names = _hub_to_diffusers(_count_blocks(hub))
    _match(hub, names, "wan")
    return {names[name]: tensor for name, tensor in hub.items()}


def diffusers_to_hub(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Inverse of hub_to_diffusers. Raises: ValueError for unmatched names."""
    tensors = _clean(tensors)
    names = {theirs: name for name, theirs in _hub_to_diffusers(_count_blocks(tensors)).items()}
    _match(tensors, names, "diffusers")
    return {names[name]: tensor for name, tensor in tensors.items()}


def hub_to_rcm(hub: Mapping[str, torch.Tensor]) -> Tensors:
    """A hub dict as an rCM state dict. Raises: ValueError for unmatched names."""
    _match(hub, _hub_to_diffusers(_count_blocks(hub)), "wan")
    return {"net." + name: tensor.flatten(1) if name == _PATCH else tensor for name, tensor in hub.items()}


def rcm_to_hub(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Inverse of hub_to_rcm; the patch, which the flattened weight does not tell, is (1, 2, 2) as in every rCM network.

    Drops unknown int64 tensors: the counters of rCM's training wrapper, no parameters.
    Raises: ValueError for unmatched names, or a patch weight that is not [D, C*4].
    """
    hub = _clean(tensors)
    known = _hub_to_diffusers(_count_blocks(hub))
    counters = [name for name, tensor in hub.items() if name not in known and tensor.dtype == torch.int64]
    for name in counters:
        _log.info("%s: a counter, left out", name)
        del hub[name]
    _match(hub, known, "rcm")
    if hub[_PATCH].ndim != 2 or hub[_PATCH].shape[1] % 4:
        raise ValueError(f"{_PATCH} has shape {list(hub[_PATCH].shape)}, must be [width, channels x 4] in an rCM file")
    hub[_PATCH] = hub[_PATCH].unflatten(1, (-1, 1, 2, 2))
    return hub


def hub_to_mcore(hub: Mapping[str, torch.Tensor], shape: WanShape) -> Tensors:
    """A hub dict under our names: full tensors, to be split over tensor-parallel ranks along dimension 0 or 1.

    Raises: ValueError when the hub dict is not of this shape, or fused tensors differ in dtype.
    """
    check_hub(hub, shape)
    tensors = {}
    for name, sources in _mcore_to_hub(shape.num_layers).items():
        parts = [hub[source] for source in sources]
        if len({part.dtype for part in parts}) > 1:
            dtypes = ", ".join(f"{source} {hub[source].dtype}" for source in sources)
            raise ValueError(f"cannot fuse tensors of different dtypes: {dtypes}; convert them to one dtype")
        tensors[name] = parts[0] if len(parts) == 1 else _fuse_heads(parts, shape.num_heads)
    tensors[_PATCH] = tensors[_PATCH].flatten(1)
    return tensors


def mcore_to_hub(tensors: Mapping[str, torch.Tensor], shape: WanShape) -> Tensors:
    """Inverse of hub_to_mcore. Raises: ValueError for unmatched names and for tensors of another shape."""
    tensors = _clean(tensors)
    meta = {name: torch.empty(size, device="meta") for name, size in expected_shapes(shape).items()}
    expected = {name: tensor.shape for name, tensor in hub_to_mcore(meta, shape).items()}
    _match(tensors, expected, "mcore")
    _compare(tensors, expected)
    hub: Tensors = {}
    for name, sources in _mcore_to_hub(shape.num_layers).items():
        parts = [tensors[name]] if len(sources) == 1 else _split_heads(tensors[name], shape.num_heads, len(sources))
        hub.update(zip(sources, parts))
    hub[_PATCH] = hub[_PATCH].unflatten(1, (shape.in_channels, *shape.patch_size))
    return hub


def _fuse_heads(parts: list[torch.Tensor], heads: int) -> torch.Tensor:
    """Tensors [heads*d, ...] -> one [heads*len(parts)*d, ...], laid out [heads, part, d]."""
    return torch.stack([part.unflatten(0, (heads, -1)) for part in parts], dim=1).flatten(0, 2)


def _split_heads(fused: torch.Tensor, heads: int, parts: int) -> list[torch.Tensor]:
    return [part.flatten(0, 1) for part in fused.unflatten(0, (heads, parts, -1)).unbind(1)]


def _leaves(stem: str) -> tuple[str, ...]:
    if stem.endswith("modulation"):
        return ("",)
    return (".weight",) if stem.endswith(("norm_q", "norm_k")) else (".weight", ".bias")


def _hub_to_diffusers(num_layers: int) -> dict[str, str]:
    stems = dict(_OUTER_TO_DIFFUSERS)
    for i in range(num_layers):
        stems |= {f"blocks.{i}.{ours}": f"blocks.{i}.{theirs}" for ours, theirs in _BLOCK_TO_DIFFUSERS.items()}
    return {ours + leaf: theirs + leaf for ours, theirs in stems.items() for leaf in _leaves(ours)}


def _mcore_to_hub(num_layers: int) -> dict[str, tuple[str, ...]]:
    stems: dict[str, tuple[str, ...]] = {stem: (stem,) for stem in _OUTER_TO_DIFFUSERS}
    for i in range(num_layers):
        block = f"blocks.{i}."
        stems |= {block + name: tuple(block + s for s in sources) for name, sources in _BLOCK_FROM_MCORE.items()}
    return {name + leaf: tuple(s + leaf for s in sources) for name, sources in stems.items() for leaf in _leaves(name)}


def _count_blocks(names: Collection[str]) -> int:
    """One more than the highest block index, so that a gap shows as missing names.

    At least 1, and at most the number of names: an absurd index must not cost memory.
    """
    indices = (re.match(r"blocks\.(\d+)\.", name) for name in names)
    return 1 + min(max((int(index[1]) for index in indices if index), default=0), len(names))


def _clean(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Takes the harmless residue of wrappers off the names.

    Only a leading `net.` is one: diffusers has `ffn.net.0` inside its names.
    """
    cleaned: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith("_extra_state"):
            continue
        clean = name.replace("_checkpoint_wrapped_module.", "").removeprefix("net.")
        if clean in cleaned:
            raise ValueError(f"{name}: a second tensor for {clean}")
        cleaned[clean] = tensor
    return cleaned


def _match(tensors: Mapping[str, torch.Tensor], names: Iterable[str], scheme: str) -> None:
    """Raises ValueError listing what is in only one of tensors and names."""
    if image := next((name for name in tensors if any(mark in name for mark in _IMAGE_TO_VIDEO)), None):
        raise ValueError(f"{image}: an image-to-video network, which is not supported yet; only text-to-video is")
    wanted = set(names)
    unknown = [name for name in tensors if name not in wanted]
    missing = [name for name in names if name not in tensors]
    if not unknown and not missing:
        return
    problems = [f"{kind} {_listed(found)}" for kind, found in (("unknown", unknown), ("missing", missing)) if found]
    text = f"not the tensors of a Wan2.1 text-to-video network in {scheme} names: {'; '.join(problems)}"
    looks = _looks_like(tensors)
    raise ValueError(text + (f"; these look like {looks} names" if looks and scheme not in looks else ""))


def _looks_like(names: Iterable[str]) -> str:
    for mark, scheme in (
        ("condition_embedder.", "diffusers"),
        ("linear_qkv.", "mcore"),
        ("self_attn.q.", "wan or rcm"),
    ):
        if any(mark in name for name in names):
            return scheme
    return ""


def _listed(names: list[str]) -> str:
    text = ", ".join(names[:_LISTED])
    return f"({len(names)}) {text}" + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


def _compare(tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Size]) -> None:
    """Raises ValueError for the first tensors whose shape differs, or that are no floating-point weights."""
    wrong = [name for name in expected if tensors[name].shape != expected[name]]
    if wrong:
        shown = [f"{name} has {list(tensors[name].shape)}, expected {list(expected[name])}" for name in wrong[:5]]
        raise ValueError(f"a network of another size: {len(wrong)} tensors differ in shape: {'; '.join(shown)}")
    for name in expected:
        if tensors[name].dtype not in _FLOATS:
            allowed = ", ".join(str(dtype) for dtype in _FLOATS)
            raise ValueError(f"{name} has dtype {tensors[name].dtype}, must be one of {allowed}; quantized is unsupported")
