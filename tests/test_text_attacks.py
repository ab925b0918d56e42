"""Attacks on texts: what changes and what does not, limits, candidates, the search, bad input."""

import copy
import dataclasses
import json
import random
import shutil

import pytest
import torch
from hypothesis import given, settings
from readers import KINDS, TEXTS, pointer, random_reader, texts, tokenizer_of
from safetensors.torch import load_file, save_file
from text_victims import (
    BAD,
    GOOD,
    PLAIN,
    bag_of_words,
    masked_network,
    sentence,
    train_classifier,
)
from transformers import GPT2Config, GPT2ForSequenceClassification

import genkit
from genkit.data.squad import Example
from genkit.hub import kinds, staging
from genkit.metrics.squad import compute_f1
from genkit.qa.attacks import attack_answer
from genkit.qa.distractors import asked_words, distractors, statements
from genkit.qa.robustness import measure_answer_attacks
from genkit.text.attacks import attack_text
from genkit.text.candidates import Vocabulary, typing_errors
from genkit.text.classifiers import TextClassifier
from genkit.text.edits import has_letters, split_words
from genkit.text.robustness import measure_text_attacks

TEXT = "The film was lovely and the story had a (very) nice ending, 2024 was warm!  "
WAYS = [
    ("gradient", "gradient"),
    ("gradient", "deletion"),
    ("characters", "gradient"),
    ("characters", "deletion"),
    ("mlm", "gradient"),
]


@pytest.fixture(scope="module")
def classifier():
    return train_classifier()


@pytest.fixture(scope="module")
def masked_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masked")
    for part in masked_network():
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory, classifier):
    folder = tmp_path_factory.mktemp("classifier")
    classifier.model.save_pretrained(folder)
    classifier.tokenizer.save_pretrained(folder)
    return folder


def rebuild(record, text):
    """The adversarial text from the changes alone."""
    for change in reversed(record.changes):
        end = change.start + len(change.before)
        assert text[change.start : end] == change.before != change.after
        text = text[: change.start] + change.after + text[end:]
    return text


# ---- words


@given(texts)
@settings(max_examples=100, deadline=None)
def test_split_words_loses_nothing(text):
    draft = split_words(text)
    assert draft.text == text
    for i, word in enumerate(draft.words):
        start, end = draft.span(i)
        assert text[start:end] == word


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("don't go, well-known 42!", ["don't", "go", "well", "known", "42"]),
        ("שלום עולם", ["שלום", "עולם"]),
        ("日本語 ok", ["日", "本", "語", "ok"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("e\u0301te\u0301 😀", ["e\u0301te\u0301"]),
        ("😀 👩\u200d🚀", []),
        ("", []),
    ],
)
def test_split_words_of_any_script(text, words):
    assert list(split_words(text).words) == words


def test_typing_errors_are_by_seed_and_keep_the_script():
    draft = split_words("שלום nice wörd")
    for position, word in enumerate(draft.words):
        errors = typing_errors(draft, position, 3)
        assert errors == typing_errors(draft, position, 3) != typing_errors(draft, position, 4)
        assert word not in errors and len(set(errors)) == len(errors)
        letters = set(word) | {c for c in draft.text if ("a" < c < "\u0300") == (position > 0)}
        assert all(set(each) <= letters and abs(len(each) - len(word)) <= 1 for each in errors)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_words_are_one_token_where_they_are_put(kind):
    tokenizer = tokenizer_of(kind)
    vocabulary = Vocabulary(random_reader(kind).model, tokenizer)
    for before, spaced in (("lazy ", True), ("(", False)):
        around = tokenizer(before.strip(), add_special_tokens=False).input_ids
        for case in ("lower", "title"):
            words, vectors = vocabulary.whole_words(spaced, case, "LATIN")
            assert len(words) == len(vectors)
            for word in words:
                ids = tokenizer(before + word, add_special_tokens=False).input_ids
                assert len(ids) == len(around) + 1
                assert (word[0].isupper()) == (case == "title")


