"""Sequence-to-sequence models: stock networks, batches of sources with targets, and their loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from genkit.data.seq2seq_tokenizers import EOS, PAD

IGNORED = -100  # a target that cross_entropy leaves out


@dataclass(frozen=True)
class Batch:
    """Sources and targets, padded on the right."""

    sources: torch.Tensor  # (n, source length), int64
    mask: torch.Tensor  # (n, source length), int64: 0 at padding
    inputs: torch.Tensor  # (n, target length), int64: of the decoder, the targets one later
    targets: torch.Tensor  # (n, target length), int64: IGNORED at padding

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        return Batch(*(own.to(device) for own in vars(self).values()))


def make_batch(
    sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], start: int, pad: int
) -> Batch:
    """Put sources and targets into a batch.

    The decoder reads the start token and all of a target but its last token. Causal attention lets
    no token see the padding after it.

    Args:
        sources, targets: tokens of each, with their ends.
        start: the token that the decoder begins with.
        pad: the token of padding.
    """
    read = [torch.tensor(row) for row in sources]
    written = [torch.tensor(row) for row in targets]
    begun = [torch.tensor([start, *row[:-1]]) for row in targets]
    return Batch(
        pad_sequence(read, batch_first=True, padding_value=pad),
        pad_sequence([torch.ones_like(row) for row in read], batch_first=True),
        pad_sequence(begun, batch_first=True, padding_value=pad),
        pad_sequence(written, batch_first=True, padding_value=IGNORED),
    )


def loss(model: torch.nn.Module, batch: Batch, count: float) -> torch.Tensor:
    """Return the cross-entropy of the targets in nats, summed and divided by `count`.

    Args:
        count: of target tokens: those that this part of a global batch stands for.
    """
    logits = model(
        input_ids=batch.sources,
        attention_mask=batch.mask,
        decoder_input_ids=batch.inputs,
        use_cache=False,
    ).logits  # (n, target length, vocabulary)
    targets = batch.targets.flatten()
    nats = F.cross_entropy(
        logits.flatten(0, 1).float(), targets, ignore_index=IGNORED, reduction="sum"
    )
    return nats / count


def make_model(
    architecture: str,
    vocabulary: dict[str, int],
    context: int,
    depth: int,
    width: int,
    heads: int,
    dropout: float,
) -> PreTrainedModel:
    """Build a stock encoder-decoder with random weights and tied embeddings.

    Args:
        architecture: "t5", with relative positions, or "bart", with learned ones.
        vocabulary: ids by token, <eos> and <pad> among them.
        context: the most tokens of a source and of a target, for "bart".
        depth: layers of the encoder, and of the decoder.
        width: size of a layer's vectors.
        heads: attention heads.
        dropout: of embeddings and residual branches; for "t5" of attention weights, too.
    """
    end, pad = vocabulary[EOS], vocabulary[PAD]
    common = {"vocab_size": len(vocabulary), "pad_token_id": pad, "eos_token_id": end}
    if architecture == "t5":
        return T5ForConditionalGeneration(
            T5Config(
                d_model=width,
                d_kv=width // heads,
                d_ff=4 * width,
                num_layers=depth,
                num_heads=heads,
                dropout_rate=dropout,
                decoder_start_token_id=pad,
                **common,
            )
        )
    return BartForConditionalGeneration(
        BartConfig(
            max_position_embeddings=context,
            d_model=width,
            encoder_layers=depth,
            decoder_layers=depth,
            encoder_attention_heads=heads,
            decoder_attention_heads=heads,
            encoder_ffn_dim=4 * width,
            decoder_ffn_dim=4 * width,
            dropout=dropout,
            bos_token_id=None,
            decoder_start_token_id=end,
            forced_eos_token_id=None,
            **common,
        )
    )
