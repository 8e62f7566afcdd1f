"""The embedding of the negative prompt, a file beside the shards."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rcm_mcore.data.shards import pad_text


def load_embedding(path: str | os.PathLike[str], *, text_len: int, text_dim: int) -> Tensor:
    """Text rows [text_len, text_dim] float32 from `embed` of a .safetensors file, or a torch-saved tensor (the rCM form).

    Rows that are missing are zeros. Raises ValueError naming the file when it cannot be used; a pickle that wants to run
    code is refused.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            rows = load_file(path)["embed"]
        else:
            rows = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, KeyError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"negative_embedding={path} cannot be read: {str(error).splitlines()[0]}") from None
    if isinstance(rows, Tensor) and rows.ndim == 3 and len(rows) == 1:
        rows = rows[0]
    if not isinstance(rows, Tensor) or rows.ndim != 2 or rows.shape[1] != text_dim:
        what = list(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
        raise ValueError(f"negative_embedding={path} holds {what}: must be text rows [n, {text_dim}] (model.text_dim)")
    rows = rows.float()
    if len(rows) > text_len:
        raise ValueError(f"negative_embedding={path} has {len(rows)} rows, more than model.text_len={text_len}")
    if not bool(rows.isfinite().all()):
        raise ValueError(f"negative_embedding={path} holds NaN or infinite values")
    return pad_text(rows, text_len)
