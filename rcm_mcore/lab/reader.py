"""The learned judge of the scenes: what a video shows, and features of videos and frames for the measures.

One network for both. What it cannot see:
- two objects of one colour (they count as one), and colours that are none of COLOURS;
- that an object is deformed, as long as it is still most like the right shape: distances of features see more of that;
- the order of objects that never meet, and whether a motion is smooth (temporal consistency is measured on `frame_features`);
- a letter that is badly drawn but unlike all others: `legibility` of rcm_mcore.lab.scenes, which needs no training, does.
It is trained on real videos, half of them noisy or blurred and a part through the codec: of a video unlike any real one its
reading is a guess among what exists. Chance is therefore measured, as the adherence of real videos to prompts of others
(`facts["chance"]`), beside the adherence to their own (`facts["heldout"]`), the ceiling of every generator.

Shapes: B videos, F frames, Q queries, D width of a query. Videos [n, 3, 17, 64, 64] in [0, 1]; clamp before.
"""

import os
from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from rcm_mcore.lab.adherence import Adherence, Reading, judge, mean_of
from rcm_mcore.lab.blocks import Block, check_videos, mixed
from rcm_mcore.lab.scenes import CANVAS, CAPTION_LENGTH, COLOURS, GLYPHS, MOTIONS, PLACES, SHAPES, SIZES, TEXTURES
from rcm_mcore.lab.weights import read_network, write_network

APPEARANCE_FEATURES = 64  # of a frame
MOTION_FEATURES = 32
PAIRS = tuple(combinations(range(len(COLOURS)), 2))  # of colours
THUMBNAIL = 8  # pixels to a side of the frames that features must be able to paint

_FORMAT = "scene-reader-1"
_BATCH = 128  # videos in a pass without a graph
GRID = 16  # cells to a side of what is looked at
_STATES = 3  # of a pair of colours: nothing seen, the first in front, the second in front


