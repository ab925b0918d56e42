import functools
import itertools
import math
import random

import numpy as np
import pytest
import torch
from builders import LETTERS, small_model
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from genkit.data import characters
from genkit.models import lm
from genkit.text import correction, lexicon, rescoring
from genkit.text.language_model import LanguageModel

SENTENCES = [
    "what is the weather like in boston right now",
    "is it cold in boston this morning",
    "the best in town is what she likes",
    "right now the boat is in the harbour",
    "it is what it is, and this is it.",
]
ALPHABET = "".join(sorted(set("".join(SENTENCES)) | set("\n\t,.!?'BOSTIN")))


def random_words(count: int, letters: str, longest: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(letters, k=rng.randint(1, longest))) for _ in range(count)]


# ---- words and their neighbours


@functools.cache
def distance(first: str, second: str) -> int:
    """Optimal string alignment, by its definition."""
    if not first or not second:
        return len(first) + len(second)
    ways = [
        distance(first[:-1], second) + 1,
        distance(first, second[:-1]) + 1,
        distance(first[:-1], second[:-1]) + (first[-1] != second[-1]),
    ]
    if first[-2:] == second[-2:][::-1] and len(first) > 1:
        ways.append(distance(first[:-2], second[:-2]) + 1)
    return min(ways)


@pytest.mark.parametrize("letters", ["ab", "abcdef", "aéß\N{GREEK SMALL LETTER PI}字"])
@pytest.mark.parametrize("max_edits", [1, 2, 3])
def test_neighbours_are_those_of_brute_force(letters, max_edits):
    known = random_words(300, letters, 8)
    listed = lexicon.Lexicon(known)
    for word in random_words(40, letters, 8, seed=1):
        near = {k: distance(word, k) for k in known if 0 < distance(word, k) <= max_edits}
        found = listed.neighbours(word, max_edits)
        assert dict(found) == near and len(found) == len(near)
        order = [(edits, -listed.counts[other]) for other, edits in found]
        assert order == sorted(order)


def test_a_large_lexicon_finds_a_word_spelled_in_any_wrong_way():
    known = random_words(100_000, "etaoinshrdlu", 12)
    listed = lexicon.Lexicon(known)
    for word in [word for word in known if len(word) > 3][:50]:
        for wrong in (word[1:], word + "x", word[:2] + "x" + word[3:], word[1::-1] + word[2:]):
            assert wrong == word or (word, 1) in listed.neighbours(wrong, 2)


def test_words_are_letters_with_apostrophes_inside():
    found = lexicon.words("Don't stop, x2 __init__ 'tis a_b naïve\u2014o\u2019er 3rd end'")
    assert found == ["Don't", "stop", "tis", "naïve", "o\u2019er", "end"]


# ---- word error rate


@functools.cache
def edits(first: tuple[str, ...], second: tuple[str, ...]) -> int:
    if not first or not second:
        return len(first) + len(second)
    same = edits(first[1:], second[1:]) + (first[0] != second[0])
    return min(same, edits(first[1:], second) + 1, edits(first, second[1:]) + 1)


def test_word_error_rate_is_that_of_brute_force():
    rng = random.Random(0)
    texts = [" ".join(rng.choices("abc", k=rng.randint(0, 7))) for _ in range(200)]
    right, heard = texts[:100], texts[100:]
    total = sum(
        edits(tuple(r.split()), tuple(h.split())) for r, h in zip(right, heard, strict=True)
    )
    expected = total / sum(len(r.split()) for r in right)
    assert rescoring.word_error_rate(right, heard) == expected
    assert rescoring.word_error_rate("the cat sat", "the  bat\nsat down") == 2 / 3
    assert rescoring.word_error_rate(right, right) == 0


def test_a_word_error_rate_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"hypotheses: 1 .* 2"):
        rescoring.word_error_rate(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="references: "):
        rescoring.word_error_rate([" "], ["a"])


# ---- the probability of a text


