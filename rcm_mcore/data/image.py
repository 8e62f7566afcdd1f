"""What Wan's image-to-video networks are given: rows of a CLIP image encoder, and a video of the given frames alone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from rcm_mcore.data.media_input import to_unit
from rcm_mcore.data.vae import VideoVAE

GivenFrames = Literal["image", "first_last"]  # as ModelConfig.condition


def given_frames(video: Tensor, condition: GivenFrames) -> Tensor:
    """The frames [n, 3, H, W] of a video [3, F, H, W] that a network is given: the first, or the first and the last."""
    where = [0] if condition == "image" else [0, -1]
    return video[:, where].transpose(0, 1)


def given_video(frames: Tensor, count: int) -> Tensor:
    """The video [3, count, H, W] whose first (and last) frame is given, [n, 3, H, W] in [-1, 1], and whose others are zeros.

    Zero is a grey picture; it is what Wan's networks were trained with.
    """
    video = frames.new_zeros(frames.shape[1], count, *frames.shape[2:])
    video[:, 0] = frames[0]
    if len(frames) == 2:
        video[:, -1] = frames[1]
    return video


def encode_given(frames: Tensor, count: int, *, vae: VideoVAE, image_encoder: ImageEncoder) -> tuple[Tensor, Tensor]:
    """What a network is told of the given frames [n, 3, H, W], uint8, of a video of `count` frames.

    Returns latents [C, F, h, w] of the video with zeros for the others, float32, and rows [n * tokens, width] on the CPU.
    """
    rows = image_encoder.encode(frames)
    video = given_video(to_unit(frames.to(vae.device)), count)
    return vae.encode(video[None])[0], rows


def rows_of_image(folder: str | os.PathLike[str]) -> tuple[int, int]:
    """Rows that the image encoder of a folder gives of an image, and their width; nothing is loaded.

    Raises: ValueError when it or its image processor is missing, or it is of another kind.
    """
    from transformers import CLIPVisionConfig

    _find(Path(folder), "image_processor", "preprocessor_config.json")
    model_folder = _find(Path(folder), "image_encoder", "config.json")
    try:
        _check_kind(model_folder)
        config = CLIPVisionConfig.from_pretrained(model_folder, local_files_only=True)
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"image encoder folder {model_folder} cannot be loaded: {str(error).splitlines()[0]}") from None
    return (config.image_size // config.patch_size) ** 2 + 1, config.hidden_size


class ImageEncoder:
    """A frozen CLIP vision model and its image processor, from the folder of a Wan image-to-video pipeline.

    Both are looked for in `image_encoder` and `image_processor`, or in the folder itself.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        """Loads both; never downloads. Raises: ValueError when one is missing, damaged or of another kind."""
        from transformers import CLIPImageProcessor, CLIPVisionModel

        folder = Path(folder)
        model_folder = _find(folder, "image_encoder", "config.json")
        processor_folder = _find(folder, "image_processor", "preprocessor_config.json")
        try:
            _check_kind(model_folder)
            self._processor = CLIPImageProcessor.from_pretrained(processor_folder, local_files_only=True)
            model, report = CLIPVisionModel.from_pretrained(
                model_folder, local_files_only=True, dtype=dtype, output_loading_info=True
            )
            if report["missing_keys"]:
                raise ValueError(f"weights are missing, such as {min(report['missing_keys'])}")
        except (OSError, RuntimeError, SafetensorError, ValueError, AttributeError) as error:
            raise ValueError(f"image encoder folder {model_folder} cannot be loaded: {str(error).splitlines()[0]}") from None
        self._model = model.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Rows [n * tokens, width], float32 on CPU, of frames [n, 3, H, W] uint8: the layer before the last, frame by frame."""
        images = [frame.permute(1, 2, 0).cpu().numpy() for frame in frames]
        pixels = self._processor(images=images, return_tensors="pt").pixel_values
        hidden = self._model(pixels.to(self._model.device, self._model.dtype), output_hidden_states=True).hidden_states[-2]
        return hidden.flatten(0, 1).float().cpu()


def _check_kind(folder: Path) -> None:
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind != "clip_vision_model":
        raise ValueError(f"it holds {kind}, not clip_vision_model")


def _find(folder: Path, part: str, marker: str) -> Path:
    found = next((path for path in (folder / part, folder) if (path / marker).is_file()), None)
    if found is None:
        raise ValueError(f"image encoder folder {folder}: no {marker} in it or in {part}/")
    return found
