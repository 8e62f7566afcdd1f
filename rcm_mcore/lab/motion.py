"""The laws by which objects move: closed forms of the frame, one law for each of MOTIONS."""

import math

import torch

from rcm_mcore.lab.vocabulary import CANVAS, FRAMES, MOTIONS, Scenes

RADII = (8.0, 13.0)  # pixels, of SIZES
SPEEDS = {
    "standing still": (0.0, 0.0, 0.0),
    "drifting left": (1.0, 1.5, 2.0),  # pixels a frame
    "drifting right": (1.0, 1.5, 2.0),
    "drifting up": (1.0, 1.5, 2.0),
    "drifting down": (1.0, 1.5, 2.0),
    "bouncing": (3.0, 3.5, 4.0),
    "falling": (0.6, 0.8, 1.0),  # pixels a frame a frame, from rest
    "circling": (6.0, 8.0, 10.0),  # pixels, the radius of the path
    "oscillating": (6.0, 8.0, 10.0),  # pixels, the amplitude
}
RESTITUTION = 0.7  # of the speed when a falling object meets the floor
CIRCLE_FRAMES = 16  # of a full circle
OSCILLATION_FRAMES = 12
_IMPACTS = 4  # more than fit into a video


def centres(scenes: Scenes) -> torch.Tensor:
    """Where the objects are, [n, OBJECTS, FRAMES, 2] float32, pixels right and down; of unused slots the start."""
    return paths(scenes.motion, scenes.size, scenes.start, (scenes.speed, scenes.phase, scenes.turn))


def paths(
    motion: torch.Tensor, size: torch.Tensor, start: torch.Tensor, course: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """The centres [..., FRAMES, 2] of objects in any shape [...], the course being (speed, phase, turn); see Scenes."""
    frame = torch.arange(FRAMES, device=start.device, dtype=torch.float32)
    path = start[..., None, :].expand(*start.shape[:-1], FRAMES, 2).clone()
    speed, phase, turn = course
    for index, name in enumerate(MOTIONS):
        rows = motion == index
        if name == "standing still" or not bool(rows.any()):
            continue
        value = torch.tensor(SPEEDS[name], device=start.device)[speed[rows]][:, None]
        radius = torch.tensor(RADII, device=start.device)[size[rows]][:, None]
        path[rows] += _displacement(name, frame, (start[rows], value, radius), (phase[rows][:, None], turn[rows][:, None]))
    return path


def _displacement(
    name: str,
    frame: torch.Tensor,
    object_: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    course: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """How far m objects of one motion are from their start, [m, FRAMES, 2]."""
    start, speed, radius = object_  # [m, 2], [m, 1], [m, 1]
    phase, turn = course  # [m, 1]
    zero = torch.zeros_like(speed * frame)
    if name == "drifting left":
        return torch.stack([-speed * frame, zero], -1)
    if name == "drifting right":
        return torch.stack([speed * frame, zero], -1)
    if name == "drifting up":
        return torch.stack([zero, -speed * frame], -1)
    if name == "drifting down":
        return torch.stack([zero, speed * frame], -1)
    if name == "bouncing":
        direction = torch.stack([phase.cos(), phase.sin()], -1)  # [m, 1, 2]
        straight = start[:, None] + direction * (speed * frame)[..., None]
        return reflected(straight, radius[..., None], CANVAS - radius[..., None]) - start[:, None]
    if name == "falling":
        height = CANVAS - radius - start[:, 1:]
        return torch.stack([zero, _fallen(frame, height, speed)], -1)
    if name == "circling":
        angle = phase + (1 - 2 * turn) * 2 * math.pi / CIRCLE_FRAMES * frame
        return speed[..., None] * torch.stack([angle.cos(), angle.sin()], -1)
    swing = speed * (phase + 2 * math.pi / OSCILLATION_FRAMES * frame).sin()
    return torch.stack([swing * (1 - turn), swing * turn], -1)


def reflected(position: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """The position between two walls of what would be at `position` without them; perfectly elastic."""
    span = high - low
    return high - (span - (position - low).remainder(2 * span)).abs()


def _fallen(frame: torch.Tensor, height: torch.Tensor, gravity: torch.Tensor) -> torch.Tensor:
    """How far below its start an object is that falls from rest and rebounds from the floor `height` pixels below.

    The first impact is at (2 height / gravity)^(1/2); each rebound starts with RESTITUTION times the speed of the last
    impact and so lasts 2 RESTITUTION^k times as long as the first fall.
    """
    first = (2 * height / gravity).sqrt()
    fallen = gravity * frame.square() / 2
    impact = first
    for rebound in range(1, _IMPACTS + 1):
        since = frame - impact
        speed = gravity * first * RESTITUTION**rebound
        fallen = torch.where(since >= 0, height - (speed * since - gravity * since.square() / 2), fallen)
        impact = impact + 2 * first * RESTITUTION**rebound
    return fallen
