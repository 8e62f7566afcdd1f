"""rCM distillation of video diffusion models on megatron-core."""

__version__ = "0.1.0"
