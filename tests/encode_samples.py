"""Tiny encoders and inputs for tests of `prepare_shards.py encode`."""

import shutil

import torch
from components import tiny_vae
from media_samples import steady, write_video
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from rcm_mcore.data.text import build_text_encoder, train_tokenizer

CAPTIONS = ["a red fox", "two boats", "a hen &amp; a fox", "boats at sea"]


def write_components(folder):
    """A pipeline folder with vae, tokenizer, text_encoder, image_encoder, image_processor."""
    tiny_vae(folder)
    train_tokenizer(CAPTIONS, folder / "text_encoder")
    build_text_encoder(folder / "text_encoder", seed=0, d_model=32, heads=2, d_ff=48)
    shutil.copytree(folder / "text_encoder", folder / "tokenizer", ignore=shutil.ignore_patterns("config.json", "model*"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vision = CLIPVisionConfig(
            hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=8
        )
        CLIPVisionModel(vision).save_pretrained(folder / "image_encoder")
    size = {"height": 16, "width": 16}
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size).save_pretrained(folder / "image_processor")
    return folder


def write_inputs(folder, count, *, frames=5):
    """`count` videos with captions and, among them, one input of each kind that is skipped."""
    folder.mkdir(exist_ok=True)
    for index in range(count):
        shape = (32, 48) if index % 3 else (48, 32)
        write_video(folder / f"{index:02d}.mp4", steady(frames, 16), first=index, height=shape[0], width=shape[1])
        (folder / f"{index:02d}.txt").write_text(CAPTIONS[index % len(CAPTIONS)] + "\n")
    good = (folder / "01.mp4").read_bytes()
    bad = {"01a": (good[:200], "a fox"), "03a": (good, " \n"), "04a": (good, None), "05a": (good, "fox " * 600)}
    for name, (video, caption) in bad.items():
        (folder / f"{name}.mp4").write_bytes(video)
        if caption is not None:
            (folder / f"{name}.txt").write_text(caption)
    write_video(folder / "06a.mp4", steady(frames - 1, 16))
    (folder / "06a.txt").write_text("a short one")
    return folder
