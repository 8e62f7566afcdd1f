"""Diffusion transformers on megatron-core; each forward takes tensors or Duals."""
