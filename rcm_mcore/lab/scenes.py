"""Task (c) of the laboratory: procedural videos of up to three textured objects that move and hide one another, with a
caption to be read, and prompts that say what is to be seen. This module draws scenes and is where the others are found:

    scenes = draw_scenes(8, seed=0); videos = render(scenes); prompts = prompt_of(scenes)

The distribution over prompts: the number of objects, each texture, motion and size, the place of the caption and its
characters are uniform and independent; a shape is a handwritten digit with probability 1/4 and else one of the six others,
uniform; a colour is uniform; except that, given their number, the objects of a scene differ in colour and in shape, that
handwritten digits are plain, and that combinations of shape and colour are held out (``is_heldout``). Placements are drawn
after the prompt, until everything that it says can be seen: an object is clear of those in front of it and of the caption for
SEEN frames or more, and the object right in front of it overlaps it (by their circumscribed circles) for OVERLAPPING frames or
more.
"""

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch

from rcm_mcore.lab.glyphs import PLATE_HEIGHT, PLATE_LEFT, PLATE_TOP, PLATE_WIDTH, legibility, read_captions
from rcm_mcore.lab.motion import RADII, SPEEDS, paths, reflected
from rcm_mcore.lab.render import BACKGROUNDS, render
from rcm_mcore.lab.vocabulary import (
    CANVAS,
    CAPTION_LENGTH,
    COLOURS,
    DRAWN,
    FRAMES,
    GLYPHS,
    MOTIONS,
    OBJECTS,
    PLACES,
    SHAPES,
    SIZES,
    TEXTURES,
    UNUSED,
    Scenes,
    Stated,
    concatenate,
    is_heldout,
    parse_prompt,
    parse_prompts,
    prompt_of,
    select,
)

__all__ = [
    "CANVAS",
    "CAPTION_LENGTH",
    "COLOURS",
    "FRAMES",
    "GLYPHS",
    "MOTIONS",
    "OBJECTS",
    "PLACES",
    "SHAPES",
    "SIZES",
    "TEXTURES",
    "UNUSED",
    "Scenes",
    "Stated",
    "concatenate",
    "draw_scenes",
    "is_heldout",
    "legibility",
    "parse_prompt",
    "parse_prompts",
    "prompt_of",
    "read_captions",
    "render",
    "scenes_of",
    "select",
]

SEEN = 8  # frames
OVERLAPPING = 3  # frames
_DIGIT_SHARE = 0.25
_LEAST_FALL = 24.0  # pixels: so that the first impact is within a video, at 0.6 pixels a frame a frame in frame 9
_FIRST_BOUNCE = (3.0, 12.0)  # frames
# Distances of centres, as the radius of the front object plus so many radii of the one behind.
_CLEAR, _TOUCHING = 0.2, 0.6
_TRIES = 100  # rounds of placements of an object before the scene starts anew
_CANDIDATES = 512  # placements tried in a round


def draw_scenes(count: int, seed: int | Sequence[int], *, heldout: bool = False) -> Scenes:
    """Random scenes; the same arguments give the same scenes.

    Args:
        count: n, at least 1.
        seed: of everything; several numbers are one seed.
        heldout: whether every scene has a held-out combination (``is_heldout``) or none has.
    Raises: ValueError for a count below 1.
    """
    if count < 1:
        raise ValueError(f"count = {count}: must be at least 1")
    generator = np.random.default_rng(seed)
    return _completed(_draw_stated(generator, count, heldout), generator)


def scenes_of(stated: Stated, seed: int | Sequence[int]) -> Scenes:
    """Random scenes that show what is stated, [n, ...]: with `parse_prompts`, real videos of given prompts."""
    return _completed(stated, np.random.default_rng(seed))


def _completed(stated: Stated, generator: np.random.Generator) -> Scenes:
    """With all that no prompt states."""
    count, digit = len(stated.place), stated.shape >= len(DRAWN)
    start, speed, phase, turn = _place(generator, stated)
    return Scenes(
        *stated,
        scan=torch.where(digit, _draw_scans(generator, stated.shape - len(DRAWN)), UNUSED),
        start=start,
        speed=speed,
        phase=phase,
        turn=turn,
        background=_integers(generator, len(BACKGROUNDS), (count, 2)),
        gradient=torch.from_numpy(generator.uniform(0, 2 * math.pi, count)).float(),
        ink=_integers(generator, 2, (count,)),
    )


