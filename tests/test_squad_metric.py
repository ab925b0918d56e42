import socket
import string
from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genkit.metrics.squad import (
    SquadMetric,
    SquadV2Metric,
    best_f1_threshold,
    compute_exact,
    compute_f1,
    normalize_answer,
    score_v1,
    score_v2,
)

# ---- a reference, written slowly from the published definition


def slow_words(text: str) -> list[str]:
    """Lower case, no ASCII punctuation, no articles, apart at white space; letter by letter."""
    kept = [letter for letter in text.lower() if letter not in string.punctuation]
    runs = ["".join(run) for _, run in groupby(kept, str.isalnum)]
    return "".join(" " if run in ("a", "an", "the") else run for run in runs).split()


def slow_f1(prediction: str, gold: str, version: int) -> float:
    predicted, wanted = slow_words(prediction), slow_words(gold)
    if version == 2 and not (predicted and wanted):
        return float(predicted == wanted)
    left, shared = list(wanted), 0
    for word in predicted:
        if word in left:
            left.remove(word)
            shared += 1
    if shared == 0:
        return 0.0
    precision, recall = shared / len(predicted), shared / len(wanted)
    return 2 * precision * recall / (precision + recall)


def slow_exact(prediction: str, gold: str, version: int) -> float:
    return float(slow_words(prediction) == slow_words(gold))


def slow_v1(predictions, answers):
    totals = []
    for measure in (slow_exact, slow_f1):
        total = 0.0
        for question, golds in answers.items():
            if question in predictions:
                total += max(measure(predictions[question], gold, 1) for gold in golds)
        totals.append(100 * total / len(answers))
    return dict(zip(("exact_match", "f1"), totals, strict=True))


def slow_raw(predictions, answers, measure):
    raw = {}
    for question, golds in answers.items():
        comparable = [gold for gold in golds if slow_words(gold)]
        golds = comparable if comparable else [""]
        raw[question] = max(measure(predictions[question], gold, 2) for gold in golds)
    return raw


def slow_sweep(raw, predictions, answers, scores):
    """Answer one more question at a time, the least doubtful first; keep what is better."""
    now = best = sum(1 for golds in answers.values() if len(golds) == 0)
    threshold = 0.0
    for question in sorted(scores, key=lambda q: scores[q]):
        if len(answers[question]) > 0:
            now += raw[question]
        elif predictions[question] != "":
            now -= 1
        if now > best:
            best, threshold = now, scores[question]
    return 100 * best / len(answers), threshold


def slow_v2(predictions, answers, scores, threshold):
    raw = {
        "exact": slow_raw(predictions, answers, slow_exact),
        "f1": slow_raw(predictions, answers, slow_f1),
    }
    expected = {}
    for prefix, kinds in (("", (True, False)), ("HasAns_", (True,)), ("NoAns_", (False,))):
        part = [q for q, golds in answers.items() if (len(golds) > 0) in kinds]
        for name in raw if part else ():
            total = 0.0
            for q in part:
                silent = scores[q] > threshold
                total += (len(answers[q]) == 0) if silent else raw[name][q]
            expected[prefix + name] = 100 * total / len(part)
            expected[prefix + "total"] = len(part)
    for name in raw:
        best = slow_sweep(raw[name], predictions, answers, scores)
        expected[f"best_{name}"], expected[f"best_{name}_thresh"] = best
    return expected


# ---- random answers: articles, punctuation, odd spaces, letters that are no ASCII

PIECES = ["a", "an", "the", "The", "A", " ", " ", "\t", "\u00a0", ".", "'", "-", "_", "«", "…"]
PIECES += ["cat", "Cat", "b", "n", "é", "e\u0301", "İ", "ß", "猫", "²", "🙂", "\u200b"]
texts = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)
probabilities = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0])


