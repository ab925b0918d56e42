"""Windows of tokens, and the spans in them."""

import functools
import unicodedata
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from readers import KINDS, TEXTS, network, texts, tokenizer_of, wrap
from tokenizers import Tokenizer, models, pre_tokenizers

from genkit.qa import spans, windows
from genkit.qa.windows import NEVER, TokenWindows

tokenizer = functools.cache(tokenizer_of)
model = functools.cache(lambda kind: network(kind, len(tokenizer(kind))))
anything = settings(max_examples=40, deadline=None)

# ---- windows


@pytest.mark.parametrize("kind", KINDS)
@anything
@given(question=texts, context=texts, room=st.integers(1, 12), share=st.floats(0, 0.99))
def test_windows_are_those_of_the_tokenizer(kind, question, context, room, share):
    own, stride = tokenizer(kind), int(share * room)
    asked, read = (own(text, add_special_tokens=False).input_ids for text in (question, context))
    assume(asked and read)
    size = own.num_special_tokens_to_add(pair=True) + len(asked) + room
    expected = own(
        question,
        context,
        truncation="only_second",
        max_length=size,
        stride=stride,
        padding=True,
        return_overflowing_tokens=True,
        return_token_type_ids=True,
        return_offsets_mapping=True,
    )
    found = TokenWindows([question], [context], own, size, stride)
    batch = found.inputs(np.arange(len(found)), model("uncased"))
    assert batch["input_ids"].tolist() == expected.input_ids
    types = batch["token_type_ids"].tolist()
    if kind == "unigram":  # tokenizers 0.23 gives the type of the template to the first alone
        assert not np.any(types) and types[0] == expected.token_type_ids[0]
    else:
        assert types == expected.token_type_ids
    assert batch["attention_mask"].tolist() == expected.attention_mask
    for i in range(len(found)):
        inside = [j for j, whose in enumerate(expected.sequence_ids(i)) if whose == 1]
        assert inside == list(
            range(found.begin[i], found.begin[i] + found.last[i] - found.first[i])
        )
        tokens = slice(found.first[i], found.last[i])
        starts, ends = found.contexts[0].starts[tokens], found.contexts[0].ends[tokens]
        offsets = [expected.offset_mapping[i][j] for j in inside]
        assert list(zip(starts.tolist(), ends.tolist(), strict=True)) == offsets


@pytest.mark.parametrize("kind", KINDS)
@anything
@given(text=texts)
def test_a_text_has_the_tokens_words_and_places_of_the_tokenizer(kind, text):
    assume(text)
    own = tokenizer(kind)(text, add_special_tokens=False, return_offsets_mapping=True)
    found = windows.tokenize(text, tokenizer(kind))
    assert found.ids.tolist() == own.input_ids
    assert list(zip(found.starts.tolist(), found.ends.tolist(), strict=True)) == own.offset_mapping
    for token, word in enumerate(own.word_ids()):
        same = [i for i, other in enumerate(own.word_ids()) if other == word]
        assert same[0] <= found.first[token] <= token <= found.last[token] <= same[-1]
        if not windows.UNSPACED.search(text):
            assert (found.first[token], found.last[token]) == (same[0], same[-1])


@pytest.mark.parametrize("kind", ["uncased", "cased"])
@anything
@given(parts=st.lists(texts.filter(lambda text: len(text) < 30), min_size=3, max_size=12))
def test_blocks_of_a_long_text_give_the_tokens_of_one_piece(kind, parts):
    text = "".join(f"{part}\nword " for part in parts)
    whole = windows.tokenize(text, tokenizer(kind))
    with mock.patch.object(windows, "BLOCK", 40):
        blocks = list(windows._blocks(text))
        found = windows.tokenize(text, tokenizer(kind))
    assert "".join(block for _, block in blocks) == text
    assert all(text.startswith(block, start) for start, block in blocks)
    assert len(blocks) > 1 or len(text) <= 80
    for name in ("ids", "starts", "ends", "first", "last"):
        assert getattr(found, name).tolist() == getattr(whole, name).tolist()


def test_a_word_without_end_is_cut_all_the_same():
    text = "x" * 1000
    with mock.patch.object(windows, "BLOCK", 40):
        assert [len(block) for _, block in windows._blocks(text)] == [80] * 12 + [40]
        found = windows.tokenize(text, tokenizer("bytes"))
    assert found.starts[0] == 0 and found.ends[-1] == 1000
    assert found.starts[1:].tolist() == found.ends[:-1].tolist()


