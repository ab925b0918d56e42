"""The tokenizer of words, the encoding of a text by any tokenizer, and the recipe."""

import collections
import json
import math
import shutil

import numpy as np
import pytest
import regex
from builders import ON_CPU, TINY, TWO, log_of, run_here, weights_of
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import genkit
from genkit.data import corpus as encoding
from genkit.data import words as wordlm
from genkit.data.tokens import encode_text
from genkit.models import lm

ODD = ["a\r\nb\r\tc", "<eos>", "x<eos>y <unk>", "\N{PILE OF POO}\u200d \N{PILE OF POO}", "e\u0301"]
ODD += ["  two   spaces ", " . , n't 's ?", "don\u2019t o'er", "\u2581 _x_ 12a", " \n  \n", "\x85"]
STORY = "The cat sat.\nThe cat, the dog; the <eos> don't 12 \n" * 3
texts = st.text().filter(lambda t: t and "\0" not in t and not t.startswith("\ufeff"))
relaxed = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60
)


def part_of(text, folder):
    path = folder / "text.txt"
    path.write_bytes(text.encode())
    return encoding.measure_corpus(str(path))


def reloaded(tokenizer, folder):
    """Saved and loaded: what users have."""
    lm.save_tokenizer(tokenizer, folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    loaded = reloaded(wordlm.make_tokenizer(part_of(STORY, folder), 100, lower=False), folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    return loaded


@pytest.fixture(scope="module")
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "BLOCK", 5)
        yield


# ---- the tokenizer


@given(text=texts)
@relaxed
def test_a_text_of_known_words_comes_back(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("text")
    loaded = reloaded(wordlm.make_tokenizer(part_of(text, folder), 1000, lower=False), folder)
    for skip in (False, True):
        assert loaded.decode(loaded(text).input_ids, skip_special_tokens=skip) == text


for odd in ODD:
    test_a_text_of_known_words_comes_back = example(odd)(test_a_text_of_known_words_comes_back)


def test_what_a_word_is(tokenizer):
    words = ["The", " cat", ",", " the", " dog", ";", " don't", " ", "\n", "The", " cat"]
    assert tokenizer.tokenize("The cat, the dog; don't \nThe cat") == words


def test_unknown_words_are_seen(tokenizer):
    ids = tokenizer("The bird sat.\N{PILE OF POO}").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "The <unk> sat. <unk>"
    assert ids.count(tokenizer.get_vocab()[wordlm.UNKNOWN]) == 2
    assert tokenizer("").input_ids == [] and tokenizer.decode([]) == ""


def test_markers_in_a_text_are_words(tokenizer):
    ids = tokenizer("the <eos>").input_ids
    assert tokenizer.eos_token_id not in ids and len(ids) == 4
    assert tokenizer.get_vocab()[wordlm.EOS] == 0 and tokenizer.get_vocab()[wordlm.UNKNOWN] == 1


def test_the_most_frequent_words_are_known(tmp_path, text_file):
    text = text_file.read_text()
    part = encoding.measure_corpus(str(text_file))
    counts = collections.Counter(regex.findall(wordlm.TOKEN, text))
    known = wordlm.make_tokenizer(part, 22, lower=False).get_vocab()
    words = sorted(counts, key=lambda word: (-counts[word], word.encode()))
    assert sorted(known, key=known.__getitem__) == [wordlm.EOS, wordlm.UNKNOWN, *words[:20]]


def test_case_can_be_left_out(tmp_path):
    part = part_of(STORY, tmp_path)
    lower = reloaded(wordlm.make_tokenizer(part, 100, lower=True), tmp_path)
    assert lower("THE Cat").input_ids == lower("the cat").input_ids
    assert lower.decode(lower(STORY).input_ids) == STORY.lower()
    kept = wordlm.make_tokenizer(part, 100, lower=False)
    assert kept("\nThe").input_ids != kept("\nthe").input_ids


# ---- a text as ids


@given(text=texts, fraction=st.floats(0.01, 0.99))
@example("one two three four five six seven\neight,nine", 0.5)
@relaxed
def test_blocks_and_parts_cut_no_word(small_blocks, tmp_path_factory, text, fraction):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(text.encode())
    whole = encoding.measure_corpus(str(path))
    known = wordlm.make_tokenizer(whole, 1000, lower=False)
    ids = [i for block in encoding.read_blocks(whole, "") for i in encode_text(known, block)]
    assert ids == known(text).input_ids
    parts = [
        encoding.encode_corpus(p, known)
        for p in encoding.split_corpus(str(path), "text", None, fraction)
    ]
    assert np.concatenate([ids for ids, _ in parts]).tolist() == known(text).input_ids
    assert sum(characters for _, characters in parts) == len(text)
    for part, characters in parts:
        assert len(known.decode(part.tolist())) == characters
    assert parts[0][1] >= int(len(text) * (1 - fraction))


def test_blocks_are_small(small_blocks, text_file):
    blocks = list(encoding.read_blocks(encoding.measure_corpus(str(text_file)), ""))
    assert "".join(blocks) == text_file.read_text()
    assert max(map(len, blocks)) <= 5 + 6  # the longest word has 6 letters


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.45, 0.6, 0.9])
def test_documents_are_separated(small_blocks, tmp_path, fraction):
    documents = ["one two", "three<eos>", "four five six"]
    for name, text in zip("123", documents, strict=True):
        (tmp_path / f"{name}.txt").write_text(text)
    train, val = encoding.split_corpus(str(tmp_path), "text", None, fraction)
    known = wordlm.make_tokenizer(encoding.measure_corpus(str(tmp_path)), 100, lower=False)
    ids = np.concatenate([encoding.encode_corpus(part, known)[0] for part in (train, val)]).tolist()
    expected = [known(text).input_ids for text in documents]
    assert ids == [*expected[0], 0, *expected[1], 0, *expected[2]]
    characters = [encoding.encode_corpus(part, known)[1] for part in (train, val)]
    assert sum(characters) == sum(map(len, documents)) + 2


