"""The decoding strategies: one generator for each, which extends a reader's texts.

Every generator yields (text, completions) whenever a text has become longer: its completions, best
first, of which the tokens so far that can no longer change are `settled`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from genkit.engine.kernels import Choice
from genkit.text.kv_cache import Rows, Tree
from genkit.text.logits import (
    NEAR_LOGIT,
    Filters,
    Penalties,
    choose,
    gumbel_noise,
    noise_ahead,
    penalized,
)

TextReader = Tree | Rows
Propose = Callable[[list[int], list[list[int]]], list[list[int]]]  # texts, lines -> continuations

NO_TOKEN = -100  # chosen where no token is possible; a target that cross_entropy ignores
DEAD_END = "dead_end"  # why a text ends where no token is possible
DRAWS = 32  # of banned tokens, after which all that are banned are excluded at once


@dataclass(frozen=True)
class Rules:
    """What every completion must satisfy, whatever the strategy."""

    longest: int
    shortest: int = 0
    ends: frozenset[int] = frozenset()  # tokens that end a text
    stops: tuple[str, ...] = ()  # strings that end a text
    never: tuple[int, ...] = ()  # tokens that no completion contains
    banned: tuple[str, ...] = ()  # strings that no completion contains
    prefix: tuple[int, ...] = ()  # the first tokens
    last: int | None = None  # the token that some encoder-decoders must end with
    penalties: Penalties = field(default_factory=Penalties)
    special: frozenset[int] = frozenset()  # tokens that have no text
    bytes: frozenset[int] = frozenset()  # tokens of which a run is decoded together
    decode: Callable[[list[int]], str] = field(default=str, compare=False)  # no half characters

    def forced(self, step: int) -> int | None:
        """The token that must come at this step, if one must."""
        if step < len(self.prefix):
            return self.prefix[step]
        return self.last if step == self.longest - 1 else None

    def leave_all(self, step: int) -> bool:
        """Whether any token may come at this step and those after it, but the last one."""
        given = self.never or self.banned or self.stops or self.penalties != Penalties()
        return not given and step >= max(self.shortest, len(self.prefix) + 1)

    def breaks(self, tokens: list[int]) -> bool:
        """Whether the last token has made the text contain a banned string."""
        return bool(self.banned) and self._completes(tokens, self.banned)

    def finish(self, tokens: list[int]) -> str | None:
        """Why a completion ends here: "eos", "stop" or "length"; None if it goes on."""
        if tokens[-1] in self.ends and len(tokens) > len(self.prefix):
            return "eos"
        late = len(tokens) >= max(self.shortest, len(self.prefix) + 1)
        if self.stops and late and self._completes(tokens, self.stops):
            return "stop"
        return "length" if len(tokens) == self.longest else None

    def _completes(self, tokens: list[int], texts: tuple[str, ...]) -> bool:
        """Whether the last token has completed one of some strings."""
        if tokens[-1] in self.special:
            return False
        longest = max(len(text.encode()) for text in texts)
        seen = (token for token in reversed(tokens) if token not in self.special)
        # a token is a byte or more; 4 for a character
        tail = list(itertools.islice(seen, longest + 4))
        if tail[-1] in self.bytes:
            tail += itertools.takewhile(self.bytes.__contains__, seen)
        tail.reverse()
        now, before = self.decode(tail), len(self.decode(tail[:-1]))
        return any(now.find(text, max(0, before - len(text) + 1)) >= 0 for text in texts)

    def scores(
        self, scores: torch.Tensor, lines: Sequence[list[int]], starts: Sequence[int]
    ) -> torch.Tensor:
        """Apply penalties and the shortest length to (rows, vocabulary)."""
        scores = penalized(scores, lines, starts, self.penalties)
        if self.never:
            scores = scores.clone()
            scores[:, list(self.never)] = -torch.inf
        early = [
            len(line) - start < self.shortest for line, start in zip(lines, starts, strict=True)
        ]
        if self.ends and any(early):
            scores = scores.clone()
            rows = torch.tensor(early, device=scores.device).nonzero()
            scores[rows, torch.tensor(sorted(self.ends), device=scores.device)] = -torch.inf
        return scores


@dataclass(frozen=True)
class Completion:
    """A text's continuation, finished or not."""

    tokens: list[int]
    logs: list[float]  # log-probability of each, under the model itself
    score: float
    finish: str | None = None
    settled: int = 0  # how many tokens can no longer change


