"""From prompts to files: samples on the mesh, and beside them the decoding and writing of those that are done."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from rcm_mcore.config import ModelConfig
from rcm_mcore.data import media
from rcm_mcore.data.digits import DigitCodec
from rcm_mcore.data.vae import VideoVAE, find_vae
from rcm_mcore.interop.files import read_json
from rcm_mcore.sampling.background import Background
from rcm_mcore.sampling.folder import Output, SampleFolder
from rcm_mcore.sampling.request import Draw, SampleRequest, check_request
from rcm_mcore.sampling.sampler import Sampler

log = logging.getLogger(__name__)


def check_output(request: SampleRequest, output: Output, world_size: int) -> None:
    """ValueError naming what is wrong with a request or what it should be written as, before anything is loaded."""
    model = check_request(request, world_size)
    _check_text_encoder(Path(request.text_encoder), model)
    if output.codec is not None and output.vae is not None:
        raise ValueError("--codec is for the digits task and --vae for videos: give one of them")
    if not 0 < output.fps < math.inf:
        raise ValueError(f"--fps {output.fps}: must be positive")
    for flag, path in (("vae", output.vae), ("codec", output.codec)):
        if path is None:
            continue
        channels = find_vae(path)[1].get("z_dim", 16) if flag == "vae" else DigitCodec.load(path).channels
        if channels != model.in_channels:
            raise ValueError(f"--{flag} {path}: its latents have {channels} channels, the network's {model.in_channels}")


def _check_text_encoder(folder: Path, model: ModelConfig) -> None:
    for part, marker in (("tokenizer", "tokenizer_config.json"), ("text_encoder", "config.json")):
        if not any((path / marker).is_file() for path in (folder / part, folder)):
            raise ValueError(f"--text-encoder {folder}: no {marker} in it or in {part}/")
    config = folder / "text_encoder" / "config.json"
    width = read_json(config if config.is_file() else folder / "config.json").get("d_model")
    if width not in (None, model.text_dim):  # none: it is of another kind, which loading says
        takes = f"the network takes model.text_dim={model.text_dim}"
        raise ValueError(f"--text-encoder {folder}: its rows have {width} numbers, {takes}")


def generate(request: SampleRequest, output: Output) -> None:
    """Collective: sample a whole request into `output.folder`; what is there of the same request is kept (`SampleFolder`).

    Raises ValueError as `check_output`, and what decoding or writing raised.
    """
    check_output(request, output, int(os.environ.get("WORLD_SIZE", "1")))
    fill(SampleFolder(request, output), request, output)


class Folder(Protocol):
    """What `fill` needs of a folder, on every rank unless rank 0 is named."""

    path: Path
    draws: list[Draw]
    is_complete: bool

    def begin(self, sampler: Sampler) -> None:
        """On rank 0, first."""

    def missing(self) -> tuple[list[Draw], list[Draw]]:
        """On rank 0: samples to make, and those whose latents are kept and whose file is to be made."""

    def save_part(self, draw: Draw, latents: Tensor) -> None:
        """Keep the latents [C, F, H, W] of a sample, so that `load_part` finds them."""

    def load_part(self, draw: Draw) -> Tensor:
        """Of a sample of the second list of `missing`."""

    def save_media(self, draw: Draw, pixels: np.ndarray) -> None:
        """Write the file of a sample from pixels [F, H, W, 3]."""

    def failed(self, draw: Draw, reason: str) -> None:
        """Take note that there will be no such sample, or raise ValueError."""

    def finish(self, sampler: Sampler, *, seconds: float, sampled: int) -> None:
        """On rank 0, when everything is written."""


def fill(folder: Folder, request: SampleRequest, output: Output) -> None:
    """Collective: make what a folder lacks, with the sampler and the batches of a request.

    The ranks that work on one sample leave its decoding to one of them, in a thread with a CUDA stream of its own, while they
    all sample the next.
    """
    if folder.is_complete:
        log.info("%s: all %d samples are there", folder.path, len(folder.draws))
        return
    with Sampler(request) as sampler:
        mesh = sampler.mesh
        plan: list[Any] = [None]
        if mesh.is_main:
            folder.begin(sampler)
            plan = [folder.missing()]
        dist.broadcast_object_list(plan)  # file systems may show a rank less than another
        unsampled, undecoded = plan[0]
        finisher = Finisher(folder, output, mesh.device) if mesh.reads else None
        with Background(finisher) if finisher is not None else contextlib.nullcontext() as background:
            if background is not None:
                for draw in undecoded[mesh.dp_rank :: mesh.dp_size]:
                    background.put(draw, None)
            for batch, latents in sampler.run(unsampled, batch_size=request.batch_size, given=request.given):
                if background is not None:
                    for draw, row in zip(batch, latents):
                        background.put(draw, row)
        seconds: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(seconds, sampler.seconds)  # a barrier as well: everything is written
        if mesh.is_main:
            folder.finish(sampler, seconds=max(seconds), sampled=len(unsampled))
        dist.barrier()


class Finisher:
    """What happens to the latents of a sample: kept, decoded, written. Called in one thread."""

    def __init__(self, folder: Folder, output: Output, device: torch.device) -> None:
        """Loads the VAE, if there is one."""
        self._folder, self._device = folder, device
        self._vae = None
        if output.vae is not None:
            self._vae = VideoVAE(output.vae, device=device, dtype=getattr(torch, output.vae_dtype), tiled=output.tiled)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:  # the weights may still be on their way
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def __call__(self, draw: Draw, latents: Tensor | None) -> None:
        """`latents` [C, F, H, W] on the CPU; none where they were kept before."""
        if latents is None:
            latents = self._folder.load_part(draw)
        elif not latents.isfinite().all():
            self._folder.failed(draw, "the network gave numbers that are not finite")
            return
        else:
            self._folder.save_part(draw, latents)
        if self._vae is not None:
            self._folder.save_media(draw, self._decode(self._vae, latents))

    def _decode(self, vae: VideoVAE, latents: Tensor) -> np.ndarray:
        """Pixels [F, H, W, 3]."""
        with contextlib.ExitStack() as stack:
            if self._stream is not None:  # the current device is that of a thread
                stack.enter_context(torch.cuda.device(self._device))
                stack.enter_context(torch.cuda.stream(self._stream))
            return media.to_pixels(vae.decode(latents[None])[0]).cpu().numpy()
