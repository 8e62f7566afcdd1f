"""Which implementation of attention runs: chosen per call by the tensors, in an order fixed by measurement.

docs/benchmarks/attention_h200_202611.md holds the measurement: on an H200 our Hopper kernel is ahead of cuDNN in the forward,
cuDNN ahead of the rest in the backward. What was not measured (flash-attn 2 and 3) comes after what was.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rcm_kernels import blockwise, hopper, portable, vendors

logger = logging.getLogger(__name__)

FUNCTIONS = ("jvp", "forward", "backward")
AUTO = "auto"
SLOW = "blockwise"


@dataclass(frozen=True)
class Backend:
    """An implementation: why it cannot take given tensors, if so, and its functions (None: it has no such function)."""

    unfit: Callable[..., str | None]
    jvp: Callable[..., Any] | None = None
    forward: Callable[..., Any] | None = None
    backward: Callable[..., Any] | None = None


BACKENDS: Mapping[str, Backend] = {
    "hopper": Backend(hopper.unfit, jvp=hopper.forward, forward=hopper.forward),
    "cudnn": Backend(vendors.Cudnn.unfit, forward=vendors.Cudnn.forward, backward=vendors.Cudnn.backward),
    "flash_attn_3": Backend(vendors.FlashAttn3.unfit, forward=vendors.FlashAttn3.forward, backward=vendors.FlashAttn3.backward),
    "flash_attn_2": Backend(vendors.FlashAttn2.unfit, forward=vendors.FlashAttn2.forward, backward=vendors.FlashAttn2.backward),
    "torch_flash": Backend(vendors.TorchFlash.unfit, forward=vendors.TorchFlash.forward, backward=vendors.TorchFlash.backward),
    "triton": Backend(portable.unfit, jvp=portable.forward, forward=portable.forward),
    SLOW: Backend(lambda *_: None, jvp=blockwise.forward, forward=blockwise.forward, backward=blockwise.backward),
}

_wanted = dict.fromkeys(FUNCTIONS, AUTO)
_reported: set[tuple] = set()


def use_backends(**names: str) -> None:
    """Choose implementations for this process: `use_backends(jvp="triton", backward="auto")`; those not named stay.

    A backend chosen by name that cannot take a call's tensors raises ValueError there, instead of giving way to another.

    Raises:
        ValueError: an unknown function or backend, or a backend without that function.
    """
    for function, name in names.items():
        if function not in FUNCTIONS:
            raise ValueError(f"{function}={name!r}: there is no such function; there are {', '.join(FUNCTIONS)}")
        allowed = (AUTO, *choices(function))
        if name not in allowed:
            raise ValueError(f"{function}={name!r}: choose one of {', '.join(allowed)}")
    _wanted.update(names)


def choices(function: str) -> tuple[str, ...]:
    """The backends that have a function, best first."""
    return tuple(name for name, backend in BACKENDS.items() if getattr(backend, function) is not None)


def backends(
    dtype: torch.dtype = torch.bfloat16, width: int = 128, device: torch.device | str | None = None
) -> dict[str, dict[str, str]]:
    """What would run for contiguous tensors of this dtype and head width, and why not the others.

    Returns {"jvp" | "forward" | "backward": {backend: "used", "available", or the reason why it cannot be}}. The device is
    the current GPU unless given, or the CPU where there is none.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    probe = torch.empty(1, 16, 1, width, dtype=dtype, device=device)
    report: dict[str, dict[str, str]] = {}
    for function in FUNCTIONS:
        reasons = {name: BACKENDS[name].unfit(probe, probe, probe) for name in choices(function)}
        wanted = _wanted[function]
        used = next(name for name, reason in reasons.items() if reason is None) if wanted == AUTO else wanted
        report[function] = {name: reason or ("used" if name == used else "available") for name, reason in reasons.items()}
    return report


def choose(function: str, q: Tensor, k: Tensor, *others: Tensor | None) -> Callable[..., Any]:
    """The implementation of a function for tensors [B, S, N, D]; says so once if a GPU is left with the slow one."""
    wanted = _wanted[function]
    if wanted != AUTO:
        reason = BACKENDS[wanted].unfit(q, k, *others)
        if reason is not None:
            raise ValueError(f"{function}={wanted!r} was chosen, but {reason}; choose another backend or {AUTO!r}")
        return getattr(BACKENDS[wanted], function)
    reasons: dict[str, str] = {}
    for name in choices(function):
        reason = BACKENDS[name].unfit(q, k, *others)
        if reason is None:
            if name == SLOW and q.is_cuda:
                _report_slow(function, q, reasons)
            return getattr(BACKENDS[name], function)
        reasons[name] = reason
    raise AssertionError(f"{SLOW} takes everything")


def _report_slow(function: str, q: Tensor, reasons: dict[str, str]) -> None:
    key = (function, q.dtype, q.shape[3], q.device, tuple(reasons.values()))
    if key in _reported:
        return
    _reported.add(key)
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    logger.warning(
        "attention (%s) of %s, width %d, on %s runs in plain PyTorch, about ten times slower than a kernel. %s",
        *(function, q.dtype, q.shape[3], q.device, why),
    )
