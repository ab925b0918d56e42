"""Sources and targets as tokens of an encoder-decoder, as `generate` reads and writes them."""

from __future__ import annotations

from genkit.data.tokens import encode_text
from genkit.errors import panics_are_errors
from genkit.text.language_model import LanguageModel


@panics_are_errors()
def encode_source(text: str, language: LanguageModel) -> list[int]:
    """Encode a source as the encoder reads it, with what its tokenizer puts around a text."""
    return encode_text(language.tokenizer, text, ends=True)


@panics_are_errors()
def encode_target(text: str, language: LanguageModel) -> list[int]:
    """Encode a target as the decoder should write it, its end token included.

    What the tokenizer puts before a text belongs to it, as in BART; and so does the token that the
    model's settings force as the first (`forced_bos_token_id`), such as that of a language.
    """
    tokenizer = language.tokenizer
    ids = encode_text(tokenizer, text, ends=True)
    forced = language.possible(language.model.generation_config.forced_bos_token_id)
    if forced and ids[:1] != forced:
        ids = [*forced, *encode_text(tokenizer, text)]
    return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]


def check_encoder_decoder(language: LanguageModel, argument: str = "model") -> None:
    """Refuse a causal model.

    Raises:
        ValueError: it has no encoder.
    """
    if not language.model.config.is_encoder_decoder:
        raise ValueError(
            f"{argument}: {language.name} has no encoder; give an encoder-decoder, such as one of "
            "`genkit train seq2seq`"
        )
