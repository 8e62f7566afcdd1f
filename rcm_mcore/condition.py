"""What a network is told besides the noisy state and its time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rcm_mcore.config import ModelConfig


class Condition(NamedTuple):
    """Text and, for image- and video-conditioned networks (`model.condition`), what is given of the video."""

    text: Tensor  # [B, X, text_dim], padded with zero rows
    # [B, C, F, H, W], normalized. Wan: the given frames encoded as a video, zero frames elsewhere. Cosmos: the clean video, of
    # which a network looks at the first `frames` latent frames alone.
    latents: Tensor | None = None
    frames: Tensor | None = None  # [B] whole numbers, Cosmos
    image: Tensor | None = None  # [B, image_tokens, image_dim], Wan: rows of the image encoder, first frame before last
    # [B], `model.interval`: rectified-flow time e <= s where the interval [e, s] ends whose average velocity is asked for
    end: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Condition:
        """`function` of every tensor that is there."""
        return Condition._make(None if value is None else function(value) for value in self)

    def rows(self, rows: Any) -> Condition:
        """The same for some samples."""
        return self.map(lambda value: value[rows])

    def with_text(self, text: Tensor) -> Condition:
        """The same with another text."""
        return self._replace(text=text)

    def generated_share(self, frames: int) -> Tensor | float:
        """Of the `frames` latent frames of each sample, the share [B] that is not given."""
        return 1.0 if self.frames is None else 1 - self.frames.double() / frames

    @staticmethod
    def cat(conditions: list[Condition]) -> Condition:
        """One batch of several."""
        return Condition._make(None if values[0] is None else torch.cat(values) for values in zip(*conditions))

    def check(self, model: ModelConfig, latents: tuple[int, ...]) -> None:
        """ValueError unless this is what `model` takes with a state of shape `latents`, [B, C, F, H, W]."""
        batch = latents[0]
        shapes: dict[str, tuple[int, ...] | None] = {
            "text": (batch, model.text_len, model.text_dim),
            "latents": None if model.condition == "text" else latents,
            "frames": (batch,) if model.condition == "frames" else None,
            "image": (batch, model.image_tokens, model.image_dim) if model.image_tokens else None,
            "end": (batch,) if model.interval else None,
        }
        for name, value in self._asdict().items():
            shape = shapes[name]
            network = f"model.interval={model.interval}" if name == "end" else f"model.condition={model.condition}"
            if value is None and shape is not None:
                raise ValueError(f"condition without {name}: a network of {network} takes {list(shape)}")
            if value is not None and shape is None:
                raise ValueError(f"condition with {name}: a network of {network} takes none")
            if value is not None and value.shape != shape:
                padding = ", padded with zero rows" if name == "text" else ""
                raise ValueError(f"{name} has shape {list(value.shape)}: must be {list(shape or ())}{padding}")
