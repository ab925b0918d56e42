"""Outputs of a sequence-to-sequence model against references: exact matches and chrF."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

HOW_TO = "pip install 'hf-genkit[seq2seq]'"


def exact_match(outputs: Sequence[str], references: Sequence[str]) -> float:
    """Return the share of outputs that equal their references but for space around them."""
    pairs = zip(outputs, references, strict=True)
    return sum(own.strip() == other.strip() for own, other in pairs) / len(outputs)


def has_chrf() -> bool:
    """Whether sacrebleu, which computes chrF, is installed."""
    return importlib.util.find_spec("sacrebleu") is not None


def chrf(outputs: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    """Compute chrF of all outputs together, 0 to 100, and the signature of its settings.

    Source: Popović 2015, https://aclanthology.org/W15-3049; as sacrebleu computes it (Post 2018)
    """
    from sacrebleu.metrics import CHRF

    metric = CHRF()
    score = metric.corpus_score(list(outputs), [list(references)]).score
    return float(score), str(metric.get_signature())
