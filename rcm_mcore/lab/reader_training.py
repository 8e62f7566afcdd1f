"""Training of the SceneReader on scenes that are rendered as it goes."""

from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from rcm_mcore.lab.adherence import expected_colours, judge, mean_of
from rcm_mcore.lab.blocks import descend
from rcm_mcore.lab.codec import SceneCodec
from rcm_mcore.lab.glyphs import GLYPH_WIDTH, PLATE_HEIGHT, PLATE_LEFT, PLATE_TOP
from rcm_mcore.lab.motion import RADII, centres
from rcm_mcore.lab.reader import APPEARANCE_FEATURES, GRID, MOTION_FEATURES, PAIRS, THUMBNAIL, Outputs, SceneReader
from rcm_mcore.lab.scenes import (
    CANVAS,
    CAPTION_LENGTH,
    COLOURS,
    FRAMES,
    MOTIONS,
    OBJECTS,
    SHAPES,
    SIZES,
    TEXTURES,
    UNUSED,
    Scenes,
    prompt_of,
    render,
)
from rcm_mcore.lab.stream import batches, scenes_for

_NOISE = 0.06  # largest standard deviation of the noise, in pixel units
_IGNORED = -100  # cross_entropy's own
_WORDS = ("colour", "shape", "texture", "size")  # that features of frames must tell, whatever object has them
_WORD_COUNT = len(COLOURS) + len(SHAPES) + len(TEXTURES) + len(SIZES)
_BLUR = 3.0  # pixels, of the heat around a centre
# Distances of the centres of two objects, in sums of their radii: nearer than the first they cover one another, farther than
# the second they do not touch (a square's corners are at 1.2). What is between is taught neither way.
_MEET, _APART = 0.8, 1.25


