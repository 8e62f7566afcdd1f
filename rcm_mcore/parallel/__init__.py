"""Meshes, tensor- and sequence-parallel building blocks, reproducible noise, and megatron-core on CPU."""
