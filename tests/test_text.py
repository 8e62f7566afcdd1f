"""Text encoders against diffusers' pipelines: UMT5 and T5, cleaning, cut prompts, folders that cannot be used."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import Cosmos2TextToImagePipeline
from diffusers.pipelines.wan import pipeline_wan
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPVisionConfig, T5Config, T5EncoderModel, UMT5EncoderModel

from rcm_mcore.data import pad_text
from rcm_mcore.data.text import MAX_TOKENS, TextEncoder, build_text_encoder, clean_prompt, train_tokenizer

PROMPTS = ["a red fox &amp;amp; a hen", " two\n\t boats  ", "âœ” schÃ¶n", "", "fox " * 600]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A UMT5 encoder beside its tokenizer, and a T5 encoder in a pipeline folder."""
    umt5, t5 = tmp_path_factory.mktemp("umt5"), tmp_path_factory.mktemp("t5")
    train_tokenizer(["a red fox & a hen", "two boats", "schön"], umt5)
    build_text_encoder(umt5, seed=0, d_model=32, heads=2, d_ff=48)
    shutil.copytree(umt5, t5 / "tokenizer", ignore=shutil.ignore_patterns("model*", "config.json"))
    torch.manual_seed(0)
    config = T5Config(vocab_size=100, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    T5EncoderModel(config).save_pretrained(t5 / "text_encoder")
    return {"umt5": umt5, "t5": t5}


def stock(kind, folders):
    if kind == "umt5":
        tokenizer, cls, path = AutoTokenizer.from_pretrained(folders[kind]), UMT5EncoderModel, folders[kind]
        get = pipeline_wan.WanPipeline._get_t5_prompt_embeds
    else:
        tokenizer, cls, path = AutoTokenizer.from_pretrained(folders[kind] / "tokenizer"), T5EncoderModel, folders[kind]
        path, get = path / "text_encoder", Cosmos2TextToImagePipeline._get_t5_prompt_embeds
    pipeline = SimpleNamespace(tokenizer=tokenizer, text_encoder=cls.from_pretrained(path).eval())
    with torch.no_grad():
        return get(pipeline, PROMPTS, max_sequence_length=MAX_TOKENS, device="cpu")


@pytest.mark.parametrize("kind", ["umt5", "t5"])
def test_embeddings_are_the_pipelines(folders, kind):
    encoder = TextEncoder(folders[kind])
    assert encoder.kind == kind
    rows = encoder.encode(PROMPTS)
    assert [len(row) for row in rows] == [min(count, MAX_TOKENS) for count in encoder.token_counts(PROMPTS)]
    assert len(rows[3]) == 1 and len(rows[4]) == MAX_TOKENS
    padded = torch.stack([pad_text(row, MAX_TOKENS) for row in rows])
    torch.testing.assert_close(padded, stock(kind, folders), rtol=1e-5, atol=1e-5)


def test_cleaning_is_wans():
    assert [clean_prompt(prompt) for prompt in PROMPTS] == [pipeline_wan.prompt_clean(prompt) for prompt in PROMPTS]
    assert clean_prompt(PROMPTS[2]) == "✔ schön"


def test_token_counts_name_what_would_be_cut(folders):
    counts = TextEncoder(folders["umt5"]).token_counts(["fox " * n for n in (511, 512, 600)])
    assert counts == [512, 513, 601]


def test_folders_that_cannot_be_used_are_refused(folders, tmp_path):
    missing, other, damaged, lacks = (tmp_path / name for name in ("missing", "other", "damaged", "lacks"))
    missing.mkdir()
    for path in (other, damaged, lacks):
        shutil.copytree(folders["umt5"], path)
    (other / "config.json").write_text(json.dumps(CLIPVisionConfig().to_dict()))
    (damaged / "model.safetensors").write_bytes((damaged / "model.safetensors").read_bytes()[:-100])
    weights = load_file(lacks / "model.safetensors")
    del weights["encoder.final_layer_norm.weight"]
    save_file(weights, lacks / "model.safetensors", metadata={"format": "pt"})
    refused = {
        missing: "no tokenizer_config.json in it or in tokenizer/",
        other: "holds clip_vision_model: must be one of umt5, t5",
        damaged: "cannot be loaded",
        lacks: "lacks 1 weights, such as encoder.final_layer_norm.weight",
    }
    for path, message in refused.items():
        with pytest.raises(ValueError, match=message):
            TextEncoder(path)