class _Painter(nn.Module):
    """Tells words and paints thumbnails from features alone; only training needs it."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Linear(APPEARANCE_FEATURES, _WORD_COUNT)
        self.motions = nn.Linear(MOTION_FEATURES, len(MOTIONS))
        pixels = 3 * THUMBNAIL**2
        self.frame = nn.Sequential(nn.Linear(APPEARANCE_FEATURES, 4 * pixels), nn.SiLU(), nn.Linear(4 * pixels, pixels))
        self.change = nn.Linear(MOTION_FEATURES, pixels)


class _Targets(NamedTuple):
    """What scenes are, as the reader says it; on the device of their videos. Of absent colours _IGNORED.

    Attributes:
        present: [n, COLOURS] float32, 0 or 1.
        shape, texture, motion, size: [n, COLOURS].
        heat: [n, F, COLOURS + CAPTION_LENGTH, cells], where each is: shares that fall off around its centre; 0 where it is not.
        pairs: [n, PAIRS], 0 to 2, or _IGNORED where neither touching nor apart.
        words: [n, _WORD_COUNT], motions: [n, MOTIONS]: 0 or 1, whether any object has it.
    """

    present: Tensor
    shape: Tensor
    texture: Tensor
    motion: Tensor
    size: Tensor
    heat: Tensor
    pairs: Tensor
    caption: Tensor
    place: Tensor
    words: Tensor
    motions: Tensor


def train_reader(
    *,
    seed: int,
    codec: SceneCodec | None = None,
    steps: int = 4000,
    batch_size: int = 96,
    width: int = 32,
    device: torch.device | str = "cpu",
    heldout: int = 1024,
    show: bool = True,
) -> SceneReader:
    """A reader trained on scenes of all combinations, a quarter of each batch through the codec, half of it noisy or blurred.

    Args:
        seed: of weights, scenes and noise; the global random state is left as it was.
        codec: on the same device; without one the reader takes the codec's blur for a fault of the generator's.
        steps: optimizer steps (AdamW, one cycle of the learning rate).
        batch_size: videos in a step.
        width: of the reader.
        device: where to train; the reader stays there. Matrix products are in bfloat16 on a GPU.
        heldout: scenes of other seeds on which `facts` are measured, and as many again that the features are standardised on.
        show: a progress bar.
    Raises: ValueError for no steps, or a batch or held-out set of less than four.
    """
    if steps < 1 or batch_size < 4 or heldout < 4:
        raise ValueError(f"reader: steps={steps}, batch_size={batch_size}, heldout={heldout}; at least 1, 4 and 4")
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        reader, painter = SceneReader(width=width).to(device).train(), _Painter().to(device)
        parameters = [*reader.parameters(), *painter.parameters()]
        drawn = batches("reader", steps, batch_size, seed=seed, device=device)
        losses = (_loss(reader, painter, targets_of(scenes, device), _augmented(videos, codec)) for scenes, videos in drawn)
        descend(parameters, losses, steps=steps, label="reader", show=show)
    reader.eval().requires_grad_(False)
    reader.fit_features(_mixture(render(scenes_for("statistics", heldout, seed=seed), device), codec))
    reader.facts = {"seed": seed, "steps": steps, "batch_size": batch_size, **measured(reader, codec, heldout, seed=seed)}
    return reader


def measured(reader: SceneReader, codec: SceneCodec | None, count: int, *, seed: int) -> dict[str, dict[str, float]]:
    """Adherences on `count` held-out scenes, as dictionaries.

    `heldout`: of their videos to their prompts. `chance`: to the prompts of other scenes, hence what a generator reaches that
    makes perfect videos and ignores its prompts. `heldout_codec`: through the codec, to their own.
    """
    scenes = scenes_for("held out", count, seed=seed)
    videos, prompts = render(scenes, reader.frame_mean.device), prompt_of(scenes)
    reading = reader.read(videos)
    found = {"heldout": judge(reading, prompts), "chance": judge(reading, prompts[1:] + prompts[:1])}
    if codec is not None:
        found["heldout_codec"] = judge(reader.read(codec.decode(codec.encode(videos))), prompts)
    return {name: mean_of(judgement)._asdict() for name, judgement in found.items()}


def targets_of(scenes: Scenes, device: torch.device) -> _Targets:
    """What the reader should say of the videos of these scenes."""
    n, used = len(scenes.place), scenes.colour != UNUSED
    row, slot = used.nonzero(as_tuple=True)
    colour = scenes.colour[row, slot]
    present = expected_colours(scenes)
    by_colour = {}
    for name in ("shape", "texture", "motion", "size"):
        by_colour[name] = torch.full((n, len(COLOURS)), _IGNORED)
        by_colour[name][row, colour] = getattr(scenes, name)[row, slot]
    where = centres(scenes)
    centre = torch.full((n, len(COLOURS) + CAPTION_LENGTH, FRAMES, 2), torch.nan)
    centre[row, colour] = where[row, slot]
    letters = PLATE_LEFT + 1 + GLYPH_WIDTH * (torch.arange(CAPTION_LENGTH) + 0.5)
    centre[:, len(COLOURS) :, :, 0] = letters[:, None]
    centre[:, len(COLOURS) :, :, 1] = (torch.tensor(PLATE_TOP)[scenes.place] + PLATE_HEIGHT / 2)[:, None, None]
    words = [_any(getattr(scenes, name), size) for name, size in zip(_WORDS, map(len, (COLOURS, SHAPES, TEXTURES, SIZES)))]
    targets = _Targets(
        present=present.float(),
        **by_colour,
        heat=_heat(centre.to(device)),
        pairs=_pairs(scenes, where),
        caption=scenes.caption,
        place=scenes.place,
        words=torch.cat(words, 1),
        motions=_any(scenes.motion, len(MOTIONS)),
    )
    return _Targets(*(field.to(device) for field in targets))


def _heat(centre: Tensor) -> Tensor:
    """Gaussian shares of the cells [n, F, Q, cells] around centres [n, Q, F, 2] in pixels; 0 for NaN."""
    at = (torch.arange(GRID, device=centre.device) + 0.5) * (CANVAS / GRID)
    distance = (centre[..., None] - at).square()  # [n, Q, F, 2, GRID], right and down
    logits = -(distance[..., 1, :, None] + distance[..., 0, None, :]).flatten(3) / (2 * _BLUR**2)
    return logits.softmax(3).nan_to_num(0.0).transpose(1, 2)


def _any(attribute: Tensor, classes: int) -> Tensor:
    """Whether any slot [n, OBJECTS] has each value, [n, classes] float32; UNUSED counts as none."""
    return functional.one_hot(attribute + 1, classes + 1)[..., 1:].amax(1).float()


def _pairs(scenes: Scenes, where: Tensor) -> Tensor:
    """The state of each pair of colours [n, PAIRS]: 1 where the first is seen in front, 2 where the second is."""
    n = len(scenes.place)
    states = torch.zeros(n, len(COLOURS), len(COLOURS), dtype=torch.int64)  # [front, behind]
    radius = torch.tensor(RADII)[scenes.size.clamp_min(0)]
    for near, far in combinations(range(OBJECTS), 2):
        distance = (where[:, near] - where[:, far]).norm(dim=-1) / (radius[:, near] + radius[:, far])[:, None]
        state = torch.where((distance < _APART).any(1), _IGNORED, 0)
        state = torch.where((distance < _MEET).any(1), 1, state)
        rows = (scenes.colour[:, far] != UNUSED).nonzero().squeeze(1)
        states[rows, scenes.colour[rows, near], scenes.colour[rows, far]] = state[rows]
    first, second = torch.tensor(PAIRS).T
    one, other = states[:, first, second], states[:, second, first]
    return torch.where(other > 0, 2, one + other.clamp_max(0))


def _mixture(videos: Tensor, codec: SceneCodec | None) -> Tensor:
    """The same videos, every fourth through the codec."""
    if codec is not None:
        videos = videos.clone()
        videos[::4] = codec.decode(codec.encode(videos[::4]))
    return videos


def _augmented(videos: Tensor, codec: SceneCodec | None) -> Tensor:
    """A part through the codec; a quarter blurred, half with noise of any strength up to _NOISE."""
    videos = _mixture(videos, codec)
    n = len(videos)
    blurred = torch.rand(n, device=videos.device) < 0.25
    sharp = videos.flatten(1, 2)
    kernel = sharp.new_tensor([0.25, 0.5, 0.25])
    kernel = torch.outer(kernel, kernel).expand(sharp.shape[1], 1, 3, 3)
    soft = functional.conv2d(functional.pad(sharp, (1, 1, 1, 1), mode="replicate"), kernel, groups=sharp.shape[1])
    videos = torch.where(blurred.view(-1, 1, 1, 1, 1), soft.view_as(videos), videos)
    strength = _NOISE * (2 * torch.rand(n, 1, 1, 1, 1, device=videos.device) - 1).clamp_min(0.0)
    return videos + strength * torch.randn_like(videos)


def _loss(reader: SceneReader, painter: _Painter, target: _Targets, videos: Tensor) -> Tensor:
    """Cross-entropies, nats a decision, and mean squares of colours; in a sum."""
    out: Outputs = reader(videos)
    cross, binary = functional.cross_entropy, functional.binary_cross_entropy_with_logits
    loss = binary(out.present, target.present) + cross(out.place, target.place)
    for name in ("shape", "texture", "motion", "size", "caption"):
        loss = loss + cross(getattr(out, name).flatten(0, 1), getattr(target, name).flatten())
    # A sum over the pairs: all but one to three of the 28 are empty.
    pairs = cross(out.pairs.transpose(1, 2), target.pairs, ignore_index=_IGNORED, reduction="none").sum(1).mean()
    heat = -(target.heat * out.heat).sum() / target.heat.sum()
    return loss + pairs + heat + _feature_loss(out, painter, target, videos)


def _feature_loss(out: Outputs, painter: _Painter, target: _Targets, videos: Tensor) -> Tensor:
    """What the features must hold: words, motions and thumbnails (their squares in units of a tenth)."""
    binary = functional.binary_cross_entropy_with_logits
    small = functional.adaptive_avg_pool3d(videos, (videos.shape[2], THUMBNAIL, THUMBNAIL)).transpose(1, 2).flatten(2)
    frame = (painter.frame(out.frame_features) - small).square().mean()
    change = (painter.change(out.motion_features) - (small[:, -1] - small[:, 0])).square().mean()
    words = binary(painter.words(out.frame_features.mean(1)), target.words)
    return words + binary(painter.motions(out.motion_features), target.motions) + 100 * (frame + change)
