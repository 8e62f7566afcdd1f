"""Prompts to text embeddings with the UMT5 encoder of Wan or the T5 of Cosmos-Predict2, and a tiny UMT5 for CPU runs.

Text embeddings are kept as the rows of real tokens only, [n, d]: n tokens including the end token, d features.
Padding, where a network wants it, is zeros (Wan) and is added by whoever builds the batch.
"""

import html
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
import torch
from transformers import AutoTokenizer, T5EncoderModel, UMT5Config, UMT5EncoderModel

MAX_TOKENS = 512  # Wan's text length, end token included

_ENCODERS = {"umt5": UMT5EncoderModel, "t5": T5EncoderModel}  # by the kind in config.json: Wan's, Cosmos-Predict2's
_MAX_PIECES = 512  # of a trained vocabulary; small corpora end far below
_TOKENIZER_CONFIG = {
    "tokenizer_class": "T5Tokenizer",
    "extra_ids": 0,
    "legacy": False,
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
}


def clean_prompt(prompt: str) -> str:
    """The prompt with HTML entities resolved, twice for doubly escaped ones, and runs of whitespace collapsed.

    Wan's cleaning without its repair of wrongly decoded characters.
    """
    return " ".join(html.unescape(html.unescape(prompt)).split())


def train_tokenizer(prompts: Sequence[str], folder: str | os.PathLike[str]) -> None:
    """Trains a unigram sentencepiece model with T5's special ids (pad 0, end 1, unknown 2) and writes its folder.

    The folder loads with ``AutoTokenizer.from_pretrained`` and may hold the encoder's files as well. Words of the
    prompts become whole pieces; other text falls back to characters and the unknown piece.

    Args:
        prompts: the corpus; repetitions and order do not matter.
        folder: created if it is missing.
    Raises: ValueError for an empty corpus.
    """
    folder = Path(folder)
    lines = sorted({clean_prompt(prompt) for prompt in prompts} - {""})
    if not lines:
        raise ValueError("prompts: a tokenizer cannot be trained on no text; give at least one non-empty prompt")
    # Unigram training proposes only substrings that it finds in two different words, so a word that is part of no
    # other would be spelt in characters. Each word once more, with a full stop, makes it a candidate.
    words = sorted({word for line in lines for word in line.split()})
    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()  # not a file prefix, which would become part of the model's bytes
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines + [f"{word}." for word in words]),
        model_writer=model,
        model_type="unigram",
        vocab_size=_MAX_PIECES,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,  # errors only: it writes pages to standard error
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    # transformers 5 reads spiece.model only through from_pretrained on a folder; T5Tokenizer(vocab_file=...) drops it.
    (folder / "tokenizer_config.json").write_text(json.dumps(_TOKENIZER_CONFIG, indent=2) + "\n")
    # Beside an encoder's config.json it does not read spiece.model at all, hence tokenizer.json as well.
    AutoTokenizer.from_pretrained(folder, local_files_only=True).save_pretrained(folder)


def build_text_encoder(
    folder: str | os.PathLike[str], *, seed: int, d_model: int = 64, layers: int = 2, heads: int = 4, d_ff: int = 128
) -> None:
    """Writes a small UMT5 encoder with random weights beside the tokenizer that the folder already holds.

    It is never trained. Its last RMSNorm has unit weights, so features have unit root mean square; the random
    embedding table keeps different words apart and the attention layers add their context and order.

    Args:
        folder: written by ``train_tokenizer``.
        seed: of the weights; the global random state is left as it was.
        d_model, layers, heads, d_ff: sizes; heads must divide d_model.
    Raises: ValueError when heads do not divide d_model.
    """
    if d_model % heads:
        raise ValueError(f"heads = {heads} does not divide d_model = {d_model}")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    config = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=d_model,
        d_kv=d_model // heads,
        d_ff=d_ff,
        num_layers=layers,
        num_heads=heads,
        feed_forward_proj="gated-gelu",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = UMT5EncoderModel(config)
    encoder.save_pretrained(folder)


class TextEncoder:
    """A tokenizer and a frozen UMT5 or T5 encoder from one local folder.

    Besides a folder that holds both, such as one of google/umt5-xxl, it takes a pipeline folder with ``tokenizer``
    and ``text_encoder`` inside, as Wan's diffusers releases are.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        """Loads both; never downloads.

        Args:
            folder: see the class.
            device: of the encoder.
            dtype: of its weights; bfloat16 halves the 22 GB of umt5-xxl's encoder.
        Raises: ValueError when the folder has no encoder or no tokenizer, or an encoder of another kind or without
            some of its weights.
        """
        folder = Path(folder)
        parts: dict[str, Path] = {}
        for part, marker in (("tokenizer", "tokenizer_config.json"), ("text_encoder", "config.json")):
            found = next((path for path in (folder / part, folder) if (path / marker).is_file()), None)
            if found is None:
                raise ValueError(
                    f"text encoder folder {folder}: no {marker} in it or in {part}/; expected a UMT5 or T5 encoder and its"
                    " tokenizer as saved by save_pretrained"
                )
            parts[part] = found
        kind = json.loads((parts["text_encoder"] / "config.json").read_text(encoding="utf-8")).get("model_type")
        if kind not in _ENCODERS:  # another class would fill what it does not find with random weights
            raise ValueError(f"text encoder folder {folder}: model_type={kind}: must be one of {', '.join(_ENCODERS)}")
        self._tokenizer = AutoTokenizer.from_pretrained(parts["tokenizer"], local_files_only=True)
        encoder, report = _ENCODERS[kind].from_pretrained(
            parts["text_encoder"], local_files_only=True, dtype=dtype, output_loading_info=True
        )
        if missing := sorted(report["missing_keys"]):  # they would stay random
            raise ValueError(f"text encoder folder {folder}: its weights lack {missing[:5]}")
        self._encoder = encoder.eval().requires_grad_(False).to(device)

    @property
    def width(self) -> int:
        """Features d of a row."""
        return self._encoder.config.d_model

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], *, batch_size: int = 32) -> list[torch.Tensor]:
        """The embeddings of the prompts, one float32 CPU tensor [n_i, d] each, n_i counting the end token.

        Prompts are cleaned and cut to MAX_TOKENS tokens. The empty prompt gives the end token's row alone.
        """
        rows = []
        for start in range(0, len(prompts), batch_size):
            tokens = self._tokenizer(
                [clean_prompt(prompt) for prompt in prompts[start : start + batch_size]],
                padding=True,
                truncation=True,
                max_length=MAX_TOKENS,
                return_tensors="pt",
            ).to(self._encoder.device)
            mask = tokens.attention_mask
            hidden = self._encoder(input_ids=tokens.input_ids, attention_mask=mask).last_hidden_state
            for embedding, count in zip(hidden.float().cpu(), mask.sum(1).tolist()):
                rows.append(embedding[:count].clone())  # a slice would keep the padded batch alive
        return rows
