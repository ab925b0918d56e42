"""What a writer never does, whatever the strategy and however much is ruled out."""

import functools
import itertools
import string

import pytest
from builders import byte_model, letter_model, small_model

import genkit
from genkit.text import explain, token_names
from genkit.text.language_model import LanguageModel
from genkit.text.strategies import Rules

LETTERS = string.ascii_lowercase + " "
STRATEGIES = {
    "sample": {"seed": 1},
    "filters": {"seed": 1, "top_k": 3, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.9},
    "stochastic": {"strategy": "stochastic", "seed": 1},
    "greedy": {"strategy": "greedy"},
    "lookup": {"strategy": "greedy", "lookup": 3},
    "beam": {"strategy": "beam", "n_best": 4},
    "diverse_beam": {"strategy": "diverse_beam", "n_best": 4},
    "contrastive": {"strategy": "contrastive"},
}


@pytest.fixture(scope="module")
def letters() -> LanguageModel:
    return letter_model()


@pytest.fixture(scope="module")
def of_bytes() -> LanguageModel:
    return byte_model()


@pytest.fixture(params=STRATEGIES)
def options(request) -> dict:
    return STRATEGIES[request.param]


# ---- no token is possible


def test_a_text_of_no_token_ends_at_once(letters, options):
    rows = genkit.generate(["c", "ab"], model=letters, bad_words=list(LETTERS), **options)
    for row in rows:
        assert (row.finish, row.completion, row.tokens, row.score) == ("dead_end", "", [], 0.0)
        assert row.alternatives == []
        assert genkit.alternatives(row, model=letters).spans == []
    pieces = list(genkit.stream(["c", "ab"], model=letters, bad_words=list(LETTERS), **options))
    assert [(p.row, p.text, p.record) for p in pieces] == [(0, "", rows[0]), (1, "", rows[1])]


def test_a_text_ends_before_it_breaks_a_rule(letters, options):
    """No letter comes twice, and few may come: rows end at different steps, each in a dead end."""
    rules = {"no_repeat_ngram": 1, "max_new_tokens": 40, "bad_words": list("ghijklmnopqrstuv")}
    rows = genkit.generate(["c", "ab", "abcdefwxyz"], model=letters, **rules, **options)
    for row, most in zip(rows, (10, 9, 1), strict=True):
        for record in (row, *row.alternatives):
            assert record.finish == "dead_end" and len(record.tokens) == most
            text = row.prompt + record.completion
            assert len(set(text)) == len(text) and not set(text) & set("ghijklmnopqrstuv")
            assert record.score > -1000
        texts = [record.completion for record in (row, *row.alternatives)]
        assert len(set(texts)) == len(texts)
    alone = genkit.generate("ab", model=letters, **rules, **options | _seed_of(rows[1]))
    assert alone.tokens == rows[1].tokens


def _seed_of(record: genkit.text.generation.Generation) -> dict:
    return {} if record.seed is None else {"seed": record.seed}


def test_a_prefix_is_in_a_text_without_further_tokens(letters, options):
    rules = {"prefix": "ab", "bad_words": list("cdefghijklmnopqrstuvwxyz "), "no_repeat_ngram": 1}
    record = genkit.generate("c", model=letters, **rules, **options)
    assert (record.completion, record.finish) == ("ab", "dead_end")


def test_suppressed_tokens_and_the_shortest_length_may_leave_none(options):
    language = letter_model(eos=0)
    language.model.generation_config.suppress_tokens = list(range(1, 27))
    record = genkit.generate("c", model=language, min_new_tokens=3, **options)
    assert (record.tokens, record.finish) == ([], "dead_end")
    assert genkit.generate("c", model=language, **options).finish == "eos"


def test_guesses_change_no_text_that_ends_in_a_dead_end(letters):
    rules = {"no_repeat_ngram": 1, "max_new_tokens": 40, "strategy": "stochastic", "seed": 1}
    plain = genkit.generate(["c", "ab"], model=letters, **rules)
    draft = genkit.generate(["c", "ab"], model=letters, draft=letter_model(), **rules)
    assert [row.tokens for row in draft] == [row.tokens for row in plain]
    assert {row.finish for row in (*plain, *draft)} == {"dead_end"}


def test_a_tree_of_beams_without_a_token_prints(tmp_path):
    language = letter_model()
    language.model.generation_config.suppress_tokens = list(range(27))
    tree = explain.beam_tree("c", model=language)
    assert tree.best.finish == "dead_end" and tree.winners() == []
    assert "c …" in str(tree)
    tree.save(tmp_path / "tree.png")


