"""What a shard holds, for a person to read."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field

import torch

from rcm_mcore.data.shards import BadSample, DamagedShard, Sample, Shard, as_float32, sample_format


@dataclass
class ShardReport:
    """Contents of one shard.

    Attributes:
        formats: good samples by format.
        latents: good samples by dtype and shape of the latent, such as "bfloat16 [16, 21, 60, 104]".
        texts: good samples by dtype and width of the text rows, such as "bfloat16 [*, 4096]".
        given, images: likewise, of the given frames and image rows of samples that have them.
        text_rows: rows that carry text, of each good sample.
        latent_mean, latent_std: over all values of the good samples; nan without any.
        prompts: of the first good samples.
        bad: key and reason of each bad sample.
        damage: why the shard could not be read to its end, or None.
    """

    path: str
    formats: Counter[str] = field(default_factory=Counter)
    latents: Counter[str] = field(default_factory=Counter)
    texts: Counter[str] = field(default_factory=Counter)
    given: Counter[str] = field(default_factory=Counter)
    images: Counter[str] = field(default_factory=Counter)
    text_rows: list[int] = field(default_factory=list)
    latent_mean: float = float("nan")
    latent_std: float = float("nan")
    prompts: list[str] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    damage: str | None = None

    def __str__(self) -> str:
        rows = self.text_rows
        lines = [
            self.path,
            f"  samples   {len(rows)} good, {len(self.bad)} bad",
            f"  format    {_counts(self.formats)}",
            f"  latent    {_counts(self.latents)}",
            f"  text      {_counts(self.texts)}",
        ]
        if rows:
            lines.insert(4, f"            mean {self.latent_mean:.4f}, std {self.latent_std:.4f}")
            lines.append(f"            rows min {min(rows)}, mean {sum(rows) / len(rows):.1f}, max {max(rows)}")
        for name, counts in (("given", self.given), ("image", self.images)):
            if counts:
                lines.append(f"  {name:9} {_counts(counts)}")
        lines += [f"  prompt    {prompt}" for prompt in self.prompts]
        lines += [f"  bad       {key}: {reason}" for key, reason in self.bad]
        if self.damage is not None:
            lines.append(f"  damaged   {self.damage}")
        return "\n".join(lines)


def inspect_shard(path: str | os.PathLike[str], *, prompts: int = 3) -> ShardReport:
    """Reads a whole shard. Bad samples and damage are reported, not raised. Raises: OSError if it cannot be opened.

    Args:
        prompts: how many prompts to keep.
    """
    report = ShardReport(os.fspath(path))
    values, total, squares = 0, 0.0, 0.0
    try:
        with Shard(path) as shard:
            for key, members in shard.samples():
                try:
                    sample = shard.read(key, members)
                    latent = as_float32(sample).latent.double()
                except BadSample as error:
                    report.bad.append((key, str(error)))
                    continue
                values, total = values + latent.numel(), total + float(latent.sum())
                squares += float(latent.square().sum())
                _add(report, sample, sample_format(members), prompts)
    except DamagedShard as error:
        report.damage = str(error)
    if values:
        report.latent_mean = total / values
        report.latent_std = max(squares / values - report.latent_mean**2, 0.0) ** 0.5
    return report


def _add(report: ShardReport, sample: Sample, format: str, prompts: int) -> None:
    report.formats[format] += 1
    for counter, tensor in ((report.latents, sample.latent), (report.given, sample.given), (report.images, sample.image)):
        if tensor is not None:
            counter[f"{_name(tensor.dtype)} {list(tensor.shape)}"] += 1
    report.texts[f"{_name(sample.embed.dtype)} [*, {sample.embed.shape[1]}]"] += 1
    report.text_rows.append(sample.embed.shape[0])
    if len(report.prompts) < prompts:
        report.prompts.append(sample.prompt)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _counts(counter: Counter[str]) -> str:
    if len(counter) == 1:
        return next(iter(counter))
    return ", ".join(f"{name} ({count})" for name, count in counter.most_common()) or "-"
