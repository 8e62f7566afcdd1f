"""Two folders of videos, real and generated, compared in the feature space of a network that is given.

A row of the table is a set of videos beside a set of real ones. The first row is one half of the real videos beside the other
half: what a perfect generator would get, but for the smaller counts, which make its Frechet distance larger.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from rcm_mcore.data.ahead import ahead
from rcm_mcore.data.media_input import BadInput, Size
from rcm_mcore.data.video_folder import list_videos, read_video
from rcm_mcore.evaluation.extractor import Extractor
from rcm_mcore.evaluation.intervals import BootstrapInterval, bootstrap_interval
from rcm_mcore.evaluation.metrics import (
    density_coverage,
    frechet_distance,
    mean_distance,
    median_distance,
    per_group,
    precision_recall,
    rows_per_group,
    vendi_score,
)
from rcm_mcore.evaluation.temporal import temporal_consistency, wasserstein
from rcm_mcore.lab.reader import SceneReader

logger = logging.getLogger(__name__)

MINIMUM_REAL = 12  # so that each half has a fifth neighbour
MINIMUM_GENERATED = 4  # a third neighbour
FORMATS = {"scene-reader-1": SceneReader.load}  # extractors of the laboratory, besides those that Extractor knows
_CACHE = "video-features-1"
_RESAMPLES = 2000  # of the bootstrap


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How videos are read (`read_video`), and which (`list_videos`)."""

    size: Size
    frames: int
    fps: Fraction = Fraction(16)
    pattern: str = "**/*"

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            raise ValueError(f"size={self.size[0]}x{self.size[1]}: height and width must be positive")
        if self.frames < 1:
            raise ValueError(f"frames={self.frames}: must be at least 1")
        if not self.fps > 0:
            raise ValueError(f"fps={float(self.fps):g}: must be positive")


@dataclass(frozen=True, kw_only=True)
class Videos:
    """What is measured of a folder's videos; those that could not be read are in `skipped`, with the reason.

    features [n, d] float32; change and jitter [n] float64 of the pixels in [0, 1] (`temporal_consistency`), NaN where there
    are fewer than 3 frames.
    """

    names: list[str]
    skipped: dict[str, str]
    features: Tensor
    change: Tensor
    jitter: Tensor


def embed_folder(
    folder: Path,
    reading: Reading,
    extractor: Extractor,
    *,
    minimum: int,
    cache: Path | None = None,
    batch_size: int = 16,
    workers: int = 2,
    skip_bad: bool = False,
) -> Videos:
    """Reads the videos of a folder and takes their features, or takes both from the cache.

    Args:
        folder: where they are.
        reading: how they are read.
        extractor: of the features.
        minimum: how many there must be.
        cache: a folder for results, which are found again for the same files (names, sizes, times of change), reading and
            extractor (hash of its file), and for nothing else.
        batch_size: videos at once.
        workers: threads that decode ahead.
        skip_bad: leave out what cannot be read, instead of refusing.
    Raises: ValueError for no videos or too few, one that cannot be read (its name and why), features that are not finite.
    """
    names = list_videos(folder, frames=reading.frames, pattern=reading.pattern)
    if len(names) < minimum:
        raise ValueError(f"{folder}: {len(names)} videos; at least {minimum} are needed")
    kept = None if cache is None else cache / f"{_fingerprint(folder, names, reading, extractor)}.safetensors"
    if kept is not None and kept.is_file():
        videos = _read_cache(kept)
        logger.info("%s: features of %d videos from %s", folder, len(videos.names), kept)
    else:
        videos = _embed(folder, names, reading, extractor, batch_size=batch_size, workers=workers, skip_bad=skip_bad)
        if kept is not None:
            _write_cache(kept, videos)
    for name, reason in videos.skipped.items():
        if not skip_bad:
            raise ValueError(f"{folder / name}: {reason}")
        logger.warning("%s is skipped: %s", folder / name, reason)
    if len(videos.names) < minimum:
        raise ValueError(f"{folder}: {len(videos.names)} videos could be read; at least {minimum} are needed")
    return videos