# ---- ids outside the vocabulary


def test_ids_outside_the_vocabulary_are_ignored(letters, options):
    stock = letter_model("stock")
    settings = stock.model.generation_config
    assert settings.eos_token_id == 50256
    settings.suppress_tokens, settings.bad_words_ids = [-1, 27, 99999], [[30]]
    rules = {"min_new_tokens": 5, "max_new_tokens": 8}
    found = genkit.generate(["ab", "c"], model=stock, **rules, **options)
    expected = genkit.generate(["ab", "c"], model=letters, **rules, **options)
    assert [row.tokens for row in found] == [row.tokens for row in expected]


# ---- beams: only texts that can be, each once


def test_more_beams_than_texts_give_each_text_once(letters):
    common = {"model": letters, "strategy": "beam", "beams": 28, "n_best": 28}
    best = genkit.generate("c", max_new_tokens=1, **common)
    texts = [record.completion for record in (best, *best.alternatives)]
    assert len(texts) == 27 and set(texts) == set(LETTERS)
    best = genkit.generate("c", max_new_tokens=3, prefix="ab", **common)
    found = [best, *best.alternatives]
    assert {r.completion for r in found} == {f"ab{letter}" for letter in LETTERS}
    assert all(record.score > -100 for record in found)
    few = genkit.generate("c", max_new_tokens=2, bad_words=list(LETTERS[2:]), **common)
    assert {r.completion for r in (few, *few.alternatives)} == {"aa", "ab", "ba", "bb"}


def test_texts_that_differ_by_their_end_alone_are_one():
    """Two stops: what is before either is the same text."""
    language = letter_model()
    common = {
        "model": language,
        "strategy": "beam",
        "beams": 8,
        "n_best": 8,
        "stop": list("abcdef"),
    }
    best = genkit.generate("c", max_new_tokens=2, **common)
    texts = [record.completion for record in (best, *best.alternatives)]
    assert len(set(texts)) == len(texts)


def test_texts_that_an_earlier_group_has_ended_cost_diversity():
    language = letter_model(eos=list(range(20)))
    best = genkit.generate(
        "c",
        model=language,
        strategy="diverse_beam",
        beams=4,
        groups=4,
        diversity=100.0,
        n_best=4,
    )
    texts = [record.completion for record in (best, *best.alternatives)]
    assert len(set(texts)) == 4 and len({text[0] for text in texts}) == 4


def test_groups_that_agree_give_a_text_once(letters):
    best = genkit.generate(
        "c", model=letters, strategy="diverse_beam", diversity=0.0, n_best=4, max_new_tokens=6
    )
    texts = [record.completion for record in (best, *best.alternatives)]
    assert len(set(texts)) == len(texts) == 2


# ---- special tokens have no text


@pytest.mark.parametrize("name", ["bad_words", "stop"])
def test_special_tokens_have_no_text(of_bytes, name):
    options = {"model": of_bytes, "strategy": "stochastic", "seed": 0, "max_new_tokens": 60}
    free = genkit.generate(["The "] * 16, **options)
    assert "eos" in {row.finish for row in free}
    found = genkit.generate(["The "] * 16, **{name: ["endoftext", "|>", "dof"]}, **options)
    assert [row.tokens for row in found] == [row.tokens for row in free]


# ---- half characters


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("é😀".encode(), "é😀"),
        ("é😀".encode()[:-1], "é"),
        (b"a" + "€".encode()[:1], "a"),
        ("a\ufffd".encode(), "a\ufffd"),  # the character itself
        (b"a\x80", "a\ufffd"),  # no character begins with this byte
        (b"a\xf0\x9fb", "a\ufffdb"),
    ],
)
def test_decode_whole_leaves_out_half_a_character_only(of_bytes, data, text):
    alphabet = token_names._byte_alphabet()
    letter = {byte: character for character, byte in alphabet.items()}
    ids = [of_bytes.tokenizer.convert_tokens_to_ids(letter[byte]) for byte in data]
    assert token_names.decode_whole(of_bytes.tokenizer, ids) == text
    assert token_names.decode_whole(of_bytes.tokenizer, [*ids, 256]) == text


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("é😀".encode(), "é😀"),
        ("é😀".encode()[:-1], ""),  # the decoder takes bytes in a row together
        ("\ufffd".encode(), "\ufffd"),
        (b"\x80\xf0", "\ufffd\ufffd"),
    ],
)
def test_decode_whole_of_bytes_as_tokens(data, text):
    tokenizer = small_model("llama").tokenizer
    ids = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in data]
    assert token_names.decode_whole(tokenizer, ids) == text


