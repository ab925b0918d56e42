import functools
import html.parser
import itertools
import json
import math
import re

import matplotlib.image
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import genkit
from genkit.data import characters
from genkit.models import lm
from genkit.text import alternatives, explain, generation, token_names
from genkit.text.language_model import LanguageModel
from genkit.text.logits import Candidate
from genkit.text.pictures import _planar, beam_tree, next_tokens

LETTERS = "abcdefghijklmnop .\n"
WORDS = "I am a tall tale told to all, a small ball. שלום عالم 😀😁 naïve <b>bold</b>\n" * 20


def peaked(model):
    """Larger weights, so that predictions are rather peaked, as those of trained models are."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    return model.eval()


def by_character() -> LanguageModel:
    torch.manual_seed(1)
    tokenizer = characters.make_tokenizer(LETTERS)
    model = peaked(lm.make_model("llama", len(tokenizer), 64, 2, 32, 2, 0.0))
    with torch.no_grad():
        model.get_input_embeddings().weight[257:].mul_(5)  # letters: bytes and <eos> are rare
    return LanguageModel(model, tokenizer, "characters")


def gpt2_like(tokenizer: PreTrainedTokenizerFast, name: str) -> LanguageModel:
    torch.manual_seed(1)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    shape = {"n_positions": 512, "n_embd": 32, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **shape, **ends))
    return LanguageModel(peaked(model), tokenizer, name)


def byte_level() -> LanguageModel:
    """A tokenizer of GPT-2's kind, of too few merges to have a whole emoji."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>"]
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, special_tokens=special)
    backend.train_from_iterator([WORDS], trainer)
    options = {"bos_token": special[0], "eos_token": special[0], "pad_token": special[0]}
    return gpt2_like(PreTrainedTokenizerFast(tokenizer_object=backend, **options), "bytes")


