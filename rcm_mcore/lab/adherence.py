"""What was read in videos against what their prompts state."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rcm_mcore.lab.scenes import COLOURS, OBJECTS, UNUSED, Scenes, Stated, parse_prompts


class Reading(NamedTuple):
    """What a SceneReader sees in n videos, on the CPU. Colours within a scene differ, so an object goes by its colour.

    Attributes:
        present: [n, COLOURS] bool, whether an object of the colour is there. What follows is a guess where it is not.
        shape, texture, motion, size: [n, COLOURS] int64, of the object of each colour.
        front: [n, COLOURS, COLOURS] bool, whether the object of the first colour is seen to cover part of the second's. Of
            objects that do not meet, both directions are False.
        caption: [n, CAPTION_LENGTH] int64, indices into GLYPHS.
        place: [n] int64, index into PLACES.
    """

    present: Tensor
    shape: Tensor
    texture: Tensor
    motion: Tensor
    size: Tensor
    front: Tensor
    caption: Tensor
    place: Tensor


class Judgement(NamedTuple):
    """How far n videos are what their prompts state: [n] float64, 0 to 1 each.

    Attributes:
        all: 1 where everything below is right, order included where there is one; 0 elsewhere.
        number: 1 where as many colours are present as objects are stated.
        colour: 1 where exactly the colours stated are present.
        shape, texture, motion, size: share of the stated objects whose colour is present with the attribute stated.
        order: share of the pairs of stated objects that are both present and not seen in the reverse order; NaN for prompts
            of one object. Objects that do not meet show no order, which the prompt allows.
        characters: share of the caption's characters.
        place: 1 where the caption is where it should be.
    """

    all: Tensor
    number: Tensor
    colour: Tensor
    shape: Tensor
    texture: Tensor
    motion: Tensor
    size: Tensor
    order: Tensor
    characters: Tensor
    place: Tensor


class Adherence(NamedTuple):
    """The means of a Judgement's fields over the videos; `order` over prompts that state one, NaN when none does."""

    all: float
    number: float
    colour: float
    shape: float
    texture: float
    motion: float
    size: float
    order: float
    characters: float
    place: float


def judge(reading: Reading, prompts: Sequence[str]) -> Judgement:
    """How far each video is what its prompt states.

    Raises: ValueError for another number of prompts than videos, none, or a text that is no prompt.
    """
    if len(prompts) != len(reading.place):
        raise ValueError(f"prompts: {len(prompts)} for {len(reading.place)} videos; give one for each")
    stated = parse_prompts(prompts)
    used = stated.colour != UNUSED  # [n, OBJECTS]
    colour = stated.colour.clamp_min(0)
    there = used & reading.present.gather(1, colour)
    parts = {
        "number": (reading.present.sum(1) == used.sum(1)).double(),
        "colour": (reading.present == expected_colours(stated)).all(1).double(),
    }
    for name in ("shape", "texture", "motion", "size"):
        right = there & (getattr(reading, name).gather(1, colour) == getattr(stated, name))
        parts[name] = right.sum(1).double() / used.sum(1)
    parts["order"] = _order(reading.front, colour, there, used)
    parts["characters"] = (reading.caption == stated.caption).double().mean(1)
    parts["place"] = (reading.place == stated.place).double()
    wrong = torch.stack([(part < 1) for part in parts.values()]).any(0)  # NaN is not less than 1
    return Judgement(all=(~wrong).double(), **parts)


def mean_of(judgement: Judgement) -> Adherence:
    """The means over the videos."""
    return Adherence(*(float(field.nanmean()) for field in judgement))


def expected_colours(stated: Scenes | Stated) -> Tensor:
    """Which colours are stated, [n, COLOURS] bool."""
    expected = torch.zeros(len(stated.colour), len(COLOURS) + 1, dtype=torch.bool)
    expected.scatter_(1, stated.colour % (len(COLOURS) + 1), True)  # UNUSED, -1, is the column that is left out
    return expected[:, :-1]


def _order(front: Tensor, colour: Tensor, there: Tensor, used: Tensor) -> Tensor:
    """Share of the pairs of slots, front to back, that are both present and not seen reversed; NaN without pairs."""
    rows = torch.arange(len(colour))
    right, pairs = torch.zeros(len(colour), dtype=torch.float64), torch.zeros(len(colour), dtype=torch.float64)
    for near in range(OBJECTS):
        for far in range(near + 1, OBJECTS):
            reverse = front[rows, colour[:, far], colour[:, near]]
            right += there[:, near] & there[:, far] & ~reverse
            pairs += used[:, near] & used[:, far]
    return right / pairs