def test_a_stop_is_found_after_a_long_run_of_bytes_and_ids_without_a_token_do_no_harm():
    tokenizer = small_model("llama").tokenizer
    ids = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "龘龘🤖".encode()]
    rules = Rules(
        longest=99,
        stops=("🤖",),
        bytes=token_names.byte_tokens(tokenizer),
        decode=functools.partial(token_names.decode_whole, tokenizer),
    )
    ends = [rules.finish(ids[: i + 1]) for i in range(len(ids))]
    assert ends == [None] * (len(ids) - 1) + ["stop"]
    lacking = [*ids[:2], 10**6]
    assert "龘" not in token_names.decode_whole(tokenizer, lacking)


def test_stops_of_a_row_do_not_depend_on_the_first_prompt(of_bytes):
    options = {"model": of_bytes, "strategy": "stochastic", "seed": [1, 2], "max_new_tokens": 30}
    for first in ("a", "é", " "):
        rows = genkit.generate([first, "The "], stop=[" ", "e", "a"], **options)
        alone = genkit.generate("The ", stop=[" ", "e", "a"], **options | {"seed": 2})
        assert (rows[1].tokens, rows[1].finish) == (alone.tokens, alone.finish)


def test_bad_words_with_the_replacement_character_leave_whole_characters(of_bytes):
    """Every byte that makes no character is ruled out, and none that begins one."""
    options = {"model": of_bytes, "strategy": "stochastic", "seed": 0, "max_new_tokens": 30}
    rows = genkit.generate(["The "] * 8, bad_words="\ufffd", **options)
    for row in rows:
        cut = row.finish != "dead_end"  # a text may end within a character
        assert "\ufffd" not in (row.completion.removesuffix("\ufffd") if cut else row.completion)
    assert any(ord(c) > 127 for row in rows for c in row.completion)


def test_a_stop_at_the_replacement_character_waits_for_whole_characters(of_bytes):
    options = {"model": of_bytes, "strategy": "stochastic", "seed": 0, "max_new_tokens": 30}
    for row in genkit.generate(["The "] * 8, stop="\ufffd", **options):
        written = of_bytes.tokenizer.decode(row.tokens[:-1], skip_special_tokens=True)
        assert "\ufffd" not in written.removesuffix("\ufffd") and "\ufffd" not in row.completion
        assert row.finish == "stop"


def test_pieces_have_the_replacement_character_and_no_half_one():
    """All bytes suppressed but those of U+FFFD: the model writes it, others, and parts of them."""
    language = byte_model()
    own = set(language.tokenizer("\ufffd").input_ids)
    language.model.generation_config.suppress_tokens = [i for i in range(257) if i not in own]
    options = {"model": language, "strategy": "stochastic", "seed": 3, "max_new_tokens": 20}
    *pieces, last = genkit.stream("The ", **options)
    assert "".join(piece.text for piece in (*pieces, last)) == last.record.completion
    assert any("\ufffd" in piece.text for piece in pieces)
    barred = genkit.generate("The ", bad_words="\ufffd", **options)
    assert "\ufffd" not in barred.completion.removesuffix("\ufffd")


# ---- temperatures next to nothing


@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.9, "min_p": 0.01}])
def test_tiny_temperatures_write_as_greedy_does_or_are_refused(letters, filters):
    texts = ["c", "ab", "the"]
    greedy = genkit.generate(texts, model=letters, strategy="greedy", max_new_tokens=12)
    refused = 0
    for exponent, digit in itertools.product((-45, -38, -37, -31, -30, -20, -9, -5), (1, 3)):
        options = {"temperature": float(f"{digit}e{exponent}"), "max_new_tokens": 12, "seed": 1}
        try:
            found = genkit.generate(texts, model=letters, **options, **filters)
        except ValueError as error:
            assert "temperature must be 1e-30 or more" in str(error)
            refused += 1
            continue
        assert [row.tokens for row in found] == [row.tokens for row in greedy]
    assert refused == 8
    with pytest.raises(ValueError, match="temperatures must be 1e-30 or more, got 1e-40"):
        genkit.next_tokens("c", model=letters, temperatures=[1e-40])