def joining_model() -> LanguageModel:
    """A random model whose tokens run across the borders of words."""
    backend = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=["<s>"], show_progress=False)
    backend.train_from_iterator([sentence * 3 for sentence in SENTENCES], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    torch.manual_seed(2)
    model = lm.make_model("gpt2", len(tokenizer), 64, 2, 32, 2, 0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    return LanguageModel(model.eval(), tokenizer, "joining")


def word_model() -> LanguageModel:
    """A random model whose tokens are words, with one for all that it does not know."""
    vocabulary = {"<unk>": 0, "<eos>": 1, "in": 2, "boston": 3, "now": 4}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>"
    )
    torch.manual_seed(3)
    model = lm.make_model("llama", 5, 64, 1, 32, 2, 0.0)
    return LanguageModel(model.eval(), tokenizer, "words")


def log_probability(language: LanguageModel, start: int, text: str) -> float:
    """Token by token, each from a text read by itself."""
    row, total = [start], 0.0
    for token in language.tokenizer(text, add_special_tokens=False).input_ids:
        with torch.inference_mode():
            logits = language.model(torch.tensor([row])).logits[0, -1]
        total += logits.log_softmax(-1)[token].item()
        row.append(token)
    return total


def log_language(language: LanguageModel, texts: list[str]) -> list[float]:
    return [rescoring.rescore([(text, 0.0)], model=language)[0].log_language for text in texts]


@pytest.mark.parametrize("name", ["llama", "gpt2", "joining"])
def test_log_probabilities_are_those_of_teacher_forcing_in_any_batch(name):
    language = joining_model() if name == "joining" else small_model(name)
    start = 0 if name == "joining" else language.tokenizer.get_vocab()["\n"]
    letters = "boast in" if name == "joining" else LETTERS
    texts = ["", *("".join(random.Random(i).choices(letters, k=i)) for i in range(1, 60, 3))]
    expected = [log_probability(language, start, text) for text in texts]
    assert np.allclose(log_language(language, texts), expected, atol=1e-3)
    together = rescoring.rescore([(text, 0.0) for text in texts], model=language, beta=0.0)
    found = {record.text: record.log_language for record in together}
    assert np.allclose([found[text] for text in texts], expected, atol=1e-3)


def test_beyond_the_context_windows_overlap_by_half():
    language = small_model("llama", context=8)
    text = "abcdefghijklmnop .abc"
    row = [language.tokenizer.get_vocab()["\n"], *language.tokenizer(text).input_ids]
    total = 0.0
    for i in range(1, len(row)):
        start = 0 if i < 8 else (i - 8) // 4 * 4 + 4
        with torch.inference_mode():
            logits = language.model(torch.tensor([row[start:i]])).logits[0, -1]
        total += logits.log_softmax(-1)[row[i]].item()
    assert np.isclose(log_language(language, [text])[0], total, atol=1e-3)


def test_an_unknown_word_has_a_share_of_the_unknown():
    language = word_model()
    known, unknown = log_language(language, ["in boston", "in bostin"])
    assert np.isclose(known, log_probability(language, 1, "in boston"), atol=1e-4)
    expected = log_probability(language, 1, "in bostin") - math.log(5)
    assert np.isclose(unknown, expected, atol=1e-4)
    assert unknown < known


def test_the_score_is_the_sum_of_its_terms():
    language = small_model("llama")
    pairs = [("abc d", -3.0), ("abc", -4.0), ("d. e f", -1.5)]
    ranked = rescoring.rescore(pairs, model=language, alpha=0.3, beta=2.0)
    assert sorted((r.text, r.log_channel) for r in ranked) == sorted(pairs)
    assert [r.score for r in ranked] == sorted((r.score for r in ranked), reverse=True)
    for r in ranked:
        assert r.words == len(r.text.split())
        assert np.isclose(r.score, r.log_channel + 0.3 * r.log_language + 2.0 * r.words)
        assert r.text in str(r)
    first, second = rescoring.rescore([pairs, pairs[:1]], model=language, alpha=0.3, beta=2.0)
    assert [r.text for r in first] == [r.text for r in ranked]
    assert len(second) == 1 and np.isclose(second[0].log_channel, -3.0)
    assert [r.text for r in rescoring.rescore(pairs, model=language, alpha=0.0, beta=0.0)] == [
        "d. e f",
        "abc d",
        "abc",
    ]


# ---- correction: the search


@pytest.mark.parametrize("name", ["llama", "gpt2", "joining"])
def test_a_wide_beam_finds_what_exhaustive_search_finds(name):
    language = joining_model() if name == "joining" else small_model(name)
    letters = "bostinw" if name == "joining" else "abcdefg"
    listed = lexicon.Lexicon(random_words(12, letters, 4, seed=5))
    channel = {"keep": 0.6, "edit_cost": 1.0, "unknown": 0.3}
    changed = 0
    for seed in range(6):
        words = random_words(4, letters, 4, seed=10 + seed)
        sources = [[w, *(n for n, _ in listed.neighbours(w, 1))] for w in words]
        scores = {}
        for chosen in itertools.product(*sources):
            pairs = list(zip(words, chosen, strict=True))
            prior = sum(math.log(0.7 if meant in listed else 0.3) for _, meant in pairs)
            seen = sum(
                math.log(0.6) if word == meant else math.log(0.4) - 1.0 for word, meant in pairs
            )
            scores[" ".join(chosen)] = prior + seen
        ranked = rescoring.rescore(list(scores.items()), model=language, alpha=0.5, beta=0.0)
        options = {"model": language, "lexicon": listed, "alpha": 0.5, "max_edits": 1, **channel}
        found = correction.correct(" ".join(words), beams=10**6, candidates=100, **options)
        assert found.text == ranked[0].text
        assert np.isclose(found.score_after, ranked[0].score, atol=1e-3)
        before = next(r.score for r in ranked if r.text == " ".join(words))
        assert np.isclose(found.score_before, before, atol=1e-3)
        narrow = correction.correct(" ".join(words), beams=1, **options)
        assert found.score_before <= narrow.score_after <= found.score_after + 1e-3
        changed += found.text != found.source
    assert changed > 2


def test_a_text_beyond_the_context_keeps_all_but_its_words():
    language = small_model("gpt2", context=64)
    text = "\n".join(["abc def. gab", "." * 150, "fed  cba" + "a" * 90] * 4)
    listed = ["abc", "deg", "gab", "fee", "cb"]
    found = correction.correct(text, model=language, lexicon=listed, unknown=1e-9)
    assert lexicon.WORD.sub("#", found.text) == lexicon.WORD.sub("#", text)
    assert found.text != text and found.score_after > found.score_before
    assert "a" * 90 in found.text
    for change in found.changes:
        assert text[change.start :].startswith(change.before)
        assert change.after in listed


# ---- correction: what a user sees


@pytest.fixture(scope="module")
def trained_language() -> LanguageModel:
    """A character model that has learned a few sentences nearly by heart."""
    tokenizer = characters.make_tokenizer(ALPHABET)
    torch.manual_seed(0)
    model = lm.make_model("llama", len(tokenizer), 128, 2, 64, 2, 0.0)
    rng = random.Random(0)
    text = "\n".join(rng.choice(SENTENCES) for _ in range(300))
    ids = torch.tensor(tokenizer(text).input_ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        starts = [rng.randrange(len(ids) - 65) for _ in range(8)]
        rows = torch.stack([ids[start : start + 65] for start in starts])
        optimizer.zero_grad()
        lm.loss(model, rows[:, :-1], rows[:, 1:]).backward()
        optimizer.step()
    return LanguageModel(model.eval(), tokenizer, "weather")


@pytest.fixture(scope="module")
def repair(trained_language):
    listed = lexicon.Lexicon(word for sentence in SENTENCES for word in lexicon.words(sentence))
    return functools.partial(correction.correct, model=trained_language, lexicon=listed)


def test_the_model_prefers_what_was_said(trained_language):
    heard = [
        ("what is the weather like in bostin right now", -1.0),
        ("what is the weather like in boston right now", -2.0),
        ("what is the whether lick in boston right now", -1.5),
    ]
    best = rescoring.rescore(heard, model=trained_language)[0]
    assert best.text == SENTENCES[0]
    assert rescoring.rescore(heard, model=trained_language, alpha=0.0)[0].text == heard[0][0]
    both = rescoring.rescore([heard, heard[:1]], model=trained_language)
    assert [ranked[0].text for ranked in both] == [SENTENCES[0], heard[0][0]]


def test_a_misspelled_word_is_corrected(repair):
    found = repair("what is the weather like in bostin right now")
    assert found.text == SENTENCES[0]
    assert found.changes == [correction.Change(28, "bostin", "boston")]
    assert found.score_after > found.score_before
    assert str(found).splitlines()[:2] == [found.text, "  bostin -> boston (at 28)"]


def test_words_are_judged_by_what_stands_around_them(repair):
    """All the wrong words are in the lexicon: only the model can tell."""
    found = repair("it the best is town in what she likes", unknown=0.5, edit_cost=2.0, alpha=1.0)
    assert found.text.endswith("the best in town is what she likes")


def test_texts_without_errors_stay(repair):
    for text in SENTENCES:
        found = repair(text)
        assert (found.text, found.changes) == (text, [])
        assert found.score_after == found.score_before


@pytest.mark.slow
def test_every_single_edit_of_a_long_word_is_undone(repair):
    rng = random.Random(0)
    for word in ("boston", "weather", "morning", "harbour"):
        sentence = next(each for each in SENTENCES if word in each)
        for i in range(1, len(word) - 1):
            swapped = word[:i] + word[i : i + 2][::-1] + word[i + 2 :]
            wrong = [word[:i] + word[i + 1 :], word[:i] + word[i] + word[i:], swapped]
            wrong.append(word[:i] + rng.choice("aeiou") + word[i + 1 :])
            texts = [sentence.replace(word, each) for each in wrong]
            found = repair(texts, unknown=1e-4)  # the lexicon has every word
            assert [record.text for record in found] == [sentence] * len(wrong)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("is it cold in Bostin, this  mornign?!", "is it cold in Boston, this  morning?!"),
        ("BOSTIN right now", "BOSTON right now"),
        ("\n what is\tthe waether ", "\n what is\tthe weather "),
        ("is it cold in \N{SNOWMAN} bostin?", "is it cold in \N{SNOWMAN} boston?"),
    ],
)
def test_case_punctuation_and_spaces_stay(repair, wrong, right):
    assert repair(wrong, unknown=1e-6).text == right


