"""Questions about texts, with their answers: in SQuAD's format, or datasets with its columns."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from genkit.data import table_sources, tables

COLUMNS = ("id", "title", "question", "context", "answers")


@dataclass(frozen=True)
class Example:
    """A question about a text."""

    id: str
    title: str  # of the article that the context is from
    question: str
    context: str
    answers: list[tuple[str, int]]  # with their first characters; empty: not in the context


def read_examples(
    source: str, table_memory: int = tables.MEMORY
) -> tuple[list[Example], list[Example]]:
    """Read questions, contexts and answers.

    Args:
        source: a file in the format of SQuAD 1.1 or 2.0; or a table with SQuAD's `COLUMNS`: a file
            (json, jsonl, parquet), a dataset saved by `datasets`, or the id of one on the Hub.
        table_memory: MiB of memory of the process that reads a table; also the most bytes of its
            rows, if its files are small.

    Returns:
        Examples to train on, and those of the dataset's validation split, if it has one.

    Raises:
        ValueError: there is no such data, or it is in another format; the message names the row.
    """
    found = table_sources.find_tables(source, table_memory)
    train, val = (
        _parse_rows(_read_rows(table), source) if (table := found.get(name)) else []
        for name in ("train", "validation")
    )
    if not train and not val:
        raise ValueError(f"data: {source!r} has no questions; give some to learn from")
    return train, val


def split_examples(
    source: str, val_source: str | None, val_fraction: float, table_memory: int = tables.MEMORY
) -> tuple[list[Example], list[Example]]:
    """Read questions to train on and questions to validate on.

    Args:
        source, table_memory: see `read_examples`.
        val_source: other questions to validate on; default: the validation split of `source`, or
            its last articles, so that no context is on both sides.
        val_fraction: part of the articles to validate on, one at least.

    Raises:
        ValueError: see `read_examples` and `split_by_article`.
    """
    train, val = read_examples(source, table_memory)
    if not train:
        raise ValueError(f"data: {source!r} has a split 'validation' and no 'train'")
    if val_source:
        other, val = read_examples(val_source, table_memory)
        val = val or other
    return (train, val) if val else split_by_article(train, val_fraction, source)


def split_by_article(
    examples: list[Example], val_fraction: float, source: str
) -> tuple[list[Example], list[Example]]:
    """Hold the last articles out, so that no context is on both sides.

    Args:
        val_fraction: part of the articles to hold out, one at least.
        source: name of the data, for errors.

    Raises:
        ValueError: there is one article, or articles on both sides share a context.
    """
    titles = list(dict.fromkeys(example.title for example in examples))
    if len(titles) < 2:
        raise ValueError(
            f"data: {source!r} is one article, {titles[0]!r}, of which none can be held "
            "out; give --val_data"
        )
    count = min(max(1, round(val_fraction * len(titles))), len(titles) - 1)
    held = set(titles[-count:])
    train = [example for example in examples if example.title not in held]
    val = [example for example in examples if example.title in held]
    shared = {example.context: example.title for example in train}
    for example in val:
        if example.context in shared:
            raise ValueError(
                f"data: the articles {shared[example.context]!r} and {example.title!r} of "
                f"{source!r} share a context, so that they cannot be split; give --val_data"
            )
    return train, val


def content_hash(examples: Sequence[Example]) -> str:
    """SHA-256 of all fields of the examples."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(dataclasses.astuple(example)).encode() + b"\n")
    return digest.hexdigest()


def has_impossible(examples: Sequence[Example]) -> bool:
    """Return whether some questions have no answer, as in SQuAD 2.0."""
    return not all(example.answers for example in examples)


def _read_rows(table: tables.Table) -> Iterator[Any]:
    """Yield rows with the columns of SQuAD on the Hub."""
    columns = (*COLUMNS, "paragraphs")
    with tables.open_table(table, columns) as (head, rows):
        if table.files[0].lower().endswith(".json") and head.layout == tables.LINES:
            raise ValueError(
                f'{table.name} must be SQuAD\'s {{"data": [...]}}, or a list of questions with '
                f"{', '.join(COLUMNS)}, got the keys {head.columns!r:.60}; a file of one JSON "
                "object a line is a .jsonl"
            )
        yield from _flatten(rows) if head.layout == tables.DATA else rows