# ---- texts


@pytest.mark.parametrize("max_changed", [0.1, 0.34, 1.0])
@pytest.mark.parametrize(("candidates", "importance"), WAYS)
def test_attack_text_keeps_all_else_and_its_limits(
    classifier, masked_folder, candidates, importance, max_changed
):
    masked = masked_folder if candidates == "mlm" else None
    for budget in (3, 4, 17, 60):
        record = attack_text(
            TEXT,
            model=classifier,
            candidates=candidates,
            importance=importance,
            max_changed=max_changed,
            budget=budget,
            masked_model=masked,
        )
        assert rebuild(record, TEXT) == record.adversarial
        assert record.queries <= budget and record.changed <= max_changed
        assert all(has_letters(change.before) for change in record.changes)
        assert record.success == (record.predicted != record.label)
        seen = classifier.log_probabilities([record.adversarial])[0].exp()
        assert float(seen.max()) == pytest.approx(record.predicted_probability, abs=1e-4)


def test_attack_text_succeeds_and_prints(classifier):
    record = attack_text(TEXT, model=classifier, label="positive", max_changed=0.3)
    assert (record.label, record.predicted, record.success) == ("positive", "negative", True)
    assert any(change.after in BAD for change in record.changes)
    assert f"«{record.changes[0].before} → {record.changes[0].after}»" in str(record)
    assert "positive" in record._repr_html_() and "&lt;" not in record._repr_html_()
    assert record == attack_text(TEXT, model=classifier, label=1, max_changed=0.3)


def test_attack_text_depends_on_nothing_but_its_seed(classifier):
    options = {"model": classifier, "candidates": "characters", "budget": 40}
    first = attack_text(TEXT, seed=5, **options)
    torch.manual_seed(7)
    random.seed(7)
    state = torch.get_rng_state()
    assert attack_text(TEXT, seed=5, **options) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert attack_text(TEXT, seed=6, **options).adversarial != first.adversarial
    assert not any(p.grad is not None for p in classifier.model.parameters())


@pytest.mark.parametrize("seed", range(6))
def test_attack_on_a_bag_of_words_equals_brute_force_of_one_word(seed):
    """To first order is exact where logits are linear in the embeddings."""
    bag = bag_of_words(seed)
    text = "the film was lovely and a story had very cold day"
    draft = split_words(text)
    record = attack_text(text, model=bag, max_changed=1.5 / len(draft.words), budget=20)
    words, _ = Vocabulary(bag.model, bag.tokenizer).whole_words(True, "lower", "LATIN")
    start = bag.log_probabilities([text])[0]
    label, best = int(start.argmax()), -torch.inf
    for i in range(len(draft.words)):
        rows = bag.log_probabilities([draft.replace(i, word).text for word in words])
        best = max(best, float((rows[:, 1 - label] - rows[:, label]).max()))
    found = bag.log_probabilities([record.adversarial])[0]
    margin = float(found[1 - label] - found[label])
    assert len(record.changes) == 1
    assert margin == pytest.approx(best, abs=1e-4) or record.success


def test_attack_with_a_target_reaches_it(classifier):
    record = attack_text(TEXT, model=classifier, target="negative", max_changed=0.3)
    assert record.success and record.predicted == record.target == "negative"
    with pytest.raises(ValueError, match=r"target.*positive.*already"):
        attack_text(TEXT, model=classifier, target="positive")


@pytest.mark.parametrize(
    "text",
    [
        "lovely",
        "lovely 😀👍🏽",
        "יום טוב שלום עולם",
        "😀 the (lovely) film\u200f! ",
        "the film was nice " * 40,  # longer than the model reads
        "[SEP] the lovely [MASK] film <s>",
    ],
)
def test_attack_text_of_any_kind(classifier, text):
    for candidates in ("gradient", "characters"):
        record = attack_text(
            text, model=classifier, candidates=candidates, max_changed=1.0, budget=50
        )
        assert rebuild(record, text) == record.adversarial and record.queries <= 50
    read = classifier.characters_read(text)
    assert all(change.start < read for change in record.changes)


