"""The most likely sequence of an encoder-decoder, by depth-first search with a bound.

A sequence's log-probability falls with every token. So nothing that begins like a sequence which is
already less likely than a finished one can be the most likely one, and is not looked at (Stahlberg
and Byrne 2019, https://aclanthology.org/D19-1331, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from genkit.models.seq2seq import IGNORED
from genkit.text.kv_cache import decoder_start
from genkit.text.scoring import gather_tokens
from genkit.text.strategies import Rules

AT_ONCE = 64  # prefixes that are extended in one step of the model


@dataclass(frozen=True)
class MostLikely:
    """The most likely sequence of a source, or the best one that was found."""

    tokens: list[int]
    score: float  # its log-probability, in nats
    nodes: int  # prefixes whose next tokens were looked at
    is_exact: bool  # nothing that could be more likely was left out


class Decoder:
    """An encoder-decoder that has read one source: what may follow any prefix of a target."""

    @torch.inference_mode()
    def __init__(self, model: PreTrainedModel, source: list[int]) -> None:
        self.model, self.start = model, decoder_start(model)
        ids = torch.tensor([source], device=model.device)
        self._mask = torch.ones_like(ids)
        self._states = model.get_encoder()(input_ids=ids, attention_mask=self._mask)[0]

    @torch.inference_mode()
    def log_probabilities(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return those of all tokens after every token of rows, (n, length) to (…, vocabulary)."""
        count = len(inputs)
        output = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=self._states.expand(count, -1, -1)),
            attention_mask=self._mask.expand(count, -1),
            decoder_input_ids=inputs.to(self.model.device),
            use_cache=False,
        )
        return output.logits.float().log_softmax(-1)

    def next_tokens(self, prefixes: torch.Tensor) -> torch.Tensor:
        """Return the log-probabilities after prefixes, (n, length) to (n, vocabulary)."""
        begun = torch.nn.functional.pad(prefixes, (1, 0), value=self.start)
        return self.log_probabilities(begun)[:, -1].cpu()

    def score(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """Return the log-probability of each sequence, its end included if it has one."""
        rows = [torch.tensor(sequence, dtype=torch.int64) for sequence in sequences]
        targets = pad_sequence(rows, batch_first=True, padding_value=IGNORED)
        inputs = torch.nn.functional.pad(targets[:, :-1].clamp(min=0), (1, 0), value=self.start)
        logs = gather_tokens(self.log_probabilities(inputs).cpu(), targets.clamp(min=0))
        totals: list[float] = (logs.double() * (targets != IGNORED)).sum(1).tolist()
        return totals


def find_most_likely(
    decoder: Decoder, rules: Rules, known: Sequence[int], budget: int
) -> MostLikely:
    """Search for the most likely sequence, of those that end and those of the longest length.

    Args:
        rules: which tokens end a sequence, which are excluded or forced, and the longest length.
        known: a sequence to begin with: the more likely it is, the less is looked at.
        budget: prefixes after which the search stops.
    """
    best, score, nodes = list(known), decoder.score([known])[0], 0
    stack = [(torch.empty(1, 0, dtype=torch.int64), torch.zeros(1, dtype=torch.float64))]
    while stack:
        prefixes, totals = stack.pop()
        going = totals > score  # a better sequence may have been found since
        prefixes, totals = prefixes[going], totals[going]
        if not len(totals):
            continue
        if nodes >= budget:
            return MostLikely(best, score, nodes, False)
        nodes += len(totals)
        grown = totals[:, None] + _allowed(decoder.next_tokens(prefixes), prefixes, rules)
        ends = _ending(grown.shape[1], prefixes.shape[1], rules)
        finished = grown.masked_fill(~ends, -torch.inf)
        if finished.max() > score:
            row, token = divmod(int(finished.argmax()), grown.shape[1])
            best, score = [*prefixes[row].tolist(), token], float(finished.max())
        stack += _children(prefixes, grown.masked_fill(ends, -torch.inf), score)
    return MostLikely(best, score, nodes, True)


def _allowed(logs: torch.Tensor, prefixes: torch.Tensor, rules: Rules) -> torch.Tensor:
    """Return log-probabilities, (n, vocabulary), -inf where the rules exclude a token."""
    step, forced = prefixes.shape[1], rules.forced(prefixes.shape[1])
    if forced is not None:
        only = torch.full_like(logs, -torch.inf)
        only[:, forced] = logs[:, forced]
        return only.double()
    if not rules.leave_all(step):
        logs = rules.scores(logs, prefixes.tolist(), [0] * len(logs))
    return logs.double()


def _ending(vocabulary: int, step: int, rules: Rules) -> torch.Tensor:
    """Return which tokens end a sequence at a step, (vocabulary,)."""
    ends = torch.full((vocabulary,), step + 1 == rules.longest)
    if step >= len(rules.prefix):
        ends[list(rules.ends)] = True
    return ends


def _children(
    prefixes: torch.Tensor, grown: torch.Tensor, score: float
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return longer prefixes that may still win, a few at a time, the most likely last."""
    rows, tokens = (grown > score).nonzero(as_tuple=True)
    totals = grown[rows, tokens]
    order = totals.argsort(descending=True, stable=True)
    longer = torch.cat([prefixes[rows], tokens[:, None]], 1)[order]
    parts = zip(longer.split(AT_ONCE), totals[order].split(AT_ONCE), strict=True)
    return list(parts)[::-1] if len(order) else []
