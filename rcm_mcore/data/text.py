"""Prompts to text embeddings with a UMT5 encoder (Wan's) or a T5 encoder (Cosmos-Predict2's), and a tiny one for CPU runs.

Text embeddings are kept as the rows of real tokens only, [n, d]: n tokens including the end token, d features.
Padding, where a network wants it, is zeros (Wan) and is added by whoever builds the batch.
"""

import html
import io
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import ftfy
import sentencepiece
import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, T5EncoderModel, UMT5Config, UMT5EncoderModel

MAX_TOKENS = 512  # text length of Wan and Cosmos-Predict2, end token included

# The negative prompt of Wan's own samplers.
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)

_MAX_PIECES = 512  # of a trained vocabulary; small corpora end far below
# Class of the encoder, and whether its prompts are cleaned: Wan cleans them, Cosmos does not.
_KINDS = {"umt5": (UMT5EncoderModel, True), "t5": (T5EncoderModel, False)}
_TOKENIZER_CONFIG = {
    "tokenizer_class": "T5Tokenizer",
    "extra_ids": 0,
    "legacy": False,
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
}


def clean_prompt(prompt: str) -> str:
    """The prompt as Wan cleans it: wrongly decoded characters repaired, HTML entities resolved, twice for doubly escaped
    ones, and runs of whitespace collapsed.
    """
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()


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
    AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False).save_pretrained(folder)


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
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
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
    # safetensors makes files that only their owner may read; one that is written anew follows the umask.
    weights, partial = Path(folder) / "model.safetensors", Path(folder) / ".model.partial"
    partial.write_bytes(weights.read_bytes())
    os.replace(partial, weights)


class TextEncoder:
    """A tokenizer and a frozen UMT5 or T5 encoder, which of the two by `model_type` of its configuration, from a local folder.

    Besides a folder that holds both, such as one of google/umt5-xxl, it takes a pipeline folder with ``tokenizer``
    and ``text_encoder`` inside, as the diffusers releases of Wan and Cosmos-Predict2 are.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        """Loads both; never downloads.

        Args:
            folder: see the class.
            device: of the encoder.
            dtype: of its weights; bfloat16 halves the 22 GB of umt5-xxl's encoder.
        Raises: ValueError when the folder has no encoder or no tokenizer, or one that is damaged or of another kind.
        """
        tokenizer_folder = _find(Path(folder), "tokenizer", "tokenizer_config.json")
        encoder, self._cleans = _load_encoder(_find(Path(folder), "text_encoder", "config.json"), dtype)
        self._tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True, trust_remote_code=False)
        self._encoder = encoder.eval().requires_grad_(False).to(device)

    @property
    def width(self) -> int:
        """Features d of a row."""
        return self._encoder.config.d_model

    @property
    def kind(self) -> str:
        """`umt5` or `t5`."""
        return self._encoder.config.model_type

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt, the end token included, before `encode` cuts them to MAX_TOKENS."""
        return [len(self._tokenizer(self._cleaned(prompt)).input_ids) for prompt in prompts]

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], *, batch_size: int = 32) -> list[torch.Tensor]:
        """The embeddings of the prompts, one float32 CPU tensor [n_i, d] each, n_i counting the end token.

        Prompts are cut to MAX_TOKENS tokens, and for UMT5 cleaned before (`clean_prompt`). The empty prompt gives the end
        token's row alone.
        """
        rows = []
        for start in range(0, len(prompts), batch_size):
            tokens = self._tokenizer(
                [self._cleaned(prompt) for prompt in prompts[start : start + batch_size]],
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

    def _cleaned(self, prompt: str) -> str:
        return clean_prompt(prompt) if self._cleans else prompt


def encoder_kind(folder: str | os.PathLike[str]) -> str:
    """`umt5` or `t5`: the encoder that `TextEncoder` would load. Raises: ValueError for another, or none."""
    return _kind_of(_find(Path(folder), "text_encoder", "config.json"))


def _find(folder: Path, part: str, marker: str) -> Path:
    found = next((path for path in (folder / part, folder) if (path / marker).is_file()), None)
    if found is None:
        raise ValueError(
            f"text encoder folder {folder}: no {marker} in it or in {part}/; expected a UMT5 or T5 encoder and its"
            " tokenizer as saved by save_pretrained"
        )
    return found


def _kind_of(folder: Path) -> str:
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"text encoder folder {folder}: config.json cannot be read: {error}") from None
    if kind not in _KINDS:
        raise ValueError(f"text encoder folder {folder} holds {kind}: must be one of {', '.join(_KINDS)} (model_type)")
    return kind


def _load_encoder(folder: Path, dtype: torch.dtype):
    """The encoder of a folder and whether its prompts are cleaned."""
    cls, cleans = _KINDS[_kind_of(folder)]
    try:
        encoder, report = cls.from_pretrained(folder, local_files_only=True, dtype=dtype, output_loading_info=True)
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise ValueError(f"text encoder folder {folder} cannot be loaded: {str(error).splitlines()[0]}") from None
    missing = sorted(report["missing_keys"])  # they would stay random; a decoder's weights, not needed, are no error
    if missing:
        raise ValueError(f"text encoder folder {folder} lacks {len(missing)} weights, such as {', '.join(missing[:3])}")
    return encoder, cleans
