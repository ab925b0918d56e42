"""What training needs to make an encoder find answers, and to judge it."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tqdm import tqdm
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertForQuestionAnswering,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from genkit import hub, qa, safe_weights, safety
from genkit.metrics import calibration, squad
from genkit.spans import Wanted
from genkit.squad import Example, has_impossible
from genkit.windows import NEVER, Tokens, Windows

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ALPHABET = 1000  # the most characters that a new tokenizer knows
HINT = "Give the folder or Hub id of an encoder in safetensors, such as BERT, RoBERTa or DistilBERT"
AT_ONCE = 64  # windows whose spans are weighed together
TINY = 1e-45  # the least probability above 0, in float32

# ---------------------------------------------------------------------------------------------
# The model to start from


def load(name: str, revision: str | None = None) -> tuple[PreTrainedModel, Any]:
    """Load an encoder to train, in float32, and its tokenizer; its head is new if it has none.

    Args:
        name: folder or Hub id.
        revision: a branch, tag or commit on the Hub.

    Raises:
        ValueError: there is no such model, or it cannot learn to answer questions.
    """
    folder = hub.fetch(name, revision, argument="init_from", hint=HINT)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would warn of the new head
    try:
        with safety.opened(folder, argument="init_from") as private:
            tokenizer = AutoTokenizer.from_pretrained(private, trust_remote_code=False)
            model, told = AutoModelForQuestionAnswering.from_pretrained(
                private,
                use_safetensors=True,
                dtype=torch.float32,
                trust_remote_code=False,
                output_loading_info=True,
            )
            safe_weights.check_loaded(model)
            qa.check_tokenizer(tokenizer, name)
            safe_weights.check_tokens(model, tokenizer)
    finally:
        logging.set_verbosity(verbosity)
    lacking = [name for name in told["missing_keys"] if name.startswith(model.base_model_prefix)]
    if lacking:
        raise ValueError(f"init_from: the weights in {name!r} lack {sorted(lacking)}")
    reader = qa.Reader(model, tokenizer, name)
    if not reader.has_null:
        raise ValueError(
            f"init_from: the tokenizer in {name!r} puts no [CLS] before a question, which "
            "stands for no answer; choose another model"
        )
    known = inspect.signature(model.forward).parameters
    tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name in known]
    tokenizer.model_max_length = reader.limit
    return model, tokenizer


def make_model(
    vocab_size: int, positions: int, depth: int, width: int, heads: int
) -> PreTrainedModel:
    """Build a DistilBERT with a span head and random weights.

    Args:
        positions: the most tokens that it reads.
        depth: layers.
        width: size of a layer's vectors.
        heads: attention heads.

    Raises:
        ValueError: the width does not divide among the heads.
    """
    if width % heads:
        raise ValueError(f"width: {width} does not divide into {heads} heads")
    return DistilBertForQuestionAnswering(
        DistilBertConfig(
            vocab_size=vocab_size,
            max_position_embeddings=positions,
            n_layers=depth,
            n_heads=heads,
            dim=width,
            hidden_dim=4 * width,
            initializer_range=width**-0.5,  # BERT's 0.02 would leave small models on a plateau
            dropout=0.0,
            attention_dropout=0.0,
            qa_dropout=0.0,
            pad_token_id=SPECIAL.index("[PAD]"),
        )
    )


def make_tokenizer(
    examples: Sequence[Example], vocab_size: int, positions: int
) -> PreTrainedTokenizerFast:
    """Learn a cased WordPiece tokenizer like BERT's, the same on every machine.

    Args:
        examples: whose questions and contexts to learn from.
        vocab_size: the most tokens there may be, unless characters alone are more.
        positions: the most tokens that the model reads.
    """
    texts = list(dict.fromkeys(t for e in examples for t in (e.context, e.question)))
    learner = _backend({name: i for i, name in enumerate(SPECIAL)})
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(learner.normalizer.normalize_str(text).replace(" ", ""))
    alphabet = sorted(character for character, _ in counts.most_common(ALPHABET))
    # the trainer numbers what it meets in any order, and ties go by number; but not these
    first = [*SPECIAL, *alphabet, *(f"##{character}" for character in alphabet)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=first,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    backend = _backend(learner.get_vocab(with_added_tokens=False))
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, SPECIAL.index(name)) for name in ("[CLS]", "[SEP]")],
    )
    names = {f"{name[1:-1].lower()}_token": name for name in SPECIAL}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=positions,
        model_input_names=["input_ids", "attention_mask"],  # DistilBERT knows no types of tokens
        **names,
    )


def _backend(vocabulary: dict[str, int]) -> Tokenizer:
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend


# ---------------------------------------------------------------------------------------------
# Training

Inputs = dict[str, torch.Tensor]


class Questions:
    """Examples as windows to train on, or to judge by.

    Args:
        max_seq_len, doc_stride: see `Windows`.

    Raises:
        ValueError: see `Windows`.
    """

    def __init__(
        self, examples: Sequence[Example], tokenizer: Any, max_seq_len: int, doc_stride: int
    ) -> None:
        self.examples, self.contexts = examples, [e.context for e in examples]
        questions, self.max_seq_len = [e.question for e in examples], max_seq_len
        self.windows = Windows(questions, self.contexts, tokenizer, max_seq_len, doc_stride)
        self.targets = targets(self.windows, examples)

    def batch(self, group: np.ndarray, model: PreTrainedModel) -> tuple[Inputs, torch.Tensor]:
        """Look up windows: inputs for a model, and targets, (windows, 2)."""
        wanted = torch.from_numpy(self.targets[group]).to(model.device)
        return self.windows.inputs(group, model), wanted


def targets(windows: Windows, examples: Sequence[Example]) -> np.ndarray:
    """Find the first answer of each example in its windows.

    Args:
        examples: one for each question of `windows`.

    Returns:
        The first and the last token of the window that hold a character of the answer, (windows,
        2); 0, the token before the question, where the window does not hold all of it.
    """
    first, last = np.array(
        [_answer(*each) for each in zip(examples, windows.contexts, strict=True)]
    ).T
    first, last = first[windows.row], last[windows.row]
    held = (windows.first <= first) & (first <= last) & (last < windows.last)
    places = np.stack([first, last], 1) + (windows.begin - windows.first)[:, None]
    return np.where(held[:, None], places, 0)


def _answer(example: Example, tokens: Tokens) -> tuple[int, int]:
    """Find the first and the last token of an answer in its context; (-1, -1) if there is none."""
    if not example.answers:
        return -1, -1
    text, start = example.answers[0]
    touched = np.flatnonzero((tokens.ends > start) & (tokens.starts < start + len(text)))
    if not len(touched):
        raise ValueError(f"data: the model knows no token of the answer {text!r} ({example.id})")
    return int(touched[0]), int(touched[-1])


def loss(model: torch.nn.Module, inputs: Inputs, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of start and end over the tokens of a window.

    Args:
        inputs: as `Windows.inputs` makes them; the attention mask leaves out padding.
        targets: first and last token, (windows, 2).

    Source: Devlin et al. 2018, section 4.2, https://arxiv.org/abs/1810.04805
    """
    output = model(**inputs)
    return span_loss(output.start_logits, output.end_logits, inputs["attention_mask"], targets)


