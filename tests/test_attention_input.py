"""What the attention functions refuse, and that the message names the argument, its value and what is accepted."""

import inspect
import math

import pytest
import torch
from rcm_kernels import flash_attention, flash_attention_backward, flash_attention_jvp


def valid_arguments():
    q, q_dot = torch.randn(2, 2, 5, 3, 16)
    k, v, k_dot, v_dot = torch.randn(4, 2, 6, 3, 16)
    out, lse = flash_attention(q, k, v)
    return dict(q=q, k=k, v=v, q_dot=q_dot, k_dot=k_dot, v_dot=v_dot, dout=q_dot, out=out, lse=lse, scale=0.25)


BACKWARD, JVP, FORWARD = flash_attention_backward, flash_attention_jvp, flash_attention
TENSORS = [
    (f, name) for f in (FORWARD, JVP, BACKWARD) for name in inspect.signature(f).parameters if name not in ("scale", "wide_out")
]


def refuse(function, message, **changes):
    arguments = valid_arguments() | changes
    with pytest.raises(ValueError, match=message):
        function(**{name: arguments[name] for name in inspect.signature(function).parameters if name in arguments})


@pytest.mark.parametrize("function,name", TENSORS, ids=lambda x: getattr(x, "__name__", x))
def test_every_tensor_is_checked(function, name):
    x = valid_arguments()[name]
    culprit = ".*" if name == "q" else name  # the others are compared with q
    rank = "lse has shape" if name == "lse" else f"{name} has (3 dimensions|shape)"
    refuse(function, rank, **{name: x[0]})
    refuse(function, rf"{culprit} has dtype torch\.float", **{name: x.double()})
    refuse(function, f"{culprit} is on device", **{name: x.to("meta")})
    refuse(function, "shape", **{name: torch.cat((x, x), dim=-1)})
    if name != "lse":
        refuse(function, rf"{name} has strides \(.*\.contiguous\(\)", **{name: x.transpose(1, 3).contiguous().transpose(1, 3)})


@pytest.mark.parametrize(
    "name,index,message",
    [
        ("k", (slice(1),), r"k has shape \(1, 6, 3, 16\).*must be \(2, Skv, 3, 16\)"),
        ("k", (..., slice(2), slice(None)), r"k has shape \(2, 6, 2, 16\).*must be \(2, Skv, 3, 16\)"),
        ("k", (..., slice(8)), r"k has shape \(2, 6, 3, 8\).*must be \(2, Skv, 3, 16\)"),
        ("k", (slice(None), slice(0)), r"k has shape \(2, 0, 3, 16\); every dimension"),
        ("q", (slice(None), slice(0)), r"q has shape \(2, 0, 3, 16\); every dimension"),
        ("v", (slice(None), slice(5)), r"v has shape \(2, 5, 3, 16\); it must be k's, \(2, 6, 3, 16\)"),
        ("q_dot", (slice(None), slice(4)), r"q_dot has shape \(2, 4, 3, 16\); it must be q's, \(2, 5, 3, 16\)"),
        ("k_dot", (slice(None), slice(4)), r"k_dot has shape \(2, 4, 3, 16\); it must be k's, \(2, 6, 3, 16\)"),
    ],
)
def test_shapes_that_do_not_belong_together(name, index, message):
    refuse(JVP, message, **{name: valid_arguments()[name][index]})


def test_unsupported_dtype():
    integers = {name: x.int() for name, x in valid_arguments().items() if name != "scale"}
    refuse(FORWARD, r"q has dtype torch\.int32; use one of torch\.float16, torch\.bfloat16", **integers)


def test_lse_of_another_shape_or_dtype():
    lse = valid_arguments()["lse"]
    refuse(BACKWARD, r"lse has shape \(2, 5, 3\); it must be \[B, N, Sq\] = \(2, 3, 5\)", lse=lse.transpose(1, 2))
    refuse(BACKWARD, r"lse has dtype torch\.bfloat16; it must be torch\.float32", lse=lse.bfloat16())


@pytest.mark.parametrize("function", [FORWARD, JVP, BACKWARD])
@pytest.mark.parametrize("scale", [0.0, -0.1, math.nan, math.inf])
def test_scale_is_a_finite_positive_number(function, scale):
    refuse(function, f"scale is {scale}; it must be a finite number above 0", scale=scale)