def test_groups_hold_every_window_once_within_the_most_tokens():
    contexts = [" ".join(["fox"] * n) for n in (1, 30, 7, 200, 64, 2)]
    found = TokenWindows(["Where"] * len(contexts), contexts, tokenizer("cased"), 48, 8)
    for most in (1, 48, 100, 10**6):
        groups = list(found.groups(most))
        assert sorted(np.concatenate(groups)) == list(range(len(found)))
        assert all(found.length[group].max() * len(group) <= max(most, 48) for group in groups)
        longest = [found.length[group].max() for group in groups]
        assert longest == sorted(longest, reverse=True)


@anything
@given(tokens=st.integers(1, 60), room=st.integers(1, 20), share=st.floats(0, 0.99))
def test_every_run_of_as_many_tokens_as_windows_share_is_in_a_window(tokens, room, share):
    stride = int(share * room)
    cuts = windows.cut_windows(tokens, room, stride)
    assert all(0 < last - first <= room for first, last in cuts)
    for start in range(max(1, tokens - stride)):
        stop = min(start + stride + 1, tokens)
        assert any(first <= start and stop <= last for first, last in cuts)
    assert len(cuts) == 1 or all(last - first == room for first, last in cuts[:-1])


# ---- spans


def log_probabilities(generator, rows, tokens):
    logits = 4 * torch.randn(rows, tokens, generator=generator)
    ends = torch.randint(1, tokens + 1, (rows, 1), generator=generator)
    return torch.log_softmax(logits.masked_fill(torch.arange(tokens) >= ends, NEVER), -1)


@anything
@given(st.integers(0, 2**32), st.integers(1, 20), st.integers(1, 25), st.booleans())
def test_the_likeliest_spans_are_those_of_a_search_through_all(seed, tokens, longest, some):
    generator = torch.Generator().manual_seed(seed)
    start, end = (log_probabilities(generator, 3, tokens) for _ in range(2))
    taken = (torch.rand(3, tokens, generator=generator) < 0.2) & torch.tensor(some)
    found, first, last = spans.likeliest_spans(start, end, longest, taken)
    for row in range(3):
        every = {
            (a, b): float(start[row, a] + end[row, b])
            for a in range(tokens)
            for b in range(a, min(a + longest, tokens))
            if not taken[row, a : b + 1].any()
        }
        best = sorted((p for p in every.values() if p > NEVER), reverse=True)[: spans.CANDIDATES]
        ours = [p for p in found[row].tolist() if p > NEVER]
        assert ours == best
        places = zip(first[row].tolist(), last[row].tolist(), strict=True)
        assert [every[place] for place in list(places)[: len(ours)]] == ours


def naive(question, context, own, start, end, longest, words):
    """The best answer of one window by the definition, in float64: reading, score, place."""
    encoding = own(question, context, return_offsets_mapping=True)
    inside = [i for i, whose in enumerate(encoding.sequence_ids()) if whose == 1]
    p_start, p_end = (np.exp(x - np.logaddexp.reduce(x)) for x in (start, end))
    every = [
        (p_start[1 + a] * p_end[1 + b], inside[a], inside[b])
        for a in range(len(inside))
        for b in range(a, min(a + longest, len(inside)))
    ]
    readings = {}
    for p, a, b in sorted(every, key=lambda one: -one[0])[:12]:
        if words:
            word = encoding.word_ids()
            a = min(i for i in inside if word[i] == word[a])
            b = max(i for i in inside if word[i] == word[b])
        place = encoding.offset_mapping[a][0], encoding.offset_mapping[b][1]
        key = context[slice(*place)].lower() if words else (a, b)
        score, at = readings.get(key, (0.0, place))
        readings[key] = score + p, at
    score, (first, last) = max(readings.values())
    return context[first:last], score, first, last


SPACED = [word for word in " ".join(TEXTS).split() if not windows.UNSPACED.search(word)]


