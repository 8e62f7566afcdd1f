"""Attention whose forward pass also carries a tangent.

A tangent is named `x_dot`, a gradient `dx`. This package depends on torch alone.
"""

from rcm_kernels.attention import flash_attention, flash_attention_backward, flash_attention_jvp

__all__ = ["flash_attention", "flash_attention_backward", "flash_attention_jvp"]
