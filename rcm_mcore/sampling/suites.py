"""Prompt suites of public evaluators: their prompt files, how many samples they want and how these are named (docs/suites.md).

GenEval (github.com/djghosh13/geneval) reads IMAGES/00000/metadata.jsonl and IMAGES/00000/samples/0000.png ...; VBench
(github.com/Vchitect/VBench) reads VIDEOS/PROMPT-0.mp4 ... from a folder that holds nothing else.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rcm_mcore.sampling.request import Draw

STRIDE = 1000  # numbers of noise that belong to a prompt
_NAME_BYTES = 255  # of a file name, on all usual file systems


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt of a suite.

    Attributes:
        number: its place in the prompt file, from 0.
        name: as the evaluator knows it.
        text: what the network is told; usually the same.
        count: samples of it.
        dimensions: VBench: what is measured with it, where the prompt file says so.
        line: GenEval: the line of the prompt file.
    """

    number: int
    name: str
    text: str
    count: int
    dimensions: frozenset[str] = frozenset()
    line: str = ""


class GenEval:
    """Pictures: NUMBER/samples/INDEX.png, and NUMBER/metadata.jsonl, the line of the prompt file."""

    folder, suffix = "images", ".png"
    count = 4

    def read(self, path: Path) -> list[Prompt]:
        """Prompts of an evaluation_metadata.jsonl. Raises: ValueError naming the entry; OSError."""
        found = []
        for number, line in enumerate(_lines(path)):
            where = f"--prompts {path}: entry {number}"
            entry = _parsed(line, where)
            if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("prompt", "tag")):
                raise ValueError(
                    f"{where} must be an object with `prompt` and `tag`, as in GenEval's evaluation_metadata.jsonl"
                )
            prompt = entry["prompt"]
            found.append(Prompt(number=number, name=prompt, text=prompt.strip(), count=self.count, line=line))
        return found

    def file(self, prompt: Prompt, index: int) -> Path:
        """Of a sample, below the folder."""
        return Path(f"{prompt.number:05d}", "samples", f"{index:04d}.png")

    def metadata(self, prompt: Prompt) -> tuple[Path, str] | None:
        """The file that goes with a prompt, below the folder, and what is in it."""
        return Path(f"{prompt.number:05d}", "metadata.jsonl"), prompt.line + "\n"

    def finds(self, prompt: Prompt) -> bool:
        """Whether the evaluator finds the samples of a prompt."""
        return True


class VBench:
    """Videos: PROMPT-INDEX.mp4."""

    folder, suffix = "videos", ".mp4"
    count = 5
    flickering_count = 25  # of temporal_flickering, whose videos are filtered for still ones first

    def read(self, path: Path) -> list[Prompt]:
        """Prompts of a VBench_full_info.json, or of a text file, one a line, which says no dimensions.

        Raises: ValueError naming the entry; OSError.
        """
        if path.suffix != ".json":
            return [Prompt(number=n, name=line, text=line, count=self.count) for n, line in enumerate(_lines(path))]
        entries = _parsed("\n".join(_lines(path)), f"--prompts {path}")
        if not isinstance(entries, list):
            raise ValueError(f"--prompts {path}: must be a list, as VBench_full_info.json is")
        found = []
        for number, entry in enumerate(entries):
            good = isinstance(entry, dict) and isinstance(entry.get("prompt_en"), str)
            if not good or not isinstance(entry.get("dimension"), list):
                raise ValueError(f"--prompts {path}: entry {number} must have `prompt_en` and a list `dimension`")
            name, dimensions = entry["prompt_en"], frozenset(map(str, entry["dimension"]))
            count = self.flickering_count if "temporal_flickering" in dimensions else self.count
            found.append(Prompt(number=number, name=name, text=name.strip(), count=count, dimensions=dimensions))
        return found

    def file(self, prompt: Prompt, index: int) -> Path:
        """Of a sample, below the folder; shortened where the prompt cannot be a file name."""
        if self.finds(prompt):
            return Path(f"{prompt.name}-{index}.mp4")
        start = re.sub(r"[/\0]", "_", prompt.name).encode()[:200].decode(errors="ignore")
        return Path(f"{start}~{hashlib.sha256(prompt.name.encode()).hexdigest()[:8]}-{index}.mp4")

    def metadata(self, prompt: Prompt) -> tuple[Path, str] | None:
        """None: the folder must hold nothing but videos, as the evaluator takes the suffix of any file for that of all."""
        return None

    def finds(self, prompt: Prompt) -> bool:
        """Whether the evaluator finds the videos by the prompt: it can be a file name, with any index."""
        longest = f"{prompt.name}-{STRIDE - 1}.mp4"
        return not re.search(r"[/\0]", longest) and len(longest.encode()) <= _NAME_BYTES


