"""Scenes: the laws of motion, what is drawn, the prompts and what can be seen in the pictures."""

import math
from collections import Counter
from itertools import combinations, pairwise

import pytest
import torch

from rcm_mcore.lab import motion
from rcm_mcore.lab import render as rendering
from rcm_mcore.lab.motion import RADII, centres
from rcm_mcore.lab.scenes import (
    CANVAS,
    COLOURS,
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
    concatenate,
    draw_scenes,
    is_heldout,
    parse_prompt,
    parse_prompts,
    prompt_of,
    render,
    scenes_of,
    select,
)


@pytest.fixture(scope="module")
def drawn() -> Scenes:
    return draw_scenes(1500, seed=0)


def scene(**fields) -> Scenes:
    """One scene with one object in its first slot: a small plain white square in the middle of a black picture."""
    values = dict(shape=SHAPES.index("square"), colour=COLOURS.index("white"), texture=0, motion=0, size=0, scan=UNUSED)
    values |= dict(speed=0, turn=0, phase=0.0, start=(32.0, 32.0)) | fields
    slots = {name: torch.full((1, OBJECTS), UNUSED) for name in ("shape", "colour", "texture", "motion", "size", "scan")}
    slots |= {"speed": torch.zeros(1, OBJECTS, dtype=torch.int64), "turn": torch.zeros(1, OBJECTS, dtype=torch.int64)}
    slots |= {"phase": torch.zeros(1, OBJECTS), "start": torch.zeros(1, OBJECTS, 2)}
    for name, slot in slots.items():
        slot[0, 0] = torch.tensor(values[name])
    alone = {"caption": torch.zeros(1, 3, dtype=torch.int64), "background": torch.zeros(1, 2, dtype=torch.int64)}
    alone |= {"place": torch.zeros(1, dtype=torch.int64), "ink": torch.zeros(1, dtype=torch.int64)}
    return Scenes(**slots, **alone, gradient=torch.zeros(1))


# motion


def simulated(name: str, start: tuple[float, float], value: float, radius: float, phase: float) -> list[tuple[float, float]]:
    """The centres by small steps of time, for the laws with impacts."""
    steps = 4000
    (x, y), (vx, vy) = start, (0.0, 0.0)
    if name == "bouncing":
        vx, vy = value * torch.tensor(phase).cos().item(), value * torch.tensor(phase).sin().item()
    gravity = value if name == "falling" else 0.0
    found = []
    for step in range((FRAMES - 1) * steps + 1):
        if step % steps == 0:
            found.append((x, y))
        x, y, vy = x + vx / steps, y + vy / steps, vy + gravity / steps
        if (x < radius and vx < 0) or (x > CANVAS - radius and vx > 0):
            vx = -vx
        if (y < radius and vy < 0) or (y > CANVAS - radius and vy > 0):
            vy = -vy * (motion.RESTITUTION if name == "falling" else 1.0)
    return found


@pytest.mark.parametrize("name, start, phase", [("falling", (20.0, 40.0), 0.0), ("bouncing", (50.0, 20.0), 0.7)])
@pytest.mark.parametrize("size", [0, 1])
def test_impacts_are_those_of_a_simulation(name: str, start: tuple[float, float], phase: float, size: int) -> None:
    """Falling from so low that there are up to three impacts."""
    for speed in range(3):
        one = scene(motion=MOTIONS.index(name), start=start, phase=phase, size=size, speed=speed)
        expected = torch.tensor(simulated(name, start, motion.SPEEDS[name][speed], RADII[size], phase))
        assert (centres(one)[0, 0] - expected).abs().max() < 0.03, "half a hundredth of a pixel a frame"


@pytest.mark.parametrize("way, step", [("left", (-1, 0)), ("right", (1, 0)), ("up", (0, -1)), ("down", (0, 1))])
def test_drifting_is_uniform(way: str, step: tuple[int, int]) -> None:
    for speed, value in enumerate((1.0, 1.5, 2.0)):
        path = centres(scene(motion=MOTIONS.index(f"drifting {way}"), speed=speed))[0, 0]
        assert torch.equal(path.diff(dim=0), (value * torch.tensor(step, dtype=torch.float32)).expand(FRAMES - 1, 2))