def test_the_vocabulary_is_that_of_the_training_part(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("cat " * 90 + "dog " * 10)
    corpus = wordlm.read_words(str(path), "text", None, 0.11, 4, vocab_size=50, lower=False)
    assert set(corpus.tokenizer.get_vocab()) == {wordlm.EOS, wordlm.UNKNOWN, "cat", " cat"}
    assert len(corpus.val) == 11 and corpus.val_characters == 41
    share, bits = wordlm.unknown_words(corpus)  # a space at the end is no word of the training part
    assert share == 1.0
    assert bits == pytest.approx((41 + 11) * math.log2(len("cat ") + 1))


def test_the_cache_follows_the_content(tmp_path):
    def read(text):
        (tmp_path / "text.txt").write_text(text)
        return wordlm.read_words(str(tmp_path / "text.txt"), "text", None, 0.5, 1, 50, False)

    first, again, changed = read("a b a b a b"), read("a b a b a b"), read("a b a b a c")
    assert first.train.filename == again.train.filename and first.facts == again.facts
    assert changed.facts["text_sha256"] != first.facts["text_sha256"]
    assert changed.tokenizer.decode(changed.val.tolist()) == " b a <unk>"


def test_a_validation_text_of_its_own(tmp_path):
    (tmp_path / "a.txt").write_text("one two three four")
    (tmp_path / "b.txt").write_text("one two zero")
    a, b = str(tmp_path / "a.txt"), str(tmp_path / "b.txt")
    corpus = wordlm.read_words(a, "text", b, 0.1, 2, vocab_size=50, lower=False)
    assert corpus.tokenizer.decode(corpus.train.tolist()) == "one two three four"
    assert corpus.val_characters == len("one two zero")
    share, bits = wordlm.unknown_words(corpus)
    assert share == pytest.approx(1 / 3)
    letters = set("one two three four")
    assert bits == pytest.approx((len(" zero") + 1) * math.log2(len(letters) + 1))
    assert corpus.facts["val_text_sha256"] == encoding.measure_corpus(b).sha256


def test_a_text_that_changes_while_it_is_read_is_refused(tmp_path):
    part = part_of("a text of this test alone", tmp_path)
    (tmp_path / "text.txt").write_text("a text of this test alone, changed")
    with pytest.raises(ValueError, match="changed while it was read"):
        wordlm.make_tokenizer(part, 77, lower=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("one", "text: 1 tokens to train on are less than one window, 9"),
        ("one two three four five six seven eight nine ten", "0 tokens to validate on"),
    ],
)
def test_short_texts_are_refused(tmp_path, text, message):
    (tmp_path / "text.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        wordlm.read_words(str(tmp_path / "text.txt"), "text", None, 0.01, 8, 50, False)


# ---- the recipe

WORDS = (*TINY, "--optimizer", "adamw", "--mixed_precision", "no", "--vocab_size", "30")
WORDS += ("--max_steps", "20", "--evaluations", "2", "--save_steps", "8")


@pytest.fixture(scope="module")
def trained_words(text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "words"
    run_here("train_wordlm", *WORDS, "--text", text_file, "--output_dir", folder)
    return folder


def test_a_run_leaves_all_that_it_promises(trained_words):
    names = {path.name for path in trained_words.iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert names >= {"tokenizer.json", "tokenizer_config.json", "run.json", "loss.png", "samples"}
    judged = [line for line in log_of(trained_words) if "val_loss" in line]
    assert len(judged) == 2 and judged[1]["val_loss"] < judged[0]["val_loss"]
    for line in judged:
        assert line["perplexity"] == pytest.approx(math.exp(line["val_loss"]))
        assert line["bits_per_character"] > 0 and 0 < line["unknown"] < 0.5
    card = (trained_words / "README.md").read_text()
    assert f"{judged[1]['perplexity']:.4f}" in card and "30 tokens" in card


def test_the_folder_is_transformers_own(trained_words):
    model = AutoModelForCausalLM.from_pretrained(trained_words)
    loaded = AutoTokenizer.from_pretrained(trained_words)
    prompt = loaded.decode([7, 8, 9])
    ids = model.generate(**loaded(prompt, return_tensors="pt"), do_sample=False, max_new_tokens=20)
    assert loaded.decode(ids[0]).startswith(prompt) and 4 <= ids.shape[1] <= 23
    write = pipeline("text-generation", str(trained_words))
    drawn = write(prompt, max_new_tokens=200, min_new_tokens=200)[0]["generated_text"]
    assert drawn.startswith(prompt) and wordlm.UNKNOWN not in drawn
    written = genkit.generate(prompt, model=trained_words, seed=1, max_new_tokens=20)
    assert written.tokens and written.text == loaded.decode(
        [7, 8, 9, *written.tokens], skip_special_tokens=True
    )


def test_a_run_goes_on_exactly(trained_words, tmp_path):
    shutil.copytree(trained_words, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000020")
    (tmp_path / "run" / "model.safetensors").unlink()
    run_here("train_wordlm", "--output_dir", tmp_path / "run", "--resume")
    assert weights_of(tmp_path / "run") == weights_of(trained_words)
    assert log_of(tmp_path / "run") == log_of(trained_words)


@pytest.mark.slow
def test_two_processes_see_the_same_batches(train, trained_words, text_file, tmp_path):
    words = [*WORDS, "--text", text_file, "--output_dir", tmp_path / "run"]
    done = train(*words, recipe="train_wordlm", launcher=TWO, env=ON_CPU)
    assert done.returncode == 0, done.stderr
    one, two = log_of(trained_words), log_of(tmp_path / "run")
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-6)
    assert two[-1]["val_loss"] == pytest.approx(one[-1]["val_loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--vocab_size 2", "vocab_size.*got 2"),
        ("--context 0", "context.*got 0"),
        ("--text {tmp}/missing.txt", "text: .* is no file"),
        ("--text {tmp}/empty.txt", "text: .* is empty"),
        ("--text {tmp}/short.txt", "less than one window"),
    ],
)
def test_bad_settings_are_named(tmp_path, words, message):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("a b c")
    given = words.format(tmp=tmp_path).split()
    with pytest.raises(ValueError, match=message):
        run_here("train_wordlm", *TINY, "--output_dir", tmp_path / "run", *given)
