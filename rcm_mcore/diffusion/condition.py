"""What a network is told besides the noisy state and its time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Condition(NamedTuple):
    """Text and, for image- and video-conditioned networks (`model.condition`), what is given of the video."""

    text: Tensor  # [B, X, text_dim], padded with zero rows
    # [B, C, F, H, W], normalized. Wan: the given frames encoded as a video, zero frames elsewhere. Cosmos: the clean video, of
    # which a network looks at the first `frames` latent frames alone.
    latents: Tensor | None = None
    frames: Tensor | None = None  # [B] whole numbers, Cosmos
    image: Tensor | None = (
        None  # [B, image_tokens, image_dim], Wan: rows of the image encoder, the first frame's before the last's
    )

    def map(self, function: Callable[[Tensor], Tensor]) -> Condition:
        """`function` of every tensor that is there."""
        return Condition._make(None if value is None else function(value) for value in self)

    def rows(self, rows: Any) -> Condition:
        """The same for some samples."""
        return self.map(lambda value: value[rows])

    def with_text(self, text: Tensor) -> Condition:
        """The same with another text."""
        return self._replace(text=text)

    @staticmethod
    def cat(conditions: list[Condition]) -> Condition:
        """One batch of several."""
        return Condition._make(None if values[0] is None else torch.cat(values) for values in zip(*conditions))
