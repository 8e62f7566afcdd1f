"""Cosmos-Predict2 on megatron-core."""
