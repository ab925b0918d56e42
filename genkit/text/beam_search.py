"""Beam search, plain and diverse: the most likely of several texts that are kept at once."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import torch

from genkit.text import logits
from genkit.text.options import Beams
from genkit.text.strategies import DEAD_END, Completion, CompletionStream, Rules, TextReader


@dataclass(frozen=True)
class _Branch:
    """A text that a beam may keep: a branch of the reader and one more token."""

    parent: int
    token: int
    log: float
    total: float  # log-probability of the completion; -inf: no text, where there are too few

    @property
    def is_text(self) -> bool:
        return self.total > -torch.inf


def beam(
    reader: TextReader,
    rules: Rules,
    search: Beams,
    trace: list[list[logits.Candidate]] | None = None,
) -> CompletionStream:
    """Keep the most likely texts, set those that end aside, and rank them by score.

    Args:
        trace: gets a list of candidates for every step, best first; for a single text only.
    """
    texts, size = len(reader.lines), search.count // search.groups
    starts = [len(lines[0]) for lines in reader.lines]
    reader.branch([[0] * search.count for _ in range(texts)])
    first = torch.tensor(([0.0] + [-torch.inf] * (size - 1)) * search.groups)
    totals = first.to(reader.logits.device).repeat(texts, 1)  # (texts, beams)
    logs: list[list[list[float]]] = [[[] for _ in range(search.count)] for _ in range(texts)]
    ended: list[list[Completion]] = [[] for _ in range(texts)]
    alive = list(range(texts))
    for length in range(1, rules.longest + 1):
        each = reader.logits.log_softmax(-1)  # (texts, beams, vocabulary)
        lines = [line for own in reader.lines for line in own]
        of_lines = [starts[text] for text in alive for _ in range(search.count)]
        scores = rules.scores(each.flatten(0, 1), lines, of_lines).view_as(each)
        kept: list[list[_Branch]] = []
        for i, text in enumerate(alive):
            done = [line[starts[text] :] for line in reader.lines[i]]
            branches, ends = _grown(each[i], scores[i], totals[i], done, rules, search, trace)
            ended[text] += [_ended(b, done, logs[text], rules, search) for b in ends]
            if not ended[text] and not any(b.is_text for b in branches):
                ended[text] = _dead_ends(totals[i], done, logs[text], search)
            ended[text] = _distinct(ended[text])[: search.count]
            logs[text] = [[*logs[text][b.parent], b.log] for b in branches]
            kept.append(branches)
        reader.branch([[b.parent for b in branches] for branches in kept])
        staying = []
        for i, text in enumerate(alive):
            running = _running(reader.lines[i], starts[text], kept[i], logs[text], rules, search)
            over = length == rules.longest or _is_over(ended[text], running, length, rules, search)
            yield text, _ranked(ended[text], running, over, length == rules.longest, search)
            staying += [] if over else [i]
        if not staying:
            return
        if len(staying) < len(alive):
            alive, kept = [alive[i] for i in staying], [kept[i] for i in staying]
            reader.keep(staying)
        reader.step([[b.token for b in branches] for branches in kept])
        totals = torch.tensor([[b.total for b in branches] for branches in kept])
        totals = totals.to(reader.logits.device)


def _grown(
    each: torch.Tensor,
    scores: torch.Tensor,
    totals: torch.Tensor,
    done: list[list[int]],
    rules: Rules,
    search: Beams,
    trace: list[list[logits.Candidate]] | None,
) -> tuple[list[_Branch], list[_Branch]]:
    """Extend one text's branches by the best tokens; return those to keep and those that end."""
    size = search.count // search.groups
    forced = rules.forced(len(done[0]))
    if forced is not None:
        only = torch.full_like(scores, -torch.inf)
        only[:, forced] = each[:, forced]
        scores = only
    kept: list[_Branch] = []
    ends: list[_Branch] = []
    for group in range(search.groups):
        own = slice(group * size, (group + 1) * size)
        ranking = totals[own, None] + scores[own]
        taken = Counter(b.token for b in (*kept, *ends) if b.is_text)
        for token, times in taken.items() if search.diversity else ():
            ranking[:, token] -= search.diversity * times
        room = ranking.numel()
        wanted = min(max(2, 1 + len(rules.ends)) * size, room)
        while True:
            found = _candidates(
                ranking, each[own], totals[own, None] + scores[own], wanted, own.start
            )
            allowed = [b for b in found if not rules.breaks([*done[b.parent], b.token])]
            goes_on = [b for b in allowed if not _ends(b, done, rules)]
            if len(goes_on) >= size or len(found) < wanted or wanted == room:
                break
            wanted = min(4 * wanted, room)
        ends += [b for b in allowed[:size] if _ends(b, done, rules)]
        kept += goes_on[:size]
        kept += [_Branch(own.start, 0, 0.0, -torch.inf)] * (size - len(goes_on))
        if trace is not None and allowed:
            trace.append([_candidate(b, goes_on[:size], ends) for b in allowed])
    return kept, ends