@pytest.mark.parametrize("text", ["", " \n", "12 + 3 = ?", "\N{SNOWMAN}", "bost1n bosTin _bostin"])
def test_texts_without_a_word_to_correct_stay(repair, text):
    found = repair(text, unknown=1e-9, edit_cost=0.0)
    assert (found.text, found.changes) == (text, [])


def test_a_word_with_a_character_the_model_does_not_know_stays(repair):
    assert repair("in b\N{LATIN SMALL LETTER O WITH DIAERESIS}ston").changes == []


def test_words_the_model_cannot_read_are_not_proposed(trained_language):
    found = correction.correct(
        "in bostin", model=trained_language, lexicon=["böstin", "boston"], unknown=1e-9
    )
    assert found.text == "in boston"


def test_a_list_gives_what_each_text_gives(repair):
    texts = ["in bostin right now", "", "it is waht it is"]
    assert repair(texts) == [repair(text) for text in texts]


def test_a_rare_word_stays_unless_the_lexicon_is_trusted(repair):
    text = "right now the goat is in the harbour"
    assert repair(text, unknown=0.5, alpha=0.15).text == text
    assert repair(text, unknown=1e-9, alpha=0.15).text == text.replace("goat", "boat")


def test_without_the_model_nothing_that_the_lexicon_has_is_changed(repair):
    text = "this in what she like in the wether"
    found = repair(text, alpha=0.0)
    assert found.text == text


