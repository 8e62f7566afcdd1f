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
from rcm_mcore.interop.files import SAFETENSORS_SUFFIX, read_json, write_json
from rcm_mcore.interop.model_card import model_card

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
_STOCK_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
_MID_TIMES = {"wan": (1.5, 1.4, 1.0), "cosmos": (1.3, 1.0, 0.6)}


@dataclass(frozen=True, kw_only=True)
class PipelineOptions:
    """The base pipeline's folder, how the student samples, and what the card says."""

    base: Path
    steps: int = 4
    sigma_max: float = _SIGMA_MAX
    mid_times: Sequence[float] | None = None  # TrigFlow, falling; default that of the released students of the family
    stock_scheduler: bool = False  # model_index.json names diffusers' own: loads without trust, samples wrongly until told
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
    if "transformer_2" in _components(index):
        raise ValueError(f"--pipeline {options.base}: it has two transformers, as Wan2.2's; only Wan2.1's can be a base")
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
            if _link_weights(source, target):
                linked += 1
            else:
                shutil.copyfile(source, target)
                copied += 1
    _log.warning("%s: %d files of the base pipeline are hard links, %d are copies", options.base, linked, copied)
    _write_scheduler(folder / "scheduler", options, model)
    custom = [_SCHEDULER_FILE.stem, _SCHEDULERS[model.family]]
    scheduler = ["diffusers", _STOCK_SCHEDULER] if options.stock_scheduler else custom
    transformer = {"wan": "WanTransformer3DModel", "cosmos": "CosmosTransformer3DModel"}[model.family]
    kept = {name: value for name, value in index.items() if name != "_name_or_path"}
    replaced = {
        "_diffusers_version": version("diffusers"),
        "transformer": ["diffusers", transformer],
        "scheduler": scheduler,
    }
    write_json(folder / "model_index.json", {**kept, **replaced})
    name = options.base_model or options.base.name
    card = model_card(
        _PIPELINES[model.family, model.condition],
        step_times(options, model.family),
        license=options.license,
        base_model=name,
        stock=options.stock_scheduler,
        both_ends=model.condition == "first_last",
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _link_weights(source: Path, target: Path) -> bool:
    """Link a file of weights, which are large and which libraries replace when they save.

    They write into a configuration, so that one with two names would change in the base too.
    """
    if source.suffix != SAFETENSORS_SUFFIX:
        return False
    try:
        os.link(source.resolve(), target)  # a hub's cache holds symbolic links
    except OSError:  # another file system
        return False
    return True


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
        "_class_name": _STOCK_SCHEDULER if options.stock_scheduler else _SCHEDULERS[model.family],
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
