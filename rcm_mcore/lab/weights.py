"""Networks of the laboratory as files: safetensors with a format tag and, as JSON, how they were built and how they did."""

import json
import os
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn


def write_network(path: str | os.PathLike[str], network: nn.Module, file_format: str, facts: dict[str, Any]) -> None:
    """Writes parameters and buffers; the file takes its name only when it is complete.

    Args:
        path: of the file; one that is there is replaced.
        network: on any device.
        file_format: tag that `read_network` demands.
        facts: what JSON can hold.
    """
    path = Path(path)
    tensors = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        # Not save_file, whose files only their owner may read, whatever the umask.
        partial.write_bytes(safetensors.torch.save(tensors, metadata={"format": file_format, "facts": json.dumps(facts)}))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_network(path: str | os.PathLike[str], file_format: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by name, facts) of what `write_network` wrote.

    Raises: ValueError for another file; OSError when it cannot be read.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != file_format:
                raise ValueError(f"its format is {metadata.get('format')!r}")
            facts = json.loads(metadata["facts"])
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118
    except (ValueError, KeyError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path}: no {file_format} file ({error}); train it anew") from error