@st.composite
def questions(draw, score=probabilities, fewest=0, unique=False):
    """Predictions, gold answers and no-answer scores, the scores in an order of their own."""
    golds = st.lists(texts, min_size=fewest, max_size=3)
    rows = draw(st.lists(st.tuples(texts, golds), min_size=1, max_size=6))
    if unique:
        values = draw(st.lists(score, min_size=len(rows), max_size=len(rows), unique=True))
    else:
        values = draw(st.lists(score, min_size=len(rows), max_size=len(rows)))
    names = [f"q{i}" for i in range(len(rows))]
    predictions = {name: row[0] for name, row in zip(names, rows, strict=True)}
    answers = {name: row[1] for name, row in zip(names, rows, strict=True)}
    shuffled = draw(st.permutations(list(zip(names, values, strict=True))))
    return predictions, answers, dict(shuffled)


@given(texts, texts)
def test_two_answers_are_compared_as_the_slow_reference_does(first, second):
    assert normalize_answer(first) == " ".join(slow_words(first))
    assert compute_exact(first, second) == slow_exact(first, second, 1)
    assert compute_f1(first, second) == slow_f1(first, second, 1)
    assert compute_f1(first, second) == pytest.approx(compute_f1(second, first), abs=1e-12)
    assert 0 <= compute_f1(first, second) <= 1
    if compute_exact(first, second) and normalize_answer(first):
        assert compute_f1(first, second) == 1
    assert normalize_answer(f"  The {first}!") == normalize_answer(first)


@given(st.text(), st.text())
def test_any_text_is_compared_as_the_slow_reference_does(first, second):
    assert normalize_answer(first) == " ".join(slow_words(first))
    assert compute_f1(first, second) == slow_f1(first, second, 1)


@given(questions(fewest=1), st.data())
def test_v1_is_the_slow_reference(drawn, data):
    predictions, answers, _ = drawn
    answered = data.draw(st.sets(st.sampled_from(list(predictions))))
    predictions = {q: text for q, text in predictions.items() if q in answered}
    found = score_v1(predictions, answers)
    assert found == pytest.approx(slow_v1(predictions, answers), abs=1e-9)


@given(questions(), probabilities)
def test_v2_is_the_slow_reference(drawn, threshold):
    found = score_v2(*drawn, threshold)
    expected = slow_v2(*drawn, threshold)
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, abs=1e-9)


@given(questions(st.floats(1e-3, 1), unique=True))
def test_the_best_figures_are_those_of_the_best_threshold(drawn):
    """Where the official quirks do not matter: scores above 0, all different, "" for no words."""
    predictions, answers, scores = drawn
    predictions = {q: text if normalize_answer(text) else "" for q, text in predictions.items()}
    found = score_v2(predictions, answers, scores)
    tried = [score_v2(predictions, answers, scores, t) for t in (0.0, *scores.values())]
    for name in ("exact", "f1"):
        assert found[f"best_{name}"] == pytest.approx(max(each[name] for each in tried), abs=1e-9)
        at_best = score_v2(predictions, answers, scores, found[f"best_{name}_thresh"])
        assert at_best[name] == pytest.approx(found[f"best_{name}"], abs=1e-9)
    assert best_f1_threshold(predictions, answers, scores) == found["best_f1_thresh"]


@given(questions(st.integers(-3, 3).map(float)))
def test_no_threshold_beats_the_one_that_is_found(drawn):
    _, _, scores = drawn
    threshold = best_f1_threshold(*drawn)
    found = score_v2(*drawn, threshold)["f1"]
    for other in (min(scores.values()) - 1, *scores.values()):
        f1_there = score_v2(*drawn, other)["f1"]
        assert f1_there <= found + 1e-9
        if f1_there > found - 1e-9 and other in scores.values():
            assert threshold <= other  # the lowest of those as good


# ---- by hand

