"""Feature extractors from files: our own networks (safetensors), and programs that torch.export or TorchScript wrote."""

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import safetensors
import torch
from torch import Tensor

from rcm_mcore.evaluation import digits

Extract: TypeAlias = Callable[[Tensor], Tensor]  # videos [n, 3, F, H, W] in [0, 1], float32 -> features [n, d]

PROGRAM_SUFFIXES = (".pt2", ".pt", ".ts", ".torchscript")


class Extractor:
    """A network that turns videos into features, and the hash of its file.

    Three kinds of file:

    - `.safetensors` of a network that this repository trains, by `format` in its metadata. It holds numbers alone.
    - `.pt2`, written by torch.export.save with a dynamic batch dimension. Reading it unpickles, and its graph runs.
    - `.pt`, `.ts`, `.torchscript`, written by torch.jit.save, which torch 2.13 still reads but deprecates. Its code runs.

    The last two are programs: who wrote them can do what the user can. They are read with `run_code=True` alone.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        run_code: bool = False,
        formats: Mapping[str, Callable[[Path], Any]] | None = None,
    ) -> None:
        """Loads it.

        Args:
            path: of the file.
            device: where it runs.
            run_code: the file is trusted as a program is; without it .pt2 and TorchScript are refused, unread.
            formats: further networks in safetensors: format to a function of the path that gives an object with
                `features(videos [n, 3, F, H, W] in [0, 1]) -> [n, d]` and `to(device)`.
        Raises: ValueError for another file, or a program that is not trusted; OSError when it cannot be read.
        """
        self.path, self.device = Path(path), torch.device(device)
        with open(self.path, "rb") as file:
            self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        suffix = self.path.suffix.lower()
        if suffix == ".safetensors":
            self._extract = _own(self.path, self.device, formats or {})
        elif suffix in PROGRAM_SUFFIXES:
            if not run_code:
                raise ValueError(
                    f"{self.path}: {suffix} files are programs, and whoever wrote this one could do what you can;"
                    " allow it (--run-extractor) if you trust them"
                )
            self._extract = _program(self.path, self.device)
        else:
            raise ValueError(f"{self.path}: must end in .safetensors, {', '.join(PROGRAM_SUFFIXES)}")

    @torch.no_grad()
    def __call__(self, videos: Tensor) -> Tensor:
        """Features [n, d], float32 on the CPU, of videos [n, 3, F, H, W] in [0, 1].

        Raises: ValueError when the network does not take such videos, or gives something else.
        """
        try:
            features = self._extract(videos.to(self.device, torch.float32))
        # An exported program checks its inputs in many ways.
        except (RuntimeError, ValueError, AssertionError, TypeError) as error:
            raise ValueError(
                f"{self.path}: does not take videos {list(videos.shape)}: {str(error).strip() or type(error).__name__}"
            ) from error
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(videos):
            found = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"{self.path}: gave {found} for {len(videos)} videos; must be a tensor [{len(videos)}, d]")
        return features.float().cpu()


def _own(path: Path, device: torch.device, formats: Mapping[str, Callable[[Path], Any]]) -> Extract:
    """A network of ours, told by the metadata of its file."""
    known = {digits.FORMAT: _digit_network, **formats}
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            name = (file.metadata() or {}).get("format")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: is no safetensors file ({error})") from error
    if name not in known:
        raise ValueError(f"{path}: its format is {name}; known are {', '.join(sorted(known))}")
    return known[name](path).to(device).features


class _DigitNetwork:
    """The digit classifier, which sees greyscale, of colour videos."""

    def __init__(self, network: digits.DigitClassifier) -> None:
        self._network = network

    def to(self, device: torch.device) -> "_DigitNetwork":
        self._network.to(device)
        return self

    def features(self, videos: Tensor) -> Tensor:
        return self._network.features(videos.mean(1))


def _digit_network(path: Path) -> _DigitNetwork:
    return _DigitNetwork(digits.DigitClassifier.load(path))


def _program(path: Path, device: torch.device) -> Extract:
    """What torch.export or torch.jit saved."""
    try:
        if path.suffix.lower() != ".pt2":
            return torch.jit.load(path, map_location=device).eval()
        from torch.export.passes import move_to_device_pass

        return move_to_device_pass(torch.export.load(path), device).module()
    except OSError:
        raise
    # A file from elsewhere can make either reader raise nearly anything.
    except Exception as error:
        raise ValueError(f"{path}: cannot be loaded as a {path.suffix} program: {type(error).__name__}: {error}") from error
