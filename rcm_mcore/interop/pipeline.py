"""A whole diffusers pipeline around a converted student: the components of a base pipeline, our schedule, a model card."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rcm_mcore.config import ModelConfig
from rcm_mcore.interop.files import read_json, write_json

_log = logging.getLogger(__name__)
_REPLACED = ("transformer", "scheduler")
_SCHEDULER_FILE = Path(__file__).parent / "shipped" / "rcm_scheduler.py"
_SIGMA_MAX = 80.0
# (family, condition) -> the pipeline's class; by family: scheduler, mid times (TrigFlow) of the released students
_PIPELINES = {
    ("wan", "text"): "WanPipeline",
    ("wan", "image"): "WanImageToVideoPipeline",
    ("wan", "first_last"): "WanImageToVideoPipeline",
    ("cosmos", "text"): "Cosmos2TextToImagePipeline",
    ("cosmos", "frames"): "Cosmos2VideoToWorldPipeline",
}
_SCHEDULERS = {"wan": "RCMFlowScheduler", "cosmos": "RCMEDMScheduler"}
_MID_TIMES = {"wan": (1.5, 1.4, 1.0), "cosmos": (1.3, 1.0, 0.6)}
_TAGS = {"text": "text-to-video", "image": "image-to-video", "first_last": "image-to-video", "frames": "image-to-video"}


@dataclass(frozen=True, kw_only=True)
class PipelineOptions:
    """The base pipeline's folder, how the student samples, and what the card says."""

    base: Path
    steps: int = 4
    sigma_max: float = _SIGMA_MAX
    mid_times: Sequence[float] | None = None  # TrigFlow, falling; default that of the released students of the family
    license: str = "other"
    base_model: str | None = None  # name on the card; default the base folder's


def check_base(options: PipelineOptions, model: ModelConfig) -> None:
    """Checks that the base is a pipeline for this network with all its components, and that the steps make sense.

    Raises: ValueError naming what is wrong.
    """
    index = _index(options.base)
    wanted = _PIPELINES[model.family, model.condition]
    if index.get("_class_name") != wanted:
        raise ValueError(
            f"--pipeline {options.base}: it is a {index.get('_class_name')}; a {model.family} network with "
            f"condition={model.condition} needs a {wanted}"
        )
    for name in _components(index):
        if name not in _REPLACED and not (options.base / name).is_dir():
            raise ValueError(f"--pipeline {options.base}: model_index.json names the component {name}, which has no folder")
    times = step_times(options, model.family)
    if any(a <= b for a, b in zip(times, [*times[1:], 0.0])):
        raise ValueError(f"--mid-times {list(times[1:])}: must fall from arctan(sigma_max) = {times[0]:.6f} to above 0")
    if model.family == "cosmos" and options.sigma_max != _SIGMA_MAX:
        raise ValueError(f"--sigma-max {options.sigma_max}: Cosmos' pipelines start from {_SIGMA_MAX:g} times noise")
    if model.family == "cosmos" and not (options.base / "scheduler" / "scheduler_config.json").is_file():
        raise ValueError(f"--pipeline {options.base}: it has no scheduler/scheduler_config.json")


def step_times(options: PipelineOptions, family: str) -> list[float]:
    """TrigFlow times of the steps. Raises: ValueError for a number of steps that the mid times do not give."""
    mid = _MID_TIMES[family] if options.mid_times is None else tuple(options.mid_times)
    if not 1 <= options.steps <= len(mid) + 1:
        raise ValueError(f"--steps {options.steps}: must be from 1 to {len(mid) + 1}, one more than the mid times {list(mid)}")
    return [math.atan(options.sigma_max), *mid[: options.steps - 1]]


def write_pipeline(folder: Path, options: PipelineOptions, model: ModelConfig) -> None:
    """Makes the folder of a pipeline but for its transformer/: components linked or copied, schedule, index, card."""
    folder.mkdir()
    index = _index(options.base)
    linked = copied = 0
    for name in _components(index):
        if name in _REPLACED:
            continue
        for source in sorted(path for path in (options.base / name).rglob("*") if path.is_file()):
            target = folder / source.relative_to(options.base)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source.resolve(), target)  # a hub's cache holds symbolic links
                linked += 1
            except OSError:  # another file system
                shutil.copyfile(source, target)
                copied += 1
    _log.warning("%s: %d files of the base pipeline are hard links, %d are copies", options.base, linked, copied)
    _write_scheduler(folder / "scheduler", options, model)
    scheduler = [_SCHEDULER_FILE.stem, _SCHEDULERS[model.family]]
    transformer = {"wan": "WanTransformer3DModel", "cosmos": "CosmosTransformer3DModel"}[model.family]
    kept = {name: value for name, value in index.items() if name != "_name_or_path"}
    replaced = {
        "_diffusers_version": version("diffusers"),
        "transformer": ["diffusers", transformer],
        "scheduler": scheduler,
    }
    write_json(folder / "model_index.json", {**kept, **replaced})
    (folder / "README.md").write_text(_card(options, model), encoding="utf-8")


