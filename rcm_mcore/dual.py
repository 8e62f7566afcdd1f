"""Dual numbers: a tensor and its directional derivative, and the three ways layers treat them.

A layer has one forward that takes a tensor or a Dual. Linear maps go through `linear`, row-wise functions through `rowwise`,
and attention has a kernel of its own (rcm_kernels). A tangent never carries a graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor


class Dual(NamedTuple):
    """`primal` and the derivative `tangent` of it, tensors of the same shape, dtype and device."""

    primal: Tensor
    tangent: Tensor


MaybeDual = Tensor | Dual


def primal(x: MaybeDual) -> Tensor:
    """The value of a tensor or a Dual."""
    return x.primal if isinstance(x, Dual) else x


def stack(x: MaybeDual, dim: int = 1) -> Tensor:
    """A Dual as one tensor of twice the batch, primal rows first; a tensor as it is. `dim`: the batch dimension."""
    return torch.cat(x, dim) if isinstance(x, Dual) else x


def unstack(x: Tensor, dim: int = 1) -> Dual:
    """The inverse of `stack`: two views of `x`; the tangent is cut off the graph."""
    value, tangent = x.chunk(2, dim)
    return Dual(value, tangent.detach())


@overload
def linear(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor: ...
@overload
def linear(fn: Callable[[Tensor], Tensor], x: Dual) -> Dual: ...
@overload
def linear(fn: Callable[[Tensor], Tensor], x: MaybeDual) -> MaybeDual: ...
def linear(fn: Callable[[Tensor], Tensor], x: MaybeDual) -> MaybeDual:
    """Apply a linear map without bias, to each half of a Dual by itself: putting them together would copy both (ADR 6)."""
    if not isinstance(x, Dual):
        return fn(x)
    value = fn(x.primal)
    with torch.no_grad():
        return Dual(value, fn(x.tangent))


def rowwise(fn: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Apply a pure function to tensors or Duals; with a Dual among `args` every output is a Dual.

    `fn` returns a tensor or a tuple of tensors; arguments that are no Dual have a zero tangent. The tangent is
    `torch.func.jvp` of `fn`, written by nobody; the primal keeps its graph if gradients are on.
    """
    where = [i for i, a in enumerate(args) if isinstance(a, Dual)]
    if not where:
        return fn(*args, **options)

    def of_duals(*values: Tensor) -> Any:
        filled = list(args)
        for i, value in zip(where, values):
            filled[i] = value
        return fn(*filled, **options)

    out, out_dot = torch.func.jvp(of_duals, tuple(args[i].primal for i in where), tuple(args[i].tangent for i in where))  # type: ignore[misc]
    if isinstance(out, tuple):
        return tuple(Dual(o, o_dot.detach()) for o, o_dot in zip(out, out_dot))
    return Dual(out, out_dot.detach())


Rowwise = Callable[..., Any]


def fused(on: bool) -> Rowwise:
    """`rowwise`, or if `on` the same with each function and its tangent compiled into few kernels (torch.compile).

    A compiled function is made once a process for each combination of function, options, and shapes, strides and dtypes of the
    arguments, which takes seconds. The function must be one of a module, not a closure, or it is compiled again for every one.
    """
    return compiled_rowwise() if on else rowwise


@functools.cache
def compiled_rowwise(backend: str | Callable[..., Any] = "inductor") -> Rowwise:
    """See `fused`; `backend` as in torch.compile."""
    import torch._dynamo

    # All functions are variants of the one that is compiled here; the default limit is a handful.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1 << 14
    compiled = torch.compile(rowwise, dynamic=False, fullgraph=True, backend=backend)
    return lambda fn, *args, **options: compiled(fn, *map(_laid_out_alike, args), **options)


def _laid_out_alike(x: Any) -> Any:
    """A Dual whose halves have the same strides and storage offset: where they differ a compiled torch.func.jvp fails."""
    if not isinstance(x, Dual):
        return x
    value, tangent = x
    if value.stride() == tangent.stride() and value.storage_offset() == tangent.storage_offset():
        return x
    return Dual(*(half.clone(memory_format=torch.contiguous_format) for half in x))
