"""The folder that the samples of a prompt suite fill, restartable, and the evaluator's own folder inside it.

    request.json        what the samples depend on, written first: a run with another request is refused
    images/ or videos/  for the evaluator, and nothing else in it (suites.py)
    manifest.json       written last: configuration, counts, time, and of each sample file, text, seed and number
    prompt_file.json    VBench: prompts by file name, for its --mode=custom_input
    .failed/ .partial/  prompts that could not be sampled; files that are being written

A sample is there when its file is; latents are not kept.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from rcm_mcore.checkpoint.network import config_of, resolve
from rcm_mcore.data import media
from rcm_mcore.data.build import replacing, write_json
from rcm_mcore.sampling.folder import Output, checkpoint_digest, facts_of
from rcm_mcore.sampling.generate import check_output, fill
from rcm_mcore.sampling.request import MESH_FIELDS, Draw, SamplerConfig, SampleRequest
from rcm_mcore.sampling.sampler import Sampler
from rcm_mcore.sampling.suites import STRIDE, SUITES, Prompt, Selection, VBench, draws_of, read_prompts

log = logging.getLogger(__name__)

_REQUEST, _MANIFEST, _PROMPT_FILE = "request.json", "manifest.json", "prompt_file.json"


@dataclass(frozen=True)
class Counts:
    """What became of the samples that were asked for."""

    samples: int
    made: int
    failed: int


def generate_suite(selection: Selection, config: SamplerConfig, output: Output, *, batch_size: int = 1) -> Counts:
    """Collective: make what is missing of the samples of a suite.

    A prompt that the network cannot take, and a sample that is not finite, fail alone; a later run tries them again.
    Raises: ValueError for what cannot work, before anything is loaded, and for a folder of another request; OSError.
    """
    prompts = read_prompts(selection)
    texts = tuple(dict.fromkeys(prompt.text for prompt in prompts))
    request = SampleRequest(**vars(config), prompts=texts, batch_size=batch_size)
    _check_frames(selection.suite, config)
    if output.vae is None:
        raise ValueError("--vae: evaluators read pixels; give it, or --pipeline")
    check_output(request, output, int(os.environ.get("WORLD_SIZE", "1")))
    folder = SuiteFolder(selection, prompts, request, output)
    fill(folder, request, output)
    return folder.counts()


def _check_frames(suite: str, config: SamplerConfig) -> None:
    """ValueError for a video where the suite has pictures, and the other way round, as asked for or as trained."""
    wants, shape = SUITES[suite].suffix, config.latent_shape
    must = "1, for a picture" if wants == ".png" else "more than 1, for a video"
    if media.suffix_of(shape[1]) != wants:
        raise ValueError(f"--latent-shape {' '.join(map(str, shape))}: for {suite} its frames must be {must} (--frames)")
    trained = config_of(config.checkpoint).get("data", {}).get("latent_shape")
    if trained is not None and media.suffix_of(trained[1]) != wants:
        raise ValueError(
            f"--checkpoint {config.checkpoint}: its network was trained with data.latent_shape={trained}; for {suite} the "
            f"frames must be {must}"
        )


class SuiteFolder:
    """See the module; a `generate.Folder`."""

    def __init__(self, selection: Selection, prompts: list[Prompt], request: SampleRequest, output: Output) -> None:
        """Writes nothing. Raises: ValueError when there is something else than samples of this request."""
        self.path, self.suite = Path(output.folder), SUITES[selection.suite]
        self.draws = draws_of(prompts, seed=request.seed)
        self._prompts = {prompt.number: prompt for prompt in prompts}
        self._request, self._output = request, output
        self._failed, self._partial = self.path / ".failed", self.path / ".partial"
        checkpoint = resolve(request.checkpoint)
        names = [field.name for field in fields(SamplerConfig) if field.name not in (*MESH_FIELDS, "checkpoint")]
        asked = {
            **selection.contents(),
            "checkpoint": str(checkpoint),
            "checkpoint_sha256": checkpoint_digest(checkpoint),
            **{name: getattr(request, name) for name in names},
            **{name: getattr(output, name) for name in ("vae", "vae_dtype", "tiled", "fps")},
        }
        self._asked = json.loads(json.dumps(asked))  # as it is read back
        # A part of the suite and the whole may go to one folder.
        self._part = {"dimension": selection.dimension, "limit": selection.limit, "samples": len(self.draws)}
        self.is_complete = self._is_complete()

    def _is_complete(self) -> bool:
        if not self.path.exists() or all(path.name.startswith(".") for path in self.path.iterdir()):
            return False
        file = self.path / _REQUEST
        if not file.is_file():
            raise ValueError(f"--out {self.path} is not empty and holds no {_REQUEST}: choose another folder or remove it")
        there = _read(file)
        changed = [name for name, value in self._asked.items() if there.get(name) != value]
        made = (file for suite in SUITES.values() for file in (self.path / suite.folder).rglob(f"*{suite.suffix}"))
        if changed and any(made):  # nothing was made, as when a prompt file was wrong: any request may begin here
            was, is_ = (json.dumps(request.get(changed[0])) for request in (there, self._asked))
            raise ValueError(
                f"--out {self.path} was begun with another request: {changed[0]} is {was} there and {is_} here; "
                "choose another folder"
            )
        manifest = self.path / _MANIFEST
        is_same = manifest.is_file() and _read(manifest).get("part") == self._part
        return is_same and all(self.file(draw).is_file() for draw in self.draws)

    @property
    def _media(self) -> Path:
        return self.path / self.suite.folder

    def file(self, draw: Draw) -> Path:
        """Of a sample."""
        number, index = divmod(draw.index, STRIDE)
        return self._media / self.suite.file(self._prompts[number], index)

    def begin(self, sampler: Sampler) -> None:
        """On rank 0: say what will be made, and which prompts the network cannot take."""
        for folder in (self._failed, self._partial):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        self._media.mkdir(exist_ok=True)
        write_json(self.path / _REQUEST, self._asked)
        unseen = [prompt.name for prompt in self._prompts.values() if not self.suite.finds(prompt)]
        if unseen:
            log.warning("%d prompts cannot be file names (%r ...): see docs/suites.md", len(unseen), unseen[0][:60])
        reasons = sampler.too_long(list(dict.fromkeys(draw.prompt for draw in self.draws)))
        for draw in self.draws:
            if draw.prompt in reasons:
                self.failed(draw, f"the prompt has {reasons[draw.prompt]}")

    def missing(self) -> tuple[list[Draw], list[Draw]]:
        """Samples to make; no latents are kept."""
        return [d for d in self.draws if not self.file(d).is_file() and not self._note(d).is_file()], []

    def save_part(self, draw: Draw, latents: Tensor) -> None:
        """Nothing: what a kill leaves undecoded is sampled again."""

    def load_part(self, draw: Draw) -> Tensor:
        """Never called."""
        raise AssertionError("missing() names no such samples")

    def save_media(self, draw: Draw, pixels: np.ndarray) -> None:
        """Write the file of a sample from pixels [F, H, W, 3], and what goes with its prompt."""
        partial, file = self._partial / f"{draw.index}{self.suite.suffix}", self.file(draw)
        media.write_media(partial, pixels, fps=self._output.fps)
        metadata = self.suite.metadata(self._prompts[draw.index // STRIDE])
        if metadata is not None and not (self._media / metadata[0]).is_file():
            with replacing(self._media / metadata[0]) as temporary:
                temporary.write_text(metadata[1], encoding="utf-8")
        file.parent.mkdir(exist_ok=True)
        os.replace(partial, file)

    def failed(self, draw: Draw, reason: str) -> None:
        """Take note that there will be no such sample in this run."""
        write_json(self._note(draw), {"file": str(self.file(draw).relative_to(self.path)), **asdict(draw), "reason": reason})

    def _note(self, draw: Draw) -> Path:
        return self._failed / f"{draw.index}.json"

    def counts(self) -> Counts:
        """What is there."""
        made = sum(self.file(draw).is_file() for draw in self.draws)
        return Counts(samples=len(self.draws), made=made, failed=len(self.draws) - made)

    def finish(self, sampler: Sampler, *, seconds: float, sampled: int) -> None:
        """On rank 0, when every sample is there or failed: the manifest. `seconds` went into `sampled` of them."""
        made = [draw for draw in self.draws if self.file(draw).is_file()]
        names = {draw: str(self.file(draw).relative_to(self._media)) for draw in made}
        if isinstance(self.suite, VBench):
            of_file = {names[draw]: self._prompts[draw.index // STRIDE].name for draw in made}
            others = _read(file) if (file := self.path / _PROMPT_FILE).is_file() else {}  # of another dimension
            write_json(file, others | of_file)
        timing = {"seconds": seconds, "timed_samples": sampled, "seconds_per_sample": seconds / sampled if sampled else None}
        if not sampled and (self.path / _MANIFEST).is_file():  # what failed has failed again
            timing = {name: _read(self.path / _MANIFEST).get(name) for name in timing}
        _, frames, height, width = self._request.latent_shape
        manifest = {
            "counts": asdict(self.counts()),
            "part": self._part,
            **facts_of(self._request, sampler),
            **timing,
            "frames": 4 * (frames - 1) + 1,
            "height": 8 * height,
            "width": 8 * width,
            "request": self._asked,
            "failed": [_read(note) for note in sorted(self._failed.iterdir())],
            "samples": [{"file": names[d], "text": d.prompt, "seed": d.seed, "index": d.index} for d in made],
        }
        write_json(self.path / _MANIFEST, manifest)
        for folder in (self._failed, self._partial):
            shutil.rmtree(folder)


def _read(file: Path) -> dict[str, Any]:
    """Raises: ValueError for a file that is not of this program."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ValueError(f"{file} is not of this program: choose another folder or remove it") from None
