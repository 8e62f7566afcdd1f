"""The folder that a run of samples fills: what is there, what is missing, and how each file came to be.

    000_a-red-fox.mp4 ...     one file a sample, with a VAE
    latents.safetensors       `latents` [n, C, F, H, W] of all, when all are there; until then each in .parts/
    contact_sheet.png         first, middle and last frame of every sample
    samples.json              what was asked for, and for every file what reproduces it; `complete` when all are there

Every file appears under its name when it is complete. A run that was interrupted continues with what is missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import unicodedata
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from rcm_mcore.checkpoint.network import resolve
from rcm_mcore.data import media
from rcm_mcore.data.build import write_json
from rcm_mcore.data.digits import DigitCodec
from rcm_mcore.evaluation.report import write_gif
from rcm_mcore.interop import MANIFEST
from rcm_mcore.sampling.request import Draw, SampleRequest, draws_of, time_steps
from rcm_mcore.sampling.sampler import Sampler

NOISE = (
    "step k of few_step, 0 of the others: torch.randn(latent_shape, float32, CPU generator) seeded by "
    "rcm_mcore.parallel.random.generator(f'sample-{k}', seed=seed, step=0, slot=index)"
)
_PACKAGES = ("rcm-mcore", "torch", "megatron-core", "diffusers", "transformers", "av")
_SLUG = 40  # characters
_THUMBNAIL = 120  # pixels


@dataclass(frozen=True, kw_only=True)
class Output:
    """What to write, and where."""

    folder: str
    vae: str | None = None  # folder; without one, latents alone are written
    vae_dtype: str = "float32"
    tiled: bool = False
    fps: float = 16.0
    codec: str | None = None  # codec.json of the digits task


class SampleFolder:
    """The folder of one request. Every rank may read; rank 0 begins and finishes, `parts` come from all that sample."""

    def __init__(self, request: SampleRequest, output: Output) -> None:
        """Raises ValueError when the folder holds something else than a part of these samples."""
        self.path = Path(output.folder)
        self.draws = draws_of(request)
        self._request, self._output = request, output
        self._parts, self._latents = self.path / ".parts", self.path / "latents.safetensors"
        path = resolve(request.checkpoint)
        self._asked = {
            "request": asdict(request),
            "output": {k: v for k, v in asdict(output).items() if k != "folder"},
            "checkpoint": {"path": str(path), "digest": checkpoint_digest(path)},
            "given": {path: _sha256(Path(path)) for path in request.given.paths} if request.given else {},
        }
        self._asked = json.loads(json.dumps(self._asked))  # as it is read back
        self.is_complete = self._is_complete()

    def _is_complete(self) -> bool:
        """Whether all is there already."""
        if not self.path.exists() or all(path.name.startswith(".") for path in self.path.iterdir()):
            return False
        file = self.path / "samples.json"
        if not file.is_file():
            raise ValueError(f"--out {self.path} is not empty and holds no samples.json: choose another folder or remove it")
        try:
            there = json.loads(file.read_text(encoding="utf-8"))
            sections = {name: dict(there[name]) for name in self._asked}
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{file} is not of this program: choose another folder or remove it") from None
        if not (there.get("complete") or self._latents.is_file() or any(self._parts.glob("*.safetensors"))):
            return False  # nothing was made, as when a prompt was too long: any request may begin here
        for name, asked in self._asked.items():
            for field, value in asked.items():
                if sections[name].get(field) != value:
                    raise ValueError(
                        f"--out {self.path} holds samples of another request: {name}.{field} is "
                        f"{json.dumps(sections[name].get(field))} there and {json.dumps(value)} here; choose another folder"
                    )
        files = [self._latents, *(self.file(draw) for draw in self.draws if self._output.vae)]
        return bool(there.get("complete")) and all(file.is_file() for file in files)

    def begin(self, sampler: Sampler) -> None:
        """On rank 0: say what will be made."""
        if not (self.path / "samples.json").is_file():
            shutil.rmtree(self._parts, ignore_errors=True)  # of nobody knows what
        self._parts.mkdir(parents=True, exist_ok=True)
        for partial in self.path.glob(".*.partial"):  # of a run that was killed
            partial.unlink()
        self._write_facts(sampler, complete=False)

    def file(self, draw: Draw) -> Path:
        """Of a sample: its number and the beginning of its prompt."""
        ascii_ = unicodedata.normalize("NFKD", draw.prompt).encode("ascii", "ignore").decode().lower()
        slug = re.sub(r"[^a-z0-9]+", "-", ascii_)[:_SLUG].strip("-")
        number = f"{draw.number:0{max(3, len(str(len(self.draws) - 1)))}d}"
        return self.path / ("_".join(filter(None, [number, slug])) + media.suffix_of(self._frames))

    @property
    def _frames(self) -> int:
        return 4 * (self._request.latent_shape[1] - 1) + 1

    def missing(self) -> tuple[list[Draw], list[Draw]]:
        """Samples without latents, and those with latents that lack their file."""
        unsampled = [d for d in self.draws if not self._latents.is_file() and not self._part(d).is_file()]
        lacking = [draw for draw in self.draws if self._output.vae and not self.file(draw).is_file()]
        return unsampled, [draw for draw in lacking if draw not in unsampled]

    def save_part(self, draw: Draw, latents: Tensor) -> None:
        """Keep the latents [C, F, H, W] of a sample."""
        _publish(self._part(draw), {"latents": latents.contiguous()})

    def load_part(self, draw: Draw) -> Tensor:
        """What `save_part` kept."""
        if self._part(draw).is_file():
            return safetensors.torch.load_file(self._part(draw))["latents"]
        with safe_open(self._latents, "pt") as file:  # finished before, and a file was removed since
            return file.get_slice("latents")[draw.number]

    def save_media(self, draw: Draw, pixels: np.ndarray) -> None:
        """Write the file of a sample from pixels [F, H, W, 3]."""
        media.write_media(self.file(draw), pixels, fps=self._output.fps)

    def failed(self, draw: Draw, reason: str) -> None:
        """Raises: ValueError. All are wanted."""
        raise ValueError(f"sample {draw.number} ({draw.prompt!r}, seed {draw.seed}): {reason}")

    def finish(self, sampler: Sampler, *, seconds: float, sampled: int) -> None:
        """On rank 0, when every sample is there: everything about all of them. `seconds` went into `sampled` of them."""
        latents = torch.stack([self.load_part(draw) for draw in self.draws])
        _publish(self._latents, {"latents": latents})
        if self._output.codec is not None:
            videos = DigitCodec.load(self._output.codec).decode(latents)
            _publish(self.path / "videos.safetensors", {"videos": videos.contiguous()})
            write_gif(videos[:40], self.path / ".videos.gif.partial")
            os.replace(self.path / ".videos.gif.partial", self.path / "videos.gif")
        if self._output.vae is not None:
            cells = []
            for draw in self.draws:
                shown = media.thumbnails(self.file(draw), height=_THUMBNAIL)
                cells.append((f"{draw.number}  {draw.prompt}", shown))
            media.write_contact_sheet(self.path / "contact_sheet.png", cells)
        timing = {"seconds": seconds, "seconds_per_video": seconds / sampled if sampled else None, "timed_videos": sampled}
        self._write_facts(sampler, complete=True, **timing)
        shutil.rmtree(self._parts, ignore_errors=True)

    def _part(self, draw: Draw) -> Path:
        return self._parts / f"{draw.number}.safetensors"

    def _write_facts(self, sampler: Sampler, *, complete: bool, **timing: Any) -> None:
        """samples.json."""
        height, width = self._request.latent_shape[2:]
        facts = {"complete": complete, **timing, **self._asked, **facts_of(self._request, sampler)}
        if self._output.vae is not None:
            facts["video"] = {"frames": self._frames, "height": 8 * height, "width": 8 * width, "fps": self._output.fps}
        facts["samples"] = [self._facts_of(draw) for draw in self.draws]
        write_json(self.path / "samples.json", facts)

    def _facts_of(self, draw: Draw) -> dict[str, Any]:
        facts: dict[str, Any] = asdict(draw)
        if not draw.given:
            facts.pop("given")
        if self._output.vae is not None:
            file = self.file(draw)
            facts |= {"file": file.name, "sha256": _sha256(file) if file.is_file() else None}
        return facts


def facts_of(request: SampleRequest, sampler: Sampler) -> dict[str, Any]:
    """How the samples of a request come to be, besides the request itself; JSON-able."""
    mesh = sampler.mesh
    return {
        "evaluations": request.evaluations,
        "model": asdict(sampler.model),
        "times" if request.sampler == "few_step" else "sigmas": time_steps(request),
        "noise": NOISE,
        "mesh": {**asdict(mesh.config), "ranks": dist.get_world_size(), "dp": mesh.dp_size},
        "device": torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else "cpu",
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def _publish(path: Path, tensors: dict[str, Tensor]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(safetensors.torch.save(tensors))  # not save_file, whose files only their owner may read
    os.replace(partial, path)


def checkpoint_digest(checkpoint: Path) -> str | None:
    """SHA-256 of a checkpoint's manifest, a run's or a conversion's, which tells every file; none without a manifest."""
    manifest = next((file for name in ("manifest.json", MANIFEST) if (file := checkpoint / name).is_file()), None)
    return None if manifest is None else _sha256(manifest)


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