CompletionStream = Iterator[tuple[int, list[Completion]]]


# ---------------------------------------------------------------------------------------------
# One token after the other: greedy, and sampling of every kind


@dataclass(frozen=True)
class TokenSampler:
    """How the next token is chosen: filters, seeds and rules."""

    rules: Rules
    filters: Filters
    seeds: tuple[int, ...] | None  # one for each text; None takes the most likely token
    starts: tuple[int, ...]  # where each text's completion begins in its line

    def __call__(
        self, reader: TextReader, texts: Sequence[int], branches: Sequence[tuple[int, int]]
    ) -> tuple[list[int], list[float]]:
        """Choose a token after each of some branches of a reader.

        Args:
            texts: the text of each branch, for its seed and start.
            branches: the index of each in the reader, (text, branch).

        Returns:
            The tokens, NO_TOKEN where none is possible, and their log-probabilities under the
            model itself.
        """
        lines = [reader.lines[text][branch] for text, branch in branches]
        starts = [self.starts[text] for text in texts]
        logits = _at(reader.logits, branches)
        noise = self._noise(texts, lines, starts, logits)
        scores = self.rules.scores(logits, lines, starts)
        drawn, sure = choose(scores, self.filters, noise)
        tokens = drawn.tolist()
        for i, is_sure in enumerate(sure.tolist()):
            done = lines[i][starts[i] :]
            forced = self.rules.forced(len(done))
            if forced is not None:
                tokens[i] = forced
            elif not is_sure or self.rules.breaks([*done, tokens[i]]):
                own = None if noise is None else noise[i : i + 1]
                tokens[i] = self._choose_alone(reader, branches[i], lines[i], starts[i], own)
        taken = torch.tensor(tokens, device=logits.device)
        return tokens, (
            -torch.nn.functional.cross_entropy(logits, taken, reduction="none")
        ).tolist()

    def write(
        self, reader: Tree, texts: Sequence[int], done: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Choose tokens for as long as the kernels can, so many of which are chosen already.

        Returns:
            Tokens and log-probabilities of each text, perhaps none.
        """
        count = min(reader.steps_at_once(), self.rules.longest - done - 1)
        if count < 2 or not (self.rules.leave_all(done) and self.filters.scale_only):
            return [[] for _ in texts], [[] for _ in texts]
        noise = None
        if self.seeds is not None:
            seeds = [self.seeds[text] for text in texts]
            noise = noise_ahead(seeds, done, reader.logits.shape[-1])[:, :count].contiguous()
            count = noise.shape[1]
        temperature, min_p = self.filters.temperature, self.filters.min_p or 0.0
        choice = Choice(noise, temperature, min_p, NEAR_LOGIT, self.rules.ends)
        tokens, logits = reader.write(count, choice)
        taken = torch.tensor(tokens, dtype=torch.int64).T.reshape(-1)
        logs = -torch.nn.functional.cross_entropy(logits.flatten(0, 1), taken, reduction="none")
        return tokens, logs.view(-1, len(texts)).T.tolist()

    def _noise(
        self,
        texts: Sequence[int],
        lines: Sequence[list[int]],
        starts: Sequence[int],
        logits: torch.Tensor,
    ) -> torch.Tensor | None:
        if self.seeds is None:
            return None
        seeds = [self.seeds[text] for text in texts]
        steps = [len(line) - start for line, start in zip(lines, starts, strict=True)]
        return gumbel_noise(seeds, steps, logits.shape[-1]).to(logits.device)

    def _choose_alone(
        self,
        reader: TextReader,
        branch: tuple[int, int],
        line: list[int],
        start: int,
        noise: torch.Tensor | None,
    ) -> int:
        """Choose without the batch, whose rounding could decide, and so that no rule is broken."""
        scores = self.rules.scores(reader.read_alone(*branch)[None], [line], [start]).clone()
        done = line[start:]
        for draw in itertools.count(1):
            token = int(choose(scores, self.filters, noise)[0])
            if scores[0, token] == -torch.inf:
                return NO_TOKEN
            if not self.rules.breaks([*done, token]):
                return token
            scores[0, token] = -torch.inf
            if draw == DRAWS:
                left = (scores[0] > -torch.inf).nonzero().flatten().tolist()
                scores[0, [t for t in left if self.rules.breaks([*done, t])]] = -torch.inf
        raise AssertionError("a draw is possible or is not")


def _at(logits: torch.Tensor, branches: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Logits of some branches, (branches, vocabulary); those of all first branches at no cost."""
    if len(branches) == len(logits) and not any(branch for _, branch in branches):
        return logits[:, 0]
    texts, indices = zip(*branches, strict=True)
    return logits[list(texts), list(indices)]


def sample(
    reader: TextReader, draw: TokenSampler, propose: Propose | None = None
) -> CompletionStream:
    """Choose one token after the other; a text leaves the batch when it ends.

    Args:
        propose: guesses continuations; those that equal the tokens chosen anyway are accepted and
            read in one step (Leviathan et al. 2023), so that the text is the same.
    """
    completions = [Completion([], [], 0.0) for _ in reader.lines]
    alive = list(range(len(completions)))
    while alive:
        if isinstance(reader, Tree) and propose is None:
            yield from _written(reader, draw, alive, completions)
        tokens, logs = draw(reader, alive, [(i, 0) for i in range(len(alive))])
        for text, token, log in zip(alive, tokens, logs, strict=True):
            completions[text] = _longer(completions[text], token, log, draw.rules)
            yield text, [completions[text]]
        staying = [i for i, text in enumerate(alive) if not completions[text].finish]
        if len(staying) < len(alive):
            alive, tokens = [alive[i] for i in staying], [tokens[i] for i in staying]
            if not alive:
                return
            reader.keep(staying)
        guesses: list[list[int]] = []
        if propose and isinstance(reader, Tree):
            guesses = _guesses(reader, tokens, alive, propose)
        if not guesses:
            reader.step([[token] for token in tokens])
        elif isinstance(reader, Tree):
            for text in _verified(reader, draw, alive, tokens, guesses, completions):
                yield text, [completions[text]]
            staying = [i for i, text in enumerate(alive) if not completions[text].finish]
            if len(staying) < len(alive):
                alive = [alive[i] for i in staying]
                if alive:
                    reader.keep(staying)


def _written(
    reader: Tree, draw: TokenSampler, alive: list[int], completions: list[Completion]
) -> CompletionStream:
    """Extend all texts by what can be written in one call; none of them ends by that."""
    tokens, logs = draw.write(reader, alive, len(completions[alive[0]].tokens))
    for text, own, own_logs in zip(alive, tokens, logs, strict=True):
        for token, log in zip(own, own_logs, strict=True):
            completions[text] = _longer(completions[text], token, log, draw.rules)
        if own:
            yield text, [completions[text]]


def _longer(completion: Completion, token: int, log: float, rules: Rules) -> Completion:
    """Append a token; a text ends where none is possible, or the model excludes a forced one."""
    if token == NO_TOKEN or log == -math.inf:
        return replace(completion, finish=DEAD_END, settled=len(completion.tokens))
    completion.tokens.append(token)
    completion.logs.append(log)
    return Completion(
        completion.tokens,
        completion.logs,
        completion.score + log,
        rules.finish(completion.tokens),
        len(completion.tokens),
    )


def _guesses(
    reader: Tree, tokens: list[int], alive: list[int], propose: Propose
) -> list[list[int]]:
    """Guess a continuation of every text after its token: as many tokens as fit, or none."""
    lines = [[*line, token] for (line,), token in zip(reader.lines, tokens, strict=True)]
    guesses = propose(alive, lines)
    width = min(max(map(len, guesses), default=0), reader.room - 1)
    if width < 1:
        return []
    return [(guess + [0] * width)[:width] for guess in guesses]


def _verified(
    reader: Tree,
    draw: TokenSampler,
    alive: list[int],
    tokens: list[int],
    guesses: list[list[int]],
    completions: list[Completion],
) -> Iterator[int]:
    """Read tokens and guesses in one step, accept the right ones, yield the texts that grew."""
    reader.step([[t, *guess] for t, guess in zip(tokens, guesses, strict=True)], chain=True)
    accepted, going = [0] * len(alive), list(range(len(alive)))
    for step in range(len(guesses[0])):
        picked, logs = draw(reader, [alive[i] for i in going], [(i, step) for i in going])
        right = []
        for i, token, log in zip(going, picked, logs, strict=True):
            if token == guesses[i][step]:
                text, accepted[i] = alive[i], step + 1
                completions[text] = _longer(completions[text], token, log, draw.rules)
                yield text
                if not completions[text].finish:
                    right.append(i)
        going = right
        if not going:
            break
    reader.branch([[count] for count in accepted])


# ---------------------------------------------------------------------------------------------
# Contrastive search


def contrastive(reader: TextReader, rules: Rules, top_k: int, alpha: float) -> CompletionStream:
    """Choose likely tokens whose state is unlike all earlier states (Su et al. 2022, eq. 5).

    Args:
        reader: with hidden states.
        top_k: the number of candidates in each step.
        alpha: weight of the penalty on similarity, in [0, 1].
    """
    starts = [len(lines[0]) for lines in reader.lines]
    completions = [Completion([], [], 0.0) for _ in starts]
    pasts = [torch.nn.functional.normalize(states, dim=-1) for states in reader.hidden]
    alive = list(range(len(starts)))
    while alive:
        lines, own = [lines[0] for lines in reader.lines], [starts[text] for text in alive]
        logits = reader.logits[:, 0]
        ranking = rules.scores(logits, lines, own)
        probabilities = ranking.softmax(-1)
        candidates = [
            _allowed(ranking[i], line[start:], rules, top_k)
            for i, (line, start) in enumerate(zip(lines, own, strict=True))
        ]
        width = max(1, *map(len, candidates))
        tokens = [[*c, *(c[-1:] or [0]) * width][:width] for c in candidates]
        reader.branch([[0] * width for _ in alive])
        reader.step(tokens)
        best = []
        for i, text in enumerate(alive):
            states = torch.nn.functional.normalize(reader.hidden[i], dim=-1)  # (width, size)
            similarity = (states @ pasts[text].T).amax(-1)
            scores = (1 - alpha) * probabilities[i, tokens[i]] - alpha * similarity
            best.append(int(scores.argmax()))
            pasts[text] = torch.cat([pasts[text], states[best[i] : best[i] + 1]])
            token = tokens[i][best[i]]
            log = float(logits[i, token] - logits[i].logsumexp(-1))
            token = token if candidates[i] else NO_TOKEN
            completions[text] = _longer(completions[text], token, log, rules)
            yield text, [completions[text]]
        reader.branch([[b] for b in best])
        staying = [i for i, text in enumerate(alive) if not completions[text].finish]
        if staying and len(staying) < len(alive):
            reader.keep(staying)
        alive = [alive[i] for i in staying]


def _allowed(ranking: torch.Tensor, done: list[int], rules: Rules, top_k: int) -> list[int]:
    """Return the most likely tokens that break no rule, or the one that is forced."""
    forced = rules.forced(len(done))
    if forced is not None:
        return [forced]
    count = min(top_k, len(ranking))
    while True:
        best = ranking.topk(count)
        possible = best.indices[best.values > -torch.inf].tolist()
        allowed = [token for token in possible if not rules.breaks([*done, token])][:top_k]
        if len(allowed) == top_k or len(possible) < count or count == len(ranking):
            return allowed
        count = min(4 * count, len(ranking))
