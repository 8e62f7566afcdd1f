"""The networks of a run as functions of states, whatever their parallelism.

A velocity network here maps (x_s [B, C, F, H, W], s [B], condition) to v, tensors or Duals.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rcm_mcore.condition import Condition
from rcm_mcore.diffusion.trigflow import Velocity
from rcm_mcore.dual import MaybeDual

Network = Callable[[MaybeDual, MaybeDual, Condition], Any]


def conditioned(network: Network, condition: Condition) -> Velocity:
    """`network` under this condition."""
    return lambda x, s: network(x, s, condition)


def guided(network: Network, condition: Condition, negative: Tensor, guidance: float) -> Velocity:
    """Classifier-free guidance v_u + g (v_c - v_u), both branches in one forward of 2B samples (method.md 1).

    negative [1, X, text_dim]: the text of the unconditional branch, which sees given frames like the other. With guidance 1 it
    is not computed.
    """
    if guidance == 1.0:
        return conditioned(network, condition)

    def velocity(x: Tensor, s: Tensor) -> Tensor:
        both = Condition.cat([condition, condition.with_text(negative.expand_as(condition.text))])
        conditional, unconditional = network(torch.cat([x, x]), torch.cat([s, s]), both).chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    return velocity
