"""Videos of scenes: signed distances to the shapes, in batched torch operations.

Letters: n scenes, F frames, H rows, W columns of pixels. Edges are smooth over one pixel.
"""

import math
from functools import cache

import torch

from rcm_mcore.data.digits import load_images
from rcm_mcore.lab.glyphs import PLATE_HEIGHT, PLATE_LEFT, PLATE_TOP, PLATE_WIDTH, plates
from rcm_mcore.lab.motion import RADII, centres
from rcm_mcore.lab.vocabulary import CANVAS, DRAWN, FRAMES, OBJECTS, TEXTURES, UNUSED, Scenes, select

# RGB of COLOURS. As far apart as eight bright colours can well be: a codec blurs hues before it blurs edges.
PAINTS = (
    (0.90, 0.10, 0.10),
    (1.00, 0.50, 0.05),
    (0.95, 0.90, 0.15),
    (0.10, 0.70, 0.15),
    (0.15, 0.85, 0.90),
    (0.20, 0.35, 1.00),
    (0.90, 0.20, 0.80),
    (0.97, 0.97, 0.97),
)
# Dark, so that objects of every colour stand out.
BACKGROUNDS = (
    (0.02, 0.02, 0.03),
    (0.22, 0.22, 0.24),
    (0.25, 0.12, 0.10),
    (0.08, 0.20, 0.12),
    (0.08, 0.12, 0.28),
    (0.22, 0.10, 0.25),
)
_SHADE = 0.3  # the dark parts of a texture, of the colour
_BARS = 0.85  # period of stripes and checks, radii
_DOTS, _DOT = 0.65, 0.18  # distance of dots and radius of a dot, radii
_SCAN = 1.3  # half the side of a handwritten digit, radii; its strokes fill about two thirds of that
_INK = (0.05, 0.95)  # dark and light of a caption
_CHUNK = 64  # scenes rendered at once: some 200 MB of fields of 17x64x64


def render(scenes: Scenes, device: torch.device | str = "cpu") -> torch.Tensor:
    """The videos [n, 3, 17, 64, 64] of the scenes, RGB in [0, 1], float32, on `device`."""
    n = len(scenes.place)
    videos = torch.empty(n, 3, FRAMES, CANVAS, CANVAS, device=device)
    for start in range(0, n, _CHUNK):
        rows = slice(start, start + _CHUNK)
        _render(Scenes(*(field.to(device) for field in select(scenes, rows))), videos[rows])
    return videos


def _render(scenes: Scenes, videos: torch.Tensor) -> None:
    """Fills `videos`: background, objects from back to front, caption."""
    device = videos.device
    pixel = torch.arange(CANVAS, device=device) + 0.5
    videos.copy_(_background(scenes, pixel)[:, :, None].expand_as(videos))
    path = centres(scenes)
    paints = torch.tensor(PAINTS, device=device)
    for slot in reversed(range(OBJECTS)):
        rows = (scenes.shape[:, slot] != UNUSED).nonzero().squeeze(1)
        if not len(rows):
            continue
        attributes = (scenes.shape[rows, slot], scenes.texture[rows, slot], scenes.scan[rows, slot])
        radius = torch.tensor(RADII, device=device)[scenes.size[rows, slot]][:, None, None, None]
        x = pixel - path[rows, slot, :, 0, None, None]  # [m, F, 1, W]
        y = pixel[:, None] - path[rows, slot, :, 1, None, None]  # [m, F, H, 1]
        cover = _cover(attributes[0], attributes[2], (x, y, radius))
        light = _texture(attributes[1], (x, y, radius))
        colour = paints[scenes.colour[rows, slot]][:, :, None, None, None] * (_SHADE + (1 - _SHADE) * light)[:, None]
        videos[rows] = torch.lerp(videos[rows], colour, cover[:, None])
    _add_captions(scenes, videos)


def _background(scenes: Scenes, pixel: torch.Tensor) -> torch.Tensor:
    """Linear gradients between two colours, [n, 3, H, W]."""
    ends = torch.tensor(BACKGROUNDS, device=pixel.device)[scenes.background]  # [n, 2, 3]
    along = (pixel / CANVAS - 0.5) / math.sqrt(2)
    angle = scenes.gradient[:, None, None]
    share = 0.5 + angle.cos() * along + angle.sin() * along[:, None]  # [n, H, W] in 0 to 1
    first, second = ends[:, 0, :, None, None], ends[:, 1, :, None, None]
    return torch.lerp(first, second, share[:, None])


Local = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor
]  # x [m, F, 1, W] and y [m, F, H, 1] from the centre, radius [m, 1, 1, 1]