def test_words_beyond_what_the_model_reads_stay(classifier):
    text = "the film was nice " * 40
    assert classifier.characters_read(text) < len(text) / 3
    record = attack_text(text, model=classifier, max_changed=1.0, budget=400)
    assert max((c.start for c in record.changes), default=0) < classifier.characters_read(text)


def test_attack_reports_the_perplexity_of_a_language_model(classifier):
    from builders import letter_model

    language = letter_model()
    record = attack_text(
        "the film was lovely", model=classifier, max_changed=0.5, budget=30, language_model=language
    )
    assert record.perplexity == genkit.perplexity(record.text, model=language).perplexity
    after = genkit.perplexity(record.adversarial, model=language).perplexity
    assert record.adversarial_perplexity == after and "perplexity" in str(record)


def test_the_masked_model_proposes_its_likeliest_words(classifier, masked_folder):
    options = {"model": classifier, "candidates": "mlm", "max_changed": 0.3, "budget": 200}
    record = attack_text(TEXT, masked_model=masked_folder, **options)
    assert {change.after.lower() for change in record.changes} <= {*GOOD, *BAD, *PLAIN}


def test_a_decoder_without_padding_is_attacked_like_any_other():
    tokenizer = tokenizer_of("bytes")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_embd=16,
        n_layer=1,
        n_head=2,
        num_labels=3,
        bos_token_id=0,
        eos_token_id=2,
    )
    model = GPT2ForSequenceClassification(config).eval()
    victim = TextClassifier(model, tokenizer, "decoder")
    record = attack_text(TEXTS[0], model=victim, budget=60, max_changed=0.5)
    assert record.queries <= 60 and rebuild(record, TEXTS[0]) == record.adversarial


def test_records_save_as_json(classifier, tmp_path):
    record = attack_text(TEXT, model=classifier)
    record.save(tmp_path / "record.json")
    assert json.loads((tmp_path / "record.json").read_text()) == dataclasses.asdict(record)


def test_measure_text_attacks_counts_all_texts(classifier):
    draws = torch.Generator().manual_seed(1)
    rows = [(sentence(label, draws), label) for label in (0, 1) * 4]
    rows.append((TEXT, "negative"))  # misclassified: it counts, and is not attacked
    rows.append(("lovely 😀", 1))  # a share of one word is none
    given, labels = zip(*rows, strict=True)
    found = measure_text_attacks(given, labels, model=classifier, shares=(0.1, 0.5), budget=80)
    assert found.accuracy == pytest.approx(0.9) and found.texts == 10
    after = [row.accuracy for row in found.rows]
    assert after[1] < after[0] < 0.9 and after[1] >= 0.1
    assert all(row.queries <= 80 for row in found.rows)
    assert str(found).count("\n") >= 3


# ---- loading


def test_a_classifier_of_texts_loads_and_other_verbs_refuse_it(folder, classifier):
    loaded = genkit.load(folder)
    assert isinstance(loaded, TextClassifier) and loaded.names == ["negative", "positive"]
    assert "TextClassifier" in repr(loaded) and genkit.load(folder).model is loaded.model
    torch.testing.assert_close(
        loaded.log_probabilities([TEXT]), classifier.log_probabilities([TEXT])
    )
    assert (
        attack_text(TEXT, model=folder).adversarial == attack_text(TEXT, model=loaded).adversarial
    )
    for verb in (
        lambda model: genkit.generate("a", model=model),
        lambda model: genkit.answer("a", "b", model=model),
        lambda model: genkit.attribute(torch.zeros(1, 8, 8), model=model),
        lambda model: genkit.sample(model),
    ):
        for model in (str(folder), loaded):
            with pytest.raises(ValueError, match=r"model.*classifier of texts.*genkit.attack"):
                verb(model)


