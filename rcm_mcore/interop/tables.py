"""What the naming schemes of a family of networks have in common: a table of renames, and checks that name what is wrong.

The hub is a dict of whole weights under the official names. A table says what a network's tensors are called elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from rcm_mcore.interop.lazy import Weight, Weights, lazily

T = TypeVar("T")

_LISTED = 20  # names in an error message
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_PREFIXES = {"student": "net.", "ema": "net_ema.", "fake_score": "net_fake_score."}  # of rCM's and Cosmos' training


@dataclass(frozen=True, kw_only=True)
class Table:
    """Names of one kind of network, all without .weight and .bias: `leaves` adds these to a hub name.

    `outer` and `block` map hub names to diffusers', `mcore_outer` and `mcore_block` ours to the hub names they are fused
    from, outside the blocks and inside one.
    """

    title: str
    scheme: str  # what the hub names are called in messages
    outer: Mapping[str, str]
    block: Mapping[str, str]
    mcore_outer: Mapping[str, Sequence[str]]
    mcore_block: Mapping[str, Sequence[str]]
    diffusers_blocks: str
    leaves: Callable[[str], Sequence[str]]

    def to_diffusers(self, num_layers: int) -> dict[str, str]:
        """Hub name -> diffusers name of every tensor."""
        stems = dict(self.outer)
        for i in range(num_layers):
            stems |= {f"blocks.{i}.{hub}": f"{self.diffusers_blocks}.{i}.{theirs}" for hub, theirs in self.block.items()}
        return {hub + leaf: theirs + leaf for hub, theirs in stems.items() for leaf in self.leaves(hub)}

    def from_mcore(self, num_layers: int) -> dict[str, tuple[str, ...]]:
        """Our name -> the hub names it is fused from, of every tensor."""
        stems = {ours: tuple(hub) for ours, hub in self.mcore_outer.items()}
        for i in range(num_layers):
            stems |= {
                f"blocks.{i}.{ours}": tuple(f"blocks.{i}.{part}" for part in hub) for ours, hub in self.mcore_block.items()
            }
        return {ours + leaf: tuple(part + leaf for part in hub) for ours, hub in stems.items() for leaf in self.leaves(hub[0])}


def fuse_heads(parts: Sequence[Weight], heads: int) -> Weight:
    """Weights [heads*d, ...] -> one [heads*len(parts)*d, ...], laid out [heads, part, d]."""
    if len(parts) == 1:
        return parts[0]
    return lazily(lambda *xs: torch.stack([x.unflatten(0, (heads, -1)) for x in xs], dim=1).flatten(0, 2), *parts)


def split_heads(fused: Weight, heads: int, parts: int) -> list[Weight]:
    """Inverse of `fuse_heads`."""
    if parts == 1:
        return [fused]
    return [lazily(lambda x, i=i: x.unflatten(0, (heads, parts, -1))[:, i].flatten(0, 1), fused) for i in range(parts)]


def select(weights: Mapping[str, T], which: str) -> dict[str, T]:
    """The weights of one network of a training checkpoint, without the residue of wrappers in their names.

    The networks of rCM's checkpoints are told by the start of a name; names with none are the student's. Only a leading
    `net.` is such a start: diffusers has `ffn.net.0` inside its names. Extra states are left out.
    Raises: ValueError for two tensors of one name, and when the network is not there.
    """
    found: dict[str, T] = {}
    others = tuple(prefix for name, prefix in _PREFIXES.items() if name not in (which, "student"))
    for name, weight in weights.items():
        if name.endswith("_extra_state") or name.startswith(others):
            continue
        if which != "student" and not name.startswith(_PREFIXES[which]):
            continue
        clean = name.removeprefix(_PREFIXES[which]).replace("_checkpoint_wrapped_module.", "")
        if clean in found:
            raise ValueError(f"{name}: a second tensor for {clean}")
        found[clean] = weight
    if weights and not found:
        held = [network for network, prefix in _PREFIXES.items() if any(name.startswith(prefix) for name in weights)]
        raise ValueError(f"holds no {which} network; it holds: {', '.join(held) or 'student'}")
    return found


def count_blocks(names: Collection[str], blocks: str = "blocks") -> int:
    """One more than the highest block index, so that a gap shows as missing names.

    At least 1, and at most the number of names: an absurd index must not cost memory.
    """
    indices = (re.match(rf"{blocks}\.(\d+)\.", name) for name in names)
    return 1 + min(max((int(index[1]) for index in indices if index), default=0), len(names))


def match(weights: Collection[str], names: Iterable[str], title: str, scheme: str) -> None:
    """Raises ValueError listing what is in only one of `weights` and `names`."""
    wanted = dict.fromkeys(names)
    unknown = [name for name in weights if name not in wanted]
    missing = [name for name in wanted if name not in weights]
    if not unknown and not missing:
        return
    problems = [f"{kind} {_listed(found)}" for kind, found in (("unknown", unknown), ("missing", missing)) if found]
    text = f"not the tensors of a {title} network in {scheme} names: {'; '.join(problems)}"
    looks = _looks_like(weights)
    raise ValueError(text + (f"; these look like {looks} names" if looks and scheme not in looks else ""))


def _looks_like(names: Iterable[str]) -> str:
    for mark, scheme in (
        ("condition_embedder.", "diffusers"),
        ("transformer_blocks.", "diffusers"),
        ("linear_qkv.", "mcore"),
        ("self_attn.q.", "wan or rcm"),
        ("self_attn.q_proj.", "cosmos or rcm"),
    ):
        if any(mark in name for name in names):
            return scheme
    return ""


def _listed(names: list[str]) -> str:
    text = ", ".join(names[:_LISTED])
    return f"({len(names)}) {text}" + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


def compare(weights: Weights, expected: Mapping[str, torch.Size]) -> None:
    """Raises ValueError for the first weights whose shape differs, or that are no floating-point numbers."""
    wrong = [name for name in expected if weights[name].shape != expected[name]]
    if wrong:
        shown = [f"{name} has {list(weights[name].shape)}, expected {list(expected[name])}" for name in wrong[:5]]
        raise ValueError(f"a network of another size: {len(wrong)} tensors differ in shape: {'; '.join(shown)}")
    for name in expected:
        if weights[name].dtype not in _FLOATS:
            allowed = ", ".join(str(dtype) for dtype in _FLOATS)
            raise ValueError(f"{name} has dtype {weights[name].dtype}, must be one of {allowed}; quantized is unsupported")