def compare(
    real: Videos,
    generated: Videos,
    *,
    groups: tuple[Sequence[str], Sequence[str]],
    per_prompt: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """All measures of the generated videos against the real ones, and of two halves of the real ones.

    Args:
        real, generated: of both folders.
        groups: of each video of both, what it has in common with the others of its prompt.
        per_prompt: videos of a prompt for diversity within prompts, the same in both sets; prompts with fewer are left out.
            Default the size of the smallest group of at least 2.
        seed: of the halves and of the bootstrap.
    Returns: `rows`, a list of two dicts of measures; `intervals`, for each row measure to [low, high] of 95 %, over videos
        drawn anew by prompts; `per_prompt`, `bandwidth`, what was used, or None.
    Raises: ValueError for too few videos, or features that cannot be measured.
    """
    order = torch.randperm(len(real.names), generator=torch.Generator().manual_seed(seed))
    one, other = order[: len(order) // 2], order[len(order) // 2 :]
    sizes = [size for labels in groups for size in Counter(labels).values() if size >= 2]
    per_prompt = per_prompt or min(sizes, default=None)
    kept = [_kept(labels, per_prompt) for labels in groups]
    bandwidth = median_distance(real.features[kept[0]], [groups[0][row] for row in kept[0]]) if kept[0] else None
    halves = _against(real, one, real, other)
    within, spread = _within(real, groups[0], kept[0], bandwidth=bandwidth, seed=seed)
    rows = [{"videos": "real, half against half", "n": len(other)} | halves | within]
    every = [torch.arange(len(videos.names)) for videos in (real, generated)]
    within, generated_spread = _within(generated, groups[1], kept[1], bandwidth=bandwidth, seed=seed)
    rows.append({"videos": "generated", "n": len(generated.names)} | _against(real, every[0], generated, every[1]) | within)
    intervals = [{name: [found.low, found.high] for name, found in of_row.items()} for of_row in (spread, generated_spread)]
    return {"rows": rows, "intervals": intervals, "per_prompt": per_prompt, "bandwidth": bandwidth}


def _against(real: Videos, some: Tensor, videos: Videos, others: Tensor) -> dict[str, float | None]:
    """Measures of videos[others] against real[some]."""
    reference, features = real.features[some], videos.features[others]
    shares, counts = precision_recall(reference, features), density_coverage(reference, features)
    distances: dict[str, float | None] = {
        "Frechet": frechet_distance(reference, features),
        **shares._asdict(),
        **counts._asdict(),
    }
    for name in ("change", "jitter"):
        values, measured = getattr(real, name)[some], getattr(videos, name)[others]
        distances[f"{name} W1"] = None if measured.isnan().any() else wasserstein(values, measured)
    return distances


def _within(
    videos: Videos, groups: Sequence[str], kept: list[int], *, bandwidth: float | None, seed: int
) -> tuple[dict[str, float | None], dict[str, BootstrapInterval]]:
    """Means over prompts and over videos, and their intervals where there are two prompts or more."""
    draw = partial(bootstrap_interval, seed=seed, resamples=_RESAMPLES)
    found: dict[str, float | None] = {"distance within prompts": None, "Vendi within prompts": None}
    intervals: dict[str, BootstrapInterval] = {}
    measures: dict[str, Callable[[Tensor], float]] = {"distance within prompts": mean_distance}
    if bandwidth is not None:
        measures["Vendi within prompts"] = partial(vendi_score, bandwidth=bandwidth)
    for name, measure in measures.items() if kept else ():
        values = per_group(videos.features[kept], [groups[row] for row in kept], measure)
        found[name] = float(values.mean())
        if len(values) > 1:
            intervals[name] = draw(values)
    for name in ("change", "jitter"):
        values = getattr(videos, name)
        found[name] = None if values.isnan().any() else float(values.mean())
        if found[name] is not None and len(set(groups)) > 1:
            intervals[name] = draw(values, clusters=groups)
    return found, intervals


def _kept(groups: Sequence[str], size: int | None) -> list[int]:
    """Rows of the groups that have so many, or none."""
    if size is None or max(Counter(groups).values()) < size:
        return []
    return rows_per_group(groups, size)


def _embed(
    folder: Path,
    names: Sequence[Path],
    reading: Reading,
    extractor: Extractor,
    *,
    batch_size: int,
    workers: int,
    skip_bad: bool,
) -> Videos:
    """Reads the videos in threads and takes their features in batches."""
    read = partial(read_video, frames=reading.frames, fps=reading.fps, size=reading.size)
    good: list[str] = []
    skipped: dict[str, str] = {}
    batch: list[Tensor] = []
    features, moving = [], []

    def start(name: Path, pool: ThreadPoolExecutor) -> Future[Tensor]:
        return pool.submit(read, folder / name)

    def flush() -> None:
        videos = torch.stack(batch).to(extractor.device).float() / 255  # [n, 3, F, H, W]
        features.append(extractor(videos))
        moving.append(_motion(videos))
        batch.clear()

    progress: Iterable[tuple[Path, Future[Tensor]]] = ahead(start, names, workers=workers)
    for name, read_ahead in tqdm(progress, total=len(names), desc=folder.name, unit="video"):
        try:
            batch.append(read_ahead.result())
        except BadInput as error:
            if not skip_bad:
                raise ValueError(f"{folder / name}: {error}") from None
            skipped[name.as_posix()] = str(error)
            continue
        good.append(name.as_posix())
        if len(batch) == batch_size:
            flush()
    if batch:
        flush()
    if not good:
        raise ValueError(
            f"{folder}: none of {len(names)} videos could be read, such as {names[0]}: {skipped[names[0].as_posix()]}"
        )
    taken = torch.cat(features)
    bad = [name for name, row in zip(good, taken) if not bool(row.isfinite().all())]
    if bad:
        raise ValueError(f"{extractor.path}: {len(bad)} videos of {folder} get NaN or infinite features, such as {bad[0]}")
    change, jitter = torch.cat(moving, 1)
    return Videos(names=good, skipped=skipped, features=taken, change=change, jitter=jitter)


def _motion(videos: Tensor) -> Tensor:
    """Change and jitter [2, n] of pixels [n, 3, F, H, W]."""
    if videos.shape[2] < 3:
        return torch.full((2, len(videos)), torch.nan, dtype=torch.float64)
    found = temporal_consistency(videos.transpose(1, 2))
    return torch.stack([found.change, found.jitter])


def _fingerprint(folder: Path, names: Sequence[Path], reading: Reading, extractor: Extractor) -> str:
    """What the features of a folder depend on."""
    files = []
    for name in names:
        path = folder / name
        parts = sorted(path.iterdir()) if path.is_dir() else [path]
        files += [[part.relative_to(folder).as_posix(), part.stat().st_size, part.stat().st_mtime_ns] for part in parts]
    content = {
        "format": _CACHE,
        "folder": str(folder.resolve()),
        "files": files,
        "reading": [*reading.size, reading.frames, str(reading.fps)],
        "extractor": extractor.sha256,
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _write_cache(path: Path, videos: Videos) -> None:
    """Under its name when it is complete."""
    tensors = {name: getattr(videos, name).contiguous() for name in ("features", "change", "jitter")}
    facts = {"format": _CACHE, "names": json.dumps(videos.names), "skipped": json.dumps(videos.skipped)}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial_path.write_bytes(safetensors.torch.save(tensors, metadata=facts))
    os.replace(partial_path, path)


def _read_cache(path: Path) -> Videos:
    """Raises: ValueError when it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            facts: Mapping[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in ("features", "change", "jitter")}
        return Videos(names=json.loads(facts["names"]), skipped=json.loads(facts["skipped"]), **tensors)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: is damaged ({error}); remove it") from error