def sentence_piece() -> LanguageModel:
    """A tokenizer of Llama's kind: ▁ for spaces, one before every text, a start token, bytes."""
    spaces_first = pre_tokenizers.Metaspace(prepend_scheme="first")
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = spaces_first
    learner.train_from_iterator([WORDS], trainers.BpeTrainer(vocab_size=70, limit_alphabet=25))
    learned = json.loads(learner.to_str())["model"]
    vocabulary = ["<unk>", "<s>", "</s>", *characters.BYTES, *learned["vocab"]]
    backend = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(vocabulary)},
            merges=[tuple(merge) for merge in learned["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    backend.pre_tokenizer = spaces_first
    spaces = decoders.Replace("▁", " ")
    fused = [spaces, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(fused)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    options = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return gpt2_like(PreTrainedTokenizerFast(tokenizer_object=backend, **options), "pieces")


BUILDERS = {"characters": by_character, "bytes": byte_level, "pieces": sentence_piece}


@functools.cache
def built(kind: str) -> LanguageModel:
    return BUILDERS[kind]()


@pytest.fixture(params=list(BUILDERS))
def language(request) -> LanguageModel:
    return built(request.param)


@pytest.fixture
def letters() -> LanguageModel:
    return built("characters")


def logits_after(language, ids: list[int]) -> np.ndarray:
    with torch.inference_mode():
        return language.model(torch.tensor([ids])).logits[0].double().numpy()


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def bits(probabilities: np.ndarray) -> float:
    nonzero = probabilities[probabilities > 0]
    return float(-(nonzero * np.log2(nonzero)).sum())


def assert_picture(path) -> None:
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    pixels = matplotlib.image.imread(path)
    assert min(pixels.shape[:2]) > 150
    drawn = (pixels[..., :3] != 1).any(-1)
    assert 0.01 < drawn.mean() < 0.9
    assert not list(path.parent.glob(".*"))


# ---- the next token


@pytest.mark.parametrize("prompt", ["a", "am a", "I am a tall"])
def test_next_tokens_are_the_softmax_of_the_logits(language, prompt):
    prompt = prompt.lower().replace("t", "b")  # every model knows these letters
    temperatures = (0.1, 0.5, 1.0, 3.0)
    record = explain.next_tokens(prompt, model=language, temperatures=temperatures, top=7)
    logits = logits_after(language, language.tokenizer(prompt).input_ids)[-1]
    assert record.ids == np.argsort(-logits, kind="stable")[:7].tolist()
    for i, temperature in enumerate(temperatures):
        exact = softmax(logits / temperature)
        assert np.allclose(record.probabilities[i], exact[record.ids], rtol=1e-4, atol=1e-9)
        assert math.isclose(record.entropies[i], bits(exact), rel_tol=1e-4, abs_tol=1e-6)


@settings(max_examples=30, deadline=None)
@given(prompt=st.text(LETTERS, min_size=1, max_size=20), data=st.data())
def test_entropy_grows_with_temperature(prompt, data):
    temperatures = sorted(data.draw(st.lists(st.floats(0.01, 100), min_size=2, max_size=6)))
    record = explain.next_tokens(
        prompt, model=built("characters"), temperatures=temperatures, top=1
    )
    for low, high in itertools.pairwise(record.entropies):
        assert low <= high + 1e-9
    for low, high in itertools.pairwise(record.probabilities):
        assert low[0] >= high[0] - 1e-12


def test_every_token_together_has_probability_one(language):
    size = language.model.config.vocab_size
    record = explain.next_tokens("a ", model=language, top=size)
    assert sorted(record.ids) == list(range(size))
    assert np.allclose(np.sum(record.probabilities, axis=1), 1)


def test_the_table_of_next_tokens_is_aligned_and_shows_whitespace(letters):
    record = explain.next_tokens("a\nb ", model=letters, top=letters.model.config.vocab_size)
    title, _, *lines = str(record).split("\n")
    assert title == "a↵b␣ …"
    assert len({len(line) for line in lines}) == 1
    assert len(lines) == len(record.ids) + 2
    assert {"␣", "↵", "⟨F0⟩"} <= {line.split()[0] for line in lines}


# ---- one text a temperature


def test_a_series_is_generated_text_with_its_measures(language):
    temperatures = (0.05, 0.7, 2.0)
    options = {"model": language, "max_new_tokens": 25, "seed": 3}
    series = explain.temperature_series("a bab", temperatures, **options)
    given = language.tokenizer("a bab").input_ids
    for temperature, text in zip(temperatures, series.texts, strict=True):
        record = genkit.generate("a bab", temperature=temperature, **options)
        assert text.generation == record
        logits = logits_after(language, given + record.tokens)[len(given) - 1 : -1]
        exact = np.mean([bits(softmax(row / temperature)) for row in logits])
        assert math.isclose(text.entropy, exact, rel_tol=1e-3, abs_tol=1e-5)
        t = record.tokens
        assert len(t) >= 5, "the test needs a text of some length"
        assert text.distinct_1 == len(set(t)) / len(t)
        assert text.distinct_2 == len(set(itertools.pairwise(t))) / (len(t) - 1)
        again = [any(t[j : j + 4] == t[i : i + 4] for j in range(i)) for i in range(len(t) - 3)]
        assert math.isclose(text.repetition, np.mean(again), abs_tol=1e-12)
    report = str(series)
    for text in series.texts:
        assert f"temperature {text.temperature:g}   entropy {text.entropy:.2f} bits" in report


def test_shares_at_their_limits():
    assert explain.distinct([7] * 10, 1) == 0.1
    assert explain.distinct([7] * 10, 4) == 1 / 7
    assert explain.distinct(range(10), 2) == 1
    assert explain.distinct([1, 2, 3], 4) == 1


# ---- the tree of beam search


def tree_texts(tree: explain.BeamTree) -> list[list[list[int]]]:
    """The tokens of every candidate, by following parents."""
    kept: list[list[int]] = [[]]
    found = []
    for step in tree.steps:
        found.append([[*kept[c.parent], c.token] for c in step])
        kept = [t for c, t in zip(step, found[-1], strict=True) if c.fate == "kept"]
    return found


def total(language, prompt: str, text: list[int]) -> list[float]:
    ids = language.tokenizer(prompt).input_ids
    logs = np.log(softmax(logits_after(language, ids + text)))
    return [logs[len(ids) - 1 + i, token] for i, token in enumerate(text)]


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("penalty", [None, 0.0, 2.0])
def test_totals_are_teacher_forced_and_the_winner_is_that_of_generate(language, beams, penalty):
    options = {"model": language, "beams": beams, "length_penalty": penalty, "max_new_tokens": 6}
    tree = explain.beam_tree("a ba", **options)
    for step, texts in zip(tree.steps, tree_texts(tree), strict=True):
        for candidate, text in zip(step, texts, strict=True):
            logs = total(language, "a ba", text)
            assert math.isclose(candidate.log_probability, logs[-1], abs_tol=1e-3)
            assert math.isclose(candidate.total, sum(logs), abs_tol=1e-3)
        totals = [candidate.total for candidate in step]
        assert totals == sorted(totals, reverse=True)
        assert sum(c.fate == "kept" for c in step) == beams
    expected = genkit.generate("a ba", strategy="beam", **options)
    assert tree.best.tokens == expected.tokens
    assert math.isclose(tree.best.score, expected.score, abs_tol=1e-4)
    path = tree.winners()
    assert [tree.steps[i][c].token for i, c in enumerate(path)] == tree.best.tokens
    assert tree_texts(tree)[len(path) - 1][path[-1]] == tree.best.tokens


def test_kept_beams_are_the_best_of_all_continuations(letters):
    start, end = letters.tokenizer("ab").input_ids, letters.tokenizer.eos_token_id
    tree = explain.beam_tree("ab", model=letters, beams=3, max_new_tokens=5)
    kept: list[list[int]] = [[]]
    for step, texts in zip(tree.steps, tree_texts(tree), strict=True):
        totals = {}
        for text in kept:
            before = sum(total(letters, "ab", text))
            logs = np.log(softmax(logits_after(letters, start + text)[-1]))
            totals |= {(*text, i): before + log for i, log in enumerate(logs) if i != end}
        kept = [list(text) for text in sorted(totals, key=totals.__getitem__, reverse=True)[:3]]
        assert [t for t, c in zip(texts, step, strict=True) if c.fate == "kept"] == kept


def test_beams_as_many_as_the_vocabulary_find_the_best_of_all_pairs(letters):
    size, end = letters.model.config.vocab_size, letters.tokenizer.eos_token_id
    options = {"beams": size, "max_new_tokens": 2, "length_penalty": 0.0}
    tree = explain.beam_tree("b", model=letters, **options)
    every = [total(letters, "b", [i]) for i in range(size)]
    start = letters.tokenizer("b").input_ids
    pairs = np.array(
        [
            logs + np.log(softmax(logits_after(letters, [*start, i])[-1]))
            for i, logs in enumerate(every)
        ]
    )  # (first, second) log-probability of both
    pairs[end] = pairs[:, end] = -np.inf
    texts = zip(tree_texts(tree)[1], tree.steps[1], strict=True)
    found = [tuple(text) for text, candidate in texts if candidate.fate == "kept"]
    assert len(set(found)) == size
    assert min(pairs[pair] for pair in found) > np.sort(pairs.flatten())[-size] - 1e-4
    assert pairs[tuple(tree.best.tokens)] == pairs.max()


def test_texts_that_end_are_finished_leaves(letters):
    config = letters.model.generation_config
    usual = config.eos_token_id
    often = genkit.generate("ab", model=letters, strategy="greedy").tokens[2]
    config.eos_token_id = often
    try:
        tree = explain.beam_tree("ab", model=letters, beams=4, max_new_tokens=8)
    finally:
        config.eos_token_id = usual
    fates = [c.fate for step in tree.steps for c in step if c.token == often]
    assert "finished" in fates and "kept" not in fates
    assert all(c.token == often for step in tree.steps for c in step if c.fate == "finished")
    assert "■" in str(tree) or tree.best.finish == "eos"
    lines = str(tree).split("\n")[1:-2]
    assert len(lines) == sum(map(len, tree.steps))
    assert sum("●" in line for line in lines) == len(tree.best.tokens)


def test_the_winner_is_followed_past_texts_that_ended():
    def step(*rows):
        return [Candidate(parent, token, -1.0, -1.0, fate) for parent, token, fate in rows]

    steps = [
        step((0, 9, "finished"), (0, 1, "kept"), (0, 2, "kept"), (0, 3, "dropped")),
        step((0, 1, "dropped"), (1, 9, "dropped"), (1, 1, "kept"), (0, 2, "kept")),
        step((1, 5, "kept"), (0, 5, "kept"), (0, 4, "dropped")),
    ]
    names = [[str(candidate.token) for candidate in row] for row in steps]
    best = generation.Generation("a", "215", [2, 1, 5], [-1.0] * 3, -3.0, "length", None)
    tree = explain.BeamTree("a", steps, names, best)
    assert tree.winners() == [2, 2, 1]
    marked = [line[-10:] for line in str(tree).split("\n")[:-1] if "●" in line]
    assert marked == ["● 2  -1.00", "● 1  -1.00", "● 5  -1.00"]


def test_branches_do_not_cross(letters):
    for prompt in ("a", "ab.", "p\n"):
        tree = explain.beam_tree(prompt, model=letters, beams=5, max_new_tokens=8)
        parents = np.zeros(1)
        for step, heights in zip(tree.steps, _planar(tree.steps), strict=True):
            assert len(set(heights)) == len(step)
            downwards = sorted(range(len(step)), key=lambda i: -heights[i])
            starts = [parents[step[i].parent] for i in downwards]
            assert starts == sorted(starts, reverse=True)
            parents = heights[[c.fate == "kept" for c in step]]


# ---- what else could have been said


def test_alternatives_of_a_record_have_its_probabilities(language):
    for prompt in ("a", "ab a"):
        record = genkit.generate(prompt, model=language, seed=3, max_new_tokens=40)
        found = alternatives.alternatives(record, model=language, top=4)
        logs = [choice.log_probability for choice in found.choices]
        assert np.allclose(logs, record.log_probabilities, atol=1e-3)
        assert [choice.token for choice in found.choices] == record.tokens
        assert found.prompt == prompt
        assert found.text == record.completion


def test_ranks_and_options_are_those_of_the_softmax(language):
    found = alternatives.alternatives("bc deaf", model=language, prompt="ab", top=6)
    ids = language.tokenizer("abbc deaf").input_ids
    start = len(ids) - len(found.choices)
    assert [c.token for c in found.choices] == ids[start:]
    assert found.text == "bc deaf"
    for i, choice in enumerate(found.choices):
        logits = logits_after(language, ids)[start + i - 1]
        exact = softmax(logits)
        assert math.isclose(choice.probability, exact[choice.token], rel_tol=1e-4)
        assert choice.rank == 1 + (logits > logits[choice.token]).sum()
        assert [o.token for o in choice.options] == np.argsort(-exact, kind="stable")[:6].tolist()
        assert np.allclose(
            [o.probability for o in choice.options], -np.sort(-exact)[:6], rtol=1e-4, atol=1e-7
        )
        assert (choice.rank <= 6) == (choice.token in [o.token for o in choice.options])


def test_the_summary_is_of_the_whole_text():
    choices = [
        alternatives.Choice(0, "x", math.log(p), rank, []) for p, rank in ((0.5, 1), (0.125, 2))
    ]
    record = alternatives.Alternatives("a", [alternatives.TokenSpan("xx", choices)])
    assert record.summary == "2 tokens, 2.00 bits each, 50% the model's first choice"


def test_without_a_start_token_the_first_character_is_given(letters):
    found = alternatives.alternatives("😀 abc", model=letters)
    assert (found.prompt, found.text) == ("😀", " abc")
    for kind, text in (("bytes", " abc"), ("pieces", "abc")):
        found = alternatives.alternatives(text, model=built(kind))
        assert found.text == text and not found.prompt
        ids = built(kind).tokenizer(text, add_special_tokens=False).input_ids
        assert [choice.token for choice in found.choices] == ids


def test_a_record_that_ended_shows_how(letters):
    config = letters.model.generation_config
    record = genkit.generate("ab", model=letters, seed=1, max_new_tokens=5)
    record = generation.Generation(
        "ab", record.completion, [*record.tokens, 0], [*record.log_probabilities, -9.0], 0, "eos", 1
    )
    found = alternatives.alternatives(record, model=letters)
    assert config.eos_token_id == 0
    assert found.text == record.completion
    assert found.spans[-1].text == "" and found.spans[-1].name == "<eos>"
    assert "<eos>" in str(found) and "<eos>" in found.ansi()


def test_colours_only_where_they_are_welcome(letters, capsys, monkeypatch):
    found = alternatives.alternatives("c d", model=letters, prompt="ab")
    found.show()
    assert capsys.readouterr().out == f"{found}\n"
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    found.show()
    assert capsys.readouterr().out == f"{found.ansi()}\n"
    monkeypatch.setenv("NO_COLOR", "1")
    found.show()
    assert capsys.readouterr().out == f"{found}\n"
    assert "\x1b" not in str(found)


def test_likelier_is_greener():
    shares = np.linspace(0.001, 1, 30).tolist()
    record = alternatives.Alternatives(
        "ab",
        [
            alternatives.TokenSpan("x", [alternatives.Choice(0, "x", math.log(share), 1, [])])
            for share in shares
        ],
    )
    colours = [map(int, c) for c in re.findall(r"48;2;(\d+);(\d+);(\d+)mx", record.ansi())]
    greenness = [green - red for red, green, _ in colours]
    assert len(greenness) == 30
    assert greenness == sorted(greenness) and greenness[0] < -50 and greenness[-1] > 50


# ---- any text


ODD = [
    "plain words",
    "<script>alert('x')</script> & \"quotes\"",
    "two\nlines\r\nand\rthree\n\n",
    "\n leading",
    "  spaces\tand tabs  ",
    "😀😁👩‍👩‍👧 emoji",
    "שלום عالم mixed",
    "\x1b[31mred\x07",
    "‮override\u2028line",
    "&amp; &#13; %s {braces}",
    "\ufffd literal",
]


class Page(html.parser.HTMLParser):
    """The text of the spans, of the prompt, and of the panels; and every tag and attribute."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.classes: list[str] = []
        self.spans: list[str] = []
        self.prompt, self.panels = "", ""
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.feed(page)
        self.close()
        assert not self.classes

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= dict(attributes).keys()
        if tag not in ("meta", "br"):
            self.classes.append(dict(attributes).get("class") or tag)
        if self.classes and self.classes[-1] == "token" and tag == "span":
            self.spans.append("")

    def handle_endtag(self, tag):
        self.classes.pop()

    def handle_data(self, data):
        if "panel" in self.classes:
            self.panels += data
        elif "token" in self.classes:
            self.spans[-1] += data
        elif "prompt" in self.classes:
            self.prompt += data


TAGS = {"html", "head", "meta", "title", "style", "body", "header", "br", "span", "div", "bdi"}
ATTRIBUTES = {"charset", "name", "content", "http-equiv", "class", "tabindex", "style"}


def check_page(language, text: str, prompt: str, path) -> None:
    found = alternatives.alternatives(text, model=language, prompt=prompt, top=3)
    found.html(path)
    page = Page(path.read_bytes().decode())
    assert page.spans == [span.text for span in found.spans]
    assert "".join(page.spans) == text
    assert b"\r" not in path.read_bytes()  # which a browser, unlike this parser, reads as \n
    assert page.prompt == prompt
    assert page.tags <= TAGS
    assert page.attributes <= ATTRIBUTES
    for choice in found.choices:
        assert choice.name in page.panels


@pytest.mark.parametrize("text", ODD)
def test_a_page_gives_the_text_back(text, tmp_path):
    for prompt in ("a\n<b>", "é\n"):
        check_page(built("bytes"), text, prompt, tmp_path / "page.html")


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1))
def test_a_page_gives_any_text_back(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.html"
    check_page(built("bytes"), text, "-\n", path)


@pytest.mark.parametrize("text", ODD)
def test_a_terminal_gives_the_text_back_and_is_not_steered(text):
    found = alternatives.alternatives(text, model=built("bytes"), prompt="a")
    shown = re.sub(r"\x1b\[[0-9;]*m", "", found.ansi())
    assert shown == "a" + token_names.printable(text).replace("\n", "↵\n")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\u2028]", shown)
    assert str(found).replace("\n", "").isprintable()


def test_nul_is_shown_by_its_picture(tmp_path):
    found = alternatives.alternatives("a\0b", model=built("bytes"), prompt="a")
    assert found.text == "a\0b"
    found.html(tmp_path / "page.html")
    assert "".join(Page((tmp_path / "page.html").read_text()).spans) == "a␀b"


ANY = st.text(st.characters(exclude_categories=["Cs"]))


@settings(max_examples=150, deadline=None)
@given(before=ANY, text=ANY)
@pytest.mark.parametrize("kind", list(BUILDERS))
def test_spans_are_whole_characters_and_the_whole_text(kind, before, text):
    tokenizer = built(kind).tokenizer
    first = tokenizer(before).input_ids
    ids = [tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]
    cut = token_names.spans(tokenizer, first, ids)
    assert [i for _, run in cut for i in run] == ids
    whole = token_names.decode(tokenizer, first + ids)
    assert token_names.decode(tokenizer, first) + "".join(t for t, _ in cut) == whole
    if "\ufffd" not in text:
        assert not any("\ufffd" in t for t, _ in cut)
        runs = [run for t, run in cut if len(run) > 1]
        assert all("\ufffd" in token_names.decode(tokenizer, run[:-1]) for run in runs)


@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(0, 275), min_size=2), border=st.integers(0, 5))
@pytest.mark.parametrize("kind", list(BUILDERS))
def test_spans_of_any_tokens_are_their_text(kind, ids, border):
    """Bytes that make no character, special tokens, and all else that a model may write."""
    tokenizer = built(kind).tokenizer
    first, last = ids[:border], ids[border:]
    cut = token_names.spans(tokenizer, first, last)
    assert [i for _, run in cut for i in run] == last
    written = token_names.decode(tokenizer, ids)[len(token_names.decode(tokenizer, first)) :]
    assert "".join(text for text, _ in cut) == written


@given(text=ANY)
def test_what_is_visible_is_on_one_line_and_steers_nothing(text):
    shown = token_names.visible(text)
    assert " " not in shown and shown.isprintable()
    assert token_names.printable(text).replace("\n", "").isprintable()
    assert token_names.one_line(text).replace(" ", "␣") == shown
    assert len(shown) >= len(text)


def test_an_emoji_over_several_tokens_is_one_span():
    found = alternatives.alternatives("a😀😁b", model=built("bytes"), prompt="x")
    (emoji,) = (span for span in found.spans if span.text == "😀")
    assert len(emoji.choices) > 1
    assert math.isclose(emoji.probability, math.prod(c.probability for c in emoji.choices))
    raw = "".join(re.findall(r"⟨(..)⟩", emoji.name))
    assert bytes.fromhex(raw).decode() == "😀"


def test_bytes_that_make_no_character_are_named():
    for name, prefix in (("bytes", "Ġ"), ("pieces", "▁"), ("characters", None)):
        tokenizer = built(name).tokenizer
        vocabulary = tokenizer.get_vocab()
        if prefix:
            assert token_names.names(tokenizer, [vocabulary[prefix]]) == ["␣"]
        ids = list(range(len(vocabulary)))
        named = dict(zip(ids, token_names.names(tokenizer, ids), strict=True))
        assert all(named.values())
        if name == "bytes":
            assert len(set(named.values())) == len(ids)
        assert sum(re.fullmatch("⟨[0-9A-F]{2}⟩", n) is not None for n in named.values()) >= 128
        assert not any("\ufffd" in n for n in named.values())


# ---- pictures


def test_pictures_are_drawn(letters, tmp_path):
    explain.next_tokens("ab ", model=letters).save(tmp_path / "next.png")
    explain.next_tokens("ab ", model=letters, temperatures=[1], top=1).save(tmp_path / "one.png")
    series = explain.temperature_series("ab ", model=letters, max_new_tokens=10)
    series.save(str(tmp_path / "series.png"))
    explain.beam_tree("ab ", model=letters).save(tmp_path / "beams.png")
    explain.beam_tree("ab ", model=letters, beams=1, max_new_tokens=2).save(tmp_path / "beam.png")
    pictures = sorted(path.name for path in tmp_path.iterdir())
    assert pictures == ["beam.png", "beams.png", "next.png", "one.png", "series.png"]
    for path in tmp_path.iterdir():
        assert_picture(path)


@pytest.mark.parametrize("name", ["$x$", "$", "$\\x_^{$", "你好", "שלום", "😀", "⟨F0⟩", "a" * 90])
def test_any_token_can_be_drawn(name, tmp_path):
    shares = [[0.7, 0.2]]
    next_tokens(name, [name, "b"], [1.0], shares, [1.2], tmp_path / "bars.png")
    kept, dropped = (Candidate(0, 1, -1.0, -1.0, fate) for fate in ("kept", "dropped"))
    steps, names = [[kept, dropped]] * 2, [[name, name]] * 2
    beam_tree(name, name, steps, names, [0, 0], tmp_path / "tree.png")
    assert_picture(tmp_path / "bars.png")
    assert_picture(tmp_path / "tree.png")


# ---- bad input


@pytest.mark.parametrize(
    ("verb", "options", "message"),
    [
        ("next_tokens", {"prompt": ""}, "prompt is empty"),
        ("next_tokens", {"top": 0}, "top must be between 1 and the vocabulary's 276, got 0"),
        ("next_tokens", {"top": 277}, "top must be between 1 and .* 276, got 277"),
        ("next_tokens", {"temperatures": ()}, r"temperatures: \[\]"),
        ("next_tokens", {"temperatures": (1.0, 0)}, "temperatures must be above 0, got 0"),
        ("next_tokens", {"temperatures": (math.nan,)}, "temperatures must be above 0, got nan"),
        ("next_tokens", {"temperatures": (math.inf,)}, "temperatures must be above 0, got inf"),
        ("next_tokens", {"prompt": "a😀"}, "has never seen '😀'"),
        ("next_tokens", {"prompt": "a" * 65}, "65 tokens are more than"),
        ("temperature_series", {"prompt": ""}, "prompt is empty"),
        ("temperature_series", {"temperatures": []}, r"temperatures: \[\]"),
        ("temperature_series", {"temperatures": [-1.0]}, "temperatures must be above 0, got -1.0"),
        ("temperature_series", {"max_new_tokens": 0}, "max_new_tokens must be 1 or more, got 0"),
        ("temperature_series", {"max_new_tokens": 63}, "max_new_tokens: 66 tokens .* 65"),
        ("temperature_series", {"seed": -1}, "seed must be 0 or more and less than 2.63, got -1"),
        ("beam_tree", {"prompt": ""}, "prompt is empty"),
        ("beam_tree", {"beams": 0}, "beams must be 1 or more, got 0"),
        ("beam_tree", {"max_new_tokens": 0}, "max_new_tokens must be 1 or more, got 0"),
        ("alternatives", {"text": ""}, "text is empty"),
        ("alternatives", {"text": "a"}, "text: 'a' is one token"),
        ("alternatives", {"text": "ab", "top": 0}, "top must be between 1 and .*, got 0"),
        ("alternatives", {"text": "a" * 66}, "text: 66 tokens .* 65 "),
        ("alternatives", {"text": "a", "prompt": "é"}, "has never seen 'é'"),
    ],
)
def test_bad_arguments_are_named(letters, verb, options, message):
    first = {} if verb == "alternatives" else {"prompt": "abc"}
    with pytest.raises(ValueError, match=message):
        getattr(genkit, verb)(**(first | {"model": letters} | options))


def test_the_longest_text_is_read(letters):
    assert len(alternatives.alternatives("a" * 65, model=letters).choices) == 64
    series = explain.temperature_series("abc", [1.0], model=letters, max_new_tokens=62)
    assert len(series.texts[0].generation.tokens) == 62


def test_a_prompt_that_ends_within_a_token_is_refused():
    whole = built("bytes").tokenizer(" all").input_ids
    assert len(whole) < 4, "the test needs a token of several letters"
    with pytest.raises(ValueError, match=r"prompt: ' a' ends within a token"):
        alternatives.alternatives("ll", model=built("bytes"), prompt=" a")


def test_a_record_brings_its_own_prompt(letters):
    record = genkit.generate("ab", model=letters, seed=1, max_new_tokens=3)
    with pytest.raises(ValueError, match="prompt='ab'"):
        alternatives.alternatives(record, model=letters, prompt="ab")


def test_a_model_that_answers_is_refused(letters):
    shape = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(vocab_size=300, decoder_start_token_id=0, **shape))
    answering = LanguageModel(model.eval(), letters.tokenizer, "t5")
    with pytest.raises(ValueError, match="model: t5 "):
        explain.next_tokens("ab", model=answering)


def test_a_model_is_a_folder_too(letters, tmp_path):
    lm.save_tokenizer(letters.tokenizer, tmp_path)
    letters.model.save_pretrained(tmp_path)
    found = explain.next_tokens("ab", model=tmp_path)
    assert found == explain.next_tokens("ab", model=letters)
    with pytest.raises(ValueError, match="cannot load"):
        alternatives.alternatives("ab", model=tmp_path / "nothing")


def test_nothing_but_the_seed_matters(letters):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = explain.temperature_series("ab", model=letters, max_new_tokens=10)
    assert torch.equal(torch.get_rng_state(), before)
    assert explain.temperature_series("ab", model=letters, max_new_tokens=10) == first


def test_beam_tree_is_of_one_text():
    with pytest.raises(ValueError, match="prompt must be one text, got"):
        explain.beam_tree(["ab", "c"], model=built("bytes"))


@pytest.mark.parametrize("first", ["a", "<s>", "the the"])
def test_stops_and_prefixes_have_no_space_that_nobody_gave(first):
    """SentencePiece adds a space before a text, and drops the first one of a decoded text."""
    pieces = built("pieces")
    options = {"model": pieces, "strategy": "greedy", "max_new_tokens": 8}
    rows = genkit.generate([first, "the cat"], prefix="the", **options)
    assert all(row.completion.startswith("the") for row in rows)
    spaced = genkit.generate("the cat", prefix=" the", **options)
    assert spaced.completion.startswith(" the")
    stopped = genkit.generate([first, "the cat"], stop=" ", **options | {"max_new_tokens": 40})
    alone = genkit.generate("the cat", stop=" ", **options | {"max_new_tokens": 40})
    assert (stopped[1].tokens, stopped[1].finish) == (alone.tokens, alone.finish)