class Outputs(NamedTuple):
    """What the network says of n videos.

    Attributes:
        present: [n, COLOURS] logits.
        shape, texture, motion, size: [n, COLOURS, classes] logits.
        heat: [n, F, COLOURS + CAPTION_LENGTH, GRID GRID], log of where the object of each colour and each character is, rows of
            GRID cells of 4 pixels.
        pairs: [n, PAIRS, 3] logits.
        caption: [n, CAPTION_LENGTH, GLYPHS] logits.
        place: [n, PLACES] logits.
        frame_features: [n, F, 64], raw; motion_features: [n, 32], raw.
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
    frame_features: Tensor
    motion_features: Tensor


class SceneReader(nn.Module):
    """Finds the object of each colour and each character in every frame, looks there, and between each two, then along time.

    Features are not what was seen there, which leaves out all that no prompt states, but a bottleneck of each frame
    (64 numbers) and of their course (32): from them alone the words of the prompt other than the caption and small pictures of
    the frames must be told, so that positions and backgrounds count as well. They hardly see the letters. Each is standardised
    over real videos, so that every one weighs alike in a distance.

    Attributes:
        facts: of the training: `heldout`, `heldout_codec` and `chance` (adherences as dictionaries), and how it was trained.
    """

    frame_mean: Tensor
    frame_std: Tensor
    video_mean: Tensor
    video_std: Tensor

    def __init__(self, *, width: int = 32) -> None:
        """A reader with random weights; `width`: channels at half the resolution of the videos.

        Raises: ValueError for another width.
        """
        super().__init__()
        if width < 1:
            raise ValueError(f"reader: width={width}; must be at least 1")
        self.width, d = width, 4 * width
        self.facts: dict[str, Any] = {}
        self.stem = nn.Sequential(nn.Conv2d(3, width, 6, stride=2, padding=2), Block(width))
        self.quarter = nn.Sequential(_halved(width, 2 * width), Block(2 * width), Block(2 * width))
        self.eighth = nn.Sequential(_halved(2 * width, d), Block(d), Block(d), nn.SiLU())
        self.fine = nn.Conv2d(2 * width, d, 1)
        self.position = nn.Parameter(0.1 * torch.randn(d, GRID, GRID))
        self.heat = nn.Conv2d(d, len(COLOURS) + CAPTION_LENGTH, 1)
        self.seen = nn.Linear(d + 2, d)
        self.names = nn.Parameter(torch.randn(len(COLOURS) + CAPTION_LENGTH, d))
        self.pair = nn.Linear(2 * d, d)
        self.move = nn.Linear(4, d)
        self.slot = nn.Sequential(nn.SiLU(), nn.Linear(d, d))
        self.course = nn.Sequential(_TimeBlock(d), _TimeBlock(d))
        self.summary = nn.Sequential(nn.LayerNorm(3 * d), nn.Linear(3 * d, d), nn.SiLU())
        classes = {"present": 1, "shape": len(SHAPES), "texture": len(TEXTURES), "motion": len(MOTIONS), "size": len(SIZES)}
        self.object_heads = nn.ModuleDict({name: nn.Linear(d, n) for name, n in classes.items()})
        self.pair_head = nn.Linear(d, _STATES)
        self.letter_head = nn.Linear(d, len(GLYPHS))
        self.place_head = nn.Linear(d, len(PLACES))
        cells = (CANVAS // 8) ** 2
        self.frame = nn.Sequential(nn.Conv2d(d, width, 1), nn.Flatten(), nn.Linear(width * cells, APPEARANCE_FEATURES))
        self.widen = nn.Linear(APPEARANCE_FEATURES, d)
        self.frame_course = nn.Sequential(_TimeBlock(d), _TimeBlock(d))
        self.motion = nn.Linear(2 * d, MOTION_FEATURES)
        for name, size in (("frame", APPEARANCE_FEATURES), ("video", APPEARANCE_FEATURES + MOTION_FEATURES)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))

    def forward(self, videos: Tensor) -> Outputs:
        """All outputs, float32, for videos on the network's device."""
        n = len(videos)
        frames = (2 * videos - 1).transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        with mixed(videos.device):
            quarter = self.quarter(self.stem(frames))
            eighth = self.eighth(quarter)
            grid = self.fine(quarter) + functional.interpolate(eighth, scale_factor=2.0) + self.position
            # [n, F, 11, cells], [n, F, Q, 2], [n, F, Q, D]
            heat, where, seen = (x.unflatten(0, (n, -1)) for x in self._look(grid))
            slots = seen + self.move(_moves(where).to(seen))
            along = slots.permute(0, 2, 3, 1).flatten(0, 1)  # [n Q, D, F]
            course = self.course(along)
            summary = self.summary(torch.cat([along.mean(2), course.mean(2), course.amax(2)], 1)).unflatten(0, (n, -1))
            frame = self.frame(eighth).unflatten(0, (n, -1))  # [n, F, 64]
            frame_course = self.frame_course(self.widen(frame).transpose(1, 2))
            motion = self.motion(torch.cat([frame_course.mean(2), frame_course.amax(2)], 1))
            counts = [len(COLOURS), CAPTION_LENGTH, len(PAIRS)]
            colours, letters, pairs = summary.split(counts, 1)
            heads = {name: head(colours) for name, head in self.object_heads.items()}
            found = (heat, self.pair_head(pairs), self.letter_head(letters), self.place_head(letters.mean(1)), frame, motion)
        present = heads.pop("present").squeeze(2)
        return Outputs(*(x.float() for x in (present, *heads.values(), *found)))

    def read(self, videos: Tensor) -> Reading:
        """What the videos show.

        Raises: ValueError for videos of another shape.
        """
        out = self._evaluate(videos)
        state = out.pairs.argmax(2)
        front = torch.zeros(len(videos), len(COLOURS), len(COLOURS), dtype=torch.bool)
        for pair, (first, second) in enumerate(PAIRS):
            front[:, first, second], front[:, second, first] = state[:, pair] == 1, state[:, pair] == 2
        named = {name: getattr(out, name).argmax(2) for name in ("shape", "texture", "motion", "size", "caption")}
        return Reading(present=out.present > 0, front=front, place=out.place.argmax(1), **named)

    def adherence(self, videos: Tensor, prompts: Sequence[str]) -> Adherence:
        """How far the videos are what their prompts state; `judge(reader.read(videos), prompts)` says it of each.

        Raises: ValueError for videos of another shape, another number of prompts, or a text that is no prompt.
        """
        return mean_of(judge(self.read(videos), prompts))

    def features(self, videos: Tensor) -> Tensor:
        """Standardised features [n, 96], float32 on the CPU: means of the frames' 64, then 32 of motion.

        Raises: ValueError for videos of another shape.
        """
        return (self._raw_features(videos)[1] - self.video_mean.cpu()) / self.video_std.cpu()

    def frame_features(self, videos: Tensor) -> Tensor:
        """Standardised features of every frame alone [n, F, 64], float32 on the CPU.

        Raises: ValueError for videos of another shape.
        """
        return (self._raw_features(videos)[0] - self.frame_mean.cpu()) / self.frame_std.cpu()

    def fit_features(self, videos: Tensor) -> None:
        """Takes the means and standard deviations of the features from real videos."""
        frames, whole = self._raw_features(videos)
        for name, raw in (("frame", frames.flatten(0, 1)), ("video", whole)):
            getattr(self, f"{name}_mean").copy_(raw.mean(0))
            getattr(self, f"{name}_std").copy_(raw.std(0).clamp_min(1e-6))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes weights, statistics of the features and facts as safetensors."""
        write_network(path, self, _FORMAT, {"built": {"width": self.width}, **self.facts})

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> "SceneReader":
        """Reads what `save` wrote.

        Raises: ValueError for another file; OSError when it cannot be read.
        """
        tensors, facts = read_network(path, _FORMAT)
        reader = cls(**facts.pop("built"))
        reader.load_state_dict(tensors)
        reader.facts = facts
        return reader.to(device).eval().requires_grad_(False)

    def _look(self, grid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of grids [frames, D, GRID, GRID]: heat [frames, 11, cells]; of every query where it looks [frames, Q, 2], right and
        down, half a canvas as the unit, 0 in the middle; and what it sees there [frames, Q, D]."""
        first, second = torch.tensor(PAIRS).T
        heat = self.heat(grid).flatten(2).float().log_softmax(2)
        # The mean of two logs is highest half way, where one object covers the other if it does.
        looks = torch.cat([heat, (heat[:, first] + heat[:, second]) / 2], 1).softmax(2)
        names = torch.cat([self.names, self.pair(torch.cat([self.names[first], self.names[second]], 1))])
        at = (torch.arange(GRID, device=grid.device) + 0.5) / (GRID / 2) - 1
        cells = torch.stack([at.expand(GRID, GRID), at[:, None].expand(GRID, GRID)], -1).flatten(0, 1).expand(len(grid), -1, -1)
        where = looks @ cells
        seen = torch.cat([looks.to(grid) @ grid.flatten(2).transpose(1, 2), where.to(grid)], 2)
        return heat, where, self.slot(self.seen(seen) + names)

    @torch.no_grad()
    def _evaluate(self, videos: Tensor) -> Outputs:
        """The outputs on the CPU, in batches."""
        check_videos(videos)
        batches = [self(part.to(self.frame_mean)) for part in videos.split(_BATCH)]
        return Outputs(*(torch.cat(parts).cpu() for parts in zip(*batches)))

    def _raw_features(self, videos: Tensor) -> tuple[Tensor, Tensor]:
        """[n, F, 64] of frames and [n, 96] of videos."""
        out = self._evaluate(videos)
        return out.frame_features, torch.cat([out.frame_features.mean(1), out.motion_features], 1)


class _TimeBlock(nn.Module):
    """Two convolutions over five frames each beside the identity, which is what it is at first: [m, width, F] to the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Conv1d(width, width, 5, padding=2)
        self.outer = nn.Conv1d(width, width, 5, padding=2)
        nn.init.zeros_(self.outer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(functional.silu(self.inner(functional.silu(x))))


def _moves(where: Tensor) -> Tensor:
    """What motions are told by [n, F, Q, 4]: the way from the mean place in units of 4 pixels, from the last frame in 1."""
    steps = functional.pad(where.diff(dim=1), (0, 0, 0, 0, 1, 0))
    return torch.cat([8 * (where - where.mean(1, keepdim=True)), 32 * steps], 3)


def _halved(narrow: int, wide: int) -> nn.Module:
    return nn.Sequential(nn.SiLU(), nn.Conv2d(narrow, wide, 4, stride=2, padding=1))
