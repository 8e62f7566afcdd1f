"""The words of the scenes: what a scene consists of, the prompt that says it, and the prompt read back.

Positions, speeds, phases, directions of turning, scans of digits, background and ink are in no prompt: they are what videos
of one prompt may differ in.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch

OBJECTS = 3  # slots of a scene, front to back
CAPTION_LENGTH = 3
FRAMES = 17
CANVAS = 64  # pixels, height and width of a frame
UNUSED = -1  # in every attribute of a slot that holds no object

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DRAWN = ("disc", "square", "triangle", "star", "ring", "cross")
SHAPES = (*DRAWN, *(f"handwritten {digit}" for digit in DIGITS))
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "magenta", "white")
TEXTURES = ("plain", "striped", "checked", "dotted")
MOTIONS = (
    "standing still",
    "drifting left",
    "drifting right",
    "drifting up",
    "drifting down",
    "bouncing",
    "falling",
    "circling",
    "oscillating",
)
SIZES = ("small", "large")
PLACES = ("top", "bottom")
GLYPHS = "ACEHJKLNPTUVXY234579"  # easily told apart: no two bitmaps correlate by more than 0.78

_HELDOUT_PERIOD = 8


class Scenes(NamedTuple):
    """n scenes, each of which determines its video. Slots run from front to back; the last are UNUSED.

    Attributes:
        shape, colour, texture, motion, size: [n, OBJECTS] int64, indices into SHAPES, COLOURS, TEXTURES, MOTIONS, SIZES.
        caption: [n, CAPTION_LENGTH] int64, indices into GLYPHS.
        place: [n] int64, index into PLACES.
        scan: [n, OBJECTS] int64, which of the scans of its digit (data.digits.load_images) a handwritten digit is.
        start: [n, OBJECTS, 2] float32, pixels right and down: the centre in frame 0; of circling and oscillating objects
            the centre of the path.
        speed: [n, OBJECTS] int64, 0 to 2: which of the motion's speeds (motion.SPEEDS).
        phase: [n, OBJECTS] float32, radians: of circling and oscillating, and the direction of bouncing in frame 0.
        turn: [n, OBJECTS] int64, 0 or 1: circling clockwise or not, oscillating along the rows or the columns.
        background: [n, 2] int64, indices into render.BACKGROUNDS, the colours at the two ends of a gradient.
        gradient: [n] float32, radians: the direction of the gradient.
        ink: [n] int64, 0 for a light caption on dark, 1 for a dark one on light.
    """

    shape: torch.Tensor
    colour: torch.Tensor
    texture: torch.Tensor
    motion: torch.Tensor
    size: torch.Tensor
    caption: torch.Tensor
    place: torch.Tensor
    scan: torch.Tensor
    start: torch.Tensor
    speed: torch.Tensor
    phase: torch.Tensor
    turn: torch.Tensor
    background: torch.Tensor
    gradient: torch.Tensor
    ink: torch.Tensor


class Stated(NamedTuple):
    """What prompts state, as the fields of the same names in Scenes: [OBJECTS], [CAPTION_LENGTH] and [] for one prompt."""

    shape: torch.Tensor
    colour: torch.Tensor
    texture: torch.Tensor
    motion: torch.Tensor
    size: torch.Tensor
    caption: torch.Tensor
    place: torch.Tensor


def select(scenes: Scenes, rows: torch.Tensor | slice) -> Scenes:
    """The scenes of these rows (indices, a mask or a slice)."""
    return Scenes(*(field[rows] for field in scenes))


def concatenate(parts: Sequence[Scenes]) -> Scenes:
    """All scenes of several, in order."""
    return Scenes(*(torch.cat(fields) for fields in zip(*parts)))


def is_heldout(scenes: Scenes | Stated) -> torch.Tensor:
    """Whether an object has a combination of shape and colour that training never shows, [n] bool (or [] for one prompt).

    Two colours of each eight, and one shape of each eight, are held out for one another: shape + 3 colour is a multiple of 8.
    Every shape and every colour is thus seen, in other combinations.
    """
    hidden = (scenes.shape + 3 * scenes.colour) % _HELDOUT_PERIOD == 0
    return (hidden & (scenes.shape != UNUSED)).any(-1)


def prompt_of(scenes: Scenes | Stated) -> list[str]:
    """The n prompts, such as "a small striped red disc bouncing in front of a large plain blue square drifting left, caption
    K 7 X at the top"."""
    columns = (scenes.size, scenes.texture, scenes.colour, scenes.shape, scenes.motion)
    objects = torch.stack(columns, -1).tolist()
    return [
        " in front of ".join(_object_text(*indices) for indices in slots if indices[3] != UNUSED)
        + f", caption {' '.join(GLYPHS[glyph] for glyph in caption)} at the {PLACES[place]}"
        for slots, caption, place in zip(objects, scenes.caption.tolist(), scenes.place.tolist())
    ]


def parse_prompt(text: str) -> Stated:
    """What a prompt states; the inverse of ``prompt_of``.

    Raises: ValueError for any other text.
    """
    parts = _PROMPT.fullmatch(text)
    found = [_OBJECT.fullmatch(part) for part in parts["objects"].split(" in front of ")] if parts else []
    if parts is None or not all(found) or not 1 <= len(found) <= OBJECTS:
        raise ValueError(
            f"prompt {text!r}: expected 1 to {OBJECTS} times 'a SIZE TEXTURE COLOUR SHAPE MOTION', joined by ' in front of ',"
            f" then ', caption {' '.join('XYZ'[:CAPTION_LENGTH])} at the {' or '.join(PLACES)}', with SIZE one of"
            f" {', '.join(SIZES)}; TEXTURE {', '.join(TEXTURES)}; COLOUR {', '.join(COLOURS)}; SHAPE {', '.join(SHAPES)};"
            f" MOTION {', '.join(MOTIONS)}; characters of {GLYPHS}"
        )
    slots = {}
    for name, words in _WORDS.items():
        indices = [words.index(match[name]) for match in found if match]
        slots[name] = torch.tensor(indices + [UNUSED] * (OBJECTS - len(indices)))
    caption = torch.tensor([GLYPHS.index(glyph) for glyph in parts["caption"].split()])
    return Stated(**slots, caption=caption, place=torch.tensor(PLACES.index(parts["place"])))


def parse_prompts(texts: Sequence[str]) -> Stated:
    """What n prompts state, each field with n in front.

    Raises: ValueError for a text that is no prompt, or no texts.
    """
    if not texts:
        raise ValueError("texts: no prompts; give at least one")
    return Stated(*(torch.stack(fields) for fields in zip(*map(parse_prompt, texts))))


_WORDS = {"size": SIZES, "texture": TEXTURES, "colour": COLOURS, "shape": SHAPES, "motion": MOTIONS}
_OBJECT = re.compile("a " + " ".join(f"(?P<{name}>{'|'.join(words)})" for name, words in _WORDS.items()))
_GLYPH_WORDS = " ".join([f"[{GLYPHS}]"] * CAPTION_LENGTH)
_PROMPT = re.compile(f"(?P<objects>.*), caption (?P<caption>{_GLYPH_WORDS}) at the (?P<place>{'|'.join(PLACES)})")


def _object_text(size: int, texture: int, colour: int, shape: int, motion: int) -> str:
    return f"a {SIZES[size]} {TEXTURES[texture]} {COLOURS[colour]} {SHAPES[shape]} {MOTIONS[motion]}"