def _candidates(
    ranking: torch.Tensor, each: torch.Tensor, totals: torch.Tensor, count: int, first: int
) -> list[_Branch]:
    """Return the best possible pairs of branch and token by rank, best first."""
    best = ranking.flatten().topk(count)
    flat = best.indices[best.values > -torch.inf]
    parents, tokens = flat // ranking.shape[1], flat % ranking.shape[1]
    logs = each[parents, tokens]
    return [
        _Branch(first + parent, token, log, total)
        for parent, token, log, total in zip(
            parents.tolist(),
            tokens.tolist(),
            logs.tolist(),
            totals[parents, tokens].tolist(),
            strict=True,
        )
    ]


def _ends(branch: _Branch, done: list[list[int]], rules: Rules) -> bool:
    return rules.finish([*done[branch.parent], branch.token]) in ("eos", "stop")


def _candidate(branch: _Branch, kept: list[_Branch], ended: list[_Branch]) -> logits.Candidate:
    fate = "kept" if branch in kept else "finished" if branch in ended else "dropped"
    return logits.Candidate(branch.parent, branch.token, branch.log, branch.total, fate)


def _ended(
    branch: _Branch, done: list[list[int]], logs: list[list[float]], rules: Rules, search: Beams
) -> Completion:
    tokens = [*done[branch.parent], branch.token]
    own, score = [*logs[branch.parent], branch.log], _score(branch.total, len(tokens), search)
    return Completion(tokens, own, score, rules.finish(tokens))


def _dead_ends(
    totals: torch.Tensor, done: list[list[int]], logs: list[list[float]], search: Beams
) -> list[Completion]:
    """Make completions of the branches of which none can go on."""
    return [
        Completion(tokens, own, _score(total, len(tokens), search), DEAD_END)
        for tokens, own, total in zip(done, logs, totals.tolist(), strict=True)
        if total > -torch.inf
    ]


def _score(total: float, length: int, search: Beams) -> float:
    return total / max(length, 1) ** search.length_penalty


def _distinct(completions: list[Completion]) -> list[Completion]:
    """Order completions by score, each once: groups may come to the same."""
    found: dict[tuple[int, ...], Completion] = {}
    for completion in sorted(completions, key=lambda c: -c.score):
        found.setdefault(tuple(completion.tokens), completion)
    return list(found.values())


def _running(
    lines: list[list[int]],
    start: int,
    branches: list[_Branch],
    logs: list[list[float]],
    rules: Rules,
    search: Beams,
) -> list[Completion]:
    """Make completions of the kept branches; the lines do not have their last token yet."""
    found = []
    for line, branch, own in zip(lines, branches, logs, strict=True):
        if branch.is_text:
            tokens = [*line[start:], branch.token]
            finish = "length" if len(tokens) == rules.longest else None
            score = _score(branch.total, len(tokens), search)
            found.append(Completion(tokens, own, score, finish))
    return found


def _is_over(
    ended: list[Completion], running: list[Completion], length: int, rules: Rules, search: Beams
) -> bool:
    """Whether no unfinished text can, or may, replace one that has ended."""
    if not running:
        return True
    if len(ended) < search.count:
        return False
    if search.early_stopping is True:
        return True
    total = max(c.score for c in running) * length**search.length_penalty
    longest = search.early_stopping == "never" and search.length_penalty > 0
    reachable = total / (rules.longest if longest else length) ** search.length_penalty
    return reachable <= ended[-1].score


def _ranked(
    ended: list[Completion], running: list[Completion], over: bool, longest: bool, search: Beams
) -> list[Completion]:
    """Order completions, and count the tokens of the best that can no longer change."""
    if over:
        pool = _distinct([*ended, *running] if longest else ended)
        return [replace(c, settled=len(c.tokens)) for c in pool[: search.count]]
    together = [c.tokens for c in (*ended, *running)]
    shared = 0
    while all(len(t) > shared for t in together) and len({t[shared] for t in together}) == 1:
        shared += 1
    return [replace(max(running, key=lambda c: c.score), settled=shared)]
