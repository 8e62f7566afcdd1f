"""Before training: whether all ranks run the same code and configuration, compute correctly, and are equally fast."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import math
import platform
import shutil
import socket
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import rcm_kernels
import torch
import torch.distributed as dist
from torch import Tensor

import rcm_mcore
from rcm_mcore.config import Config
from rcm_mcore.parallel.mesh import Mesh
from rcm_mcore.training.stopwatch import Stopwatch
from rcm_mcore.training.stragglers import Probe

log = logging.getLogger(__name__)

MAX_SKEW = 5.0  # seconds
SLOW = 0.8  # of the median rate
SOURCES = {"rcm_mcore": Path(rcm_mcore.__file__).parent, "rcm_kernels": Path(rcm_kernels.__file__).parent}


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """What was measured on all ranks."""

    matmul_tflops: float  # median of the ranks, in model.dtype
    matmul_tflops_min: float
    allreduce_gbps: dict[str, float]  # bus bandwidth, 1e9 bytes/s, median of the ranks, by group: dp_cp, tp
    allreduce_gbps_min: dict[str, float]
    warnings: tuple[str, ...]


def require_same(config: Config) -> None:
    """Collective over the default group: refuse ranks that run other code or another configuration.

    Raises the same ValueError on every rank; it names what differs, and on which ranks.
    """
    mine = facts(config)
    digest = _digest(json.dumps(mine, sort_keys=True).encode())
    if len(set(_from_all(digest))) == 1:
        return
    hosts, everyone = _from_all(socket.gethostname()), _from_all(mine)
    lines = differences(everyone, hosts)
    shown = "; ".join(lines[:10]) + (f"; and {len(lines) - 10} more" if len(lines) > 10 else "")
    raise ValueError(f"the ranks do not run the same: {shown}. Give all ranks the same code, environment and command line")


def facts(config: Config) -> dict[str, str]:
    """What must be equal on all ranks, by name: versions, a digest of each source file, each field of the configuration."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__), "cuda": str(torch.version.cuda)}
    for package in ("megatron-core", "triton"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    for package, root in SOURCES.items():
        for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".cu")):
            found[f"{package}/{path.relative_to(root)}"] = _digest(path.read_bytes())
    return found | {
        f"{section}.{name}": repr(value) for section, fields in asdict(config).items() for name, value in fields.items()
    }


def differences(facts: Sequence[dict[str, str]], hosts: Sequence[str]) -> list[str]:
    """One text for each fact that is not the same on all ranks: those that differ from most, or all."""
    texts = []
    for name in sorted(set().union(*facts)):
        values = [of_rank.get(name, "missing") for of_rank in facts]
        counts = Counter(values).most_common()
        if len(counts) == 1:
            continue
        most = counts[0][0] if 2 * counts[0][1] > len(values) else None
        parts = []
        for value, _ in counts:
            if value == most:
                continue
            ranks = [f"{rank} ({hosts[rank]})" for rank, of_rank in enumerate(values) if of_rank == value]
            more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
            parts.append(f"{value} on rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks[:8])}{more}")
        texts.append(f"{name} is {', '.join(parts)}" + (f", {most} on the others" if most is not None else ""))
    return texts


def preflight(config: Config, mesh: Mesh) -> Preflight:
    """Collective: check clocks and arithmetic of every rank, measure matrix products and all-reduces.

    Raises the same ValueError on every rank if a rank computes wrongly. What is only suspicious is a warning.
    """
    dtype = getattr(torch, config.model.dtype)
    hosts = _from_all(socket.gethostname())
    warnings = clock_warnings(_clocks(), hosts)
    probe = Probe(mesh.device, dtype)
    probe.launch()  # the first one finds its kernel
    probe.seconds()
    probe.launch()
    mine = {
        "error": product_error(mesh.device, dtype),
        "tflops": probe.flops / probe.seconds() / 1e12,
        "gpu": _gpu(mesh.device),
    }
    ranks = _from_all(mine | {"notes": gpu_warnings(mesh.device)})
    wrong = [f"rank {i} ({hosts[i]}, {r['gpu']}): {r['error']}" for i, r in enumerate(ranks) if r["error"]]
    if wrong:
        raise ValueError(f"a matrix product of small integers is wrong on {'; '.join(wrong)}. Leave that machine out")
    warnings += [f"rank {i} ({hosts[i]}, {r['gpu']}): {note}" for i, r in enumerate(ranks) for note in r["notes"]]
    rates = {"matmul": [r["tflops"] for r in ranks]}
    of_groups = _from_all(allreduce_rates(mesh))
    for name in ("dp_cp", "tp"):
        if any(name in of_rank for of_rank in of_groups):
            rates[name] = [of_rank.get(name, math.nan) for of_rank in of_groups]
    units = {"matmul": "TFLOP/s of matrix products"}
    medians, least = {}, {}
    for name, row in rates.items():
        unit = units.get(name, f"GB/s of all-reduces over {name}")
        medians[name], least[name] = _median(row), min(x for x in row if math.isfinite(x))
        warnings += slow_warnings(row, hosts, unit)
        if mesh.is_main:
            rank = row.index(least[name])
            log.info("%s: median %.4g, least %.4g (rank %d, %s)", unit, medians[name], least[name], rank, hosts[rank])
    if mesh.is_main:
        for warning in warnings:
            log.warning("%s", warning)
    return Preflight(
        matmul_tflops=medians.pop("matmul"),
        matmul_tflops_min=least.pop("matmul"),
        allreduce_gbps=medians,
        allreduce_gbps_min=least,
        warnings=tuple(warnings),
    )


