"""Which network: a named size of a family, any of whose fields may be overridden."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

# Released networks (architectures.md A.0, B.0); `tiny` is ours, for tests and the demo.
_TINY = dict(
    num_layers=3, hidden_size=192, num_attention_heads=6, ffn_hidden_size=768, in_channels=32, text_dim=64, text_len=16
)
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "wan": {
        "tiny": _TINY,
        "1.3B": dict(num_layers=30, hidden_size=1536, num_attention_heads=12, ffn_hidden_size=8960),
        "14B": dict(num_layers=40, hidden_size=5120, num_attention_heads=40, ffn_hidden_size=13824),
    },
    "cosmos": {
        "tiny": _TINY | dict(adaln_rank=32),
        "0.6B": dict(num_layers=20, hidden_size=1280, num_attention_heads=20, ffn_hidden_size=5120),
        "2B": dict(num_layers=28, hidden_size=2048, num_attention_heads=16, ffn_hidden_size=8192),
        "14B": dict(num_layers=36, hidden_size=5120, num_attention_heads=40, ffn_hidden_size=20480),
    },
}
_FAMILY_FIELDS: dict[str, dict[str, Any]] = {"cosmos": dict(text_dim=1024)}
# Of the students of each family: TrigFlow times between the first step's and 0 (method.md 6; the paper takes Cosmos' for both).
MID_TIMES: dict[str, tuple[float, ...]] = {"wan": (1.5, 1.4, 1.0), "cosmos": (1.3, 1.0, 0.6)}
_CONDITIONS = {"wan": ("text", "image", "first_last"), "cosmos": ("text", "frames")}
_MASK_CHANNELS = 4  # of a given frame in Wan's image-to-video: frames of video to a frame of latents


def fields_of_size(family: str, size: str, condition: str) -> dict[str, Any]:
    """The fields that a named network sets; ValueError for a size that the family does not have."""
    sizes = SIZES.get(family, {})
    if family in SIZES and size not in sizes:
        raise ValueError(f"model.size={size}: model.family={family} has the sizes {', '.join(sizes)}")
    fields = {**_FAMILY_FIELDS.get(family, {}), **sizes.get(size, {})}
    if family == "cosmos":
        fields["rope_ratios"] = [1.0, 4.0, 4.0]
        if condition == "frames":
            fields["rope_ratios"] = [20 / 24, 2.0, 2.0] if size == "14B" else [1.0, 3.0, 3.0]
    return fields


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture and numerics of one network; fields left out take the values of `family`, `size` and `condition`."""

    family: Literal["wan", "cosmos"] = "wan"
    size: Literal["tiny", "0.6B", "1.3B", "2B", "14B"]
    # What is given besides text: the first frame (Wan I2V), the first and the last (Wan FLF2V), or the first latent frames
    # (Cosmos V2W).
    condition: Literal["text", "image", "first_last", "frames"] = "text"
    interval: bool = (
        False  # told how long the interval is whose average velocity is asked for (students of distill.method=meanflow)
    )
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    ffn_hidden_size: int
    in_channels: int = 16  # latent channels, in and out
    patch_size: tuple[int, int, int] = (1, 2, 2)  # (time, height, width) latent positions of a token
    freq_dim: int = 256  # Wan: width of the sinusoid of time
    adaln_rank: int = 256  # Cosmos: of the linears from time to shifts, scales and gates
    rope_ratios: tuple[float, float, float] = (1.0, 1.0, 1.0)  # Cosmos: stretch the rotary base of time, height, width
    text_dim: int = 4096  # width of the text encoder
    text_len: int = 512  # rows of text, zero-padded
    image_dim: int = 1280  # Wan I2V: width of the image encoder
    image_len: int = 257  # Wan I2V: rows that it gives of an image
    eps: float = 1e-6  # of every norm
    dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16"  # parameters and matmuls
    # Keep the residual stream in float32, as the official Wan code does: rounding it after every addition nearly doubles
    # the error of a deep network and of its tangent (docs/benchmarks/tangent_h200_202611.md).
    fp32_residual: bool = True
    bf16_time: bool = False  # Wan: round 1000 s to bfloat16, for students trained elsewhere that way
    # Of blocks, in backward: nothing, all but the self-attention, or all; of a dual pass always all but the self-attention.
    recompute: Literal["none", "selective", "full"] = "selective"
    compile: bool = True  # on GPUs, fuse what is computed between matmuls and attention with torch.compile
    transformer_impl: Literal["local", "transformer_engine"] = "local"
    # The linears of blocks in float8 where a pass needs no gradient and no tangent: teacher, rollouts, evaluated fake score.
    fp8_forwards: bool = False

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def patch_channels(self) -> int:
        """Channels of what the patches are cut from: latents, masks, and the latents of given frames."""
        if self.family == "cosmos":
            return self.in_channels + 1 + (self.condition == "frames")
        return self.in_channels if self.condition == "text" else 2 * self.in_channels + _MASK_CHANNELS

    @property
    def image_tokens(self) -> int:
        """Rows of image embedding that the network sees beside the text."""
        return {"image": 1, "first_last": 2}.get(self.condition, 0) * self.image_len

    def __post_init__(self) -> None:
        if self.condition not in _CONDITIONS[self.family]:
            raise ValueError(
                f"model.condition={self.condition}: model.family={self.family} takes {', '.join(_CONDITIONS[self.family])}"
            )
        if self.fp8_forwards and self.dtype != "bfloat16":
            raise ValueError(f"model.fp8_forwards=true with model.dtype={self.dtype}: float8 products come out as bfloat16")
        if self.fp8_forwards and self.transformer_impl != "local":
            raise ValueError(
                f"model.fp8_forwards=true with model.transformer_impl={self.transformer_impl}: float8 is for the linears of "
                "model.transformer_impl=local"
            )
        for name in (
            "num_layers",
            "hidden_size",
            "num_attention_heads",
            "ffn_hidden_size",
            "in_channels",
            "adaln_rank",
            "text_dim",
            "text_len",
            "image_dim",
            "image_len",
        ):
            _positive(f"model.{name}", getattr(self, name))
        if any(p < 1 for p in self.patch_size):
            raise ValueError(f"model.patch_size={list(self.patch_size)}: every entry must be at least 1")
        if self.condition == "frames" and self.patch_size[0] != 1:
            raise ValueError(f"model.patch_size={list(self.patch_size)}: model.condition=frames needs tokens of one frame")
        if any(not ratio > 0 for ratio in self.rope_ratios):
            raise ValueError(f"model.rope_ratios={list(self.rope_ratios)}: every entry must be positive")
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


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}={value}: must be at least 1")