def test_a_model_of_words_corrects_to_words_it_knows():
    found = correction.correct(
        "now, in bostin", model=word_model(), lexicon=["in", "boston", "now"], unknown=1e-6
    )
    assert found.text == "now, in boston"


def test_a_folder_will_do_as_a_model(trained):
    found = correction.correct("eta ta", model=trained, lexicon=["eta", "ta"])
    assert found.text == "eta ta"
    assert rescoring.rescore([("eta", -1.0)], model=str(trained))[0].words == 1


# ---- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": []}, "candidates: an empty list"),
        ({"candidates": [[("a", -1.0)], []]}, "candidates: an empty list"),
        ({"candidates": [("a", -1.0), ("b", math.nan)]}, "'b' has the log-probability nan"),
        ({"candidates": [("a", -math.inf)]}, "'a' has the log-probability -inf"),
        ({"candidates": [("a", None)]}, r"\('a', None\) is not a pair"),
        ({"candidates": [("a", "-1")]}, r"\('a', '-1'\) is not a pair"),
        ({"candidates": [("a", -1.0), ("b",)]}, "is not a pair"),
        ({"candidates": ["ab"]}, "'ab' is not a pair"),
        ({"candidates": [("a\N{SNOWMAN}", -1.0)]}, "never seen '\N{SNOWMAN}'"),
        ({"alpha": -1.0}, "alpha must be 0 or more, got -1.0"),
        ({"alpha": math.nan}, "alpha must be 0 or more, got nan"),
        ({"beta": math.inf}, "beta must be a finite number, got inf"),
    ],
)
def test_bad_candidates_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        rescoring.rescore(
            **({"candidates": [("a", -1.0)], "model": small_model("llama")} | options)
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": []}, r"text: \[\]"),
        ({"text": ["a", None]}, "text must be a text, got None"),
        ({"lexicon": []}, r"lexicon: \[\]"),
        ({"lexicon": "some text"}, "lexicon: a str "),
        ({"lexicon": ["two words"]}, "lexicon: 'two words'"),
        ({"lexicon": [""]}, "lexicon: ''"),
        ({"lexicon": [7]}, "lexicon: 7 "),
        ({"alpha": -0.1}, "alpha must be 0 or more"),
        ({"beams": 0}, "beams must be 1 or more, got 0"),
        ({"max_edits": 0}, "max_edits must be 1 or more, got 0"),
        ({"candidates": 0}, "candidates must be 1 or more, got 0"),
        ({"keep": 1.0}, "keep must be between 0 and 1, got 1.0"),
        ({"unknown": 0.0}, "unknown must be between 0 and 1, got 0.0"),
        ({"edit_cost": -1.0}, "edit_cost must be 0 or more, got -1.0"),
        ({"edit_cost": math.nan}, "edit_cost must be 0 or more, got nan"),
        ({"model": "no/such/model/here"}, "model: cannot load"),
        ({"model": small_model("llama", context=4)}, "too few for a word"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        correction.correct(
            **({"text": "abcde", "model": small_model("llama"), "lexicon": ["abcd"]} | options)
        )