BY_HAND = [
    # prediction, gold, exact, F1 of v1, F1 of v2
    ("the cat", "Cat!", 1, 1, 1),
    ("a", "the", 1, 0, 1),  # nothing is left of either
    ("", "", 1, 0, 1),
    ("", "...", 1, 0, 1),  # v2 drops this gold answer: there is none, and none was given
    ("", "cat", 0, 0, 0),
    ("cat", "", 0, 0, 0),
    ("cats", "the cat", 0, 0, 0),
    ("another theme", "other me", 0, 0, 0),  # articles are words, not parts of words
    ("black cat", "cat", 0, 2 / 3, 2 / 3),  # P 1/2, R 1
    ("the black cat sat", "a black dog", 0, 2 / 5, 2 / 5),  # P 1/3, R 1/2
    ("cat cat dog", "cat dog dog bird", 0, 4 / 7, 4 / 7),  # cat and dog once each: P 2/3, R 2/4
    ("cat sat", "sat cat", 0, 1, 1),  # the order of words is not looked at
    ("U.S.A", "usa", 1, 1, 1),
    ("a-b", "ab", 1, 1, 1),  # punctuation goes first, and leaves no space
    ("a.b", "b", 0, 0, 0),
    ("a…b", "…b", 1, 1, 1),  # … is no ASCII: it stays, and a word ends before it
    ("«cat»", "cat", 0, 0, 0),
    ("don't", "dont", 1, 1, 1),
    ("1,000\u00a0km", "1000 km", 1, 1, 1),  # a space that does not break is one, too
    ("É", "é", 1, 1, 1),
    ("e\u0301", "é", 0, 0, 0),  # no Unicode normalisation
    ("the_a", "thea", 1, 1, 1),  # _ is punctuation
]


@pytest.mark.parametrize(("prediction", "gold", "same", "first", "second"), BY_HAND)
def test_by_hand(prediction, gold, same, first, second):
    assert compute_exact(prediction, gold) is bool(same)
    assert compute_f1(prediction, gold) == pytest.approx(first, abs=1e-12)
    assert score_v1({"q": prediction}, {"q": [gold]}) == pytest.approx(
        {"exact_match": 100 * same, "f1": 100 * first}
    )
    found = score_v2({"q": prediction}, {"q": [gold]}, {"q": 0.0})
    assert (found["exact"], found["f1"]) == pytest.approx((100 * same, 100 * second))


def test_v1_by_hand():
    predictions = {"1": "The Eiffel Tower", "2": "in 1976", "4": "the a"}
    answers = {
        "1": ["eiffel tower", "tower"],  # exact 1, F1 1
        "2": ["1976", "July 1976 or so"],  # exact 0; F1 2/3 and 1/3: the larger
        "3": ["Paris"],  # not answered: 0
        "4": ["an"],  # exact 1, F1 0
    }
    assert score_v1(predictions, answers) == pytest.approx(
        {"exact_match": 50, "f1": 100 * (1 + 2 / 3) / 4}
    )


def test_v2_by_hand():
    predictions = {"1": "black cat", "2": "Paris", "3": "", "4": "London"}
    answers = {"1": ["the cat"], "2": ["paris"], "3": [], "4": []}
    scores = {"1": 0.6, "2": 0.1, "3": 0.7, "4": 0.4}
    # raw exact 0, 1, 1, 0 and F1 2/3, 1, 1, 0; above 0.5 are 1 (now 0, 0) and 3 (still 1, 1).
    # answered in the order 2, 4, 1, 3 the exact total goes 2, 3, 2, 2, 2 and that of F1
    # 2, 3, 2, 2 2/3, 2 2/3: both are best at the score of question 2
    assert score_v2(predictions, answers, scores, 0.5) == {
        "exact": 50,
        "f1": 50,
        "total": 4,
        "HasAns_exact": 50,
        "HasAns_f1": 50,
        "HasAns_total": 2,
        "NoAns_exact": 50,
        "NoAns_f1": 50,
        "NoAns_total": 2,
        "best_exact": 75,
        "best_exact_thresh": 0.1,
        "best_f1": 75,
        "best_f1_thresh": 0.1,
    }
    unlimited = score_v2(predictions, answers, scores)
    assert unlimited["f1"] == pytest.approx(100 * (2 / 3 + 1 + 1) / 4)
    assert unlimited["HasAns_f1"] == pytest.approx(100 * (2 / 3 + 1) / 2)
    assert best_f1_threshold(predictions, answers, scores) == 0.1


