"""Wan2.1 on megatron-core."""