def _draw_stated(generator: np.random.Generator, count: int, heldout: bool) -> Stated:
    """What the prompts state; given the number of objects, everything is drawn until it is allowed."""
    objects = torch.from_numpy(generator.integers(1, OBJECTS + 1, count))
    stated = _draw_any(generator, objects)
    while len(rows := (_alike(stated) | (is_heldout(stated) != heldout)).nonzero().squeeze(1)):
        for field, drawn in zip(stated, _draw_any(generator, objects[rows])):
            field[rows] = drawn
    return stated


def _draw_any(generator: np.random.Generator, objects: torch.Tensor) -> Stated:
    """Prompts with these numbers of objects [n], which may be alike or held out."""
    n = len(objects)
    slots = (n, OBJECTS)
    used = torch.arange(OBJECTS) < objects[:, None]
    digit = torch.from_numpy(generator.random(slots) < _DIGIT_SHARE)
    written = len(DRAWN) + _integers(generator, len(SHAPES) - len(DRAWN), slots)
    shape = written.where(digit, _integers(generator, len(DRAWN), slots))
    texture = torch.where(digit, TEXTURES.index("plain"), _integers(generator, len(TEXTURES), slots))
    return Stated(
        shape=shape.where(used, UNUSED),
        colour=_integers(generator, len(COLOURS), slots).where(used, UNUSED),
        texture=texture.where(used, UNUSED),
        motion=_integers(generator, len(MOTIONS), slots).where(used, UNUSED),
        size=_integers(generator, len(SIZES), slots).where(used, UNUSED),
        caption=_integers(generator, len(GLYPHS), (n, CAPTION_LENGTH)),
        place=_integers(generator, len(PLACES), (n,)),
    )


def _alike(stated: Stated) -> torch.Tensor:
    """Whether two objects of a scene have one shape or one colour, [n] bool."""
    alike = torch.zeros(len(stated.place), dtype=torch.bool)
    for first, second in combinations(range(OBJECTS), 2):
        same = (stated.shape[:, first] == stated.shape[:, second]) | (stated.colour[:, first] == stated.colour[:, second])
        alike |= same & (stated.shape[:, second] != UNUSED)
    return alike


