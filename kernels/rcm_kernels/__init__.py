"""Attention whose forward pass also carries a tangent.

A tangent is named `x_dot`, a gradient `dx`. This package needs torch alone; GPU
kernels join where triton or cuda-bindings is installed, as torch's CUDA builds have them.
"""

from rcm_kernels.attention import flash_attention, flash_attention_backward, flash_attention_jvp
from rcm_kernels.backends import backends, use_backends
from rcm_kernels.merge import Partial, merge

__all__ = [
    "Partial",
    "backends",
    "flash_attention",
    "flash_attention_backward",
    "flash_attention_jvp",
    "merge",
    "use_backends",
]