def span_loss(
    start: torch.Tensor, end: torch.Tensor, mask: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Compute that loss from the logits of start and end, (windows, longest) each."""
    both = torch.cat([start, end]).float().masked_fill(mask.repeat(2, 1) == 0, NEVER)
    return F.cross_entropy(both, targets.T.flatten())


# ---------------------------------------------------------------------------------------------
# The verdict


@torch.inference_mode()
def look(model: PreTrainedModel, questions: Questions) -> tuple[np.ndarray, float]:
    """Read all windows of questions.

    Returns:
        Logits of start and end, of no answer first and then of the tokens of the context,
        (windows, 2, max_seq_len), NEVER where there are none; and the sum of the loss in nats.
    """
    windows, nats = questions.windows, 0.0
    logits = np.full((len(windows), 2, questions.max_seq_len), NEVER, dtype=np.float32)
    with tqdm(total=len(windows), desc="judging", unit=" windows", delay=2, leave=False) as bar:
        for group in windows.groups(qa.BATCH[model.device.type]):
            inputs, wanted = questions.batch(group, model)
            output = model(**inputs)
            both = output.start_logits, output.end_logits
            nats += len(group) * span_loss(*both, inputs["attention_mask"], wanted).item()
            for side, values in enumerate(both):
                taken = windows.of_context(values, group)
                logits[group, side, : taken.shape[1]] = taken.numpy()
            bar.update(len(group))
    return logits, nats


def gold_classes(questions: Questions) -> np.ndarray:
    """Say which of the logits of `look` are right, (windows, 2)."""
    begin = questions.windows.begin[:, None]
    return np.where(questions.targets, questions.targets - begin + 1, 0)


@dataclass(frozen=True)
class Reading:
    """What a model reads out of a context."""

    answer: str  # the best, if there is one
    score: float  # its probability, normalised over its window
    confidence: float  # the same, calibrated
    null_score: float  # probability that there is none
    null_confidence: float

    @property
    def null_odds(self) -> float:
        """Log-odds of no answer against the best one."""
        return math.log(max(self.null_score, TINY)) - math.log(max(self.score, TINY))


def readings(
    logits: np.ndarray, questions: Questions, longest: int, temperatures: np.ndarray
) -> list[Reading]:
    """Find the best answer to each question, as `genkit.answer` does.

    Args:
        logits: see `look`.
        longest: the most tokens of an answer.
        temperatures: what calibrates the confidence of each question, (questions,).
    """
    windows, contexts = questions.windows, questions.contexts
    found = [qa.Found() for _ in contexts]
    for temperature in np.unique(temperatures).tolist():
        wanted = Wanted(longest=longest, temperature=temperature)
        chosen = np.flatnonzero(temperatures[windows.row] == temperature)
        for group in np.split(chosen, range(AT_ONCE, len(chosen), AT_ONCE)):
            widest = 1 + (windows.last[group] - windows.first[group]).max()
            start, end = torch.from_numpy(logits[group, :, :widest]).unbind(1)
            qa.gather(found, windows, contexts, group, start, end, wanted)
    return [_reading(*each) for each in zip(found, contexts, strict=True)]


def _reading(found: qa.Found, context: str) -> Reading:
    null = found.null, found.null_confidence
    for span in qa.distinct(found.spans, context, 1):
        return Reading(context[span.start : span.end], span.score, span.confidence, *null)
    return Reading("", 0.0, 0.0, *null)


def halves(count: int) -> np.ndarray:
    """Deal questions out to two halves, 0 and 1: each is judged by what the other taught."""
    return np.arange(count) % 2


@dataclass(frozen=True)
class Verdict:
    """How well questions were answered."""

    figures: dict[str, float]
    threshold: float  # of log-odds of no answer, best for F1 on all questions
    given: list[str]  # the answers, "" for none
    confidences: list[float]  # in them, calibrated
    right: list[bool]  # exactly


def judge(read: Sequence[Reading], examples: Sequence[Example]) -> Verdict:
    """Compare answers with gold answers, as SQuAD 1.1 does, or 2.0 if some questions have none.

    Where there may be no answer, a half of the questions is judged by the threshold that is best
    for the other.
    """
    golds = {e.id: [text for text, _ in e.answers] for e in examples}
    best = {e.id: reading.answer for e, reading in zip(examples, read, strict=True)}
    if has_impossible(examples):
        odds = {e.id: reading.null_odds for e, reading in zip(examples, read, strict=True)}
        threshold = squad.best_f1_threshold(best, golds, odds)
        final = _decided(best, golds, odds)
        scored = squad.score_v2(final, golds, dict.fromkeys(golds, 0.0))
        names = [f"{part}{name}" for part in ("", "HasAns_", "NoAns_") for name in ("exact", "f1")]
        figures = {name: scored[name] for name in names if name in scored}
    else:
        threshold, final = 0.0, best
        figures = squad.score_v1(final, golds)
    given = list(final.values())
    right = [
        any(squad.exact(answer, gold) for gold in golds[question] or [""])
        for question, answer in final.items()
    ]
    raw = [r.score if answer else r.null_score for r, answer in zip(read, given, strict=True)]
    sure = [r.confidence if a else r.null_confidence for r, a in zip(read, given, strict=True)]
    raw, sure = np.minimum(raw, 1).tolist(), np.minimum(sure, 1).tolist()  # sums may round up
    figures["ece_before"] = calibration.expected_calibration_error(raw, right)
    figures["ece_after"] = calibration.expected_calibration_error(sure, right)
    return Verdict(figures, threshold, given, sure, right)


def _decided(
    best: dict[str, str], golds: dict[str, list[str]], odds: dict[str, float]
) -> dict[str, str]:
    """Leave out answers that are less likely than none, by the other half's best threshold."""
    half = dict(zip(golds, halves(len(golds)).tolist(), strict=True))
    thresholds = []
    for each in (0, 1):
        own = {q: texts for q, texts in golds.items() if half[q] == each}
        of_own = {q: best[q] for q in own}, own, {q: odds[q] for q in own}
        thresholds.append(squad.best_f1_threshold(*of_own))
    return {q: best[q] if odds[q] <= thresholds[1 - half[q]] else "" for q in golds}
