"""The networks of a run as functions of states, whatever their parallelism.

A velocity network here maps (x_s [B, C, F, H, W], s [B], text [B, X, text_dim]) to v, tensors or Duals.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rcm_mcore.diffusion.trigflow import Velocity
from rcm_mcore.dual import MaybeDual

Network = Callable[[MaybeDual, MaybeDual, Tensor], Any]


def conditioned(network: Network, text: Tensor) -> Velocity:
    """`network` on this text."""
    return lambda x, s: network(x, s, text)


def guided(network: Network, text: Tensor, negative: Tensor, guidance: float) -> Velocity:
    """Classifier-free guidance v_u + g (v_c - v_u), both branches in one forward of 2B samples (method.md 1).

    text [B, X, text_dim]; negative [1, X, text_dim]. With guidance 1 the unconditional branch is not computed.
    """
    if guidance == 1.0:
        return conditioned(network, text)

    def velocity(x: Tensor, s: Tensor) -> Tensor:
        both = torch.cat([text, negative.expand_as(text)])
        conditional, unconditional = network(torch.cat([x, x]), torch.cat([s, s]), both).chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    return velocity