@pytest.mark.slow
def test_the_check_of_a_push_loads_a_classifier_of_texts(folder, tmp_path):
    kind = kinds.kind_of(folder)
    assert kind == kinds.TEXT_CLASSIFIER
    staging.validate(folder, kind)
    headless = shutil.copytree(folder, tmp_path / "headless")
    weights = load_file(headless / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "classifier" not in name}
    assert 0 < len(kept) < len(weights)
    save_file(kept, headless / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"does not load.*classifier"):
        staging.validate(headless, kind)


def test_models_that_cannot_be_attacked_are_named(folder, tmp_path, classifier, masked_folder):
    with pytest.raises(ValueError, match=r"model.*language model"):
        attack_text(TEXT, model=str(_language_folder(tmp_path / "lm")))
    with pytest.raises(ValueError, match=r"masked_model.*classifier of texts"):
        attack_text(TEXT, model=classifier, candidates="mlm", masked_model=str(folder))
    with pytest.raises(ValueError, match=r"model.*masked"):
        attack_text(TEXT, model=str(masked_folder))
    half = TextClassifier(copy.deepcopy(classifier.model).half(), classifier.tokenizer, "half")
    with pytest.raises(ValueError, match=r"model: 'half'.*gradients"):
        attack_text(TEXT, model=half)
    settings = json.loads((folder / "config.json").read_text())
    quantised = tmp_path / "int8"
    quantised.mkdir()
    for file in folder.iterdir():
        (quantised / file.name).write_bytes(file.read_bytes())
    settings["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (quantised / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"model.*quantization_config"):
        attack_text(TEXT, model=str(quantised))


def _language_folder(folder):
    from builders import letter_model

    language = letter_model()
    language.model.save_pretrained(folder)
    language.tokenizer.save_pretrained(folder)
    return folder


# ---- answers

CONTEXT = "the lazy dog is alpha omega. the fox is lazy the dog where is the Fox 2024 ? " * 2
QUESTION = "Where is the fox ?"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("candidates", ["gradient", "characters"])
def test_attack_answer_keeps_the_answer_and_the_questions_words(kind, candidates):
    reader = random_reader(kind)
    context, question = f"{TEXTS[0]} The fox had 40% of it.", "What does the quick fox do?"
    record = attack_answer(
        question, context, model=reader, candidates=candidates, max_changed=0.3, budget=40
    )
    assert rebuild(record, context) == record.adversarial
    assert record.queries <= 40 and record.changed <= 0.3
    was = genkit.answer(question, context, model=reader)
    now = genkit.answer(question, record.adversarial, model=reader)
    assert (was.answer, now.answer) == (record.answer, record.predicted)
    assert record.f1 == compute_f1(now.answer, was.answer)
    assert record.success == (record.f1 == 0 and not record.exact)
    for change in record.changes:
        end = change.start + len(change.before)
        assert end <= was.start or change.start >= was.end
        assert not {change.before.lower(), change.after.lower()} & asked_words(question)
    assert record.answer in record.adversarial
    assert record.adversarial_probability <= record.probability + 1e-6


def test_probability_is_that_of_the_answer():
    reader = pointer()
    record = attack_answer(QUESTION, CONTEXT, model=reader, budget=3, max_changed=0.1)
    exact = genkit.answer(QUESTION, CONTEXT, model=reader, align_to_words=False)
    assert record.probability == pytest.approx(exact.score, abs=1e-5)


def test_a_distractor_leaves_the_context_as_it_is():
    reader = random_reader("cased")
    context, question = f"{TEXTS[0]} The résumé was due.", "What is due on Monday in 2024?"
    record = attack_answer(question, context, model=reader, method="distractor", budget=30)
    assert record.adversarial == f"{context} {record.distractor}"
    assert not record.changes and record.queries <= 30
    assert "Monday" not in record.distractor and "2024" not in record.distractor
    again = attack_answer(question, context, model=reader, method="distractor", budget=30)
    assert again == record


def test_distractors_are_about_something_else():
    reader = random_reader("cased")
    vocabulary = Vocabulary(reader.model, reader.tokenizer)
    found = distractors("What is due on Monday?", "in Zürich", "In Zürich .", vocabulary, 20, 0)
    assert 1 < len(found) <= 20 == len({*found, *map(str, range(20 - len(found)))})
    assert not any("Monday" in each or "Zürich" in each for each in found)
    assert found == distractors(
        "What is due on Monday?", "in Zürich", "In Zürich .", vocabulary, 20, 0
    )
    assert distractors("What?", "in Zürich", "In Zürich .", vocabulary, 20, 0) == []


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What is the zorp?", ["The zorp is tal.", "What is the zorp? Tal."]),
        ("Who wrote Emma?", ["Tal wrote Emma.", "Who wrote Emma? Tal."]),
        ("When did she move?", ["When did she move? Tal."]),
    ],
)
def test_statements_follow_the_question(question, expected):
    assert list(statements(question, "tal")) == expected