def clock_warnings(clocks: Sequence[float], hosts: Sequence[str]) -> list[str]:
    """Ranks whose time.time(), taken at the same moment, is more than MAX_SKEW seconds from the median."""
    median = statistics.median(clocks)
    return [
        f"rank {rank} ({hosts[rank]}): its clock is {clock - median:+.1f} s off the median of the ranks"
        for rank, clock in enumerate(clocks)
        if abs(clock - median) > MAX_SKEW
    ]


def slow_warnings(rates: Sequence[float], hosts: Sequence[str], unit: str) -> list[str]:
    """Ranks below SLOW x the median, which of two ranks is the faster; NaN is not measured."""
    median = _median(rates)
    return [
        f"rank {rank} ({hosts[rank]}): {rate:.4g} {unit}, the median is {median:.4g}"
        for rank, rate in enumerate(rates)
        if rate < SLOW * median
    ]


def product_error(device: torch.device, dtype: torch.dtype) -> str:
    """What is wrong with a product of matrices of -1, 0 and 1 on `device`; empty if nothing is.

    Every sum of it is an integer of at most 8 bits, so exact in any dtype and order of summation. It is compared on the host
    by Freivalds' check, exactly: (A B) v = A (B v) for random v.
    """
    a, b, v = operands(2048 if device.type == "cuda" else 256)
    c = product(a.to(device, dtype), b.to(device, dtype)).cpu().double()
    if not bool(c.isfinite().all()):
        return f"{int((~c.isfinite()).sum())} of {c.numel()} elements are not finite"
    rows = int((c @ v.double() != a.double() @ (b.double() @ v.double())).any(1).sum())
    return f"{rows} of {len(c)} rows differ from the exact result" if rows else ""


def operands(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two matrices to be multiplied, [size, size], and the vectors of the check, [size, 16]; the same on every rank."""
    g = torch.Generator().manual_seed(0)
    shapes = (size, size), (size, size), (size, 16)
    a, b, v = (torch.randint(-1, 2, shape, generator=g, dtype=torch.int8) for shape in shapes)
    return a, b, v


def product(a: Tensor, b: Tensor) -> Tensor:
    """The product under test."""
    return a @ b


def allreduce_rates(mesh: Mesh) -> dict[str, float]:
    """Collective: bus bandwidth in 1e9 bytes/s of five float32 all-reduces, over the groups of more than one rank."""
    rates: dict[str, float] = {}
    groups = {"dp_cp": mesh.groups.dp_cp, "tp": mesh.tp_group}
    for name, group in groups.items():
        if group.size() == 1:
            continue
        x = torch.zeros((64 if mesh.device.type == "cuda" else 1) * 2**18, device=mesh.device)
        watch = Stopwatch(mesh.device)
        dist.all_reduce(x, group=group)  # connects the ranks
        watch.begin()
        for _ in range(5):  # in one span: of single ones, the rank that comes last sees the shortest
            dist.all_reduce(x, group=group)
        watch.end()
        # What a ring sends and receives for each byte of the result.
        sent = 2 * (group.size() - 1) / group.size() * x.nbytes
        rates[name] = 5 * sent / watch.take()[0] / 1e9
    return rates


# What nvidia-smi is asked, and what each answer means if it is not one of these.
_HEALTHY = ("0", "No", "Not Active", "N/A", "[N/A]", "[Not Supported]", "")
_HEALTH = {
    "ecc.errors.uncorrected.volatile.total": "uncorrected memory errors since the driver was loaded",
    "retired_pages.pending": "memory pages wait for a reset to be retired",
    "remapped_rows.pending": "memory rows wait for a reset to be remapped",
    "remapped_rows.failure": "a memory row could not be remapped",
}
_THROTTLING = {
    "hw_slowdown": "slowed down by its hardware (temperature or power)",
    "hw_thermal_slowdown": "slowed down: too hot",
    "hw_power_brake_slowdown": "slowed down by the power supply",
    "sw_thermal_slowdown": "slowed down by the driver: too hot",
}


def gpu_warnings(device: torch.device) -> list[str]:
    """What nvidia-smi says against the GPU of this rank; nothing on a CPU or without nvidia-smi."""
    command = shutil.which("nvidia-smi")
    if device.type != "cuda" or command is None:
        return []
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    return smi_warnings(lambda fields: _query(command, uuid, fields))


def smi_warnings(query: Callable[[Sequence[str]], list[str] | None]) -> list[str]:
    """`query` gives nvidia-smi's values of some fields, or None if it does not know one of them."""
    found = []
    # The prefix is another one for older drivers.
    for prefix, meanings in (("", _HEALTH), ("clocks_event_reasons.", _THROTTLING), ("clocks_throttle_reasons.", _THROTTLING)):
        values = query([prefix + name for name in meanings])
        if values is None or len(values) != len(meanings):
            continue
        pairs = zip(meanings.items(), values)
        found += [f"{meaning} ({name}: {value})" for (name, meaning), value in pairs if value not in _HEALTHY]
        if prefix:
            break
    return found


def _query(command: str, uuid: str, fields: Sequence[str]) -> list[str] | None:
    line = [command, "-i", uuid, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return [value.strip() for value in done.stdout.strip().split(",")]


def _gpu(device: torch.device) -> str:
    """The GPU as its owner would look for it."""
    if device.type != "cuda":
        return "CPU"
    properties: Any = torch.cuda.get_device_properties(device)
    return f"{properties.name} {device.index}, GPU-{properties.uuid}"


def _clocks() -> list[float]:
    """Collective: every rank's time.time() at about the same moment."""
    dist.all_reduce(torch.zeros(1))  # on the host, over gloo: all leave it together
    return _from_all(time.time())


def _from_all(value: Any) -> list[Any]:
    """Collective: `value` of every rank of the default group."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _median(rates: Sequence[float]) -> float:
    return statistics.median_high([x for x in rates if math.isfinite(x)])


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