def _cover(shape: torch.Tensor, scan: torch.Tensor, local: Local) -> torch.Tensor:
    """How much of each pixel the objects cover, [m, F, H, W]."""
    x, y, radius = local
    cover = torch.empty(len(shape), FRAMES, CANVAS, CANVAS, device=x.device)
    for index, name in enumerate(DRAWN):
        rows = (shape == index).nonzero().squeeze(1)
        if len(rows):
            cover[rows] = (0.5 - _distance(name, (x[rows], y[rows], radius[rows]))).clamp_(0.0, 1.0)
    rows = (shape >= len(DRAWN)).nonzero().squeeze(1)
    if len(rows):
        cover[rows] = _handwriting(scan[rows], (x[rows], y[rows], radius[rows]))
    return cover


def _distance(name: str, local: Local) -> torch.Tensor:
    """Signed distances in pixels to a shape's edge, negative inside; near the edge alone they are exact."""
    x, y, radius = local
    if name == "disc":
        return torch.hypot(x, y) - radius
    if name == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.85 * radius
    if name == "triangle":  # pointing up, as wide as the circle, and between its top and its bottom
        low = y - 0.29 * radius
        return torch.maximum(low, 0.866 * x.abs() - 0.5 * low) - 0.577 * radius
    if name == "star":
        return _star(torch.hypot(x, y), torch.atan2(x, -y), radius)
    if name == "ring":
        return (torch.hypot(x, y) - 0.7 * radius).abs() - 0.3 * radius
    bar = 0.3 * radius
    across, down = x.abs(), y.abs()
    return torch.minimum(torch.maximum(across - radius, down - bar), torch.maximum(across - bar, down - radius))


def _star(distance: torch.Tensor, angle: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Signed distance to the edge of a star with five points, one of them up, whose inner corners are at half the radius."""
    sector = math.pi / 5
    folded = ((angle + sector).remainder(2 * sector) - sector).abs()  # 0 at a point, pi/5 at an inner corner
    corner_x, corner_y = 0.5 * math.cos(sector), 0.5 * math.sin(sector)
    length = math.hypot(1 - corner_x, corner_y)
    normal_x, normal_y = corner_y / length, (1 - corner_x) / length
    return distance * (folded.cos() * normal_x + folded.sin() * normal_y) - radius * normal_x


def _handwriting(scan: torch.Tensor, local: Local) -> torch.Tensor:
    """How much of each pixel the strokes of scans cover, [m, F, H, W]."""
    x, y, radius = local
    images = _scans().to(x.device)[scan][:, None]
    grid_x, grid_y = torch.broadcast_tensors(x / (_SCAN * radius), y / (_SCAN * radius))
    grid = torch.stack([grid_x, grid_y], -1).flatten(1, 2)  # [m, F H, W, 2]: the frames one below the other
    strokes = torch.nn.functional.grid_sample(images, grid, padding_mode="zeros", align_corners=False)
    return ((strokes[:, 0] - 0.3) / 0.4).clamp_(0.0, 1.0).unflatten(1, (FRAMES, CANVAS))


@cache
def _scans() -> torch.Tensor:
    return load_images().images


def _texture(texture: torch.Tensor, local: Local) -> torch.Tensor:
    """Textures, 1 where light and 0 where dark, [m, F, H, W]; they move with their objects."""
    x, y, radius = local
    bars, dots, dot = _BARS * radius, _DOTS * radius, _DOT * radius
    light = torch.ones(len(texture), FRAMES, CANVAS, CANVAS, device=x.device)
    for index, name in enumerate(TEXTURES):
        rows = (texture == index).nonzero().squeeze(1)
        if name == "plain" or not len(rows):
            continue
        if name == "striped":  # aslant: stripes along an edge of a square or a cross would move it
            light[rows] = _bars((x[rows] + y[rows]) / math.sqrt(2), bars[rows])
        elif name == "checked":
            columns, lines = _bars(x[rows], bars[rows]), _bars(y[rows], bars[rows])
            light[rows] = columns + lines - 2 * columns * lines
        else:
            from_dot = torch.hypot(_offset(x[rows], dots[rows]), _offset(y[rows], dots[rows]))
            light[rows] = (0.5 + from_dot - dot[rows]).clamp_(0.0, 1.0)
    return light


def _offset(position: torch.Tensor, period: torch.Tensor) -> torch.Tensor:
    """Pixels to the nearest multiple of the period."""
    return (position + period / 2).remainder(period) - period / 2


def _bars(position: torch.Tensor, period: torch.Tensor) -> torch.Tensor:
    """Light and dark bars, each half a period wide, light around 0."""
    return (0.5 + period / 4 - _offset(position, period).abs()).clamp_(0.0, 1.0)


def _add_captions(scenes: Scenes, videos: torch.Tensor) -> None:
    dark, light = _INK
    ink = scenes.ink[:, None, None].float()
    glyphs = plates(scenes.caption)
    plate = dark + (light - dark) * (ink + (1 - 2 * ink) * glyphs)  # [n, 14, 32]
    for place, top in enumerate(PLATE_TOP):
        rows = (scenes.place == place).nonzero().squeeze(1)
        videos[rows, :, :, top : top + PLATE_HEIGHT, PLATE_LEFT : PLATE_LEFT + PLATE_WIDTH] = plate[rows][:, None, None]