def test_a_score_at_the_threshold_is_an_answer():
    arguments = {"q": "cat"}, {"q": ["cat"]}, {"q": 0.5}
    assert score_v2(*arguments, 0.5)["exact"] == 100
    assert score_v2(*arguments, 0.49)["exact"] == 0


def test_parts_without_questions_have_no_figures():
    found = score_v2({"q": "cat"}, {"q": ["cat"]}, {"q": 0.0})
    assert list(found)[:6] == ["exact", "f1", "total", "HasAns_exact", "HasAns_f1", "HasAns_total"]
    assert not any(name.startswith("NoAns") for name in found)
    none = score_v2({"q": "cat"}, {"q": []}, {"q": 0.0})
    assert not any(name.startswith("HasAns") for name in none)


def test_gold_answers_without_words_are_dropped():
    # of "the" and "cat" only "cat" counts, so an empty prediction is wrong in v2 and right in v1
    assert score_v1({"q": ""}, {"q": ["the", "cat"]})["exact_match"] == 100
    assert score_v2({"q": ""}, {"q": ["the", "cat"]}, {"q": 0.0})["exact"] == 0
    # with "the" alone no answer is right, yet the question is counted among those that have one,
    # and taking its prediction away is wrong
    found = score_v2({"q": ""}, {"q": ["the"]}, {"q": 0.5})
    assert (found["exact"], found["HasAns_total"]) == (100, 1)
    assert score_v2({"q": ""}, {"q": ["the"]}, {"q": 0.5}, 0.4)["exact"] == 0


def test_the_official_quirks_of_the_best_threshold():
    # two questions at 0.5: the script stops between them (total 1, then 0), no threshold can
    predictions, answers = {"1": "cat", "2": "dog"}, {"1": ["cat"], "2": []}
    tied = {"1": 0.5, "2": 0.5}
    found = score_v2(predictions, answers, tied)
    assert (found["best_f1"], found["best_f1_thresh"]) == (100, 0.5)
    assert score_v2(predictions, answers, tied, 0.5)["f1"] == 50
    assert best_f1_threshold(predictions, answers, tied) == 0  # 50 as well, and lower
    # the other way round it meets the wrong answer first: 1, 0, 1
    turned = score_v2(predictions, answers, dict(reversed(tied.items())))
    assert (turned["best_f1"], turned["best_f1_thresh"]) == (50, 0)
    # "the" is right where there is no answer, but the sweep takes it for one: 1, 0, 1
    article = {"1": "cat", "2": "the"}, answers, {"1": 0.7, "2": 0.5}
    found = score_v2(*article)
    assert (found["f1"], found["best_f1"], found["best_f1_thresh"]) == (100, 50, 0)
    assert best_f1_threshold(*article) == 0.7
    # 0 abstains from everything only if all scores are above it
    wrong = {"1": "cat", "2": "dog"}, {"1": [], "2": []}, {"1": -4.0, "2": 2.0}
    found = score_v2(*wrong)
    assert (found["best_f1"], found["best_f1_thresh"]) == (100, 0)
    assert score_v2(*wrong, 0.0)["f1"] == 50
    assert best_f1_threshold(*wrong) == -5
    assert score_v2(*wrong, -5.0)["f1"] == 100


# ---- bad input

ONE = {"q": "cat"}, {"q": ["cat"]}, {"q": 0.0}


@pytest.mark.parametrize(
    ("predictions", "answers", "message"),
    [
        ({}, {}, "answers: no question"),
        ({"x": "cat", "q": "cat", "🙂": ""}, ONE[1], "predictions: 'x', '🙂' not among the ids"),
        ({str(i): "" for i in range(9)}, ONE[1], "'4' and 4 more not among"),
        ({"q": None}, ONE[1], r"predictions\['q'\] must be a text, got None"),
        (ONE[0], {"q": "cat"}, r"answers\['q'\] must be a list of texts, got 'cat'"),
        (ONE[0], {"q": ["cat", None]}, r"answers\['q'\] must be a list of texts"),
    ],
)
def test_what_cannot_be_scored_is_named(predictions, answers, message):
    scores = dict.fromkeys(answers, 0.0)
    with pytest.raises(ValueError, match=message):
        score_v1(predictions, answers)
    for function in (score_v2, best_f1_threshold):
        with pytest.raises(ValueError, match=message):
            function(predictions, answers, scores)