def test_circling_and_oscillating_keep_their_amplitude_and_period() -> None:
    for turn, sign in ((0, 1), (1, -1)):
        path = centres(scene(motion=MOTIONS.index("circling"), speed=1, turn=turn, phase=0.5))[0, 0] - 32
        torch.testing.assert_close(path.norm(dim=1), torch.full((FRAMES,), 8.0))
        angles = torch.atan2(path[:, 1], path[:, 0])
        assert angles[0] == pytest.approx(0.5, abs=1e-5) and angles[1] == pytest.approx(0.5 + sign * torch.pi / 8, abs=1e-5)
        torch.testing.assert_close(path[0], path[16], atol=1e-4, rtol=0)
        path = centres(scene(motion=MOTIONS.index("oscillating"), speed=2, turn=turn, phase=0.5))[0, 0] - 32
        assert (path[:, 1 - turn] == 0).all() and path[:, turn].abs().max() <= 10.0
        torch.testing.assert_close(path[:5], path[12:], atol=1e-4, rtol=0)
        torch.testing.assert_close(path[:4, turn], 10 * (0.5 + torch.arange(4) * torch.pi / 6).sin(), atol=1e-4, rtol=0)


# what is drawn


def test_the_seed_alone_decides() -> None:
    first, again, other = draw_scenes(50, seed=3), draw_scenes(50, seed=3), draw_scenes(50, seed=(3, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not any(torch.equal(a, b) for a, b in zip(first, other))
    with pytest.raises(ValueError, match="count = 0"):
        draw_scenes(0, seed=3)


def test_objects_stay_on_the_canvas(drawn: Scenes) -> None:
    used = drawn.shape != UNUSED
    radius = torch.tensor(RADII)[drawn.size[used]][:, None, None]
    path = centres(drawn)[used]
    assert (path >= radius - 1e-3).all() and (path <= CANVAS - radius + 1e-3).all()


def test_motions_show_in_every_video(drawn: Scenes) -> None:
    """Bouncing and falling objects meet a wall or the floor in frames 3 to 13; a path never tells two motions alike."""
    path = centres(drawn)
    steps = path.diff(dim=2)
    for name in ("bouncing", "falling"):
        rows = drawn.motion == MOTIONS.index(name)
        turned = (steps[rows][:, 1:] * steps[rows][:, :-1] < 0).any(-1)
        assert turned[:, 1:13].any(1).all(), name
    bouncing = drawn.motion == MOTIONS.index("bouncing")
    slant = drawn.phase[bouncing].remainder(torch.pi / 2) / torch.pi * 180
    assert 29.9 < slant.min() < 32 and 58 < slant.max() < 60.1


def seen_frames(scenes: Scenes, row: int) -> list[tuple[int, int]]:
    """Of each object: in how many frames it is clear, and in how many the object before overlaps it."""
    path, found = centres(select(scenes, slice(row, row + 1)))[0].tolist(), []
    top = (1, 49)[scenes.place[row]]
    radii = [RADII[size] for size in scenes.size[row].tolist() if size != UNUSED]
    for slot, radius in enumerate(radii):
        clear = touching = 0
        for frame in range(FRAMES):
            x, y = path[slot][frame]
            from_plate = (max(16 - x, 0, x - 48) ** 2 + max(top - y, 0, y - top - 14) ** 2) ** 0.5
            distances = [((x - a) ** 2 + (y - b) ** 2) ** 0.5 for a, b in (path[front][frame] for front in range(slot))]
            near = [distance < radii[front] + 0.2 * radius for front, distance in enumerate(distances)]
            clear += from_plate >= 0.2 * radius and not any(near)
            touching += bool(distances) and distances[-1] < radii[slot - 1] + 0.6 * radius
        found.append((clear, touching))
    return found


def test_what_the_prompt_says_can_be_seen(drawn: Scenes) -> None:
    for row in range(300):
        (first, _), *others = seen_frames(drawn, row)
        assert first >= 8
        assert all(clear >= 8 and touching >= 3 for clear, touching in others), row


def test_prompts_are_distributed_as_stated(drawn: Scenes) -> None:
    used = drawn.shape != UNUSED
    digit = drawn.shape >= 6
    n = int(used.sum())
    assert used[:, 0].all() and (used[:, 1] | ~used[:, 2]).all()
    groups = {
        "objects": (used.sum(1) - 1, 3),
        "colour": (drawn.colour[used], 8),
        "texture": (drawn.texture[used & ~digit], 4),
        "motion": (drawn.motion[used], 9),
        "size": (drawn.size[used], 2),
        "caption": (drawn.caption.flatten(), 20),
        "place": (drawn.place, 2),
        "speed": (drawn.speed[used & (drawn.motion == MOTIONS.index("circling"))], 3),
    }
    for name, (values, kinds) in groups.items():
        counts = values.bincount(minlength=kinds).double()
        expected = len(values) / kinds
        # Colours and speeds are a little less than uniform: held-out combinations, and placements that fit.
        slack = 0.12 * expected if name in ("colour", "speed") else 0.0
        assert len(counts) == kinds, name
        assert ((counts - expected).abs() < 4.5 * expected**0.5 + slack).all(), (name, counts)
    assert abs(float(digit.sum()) / n - 0.25) < 0.04
    assert (drawn.texture[digit] == 0).all() and ((drawn.scan == UNUSED) == ~digit).all()
    for first, second in combinations(range(OBJECTS), 2):
        both = used[:, second]
        assert (drawn.colour[both, first] != drawn.colour[both, second]).all()
        assert (drawn.shape[both, first] != drawn.shape[both, second]).all()


def test_held_out_combinations_are_not_drawn_unless_asked_for(drawn: Scenes) -> None:
    pairs = {(shape, colour) for shape in range(len(SHAPES)) for colour in range(len(COLOURS))}
    seen = set(zip(drawn.shape.flatten().tolist(), drawn.colour.flatten().tolist())) - {(UNUSED, UNUSED)}
    held = {(shape, colour) for shape, colour in pairs if (shape + 3 * colour) % 8 == 0}
    assert seen == pairs - held, "and every other combination is"
    assert Counter(shape for shape, _ in held) == dict.fromkeys(range(16), 1)
    assert Counter(colour for _, colour in held) == dict.fromkeys(range(8), 2)
    others = draw_scenes(200, seed=0, heldout=True)
    assert is_heldout(others).all() and not is_heldout(drawn).any()
    for shapes, colours in zip(others.shape.tolist(), others.colour.tolist()):
        assert held & set(zip(shapes, colours))


def test_scenes_of_given_prompts_show_them(drawn: Scenes) -> None:
    stated = parse_prompts(prompt_of(select(drawn, slice(0, 40))))
    one, other = scenes_of(stated, seed=1), scenes_of(stated, seed=(1, 2))
    assert prompt_of(one) == prompt_of(other) == prompt_of(stated)
    assert not torch.equal(one.start, other.start) and not torch.equal(one.gradient, other.gradient)
    assert all(clear >= 8 for row in range(40) for clear, _ in seen_frames(one, row))


def test_scans_are_of_the_digit_that_is_named(drawn: Scenes) -> None:
    from rcm_mcore.data.digits import load_images

    digit = drawn.shape >= 6
    assert torch.equal(load_images().digits[drawn.scan[digit]], drawn.shape[digit] - 6)
    assert len(set(drawn.scan[digit].tolist())) > 300, "any of the scans"


# prompts


def test_prompts_are_read_back(drawn: Scenes) -> None:
    prompts = prompt_of(drawn)
    stated = parse_prompts(prompts)
    for name in stated._fields:
        assert torch.equal(getattr(stated, name), getattr(drawn, name)), name
    assert prompt_of(stated) == prompts and torch.equal(is_heldout(stated), is_heldout(drawn))
    text = (
        "a small striped red disc bouncing in front of a large plain blue handwritten two drifting left,"
        " caption K 7 X at the top"
    )
    one = parse_prompt(text)
    assert one.shape.tolist() == [0, SHAPES.index("handwritten two"), UNUSED]
    assert one.colour.tolist() == [0, COLOURS.index("blue"), UNUSED] and one.size.tolist() == [0, 1, UNUSED]
    assert one.texture.tolist() == [TEXTURES.index("striped"), 0, UNUSED]
    assert one.motion.tolist() == [MOTIONS.index("bouncing"), MOTIONS.index("drifting left"), UNUSED]
    assert [GLYPHS[glyph] for glyph in one.caption] == ["K", "7", "X"] and PLACES[one.place] == "top"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a small plain red disc bouncing",
        "a small plain red disc bouncing, caption K 7 at the top",
        "a small plain red disc bouncing, caption K7X at the top",
        "a small plain red disc bouncing, caption O 7 X at the top",
        "a small plain red disc bouncing, caption K 7 X at the left",
        "a tiny plain red disc bouncing, caption K 7 X at the top",
        "a small plain red disc bouncing in front of , caption K 7 X at the top",
        " in front of ".join(["a small plain red disc bouncing"] * 4) + ", caption K 7 X at the top",
        "a small plain red disc bouncing, caption K 7 X at the top now",
    ],
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected 1 to 3 times 'a SIZE TEXTURE COLOUR SHAPE MOTION'"):
        parse_prompt(text)
    with pytest.raises(ValueError, match="no prompts"):
        parse_prompts([])


# pictures

_TIPS = [(math.sin(k * math.pi / 5) * (1, 0.5)[k % 2], -math.cos(k * math.pi / 5) * (1, 0.5)[k % 2]) for k in range(10)]


def inside(name: str, x: float, y: float) -> bool:
    """Whether a point, in radii from the centre, right and down, is inside a shape."""
    distance = (x * x + y * y) ** 0.5
    if name == "disc":
        return distance <= 1
    if name == "square":
        return max(abs(x), abs(y)) <= 0.85
    if name == "ring":
        return 0.4 <= distance <= 1
    if name == "cross":
        return (abs(x) <= 1 and abs(y) <= 0.3) or (abs(x) <= 0.3 and abs(y) <= 1)
    corners = _TIPS if name == "star" else [(0, 0.29 - 1.154), (1.0, 0.29 + 0.577), (-1.0, 0.29 + 0.577)]
    crossings = 0
    for (ax, ay), (bx, by) in pairwise([*corners, corners[0]]):
        if (ay > y) != (by > y) and x < ax + (y - ay) * (bx - ax) / (by - ay):
            crossings += 1
    return crossings % 2 == 1


@pytest.mark.parametrize("name", ["disc", "square", "triangle", "star", "ring", "cross"])
def test_shapes_cover_the_pixels_they_should(name: str) -> None:
    """Against 6x6 points in each pixel of the first frame."""
    video = render(scene(shape=SHAPES.index(name), size=1, start=(31.3, 36.8)))
    dark, light = rendering.BACKGROUNDS[0][0], rendering.PAINTS[COLOURS.index("white")][0]
    cover = (video[0, 0, 0] - dark) / (light - dark)
    area = slice(20, 54)
    points = [(k + 0.5) / 6 for k in range(6)]
    expected = torch.tensor(
        [
            [
                sum(inside(name, (j + a - 31.3) / 13, (i + b - 36.8) / 13) for a in points for b in points) / 36
                for j in range(area.start, area.stop)
            ]
            for i in range(area.start, area.stop)
        ]
    )
    error = (cover[area, area] - expected).abs()
    assert error.mean() < 0.01 and error.max() < 0.6, (error.mean(), error.max())
    assert cover.sum() == pytest.approx(float(expected.sum() + cover[:20].sum() + cover[20:54, :20].sum()), rel=0.02, abs=25)


@pytest.mark.parametrize("texture", range(4))
def test_textures_move_with_their_objects(texture: int) -> None:
    fields = dict(texture=texture, motion=MOTIONS.index("drifting right"), start=(20.0, 40.0), size=1)
    video = render(scene(**fields))[0]
    still = video[:, 0, 26:54, 6:34]
    for frame in (1, 7, 16):
        torch.testing.assert_close(video[:, frame, 26:54, 6 + frame : 34 + frame], still, atol=1e-4, rtol=0)
    dark = (still[0] < 0.5).double().mean()
    plain = (render(scene(**(fields | {"texture": 0})))[0, 0, 0, 26:54, 6:34] < 0.5).double().mean()
    assert (dark - plain > 0.08) == (texture > 0), "something dark is on all but plain ones"


def test_textures_differ() -> None:
    videos = [render(scene(texture=texture, size=size))[0, :, 0] for size in (0, 1) for texture in range(4)]
    for size in (0, 4):
        for one, other in combinations(videos[size : size + 4], 2):
            assert (one - other).abs().sum() > 60


def test_handwriting_is_the_scan() -> None:
    from rcm_mcore.data.digits import load_images

    for scan in (3, 100, 1700):
        digit = int(load_images().digits[scan])
        video = render(scene(shape=6 + digit, scan=scan, size=1, start=(31.0, 40.0)))
        area = video[0, :, 0, 23:57, 14:48].mean(0)  # 2.6 radii to a side
        small = torch.nn.functional.interpolate(area[None, None], (8, 8), mode="area")[0, 0]
        pair = torch.stack([small.flatten(), load_images().images[scan].flatten()])
        assert torch.corrcoef(pair)[0, 1] > 0.9, scan


_SLOTS = ("shape", "colour", "texture", "motion", "size", "scan", "start", "speed", "phase", "turn")


def in_front(front: Scenes, behind: Scenes) -> Scenes:
    """The first object of one scene in front of that of another."""
    slots = {name: getattr(behind, name).roll(1, 1) for name in _SLOTS}
    for name, values in slots.items():
        values[:, 0] = getattr(front, name)[:, 0]
    return front._replace(**slots)


def test_front_objects_hide_those_behind() -> None:
    small, large = scene(colour=0, start=(30.0, 36.0)), scene(colour=3, start=(34.0, 36.0), size=1)
    paints = torch.tensor(rendering.PAINTS)
    video = render(in_front(small, large))[0, :, 0]
    assert torch.allclose(video[:, 36, 32], paints[0]) and torch.allclose(video[:, 36, 42], paints[3])
    assert torch.allclose(render(in_front(large, small))[0, :, 0, 36, 32], paints[3])


def test_every_attribute_shows(drawn: Scenes) -> None:
    """A change of any field of a scene changes its video."""
    rows = (drawn.motion[:, 0] == MOTIONS.index("circling")) & (drawn.shape[:, 0] < 6) & (drawn.shape[:, 1] == UNUSED)
    rows &= drawn.background[:, 0] != drawn.background[:, 1]
    one = select(drawn, rows.nonzero()[:1, 0])
    video = render(one)
    kinds = {"shape": 6, "colour": 8, "texture": 4, "motion": 9, "size": 2, "caption": 20, "place": 2, "speed": 3, "turn": 2}
    for name, field in zip(Scenes._fields, one):
        if name == "scan":
            continue
        changed = field.clone().flatten()
        kind = kinds.get(name, {"background": 6, "ink": 2}.get(name))
        changed[0] = (changed[0] + 1) % kind if kind else changed[0] + 0.7
        other = render(one._replace(**{name: changed.view_as(field)}))
        assert not torch.equal(other, video), name


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch, drawn: Scenes) -> None:
    few = select(drawn, slice(0, 5))
    whole = render(few)
    assert whole.shape == (5, 3, FRAMES, CANVAS, CANVAS) and whole.dtype == torch.float32
    assert whole.isfinite().all() and whole.min() >= 0 and whole.max() <= 1
    monkeypatch.setattr(rendering, "_CHUNK", 2)
    assert torch.equal(render(few), whole)
    halves = concatenate([select(few, slice(0, 3)), select(few, torch.tensor([3, 4]))])
    assert all(torch.equal(a, b) for a, b in zip(halves, few))


def test_sizes_are_what_they_say() -> None:
    small, large = (render(scene(size=size, shape=0))[0, 0, 0] > 0.5 for size in range(len(SIZES)))
    # The caption's light pixels are in both.
    assert large.sum() - small.sum() == pytest.approx(torch.pi * (13**2 - 8**2), rel=0.03)