SUITES: dict[str, GenEval | VBench] = {"geneval": GenEval(), "vbench": VBench()}


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which samples of a suite to make.

    Attributes:
        prompts: the suite's prompt file.
        augmented: a text file with a line for each prompt of `prompts`: what the network is told in its place.
        dimension: VBench: only its prompts.
        limit: the first so many of these.
        num_per_prompt: in place of the suite's number.
    """

    suite: str
    prompts: str
    augmented: str | None = None
    dimension: str | None = None
    limit: int | None = None
    num_per_prompt: int | None = None

    def contents(self) -> dict[str, Any]:
        """What the samples depend on. Those of a dimension or up to a limit have the names and the noise that they have among
        all."""
        files = {"prompts": self.prompts, "augmented": self.augmented}
        digests = {
            f"{name}_sha256": file and hashlib.sha256(Path(file).read_bytes()).hexdigest() for name, file in files.items()
        }
        return {"suite": self.suite, **digests, "num_per_prompt": self.num_per_prompt}


def read_prompts(selection: Selection) -> list[Prompt]:
    """The prompts to sample; one that is in VBench's file twice, once. Raises: ValueError naming the flag; OSError."""
    suite = SUITES[selection.suite]
    for flag, value, most in (("limit", selection.limit, 10**9), ("num-per-prompt", selection.num_per_prompt, STRIDE)):
        if value is not None and not 1 <= value <= most:
            raise ValueError(f"--{flag} {value}: must be from 1 to {most}")
    entries = suite.read(Path(selection.prompts))
    if not entries:
        raise ValueError(f"--prompts {selection.prompts}: there is no prompt in it")
    if selection.augmented is not None:
        entries = _augmented(entries, selection)
    if selection.num_per_prompt is not None:
        entries = [replace(prompt, count=selection.num_per_prompt) for prompt in entries]
    different: dict[Path, Prompt] = {}
    for prompt in entries:
        if not prompt.text:
            raise ValueError(f"--prompts {selection.prompts}: entry {prompt.number} is empty")
        first = different.setdefault(file := suite.file(prompt, 0), prompt)
        dimensions, count = first.dimensions | prompt.dimensions, max(first.count, prompt.count)
        different[file] = replace(first, dimensions=dimensions, count=count)
    prompts = list(different.values())
    if selection.dimension is not None:
        known = ", ".join(sorted(set().union(*(prompt.dimensions for prompt in prompts))))
        prompts = [prompt for prompt in prompts if selection.dimension in prompt.dimensions]
        if not prompts:
            there = f"must be one of {known}" if known else "the prompt file says none; pass VBench_full_info.json"
            raise ValueError(f"--dimension {selection.dimension}: {there}")
    return prompts[: selection.limit]


def draws_of(prompts: Sequence[Prompt], *, seed: int) -> list[Draw]:
    """Every sample: sample k of prompt p has the noise of this seed and number STRIDE p + k, whatever else is made."""
    pairs = [(prompt, index) for prompt in prompts for index in range(prompt.count)]
    return [Draw(i, prompt.text, seed, STRIDE * prompt.number + index) for i, (prompt, index) in enumerate(pairs)]


def _augmented(prompts: list[Prompt], selection: Selection) -> list[Prompt]:
    lines = _lines(Path(str(selection.augmented)))
    if len(lines) != len(prompts):
        raise ValueError(f"--augmented {selection.augmented}: has {len(lines)} lines, --prompts {len(prompts)} prompts")
    return [replace(prompt, text=line) for prompt, line in zip(prompts, lines)]


def _lines(path: Path) -> list[str]:
    """Lines of a file, stripped, without empty ones."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text ({error})") from None
    return [stripped for line in lines if (stripped := line.strip())]


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