@pytest.mark.parametrize("kind", ["uncased", "cased", "unigram"])
@pytest.mark.parametrize("words", [True, False])
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    chosen=st.lists(st.sampled_from([*SPACED, "The", "the"]), min_size=1, max_size=12),
    scale=st.sampled_from([0.5, 3.0]),
    longest=st.sampled_from([1, 3, 15]),
)
def test_answers_are_those_of_the_definition(kind, words, seed, chosen, scale, longest):
    context, own = " ".join(chosen), tokenizer(kind)
    found = TokenWindows(["Where?"], [context], own, 400, 0)
    count = 1 + len(found.contexts[0])
    start, end = scale * np.random.default_rng(seed).normal(size=(2, count))
    wanted = spans.SpanOptions(longest=longest, words=words, temperature=2.0)
    rows = [torch.from_numpy(x)[None].float() for x in (start, end)]
    ((span,),) = spans.best_spans(*rows, np.arange(1), found, [context], wanted)
    answer, score, first, last = naive("Where?", context, own, start, end, longest, words)
    assert context[span.start : span.end] == answer
    assert (span.start, span.end) == (first, last)
    assert span.score == pytest.approx(score, rel=1e-5)
    assert 0 < span.confidence <= 1 + 1e-6
    null = spans.null_probability(*rows, 2.0).item()
    p_start, p_end = (np.exp(x / 2)[0] / np.exp(x / 2).sum() for x in (start, end))
    assert null == pytest.approx(p_start * p_end, rel=1e-5)


@pytest.mark.parametrize("far", [300.0, 3000.0])
def test_a_span_too_unlikely_for_a_float_is_still_found(far):
    context = "fox dog Monday noon"
    found = TokenWindows(["Where?"], [context], tokenizer("cased"), 64, 0)
    count = 1 + len(found.contexts[0])
    start, end = torch.zeros(1, count), torch.zeros(1, count)
    start[0, -1] = end[0, 1] = far  # the end is before the start
    start[0, 2], end[0, -2] = 50.0, 50.0
    ((span,),) = spans.best_spans(start, end, np.arange(1), found, [context], spans.SpanOptions())
    assert 0 <= span.score <= np.exp(50 - far) and span.end in (len("fox"), len(context))


@pytest.mark.parametrize("kind", KINDS)
def test_an_accent_stays_with_its_letter(kind):
    context = "the cafe\u0301 is"
    found = TokenWindows(["Where?"], [context], tokenizer(kind), 64, 0)
    tokens = found.contexts[0]
    inside = np.flatnonzero((tokens.starts >= 4) & (tokens.ends <= 9) & (tokens.starts < 8))
    start, end = torch.zeros(2, 1, 1 + len(tokens))
    start[0, 1 + inside[0]], end[0, 1 + inside[-1]] = 30.0, 30.0
    wanted = spans.SpanOptions(2)
    (best,) = spans.best_spans(start, end, np.arange(1), found, [context], wanted)
    assert context[best[0].start : best[0].end] == "cafe\u0301"


UNSPACED = (
    "全学年にわたって小学校の国語の教科書に挿し絵が用いられている",
    "ภาษาไทยไม่มีช่องว่างระหว่างคำ",
    "ភាសាខ្មែរមិនដកឃ្លារវាងពាក្យ",
)


def metaspace(context):
    """A token a character, and a text without spaces one word, as in multilingual models."""
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -1.0)]
    backend = Tokenizer(models.Unigram(pieces + [(c, -1.0) for c in dict.fromkeys(context)], 3))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return wrap(backend, ("<pad>", "<unk>", "<s>", "</s>"))


@pytest.mark.parametrize("make", [metaspace, lambda _: tokenizer("bytes")])
@pytest.mark.parametrize("context", UNSPACED)
def test_a_script_without_spaces_has_short_answers(make, context):
    """A tokenizer may take a whole sentence for a word."""
    found = TokenWindows([context[:2]], [context], make(context), 400, 0)
    count = len(found.contexts[0])
    start, end = np.random.default_rng(0).normal(size=(2, 1, 1 + count)) * 3
    rows = [torch.from_numpy(x).float() for x in (start, end)]
    wanted = spans.SpanOptions(top_k=3, longest=4)
    (best,) = spans.best_spans(*rows, np.arange(1), found, [context], wanted)
    assert len(best) == 3
    for span in best:
        assert 0 < span.end - span.start <= 4 + 6  # with marks above and below its letters
        assert not unicodedata.category(context[span.start]).startswith("M")
        assert not unicodedata.category(context[span.end : span.end + 1] or " ").startswith("M")


def test_a_character_of_several_tokens_is_whole():
    """Of a byte-level tokenizer, whose tokens are parts of characters here."""
    text = "国語 abc"
    found = windows.tokenize(text, tokenizer("bytes"))
    words = {(found.starts[found.first[i]], found.ends[found.last[i]]) for i in range(len(found))}
    assert {text[a:b].strip() for a, b in words} == {"国", "語", "abc"}