def _integers(generator: np.random.Generator, high: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(generator.integers(0, high, shape))


def _draw_scans(generator: np.random.Generator, digit: torch.Tensor) -> torch.Tensor:
    """A scan of each digit [n, OBJECTS]; 0 where it is none."""
    from rcm_mcore.data.digits import load_images

    labels = load_images().digits
    scan = torch.zeros_like(digit)
    for value in range(10):
        members = (labels == value).nonzero().squeeze(1)
        wanted = digit == value
        scan[wanted] = members[_integers(generator, len(members), (int(wanted.sum()),))]
    return scan


def _place(generator: np.random.Generator, stated: Stated) -> tuple[torch.Tensor, ...]:
    """Starts, speeds, phases and turns of all objects, front to back, each drawn until it is seen as the module says."""
    n = len(stated.place)
    start, phase = torch.zeros(n, OBJECTS, 2), torch.zeros(n, OBJECTS)
    speed, turn = torch.zeros(n, OBJECTS, dtype=torch.int64), torch.zeros(n, OBJECTS, dtype=torch.int64)
    path = torch.zeros(n, OBJECTS, FRAMES, 2)
    radius = torch.tensor(RADII)[stated.size.clamp_min(0)]
    unplaced = torch.arange(n)
    while len(unplaced):
        failed = torch.zeros(n, dtype=torch.bool)
        for slot in range(OBJECTS):
            rows = unplaced[(stated.shape[unplaced, slot] != UNUSED) & ~failed[unplaced]]
            for _ in range(_TRIES):
                if not len(rows):
                    break
                # Several at once for few rows: the first good one is taken, so the distribution is the same.
                tried = rows.repeat_interleave(max(1, _CANDIDATES // len(rows)))
                motion, size = stated.motion[tried, slot], stated.size[tried, slot]
                course = _draw_course(generator, motion, radius[tried, slot])
                last = paths(motion, size, course[0], (course[1], course[2], course[3]))
                seen = _seen((path[tried, :slot], last), radius[tried, : slot + 1], stated.place[tried]).view(len(rows), -1)
                first = seen.int().cumsum(1).eq(0).sum(1).clamp_max(seen.shape[1] - 1)
                chosen = torch.arange(len(rows)) * seen.shape[1] + first
                start[rows, slot], speed[rows, slot], phase[rows, slot], turn[rows, slot] = (c[chosen] for c in course)
                path[rows, slot] = last[chosen]
                rows = rows[~seen.any(1)]
            failed[rows] = True
        unplaced = failed.nonzero().squeeze(1)
    unused = stated.shape == UNUSED
    return start, speed.masked_fill(unused, UNUSED), phase, turn.masked_fill(unused, UNUSED)


def _draw_course(generator: np.random.Generator, motion: torch.Tensor, radius: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Start [m, 2], speed, phase and turn [m], such that the object stays on the canvas."""
    m = len(motion)
    speed, turn = _integers(generator, 3, (m,)), _integers(generator, 2, (m,))
    value = torch.tensor([SPEEDS[name] for name in MOTIONS])[motion, speed]
    low = radius[:, None].expand(m, 2).clone()
    high = CANVAS - low
    travel = value * (FRAMES - 1)
    for name, bound, axis, sign in (("left", low, 0, 1), ("right", high, 0, -1), ("up", low, 1, 1), ("down", high, 1, -1)):
        bound[:, axis] += sign * travel * (motion == MOTIONS.index(f"drifting {name}"))
    high[:, 1] -= _LEAST_FALL * (motion == MOTIONS.index("falling"))
    swinging, circling = motion == MOTIONS.index("oscillating"), motion == MOTIONS.index("circling")
    for axis in range(2):
        room = value * (circling | (swinging & (turn == axis)))
        low[:, axis] += room
        high[:, axis] -= room
    start = low + torch.from_numpy(generator.random((m, 2))).float() * (high - low)
    phase = torch.from_numpy(generator.uniform(0, 2 * math.pi, m)).float()
    # A bouncing object moves at 30 to 60 degrees to the axes, and meets a wall across the axis `turn` soon enough.
    bouncing = motion == MOTIONS.index("bouncing")
    slanted = _integers(generator, 4, (m,)) * math.pi / 2 + math.pi / 6 + phase / 12
    first = torch.from_numpy(generator.uniform(*_FIRST_BOUNCE, m)).float()
    velocity = value[:, None] * torch.stack([slanted.cos(), slanted.sin()], -1)
    wall = torch.where(velocity > 0, high, low)
    met = reflected(wall - velocity * first[:, None], low, high)
    start = torch.where(bouncing[:, None] & (torch.arange(2) == turn[:, None]), met, start)
    return start, speed, torch.where(bouncing, slanted, phase).float(), turn


def _seen(courses: tuple[torch.Tensor, torch.Tensor], radius: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Whether an object is seen for long enough, and the one before it in front of it, [m] bool.

    Args:
        courses: of the objects before it [m, slots - 1, FRAMES, 2], and of itself [m, FRAMES, 2].
        radius: of all [m, slots].
        place: of the captions [m].
    """
    front, last = courses
    own = radius[:, -1]
    clear = _plate_distance(last, place) >= _CLEAR * own[:, None]
    distance = (front - last[:, None]).norm(dim=-1)  # [m, slots - 1, FRAMES]
    clear &= (distance >= (radius[:, :-1] + _CLEAR * own[:, None])[..., None]).all(1)
    seen = clear.sum(1) >= SEEN
    if front.shape[1]:
        touching = distance[:, -1] < (radius[:, -2] + _TOUCHING * own)[:, None]
        seen &= touching.sum(1) >= OVERLAPPING
    return seen


def _plate_distance(path: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Pixels from the caption, 0 inside, of points [m, FRAMES, 2]."""
    top = torch.tensor(PLATE_TOP)[place][:, None] + PLATE_HEIGHT / 2
    across = (path[..., 0] - PLATE_LEFT - PLATE_WIDTH / 2).abs() - PLATE_WIDTH / 2
    down = (path[..., 1] - top).abs() - PLATE_HEIGHT / 2
    return torch.hypot(across.clamp_min(0), down.clamp_min(0))
