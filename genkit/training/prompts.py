"""Captions as networks take them: tokens for an encoder in training, or encoded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer

from genkit import console
from genkit.data import seq2seq_tokenizers
from genkit.files import weights_hash
from genkit.hub import download, safe_weights, safety
from genkit.models.text_diffusion import encode, tokenize

ENCODERS = {  # the stock class that encodes texts, by the type of its settings
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
    "t5": "T5EncoderModel",
    "bert": "BertModel",
    "distilbert": "DistilBertModel",
}
MULTIPLE = 8  # of the tokens of a new encoder
BLOCK = 256  # captions encoded at once
ARGUMENT = "--caption_column"


@dataclass(frozen=True)
class Prompts:
    """Captions, and last no words.

    Args:
        tokenizer: of the text encoder.
        parts: what `TextDenoiser` takes, (captions + 1, …) each.
        frozen: the text encoder, if it is not trained.
    """

    tokenizer: Any
    parts: tuple[Tensor, ...]
    frozen: nn.Module | None = None

    @property
    def length(self) -> int:
        """Tokens of every caption, padding among them."""
        return self.parts[0].shape[1]

    @property
    def width(self) -> int | None:
        """Of encoded captions; None if they are tokens."""
        return None if self.frozen is None else self.parts[0].shape[2]

    @property
    def sha256(self) -> str | None:
        """Of the weights of an encoder that is not trained."""
        return None if self.frozen is None else weights_hash(self.frozen)

    def of(self, which: Any, dropped: Tensor, device: torch.device) -> tuple[Tensor, ...]:
        """Look up captions, (n, …) each.

        Args:
            which: captions, (n,).
            dropped: which of them are replaced by no words, bool, (n,).
        """
        rows = torch.from_numpy(which).masked_fill(dropped, -1)
        return tuple(part[rows].to(device) for part in self.parts)


def make_tokenizer(captions: Sequence[str], vocab_size: int, most: int | None) -> Any:
    """Make the tokenizer of captions, a byte-pair encoding; it encodes any text.

    Args:
        vocab_size: most tokens.
        most: of a text, its end among them; default: of the longest caption, and a few more.
    """
    tokenizer = seq2seq_tokenizers.make_tokenizer(captions, vocab_size)
    longest = max(map(len, tokenizer(list(captions), verbose=False).input_ids))
    tokenizer.model_max_length = most or -(-longest // MULTIPLE) * MULTIPLE
    return tokenizer


def tokenize_captions(tokenizer: Any, captions: Sequence[str]) -> Prompts:
    """Return captions for an encoder that is trained.

    Raises:
        ValueError: a caption is longer than what it reads.
    """
    return Prompts(tokenizer, tokenize(tokenizer, [*captions, ""], ARGUMENT))


@torch.no_grad()
def encode_captions(
    tokenizer: Any, encoder: Any, captions: Sequence[str], device: torch.device
) -> Prompts:
    """Return captions that an encoder has encoded, in main memory.

    Raises:
        ValueError: a caption is longer than what it reads.
    """
    parts = tokenize(tokenizer, [*captions, ""], ARGUMENT)
    rows = torch.arange(len(parts[0])).split(BLOCK)
    encoder = encoder.to(device)
    found = [
        encode(encoder, *(part[some].to(device) for part in parts)).float().cpu()
        for some in console.bar(rows, "encoding", len(rows), " blocks of captions")
    ]
    return Prompts(tokenizer, (torch.cat(found),), encoder)


def load_text_encoder(name: str, most: int | None) -> tuple[Any, Any]:
    """Load a text encoder and its tokenizer.

    Args:
        name: folder or Hub id.
        most: tokens of a text; default: as many as the encoder reads.

    Returns:
        The tokenizer, whose `model_max_length` says how many tokens the encoder is to read, and
        the encoder in float32.

    Raises:
        ValueError: it is no text encoder, its files are unsafe, or it reads fewer tokens.
    """
    folder = download.fetch(name, argument="--text_encoder").resolve()
    with safety.opened(folder, argument="--text_encoder") as private:
        kind = AutoConfig.from_pretrained(private, trust_remote_code=False).model_type
        if kind not in ENCODERS:
            raise ValueError(
                f"--text_encoder {name} is a {kind}; give one of {', '.join(sorted(ENCODERS))}"
            )
        tokenizer = AutoTokenizer.from_pretrained(private, trust_remote_code=False)
        encoder, report = getattr(transformers, ENCODERS[kind]).from_pretrained(
            private, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        if report["missing_keys"]:
            raise ValueError(f"its weights lack {sorted(report['missing_keys'])}")
        safe_weights.check_loaded(encoder)
    reads = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
    if most is not None and most > reads:
        raise ValueError(f"--max_tokens {most}: --text_encoder {name} reads {reads}")
    tokenizer.model_max_length = most or reads
    return tokenizer, encoder.eval().requires_grad_(False)