def test_v1_wants_gold_answers():
    with pytest.raises(ValueError, match="answers: none for 'q'"):
        score_v1({}, {"p": ["cat"], "q": []})


@pytest.mark.parametrize("function", [score_v2, best_f1_threshold])
@pytest.mark.parametrize(
    ("predictions", "scores", "message"),
    [
        ({}, {"q": 0.0}, "predictions: none for 'q'"),
        ({"q": ""}, {}, "no_answer_scores: 'q' only"),
        ({"q": ""}, {"q": 0.0, "x": 0.0}, "no_answer_scores: 'x' only"),
        ({"q": ""}, {"q": float("nan")}, r"no_answer_scores\['q'\] must be finite, got nan"),
        ({"q": ""}, {"q": float("inf")}, r"no_answer_scores\['q'\] must be finite, got inf"),
    ],
)
def test_v2_wants_everything_about_each_question(function, predictions, scores, message):
    with pytest.raises(ValueError, match=message):
        function(predictions, {"q": ["cat"]}, scores)


# ---- evaluate


def no_network(*address):
    raise AssertionError(f"the network was asked for {address}")


def rows_of(predictions, answers, scores):
    """Rows as the Hub's metrics take them; answers by places that nobody looks at."""
    texts = [{"id": q, "prediction_text": predictions[q]} for q in answers]
    sure = [row | {"no_answer_probability": scores[row["id"]]} for row in texts]
    golds = [
        {"id": q, "answers": {"text": golds, "answer_start": [7] * len(golds)}}
        for q, golds in answers.items()
    ]
    return texts, sure, golds


def test_the_metrics_are_the_functions(tmp_path, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", no_network)
    predictions = {"1": "black cat", "2": "Paris é🙂", "3": "", "4": "London"}
    answers = {"1": ["the cat", "a dog"], "2": ["paris é🙂"], "3": [], "4": []}
    scores = {"1": 0.625, "2": 0.125, "3": 0.75, "4": 0.375}  # exact in float32
    texts, sure, golds = rows_of(predictions, answers, scores)
    second = SquadV2Metric(cache_dir=str(tmp_path))
    assert second.compute(predictions=sure, references=golds) == score_v2(
        predictions, answers, scores
    )
    expected = score_v2(predictions, answers, scores, 0.5)
    second.add_batch(predictions=sure[:3], references=golds[:3])
    second.add(prediction=sure[3], reference=golds[3])
    assert second.compute(no_answer_threshold=0.5) == expected
    first = SquadMetric(cache_dir=str(tmp_path))
    found = first.compute(predictions=texts[:2], references=golds[:2])
    assert found == score_v1({q: predictions[q] for q in "12"}, {q: answers[q] for q in "12"})
    assert found == pytest.approx({"exact_match": 50, "f1": 100 * (2 / 3 + 1) / 2})


def test_the_metrics_refuse_by_name_and_go_on(tmp_path):
    metric = SquadMetric(cache_dir=str(tmp_path), keep_in_memory=True)
    texts, _, golds = rows_of(*ONE)
    with pytest.raises(ValueError, match="answers: no question"):
        metric.compute(predictions=[], references=[])
    with pytest.raises(ValueError, match="predictions: 'x' not among the ids"):
        metric.compute(predictions=[texts[0] | {"id": "x"}], references=golds)
    with pytest.raises(ValueError, match="id: 'q' more than once"):
        metric.compute(predictions=texts * 2, references=golds * 2)
    assert metric.compute(predictions=texts, references=golds) == {"exact_match": 100, "f1": 100}
