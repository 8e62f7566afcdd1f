"""Videos and images with captions to shards of latents and text embeddings, dealt to ranks, restartable (see build.py)."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from rcm_mcore.data.ahead import ahead
from rcm_mcore.data.build import NEGATIVE_EMBEDDING, Outcome, ShardFolder, write_embedding
from rcm_mcore.data.image import ImageEncoder, encode_given, given_frames
from rcm_mcore.data.media_input import BadInput, MediaInput, Size, list_inputs, read_media, to_unit
from rcm_mcore.data.shards import BadSample, Sample, as_float32
from rcm_mcore.data.vae import VideoVAE, latent_shape

if TYPE_CHECKING:
    from rcm_mcore.data.text import TextEncoder

logger = logging.getLogger(__name__)

_PACKAGES = ("torch", "diffusers", "transformers", "av", "pillow", "ftfy")


@dataclass(frozen=True, kw_only=True)
class EncodeRequest:
    """What to encode, and how.

    Attributes:
        source: a folder or a CSV file (`list_inputs`).
        out: where the shards go, one subfolder for each size if there are several.
        vae, text_encoder, image_encoder: local folders; the last for `condition` image and first_last alone.
        sizes: (height, width) of the buckets, multiples of 16.
        frames: of each video, 4n + 1; 1 for images.
        fps: frames a second that are chosen of a video.
        condition: what of a video a network is given besides text, as ModelConfig.condition.
        negative_prompt: its embedding is written beside the shards; None: none is.
        long_captions: skip captions of more than 512 tokens, or cut them, as Wan's and Cosmos's samplers do silently.
        store_dtype: of the tensors in the shards.
        vae_dtype, text_dtype: of the encoders' weights; the image encoder has that of the VAE.
        decode_workers: threads that decode ahead of the encoders; each holds one video.
    """

    source: Path
    out: Path
    vae: str
    text_encoder: str
    image_encoder: str | None = None
    sizes: tuple[Size, ...]
    frames: int = 81
    fps: Fraction = Fraction(16)
    condition: Literal["text", "image", "first_last"] = "text"
    negative_prompt: str | None = None
    long_captions: Literal["skip", "cut"] = "skip"
    samples_per_shard: int = 64
    store_dtype: torch.dtype = torch.bfloat16
    vae_dtype: torch.dtype = torch.float32
    text_dtype: torch.dtype = torch.bfloat16
    decode_workers: int = 2

    def __post_init__(self) -> None:
        if not self.sizes:
            raise ValueError("sizes is empty: give at least one, such as 480x832")
        if len(set(self.sizes)) < len(self.sizes):
            raise ValueError(f"sizes: {' '.join(map(size_name, self.sizes))} names one twice")
        for height, width in self.sizes:
            latent_shape(self.frames, height, width)
        if not self.fps > 0:
            raise ValueError(f"fps={float(self.fps):g}: must be positive")
        if self.decode_workers < 1:
            raise ValueError(f"decode_workers={self.decode_workers}: must be at least 1")
        if self.condition != "text" and self.frames == 1:
            raise ValueError(f"condition={self.condition} is for videos, frames=1 is an image; give 5 frames or more")
        if (self.condition == "text") != (self.image_encoder is None):
            need = "needs" if self.image_encoder is None else "has no use for"
            raise ValueError(f"condition={self.condition} {need} an image encoder")

    def arguments(self, inputs: Sequence[MediaInput]) -> dict[str, Any]:
        """What the shards depend on, for `ShardFolder`."""
        listing = hashlib.sha256(json.dumps([[entry.name, entry.caption] for entry in inputs]).encode())
        return {
            "dataset": "encode",
            "source": str(self.source.resolve()),
            "inputs_sha256": listing.hexdigest(),
            **{name: getattr(self, name) for name in ("vae", "text_encoder", "image_encoder")},
            "sizes": [size_name(size) for size in self.sizes],
            "fps": str(self.fps),
            **{name: getattr(self, name) for name in ("frames", "condition", "negative_prompt", "long_captions")},
            **{name: str(getattr(self, name)).removeprefix("torch.") for name in ("store_dtype", "vae_dtype", "text_dtype")},
        }


def size_name(size: Size) -> str:
    """`480x832` of (480, 832)."""
    return f"{size[0]}x{size[1]}"


class MediaEncoder:
    """The encoders of a request on one device; never downloads. Raises: ValueError when one cannot be loaded."""

    def __init__(self, request: EncodeRequest, *, device: torch.device | str) -> None:
        from rcm_mcore.data.text import TextEncoder  # transformers takes seconds

        self.request = request
        self.text: TextEncoder = TextEncoder(request.text_encoder, device=device, dtype=request.text_dtype)
        self.vae = VideoVAE(request.vae, device=device, dtype=request.vae_dtype)
        self.image = None
        if request.image_encoder is not None:
            self.image = ImageEncoder(request.image_encoder, device=device, dtype=request.vae_dtype)

    def check_caption(self, entry: MediaInput) -> None:
        """Raises: BadInput for a caption that is missing, empty, or too long."""
        from rcm_mcore.data.text import MAX_TOKENS

        if entry.caption is None:
            raise BadInput(f"there is no caption file {Path(entry.name).with_suffix('.txt').name}")
        if not entry.caption.strip():
            raise BadInput("the caption is empty")
        (tokens,) = self.text.token_counts([entry.caption])
        if tokens > MAX_TOKENS and self.request.long_captions == "skip":
            raise BadInput(f"the caption has {tokens} tokens, at most {MAX_TOKENS} are encoded")

    def encode(self, caption: str, pixels: Tensor) -> Sample:
        """The sample of a caption and a video [3, F, H, W] uint8, as it is stored. Raises: BadSample if it is not finite."""
        request = self.request
        (embed,) = self.text.encode([caption])
        given = image = None
        if self.image is not None:
            assert request.condition != "text"
            frames = given_frames(pixels, request.condition)
            given, image = encode_given(frames, request.frames, vae=self.vae, image_encoder=self.image)
            given, image = given.to(request.store_dtype).cpu(), image.to(request.store_dtype)
        latent = self.vae.encode(to_unit(pixels.to(self.vae.device))[None])[0]
        sample = Sample(
            latent=latent.to(request.store_dtype).cpu(),
            embed=embed.to(request.store_dtype),
            prompt=caption.strip(),
            given=given,
            image=image,
        )
        as_float32(sample)
        return sample


def encode_dataset(
    request: EncodeRequest, *, device: torch.device | str, rank: int = 0, world_size: int = 1
) -> dict[str, Any] | None:
    """Encodes what this rank has to, and returns the manifest if everything is there then.

    Raises: ValueError for what cannot work, before anything is written; OSError.
    """
    inputs = list_inputs(request.source)
    files = [] if request.negative_prompt is None else [NEGATIVE_EMBEDDING]
    folder = ShardFolder(
        request.out,
        arguments=request.arguments(inputs),
        items=len(inputs),
        samples_per_shard=request.samples_per_shard,
        files=files,
    )
    manifest = folder.complete()
    if manifest is not None:
        logger.info("%s is complete: nothing to do", request.out)
        return manifest
    blocks = folder.pending(rank, world_size)
    items = [item for block in blocks for item in folder.items_of(block)]
    missing_files = [name for name in files if not (request.out / name).is_file()] if rank == 0 else []
    if blocks or missing_files:
        encoder = MediaEncoder(request, device=device)
        folder.begin()
        for name in missing_files:
            assert request.negative_prompt is not None
            (embed,) = encoder.text.encode([request.negative_prompt])
            write_embedding(request.out / name, embed.to(request.store_dtype))
        folder.write_all(
            _outcomes(items, inputs, encoder), items=len(items), label=f"rank {rank} of {world_size}", show=rank == 0
        )
    return folder.finish(versions={package: version(package) for package in _PACKAGES})


def _outcomes(items: Sequence[int], inputs: Sequence[MediaInput], encoder: MediaEncoder) -> Iterator[Outcome]:
    """The outcome of each item, in order; files are decoded ahead in threads."""
    request = encoder.request
    decode = partial(read_media, frames=request.frames, fps=request.fps, sizes=request.sizes)

    def start(item: int, pool: ThreadPoolExecutor) -> Future[Tensor]:
        # In this thread: a tokenizer is not to be used by two.
        try:
            encoder.check_caption(inputs[item])
        except BadInput as error:
            refused: Future[Tensor] = Future()
            refused.set_exception(error)
            return refused
        return pool.submit(decode, inputs[item].path)

    for item, decoded in ahead(start, items, workers=request.decode_workers):
        entry = inputs[item]
        try:
            pixels = decoded.result()
            assert entry.caption is not None
            sample = encoder.encode(entry.caption, pixels)
        except (BadInput, BadSample) as error:
            yield Outcome(item, entry.name, reason=str(error))
            continue
        subfolder = size_name((pixels.shape[2], pixels.shape[3])) if len(request.sizes) > 1 else ""
        yield Outcome(item, entry.name, sample, subfolder)