def _write_scheduler(folder: Path, options: PipelineOptions, model: ModelConfig) -> None:
    """The subclass and its config, which the stock class reads too: Wan's samples alike when given the times, Cosmos' is the
    base's, for sampling as the teacher does.
    """
    folder.mkdir()
    shutil.copyfile(_SCHEDULER_FILE, folder / _SCHEDULER_FILE.name)
    if model.family == "cosmos":
        config = read_json(options.base / "scheduler" / "scheduler_config.json")
    else:
        config = {"num_train_timesteps": 1000, "shift": 1.0, "stochastic_sampling": True}
    _, *mid = step_times(options, model.family)
    config |= {
        "_class_name": _SCHEDULERS[model.family],
        "_diffusers_version": version("diffusers"),
        "rcm_sigma_max": options.sigma_max,
        "rcm_mid_times": mid,
    }
    write_json(folder / "scheduler_config.json", config)


def _index(base: Path) -> dict[str, Any]:
    path = base / "model_index.json"
    if not path.is_file():
        raise ValueError(f"--pipeline {base}: not a pipeline folder: it has no model_index.json")
    return read_json(path)


def _components(index: dict[str, Any]) -> list[str]:
    """Names of the components that a pipeline has."""
    return [
        name
        for name, value in index.items()
        if not name.startswith("_") and isinstance(value, list) and len(value) == 2 and None not in value
    ]


def _card(options: PipelineOptions, model: ModelConfig) -> str:
    times = step_times(options, model.family)
    rf = ", ".join(f"{math.sin(t) / (math.sin(t) + math.cos(t)):.6f}" for t in times)
    pipeline = _PIPELINES[model.family, model.condition]
    base = options.base_model or options.base.name
    tag = "text-to-image" if pipeline == "Cosmos2TextToImagePipeline" else _TAGS[model.condition]
    mid = ", ".join(f"{t:g}" for t in times[1:]) or "none"
    usage = (_WAN_USAGE if model.family == "wan" else _COSMOS_USAGE).format(
        pipeline=pipeline, steps=options.steps, rf=rf, channels=model.in_channels
    )
    return _CARD.format(
        license=options.license,
        base=base,
        tag=tag,
        steps=options.steps,
        sigma_max=options.sigma_max,
        mid=mid,
        rf=rf,
        usage=usage,
    )


_CARD = """\
---
license: {license}
base_model: {base}
library_name: diffusers
pipeline_tag: {tag}
tags:
- rcm
- distillation
---

A few-step student of {base}, distilled with rCM (score-regularized continuous-time consistency model,
[arXiv 2510.08431](https://arxiv.org/abs/2510.08431)) by rcm-mcore.

| | |
|---|---|
| steps | {steps} |
| sigma max | {sigma_max:g} |
| mid times (TrigFlow) | {mid} |
| times of the steps (rectified flow) | {rf} |
| guidance | none: guidance_scale=1 |

{usage}
Fewer steps take the first times. Noise between the steps comes from torch's global generator, hence `torch.manual_seed`.
`SHA256SUMS` lists every file: `sha256sum -c SHA256SUMS`.
"""

_WAN_USAGE = """\
The schedule is `scheduler/rcm_scheduler.py`, which diffusers runs when told to trust it:

```python
import torch
from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained(folder, torch_dtype=torch.bfloat16, trust_remote_code=True).to("cuda")
torch.manual_seed(0)
noise = torch.randn(1, {channels}, (frames - 1) // 4 + 1, height // 8, width // 8, device="cuda")
video = pipe(
    prompt, height=height, width=width, num_frames=frames, num_inference_steps={steps}, guidance_scale=1.0,
    latents=noise * pipe.scheduler.init_noise_sigma,  # the pipeline itself would start from plain noise
).frames[0]
```

Without it, the stock scheduler does the same once it is given the times:

```python
from diffusers import FlowMatchEulerDiscreteScheduler

sigmas = [{rf}]
scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
pipe = {pipeline}.from_pretrained(folder, torch_dtype=torch.bfloat16, scheduler=scheduler)
stock = scheduler.set_timesteps
scheduler.set_timesteps = lambda n=None, device=None, **options: stock(n, device=device, sigmas=sigmas)
# then as above, with latents=noise * sigmas[0]
```
"""

_COSMOS_USAGE = """\
The schedule is `scheduler/rcm_scheduler.py`, which diffusers runs when told to trust it:

```python
import torch
from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained(folder, torch_dtype=torch.bfloat16, trust_remote_code=True).to("cuda")
torch.manual_seed(0)
result = pipe(prompt=prompt, num_inference_steps={steps}, guidance_scale=1.0)
```

(Video-to-world: also pass `fps=None`, as the network was trained.) To sample with many steps as the teacher does, give it the
base's own scheduler, whose settings are in the same file:

```python
from diffusers import FlowMatchEulerDiscreteScheduler

scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
pipe = {pipeline}.from_pretrained(folder, torch_dtype=torch.bfloat16, scheduler=scheduler)
```

diffusers builds the norms of q and k with eps 1e-5 where the official network, and ours, has 1e-6.
"""