def _flatten(articles: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """Yield the questions of SQuAD's own format as rows with the columns on the Hub."""
    for i, article in enumerate(articles):
        path = f"data[{i}]"
        title = _field(article, "title", str, path)
        for j, paragraph in enumerate(_field(article, "paragraphs", list, path)):
            path = f"data[{i}].paragraphs[{j}]"
            context = _field(paragraph, "context", str, path)
            for k, question in enumerate(_field(paragraph, "qas", list, path)):
                path = f"data[{i}].paragraphs[{j}].qas[{k}]"
                golds = _field(question, "answers", list, path)
                if "is_impossible" in question:
                    _field(question, "is_impossible", bool, path)
                if question.get("is_impossible", not golds) is bool(golds):
                    raise ValueError(
                        f"data: {path} has {len(golds)} answers, and is_impossible is "
                        f"{question['is_impossible']}; one must be wrong"
                    )
                texts = [_field(gold, "text", str, f"{path}.answers") for gold in golds]
                starts = [_field(gold, "answer_start", int, f"{path}.answers") for gold in golds]
                answers = {"text": texts, "answer_start": starts}
                row = {name: _field(question, name, str, path) for name in ("id", "question")}
                yield row | {"title": title, "context": context, "answers": answers}


def _field(owner: Any, name: str, kind: type, path: str) -> Any:
    """Return a required field of a JSON object; `path` is that of the object, for errors."""
    value = owner.get(name) if isinstance(owner, dict) else None
    if not isinstance(value, kind):
        raise ValueError(f"data: {path}.{name} must be a {kind.__name__}, got {value!r:.60}")
    return value


def _parse_rows(rows: Iterable[Any], source: str) -> list[Example]:
    """Make each row with the columns of SQuAD on the Hub an example, and check it."""
    examples, seen = [], set()
    for i, row in enumerate(rows):
        path = f"row {i}"
        texts = {name: _field(row, name, str, path) for name in COLUMNS[:-1]}
        golds = _field(row, "answers", dict, path)
        lists = [_field(golds, name, list, f"{path}.answers") for name in ("text", "answer_start")]
        texts["question"] = texts["question"].strip()  # some of SQuAD's begin with many blanks
        example = Example(**texts, answers=list(zip(*lists, strict=False)))
        if len(lists[0]) != len(lists[1]):
            raise ValueError(
                f"data: question {example.id!r} has {len(lists[0])} answers and {len(lists[1])} "
                "values of answer_start"
            )
        if example.id in seen:
            raise ValueError(f"data: {source!r} has two questions with the id {example.id!r}")
        seen.add(example.id)
        _check_example(example)
        examples.append(example)
    return examples


def _check_example(example: Example) -> None:
    for name in ("question", "context"):
        text = getattr(example, name)
        if not text or text.isspace():
            raise ValueError(f"data: question {example.id!r} has an empty {name}")
    try:
        json.dumps(dataclasses.astuple(example), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"data: question {example.id!r} has half a surrogate pair: {error.reason}"
        ) from None
    for text, start in example.answers:
        if not isinstance(text, str) or not isinstance(start, int) or not text.strip() or start < 0:
            raise ValueError(
                f"data: an answer of question {example.id!r} must be a text and the character "
                f"that it starts at, got {text!r} and {start!r}"
            )
        there = example.context[start : start + len(text)]
        if there != text:
            raise ValueError(
                f"data: the answer of question {example.id!r} at character {start} should be "
                f"{text!r}, but the context has {there!r}{_unit_hint(example.context, text, start)}"
            )


def _unit_hint(context: str, text: str, start: int) -> str:
    """Say what an answer that is not at its character was counted in, if it can be seen."""
    units = (("utf-16-le", 2, "UTF-16 code units"), ("utf-8", 1, "bytes of UTF-8"))
    for encoding, size, unit in units:
        if context.encode(encoding).startswith(text.encode(encoding), size * start):
            return f"; it was counted in {unit}: count characters (code points)"
    return ""
