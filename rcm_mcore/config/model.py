"""Which network: a named size, any of whose fields may be overridden."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

# Wan2.1 text-to-video, architectures.md A.0; `tiny` is ours, for tests and the demo.
WAN_SIZES: dict[str, dict[str, Any]] = {
    "tiny": dict(
        num_layers=3, hidden_size=192, num_attention_heads=6, ffn_hidden_size=768, in_channels=32, text_dim=64, text_len=16
    ),
    "1.3B": dict(num_layers=30, hidden_size=1536, num_attention_heads=12, ffn_hidden_size=8960),
    "14B": dict(num_layers=40, hidden_size=5120, num_attention_heads=40, ffn_hidden_size=13824),
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture and numerics of one network; fields left out take the values of `size`."""

    size: Literal["tiny", "1.3B", "14B"]
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    ffn_hidden_size: int
    in_channels: int = 16  # latent channels, in and out
    patch_size: tuple[int, int, int] = (1, 2, 2)  # (time, height, width) latent positions of a token
    freq_dim: int = 256  # width of the sinusoid of time
    text_dim: int = 4096  # width of the text encoder
    text_len: int = 512  # rows of text, zero-padded
    eps: float = 1e-6  # of every norm
    dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16"  # parameters and matmuls
    fp32_residual: bool = False  # keep the residual stream in float32
    bf16_time: bool = False  # round 1000 s to bfloat16, for students trained elsewhere that way
    recompute: Literal["none", "full"] = "full"  # of blocks in backward; a dual pass always recomputes
    transformer_impl: Literal["local", "transformer_engine"] = "local"

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_attention_heads

    def __post_init__(self) -> None:
        for name in (
            "num_layers",
            "hidden_size",
            "num_attention_heads",
            "ffn_hidden_size",
            "in_channels",
            "text_dim",
            "text_len",
        ):
            _positive(f"model.{name}", getattr(self, name))
        if any(p < 1 for p in self.patch_size):
            raise ValueError(f"model.patch_size={list(self.patch_size)}: every entry must be at least 1")
        if self.freq_dim < 2 or self.freq_dim % 2:
            raise ValueError(f"model.freq_dim={self.freq_dim}: must be even and at least 2 (cosines, then sines)")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"model.hidden_size={self.hidden_size} is not a multiple of "
                f"model.num_attention_heads={self.num_attention_heads}"
            )
        if self.head_dim % 2 or self.head_dim < 6:
            raise ValueError(
                f"model.hidden_size / model.num_attention_heads = {self.head_dim}: a head must be even and at least 6 wide, "
                "so that rotary pairs can be dealt to time, height and width"
            )


@dataclass(frozen=True, kw_only=True)
class CosmosConfig(ModelConfig):
    """Cosmos-Predict2 text-to-image (architectures.md B.0); no configuration file names it yet."""

    adaln_rank: int = 256  # of the linears from time to shifts, scales and gates
    rope_ratios: tuple[float, float, float] = (1.0, 4.0, 4.0)  # stretch the base of the rotary angles: time, height, width


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}={value}: must be at least 1")