def test_measure_answer_attacks_scores_all_questions():
    reader = pointer()
    golds = (("alpha omega", CONTEXT.index("alpha")),)
    examples = [
        Example("a", "", QUESTION, CONTEXT, list(golds)),
        Example("b", "", QUESTION, CONTEXT, [("lazy", 4)]),  # missed before any attack
    ]
    found = measure_answer_attacks(examples, model=reader, shares=(0.1, 0.3), budget=40)
    assert found.exact_match == found.f1 == 50 and found.questions == 2
    assert [row.share for row in found.rows] == [0.1, 0.3]
    assert all(row.f1 <= 50 and row.queries <= 40 for row in found.rows)


# ---- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": ""}, "text is empty"),
        ({"text": " \n"}, "text is empty but for spaces"),
        ({"text": 3}, "text must be a text"),
        ({"text": "a\ud800"}, "text.*Unicode"),
        ({"text": "😀 42!"}, "text.*no word"),
        ({"text": "lovely film"}, "max_changed=0.2 of 2 words.*0.5"),
        ({"label": "negative"}, "label.*negative.*already.*positive"),
        ({"label": "positiv"}, "label.*no class.*positive"),
        ({"label": 2}, "label must be 0 to 1, got 2"),
        ({"target": "gibbon"}, "target.*gibbon.*negative"),
        ({"candidates": "glove"}, "candidates.*gradient.*glove"),
        ({"importance": "random"}, "importance.*deletion.*random"),
        ({"max_changed": 0}, "max_changed.*got 0"),
        ({"max_changed": 1.2}, "max_changed.*1.2"),
        ({"budget": 2}, "budget.*got 2"),
        ({"budget": 9.5}, "budget.*9.5"),
        ({"seed": -1}, "seed"),
        ({"candidates": "mlm"}, "masked_model"),
        ({"masked_model": "a/b"}, "masked_model.*candidates"),
        ({"device": "cpu"}, "device.*loaded"),
        ({"epsilon": 1}, "epsilon"),
    ],
)
def test_attack_text_names_bad_arguments(classifier, options, message):
    given = {"text": TEXT, "model": classifier} | options
    with pytest.raises(ValueError, match=message):
        attack_text(given.pop("text"), **given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"question": ""}, "question is empty"),
        ({"context": " "}, "context is empty"),
        ({"context": "the lazy dog"}, "max_changed"),
        ({"context": "the alpha omega [SEP] 😀 !!", "max_changed": 0.2}, "max_changed=0.2 of 4"),
        ({"answer": "lazy"}, "answer.*lazy.*missed already.*alpha omega"),
        ({"answer": ""}, "answer.*no text"),
        ({"method": "sentence"}, "method.*distractor"),
        ({"question": "what?", "method": "distractor"}, "question.*no name"),
        ({"budget": 0}, "budget"),
    ],
)
def test_attack_answer_names_bad_arguments(options, message):
    given = {"question": QUESTION, "context": CONTEXT, "model": pointer()} | options
    with pytest.raises(ValueError, match=message):
        attack_answer(given.pop("question"), given.pop("context"), **given)
