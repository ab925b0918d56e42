"""Exact search against enumeration, and what search_errors counts."""

import itertools
import json
import re

import pytest
import torch
from builders import seq2seq_model
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

import genkit
from genkit import cli
from genkit.models import lm
from genkit.text import search_errors
from genkit.text.exact_search import AT_ONCE, Decoder, find_most_likely
from genkit.text.strategies import Rules
from tests.test_seq2seq import PAIRS, TEXTS, write_pairs

SIZE, END, LONGEST = 7, 1, 5
RULES = {
    "free": Rules(LONGEST, ends=frozenset({END})),
    "short": Rules(1, ends=frozenset({END})),
    "forced": Rules(LONGEST, ends=frozenset({END}), prefix=(END, 3), last=END),
    "suppressed": Rules(LONGEST, ends=frozenset({END}), never=(2, 4)),
    "long": Rules(LONGEST, shortest=3, ends=frozenset({END, 5})),
}


def tiny(architecture: str, seed: int, sharp: float):
    """A model of seven tokens, of which all sequences can be listed."""
    torch.manual_seed(seed)
    tokens = {"vocab_size": SIZE, "pad_token_id": 0, "eos_token_id": END}
    if architecture == "t5":
        shape = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
        config = T5Config(decoder_start_token_id=0, **shape, **tokens)
        return T5ForConditionalGeneration(config).eval()
    sides = ("layers", "attention_heads", "ffn_dim")
    shape = {f"{part}_{s}": 1 for part in ("encoder", "decoder") for s in sides}
    config = BartConfig(d_model=16, max_position_embeddings=16, init_std=sharp, **shape, **tokens)
    return BartForConditionalGeneration(config).eval()


def every_sequence(rules: Rules) -> list[list[int]]:
    """All sequences that end, or are as long as may be, by the rules' own word."""
    found, open_ones = [], [[]]
    while open_ones:
        longer = [[*own, token] for own in open_ones for token in range(SIZE)]
        longer = [own for own in longer if _allowed(own, rules)]
        done = [rules.finish(own) is not None for own in longer]
        found += itertools.compress(longer, done)
        open_ones = [own for own, over in zip(longer, done, strict=True) if not over]
    return found


def _allowed(tokens: list[int], rules: Rules) -> bool:
    forced = rules.forced(len(tokens) - 1)
    if forced is not None:
        return tokens[-1] == forced
    early = tokens[-1] in rules.ends and len(tokens) - 1 < rules.shortest
    return tokens[-1] not in rules.never and not early


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("architecture", ["t5", "bart"])
def test_exact_search_is_enumeration(architecture, name):
    rules = RULES[name]
    listed = every_sequence(rules)
    for seed in range(4):
        with torch.random.fork_rng():
            decoder = Decoder(tiny(architecture, seed, 0.8), [3, 2, 5, END])
        scores = decoder.score(listed)
        best = max(scores)
        for known in (listed[-1], listed[scores.index(best)]):
            found = find_most_likely(decoder, rules, known, 10**6)
            assert found.is_exact and found.score == pytest.approx(best, abs=1e-4)
            assert decoder.score([found.tokens])[0] == pytest.approx(best, abs=1e-4)


def test_a_better_bound_leaves_more_out():
    with torch.random.fork_rng():
        decoder = Decoder(tiny("bart", 1, 0.8), [3, 2, END])
    rules = RULES["free"]
    listed = every_sequence(rules)
    scores = decoder.score(listed)
    order = sorted(range(len(listed)), key=scores.__getitem__)
    worst, best = (
        find_most_likely(decoder, rules, listed[i], 10**6) for i in (order[0], order[-1])
    )
    assert best.nodes < worst.nodes < len(listed) and best.tokens == listed[order[-1]]


def test_a_search_ends_with_its_budget():
    with torch.random.fork_rng():
        decoder = Decoder(tiny("bart", 1, 0.01), [3, 2, END])  # all sequences are about as likely
    rules = Rules(60, shortest=59, ends=frozenset({END}))
    known = [2] * 60
    found = find_most_likely(decoder, Rules(12, shortest=11), known[:12], 200)
    assert not found.is_exact and 200 <= found.nodes <= 200 + AT_ONCE
    assert len(found.tokens) == 12 and rules.longest == 60


def test_scores_do_not_depend_on_padding():
    with torch.random.fork_rng():
        decoder = Decoder(tiny("t5", 0, 1.0), [3, 2, END])
    rows = [[2, 3, END], [END], [4, 4, 4, 4, 4, 2, END]]
    alone = [decoder.score([row])[0] for row in rows]
    assert decoder.score(rows) == pytest.approx(alone, abs=1e-5)


# ---- the verb


@pytest.fixture(scope="module")
def language():
    """A model whose sequences are short, and whose beams go wrong."""
    with torch.random.fork_rng():
        made = seq2seq_model("bart", TEXTS)
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in made.model.parameters():
                parameter.mul_(6 if parameter.ndim > 1 else 1)
    return made


@pytest.fixture(scope="module")
def record(language):
    pairs = PAIRS[:12]
    return genkit.search_errors(language, pairs, beams=(4, 1, 2, 1), max_new_tokens=7)


def test_search_errors_compares_all_sequences_alike(language, record):
    assert list(record.errors) == ["1", "2", "4", "exact", "reference"]
    assert record.settings["beams"] == [1, 2, 4] and record.solved == len(record.rows) == 12
    assert record.errors["exact"] == 0 == record.wrong["reference"]
    for name in ("1", "2", "4"):
        assert record.errors["exact"] <= record.errors[name] <= 1
        assert record.score[name] <= record.score["exact"] + 1e-3
    for row in record.rows:
        greedy = genkit.generate(row.source, model=language, strategy="greedy", max_new_tokens=7)
        assert row.outputs["1"].tokens == greedy.tokens
        assert row.outputs["1"].text == greedy.completion
        assert row.outputs["1"].score == pytest.approx(sum(greedy.log_probabilities), abs=1e-3)
        missed = row.outputs["1"].score < row.outputs["exact"].score - search_errors.NEAR
        assert row.misses("1") == missed


def test_figures_are_means_of_the_rows(record):
    for name in record.errors:
        own = [row.outputs[name] for row in record.rows]
        assert record.length[name] == pytest.approx(sum(len(o.tokens) for o in own) / 12)
        assert record.empty[name] == pytest.approx(sum(not o.text for o in own) / 12)
        below = [o.score < r.outputs["reference"].score for o, r in zip(own, record.rows)]  # noqa: B905
        assert record.below_reference[name] == pytest.approx(sum(below) / 12)


def test_the_record_prints_and_draws(record, tmp_path):
    lines = str(record).splitlines()
    assert re.match(r"\s+search errors\s+below target\s+wrong\s+empty\s+tokens\s+log p", lines[0])
    assert [line.split()[0] for line in lines[1:6]] == ["beam"] * 3 + ["exact", "reference"]
    assert lines[-1].startswith("12 pairs; model bart, beams [1, 2, 4], max_new_tokens 7")
    record.save(tmp_path / "errors.png")
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")


def test_a_budget_that_ran_out_is_said():
    with torch.random.fork_rng():
        unsure = seq2seq_model("t5", TEXTS)
    record = genkit.search_errors(unsure, PAIRS[:2], beams=[1], max_new_tokens=12, budget=1)
    assert record.solved < 2 and "the exact search ran out of its budget on" in str(record)


def test_lengths_end_where_the_decoder_does(language):
    long = [("1 + 1", "is 11111111.")]  # 13 tokens with the end; the decoder has 16 positions
    record = genkit.search_errors(language, long, beams=[1], budget=1)
    assert record.settings["max_new_tokens"] == 16


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pairs": []}, r"pairs: \[\] is empty"),
        ({"pairs": [("a", "")]}, r"pairs\[0\]: target is empty"),
        ({"pairs": ["ab"]}, r"pairs\[0\] must be a source and a target, got 'ab'"),
        ({"pairs": [("1" * 17, "2")]}, r"pairs\[0\]: 18 tokens are more than .* context of 16"),
        ({"pairs": [("1", "2" * 16)]}, "the longest target has 17 tokens, the decoder writes 16"),
        ({"pairs": [("\N{SNOWMAN}", "2")]}, r"pairs\[0\]: .* has never seen '\N{SNOWMAN}'"),
        ({"max_new_tokens": 2}, "max_new_tokens=2: the longest target has"),
        ({"beams": []}, r"beams: \[\] is empty"),
        ({"beams": [0]}, "beams must be a whole number, 1 or more, got 0"),
        ({"budget": True}, "budget must be a whole number"),
        ({"count": 0}, "count must be a whole number, 1 or more, got 0"),
    ],
)
def test_bad_arguments_are_named(language, given, message):
    arguments = {"pairs": PAIRS[:1]} | given
    with pytest.raises(ValueError, match=message):
        genkit.search_errors(language, arguments.pop("pairs"), **arguments)


def test_a_causal_model_is_refused(trained):
    with pytest.raises(ValueError, match=r"model: .* has no encoder; give an encoder-decoder"):
        genkit.search_errors(trained, PAIRS[:1])


def test_the_command_prints_the_record_and_draws(language, tmp_path, capsys):
    language.model.save_pretrained(tmp_path / "model")
    lm.save_tokenizer(language.tokenizer, tmp_path / "model")
    data = write_pairs(tmp_path / "pairs.jsonl", PAIRS[:3])
    words = ["search-errors", str(tmp_path / "model"), "--data", str(data), "--beams", "1"]
    words += ["--beams", "2", "--max-new-tokens", "7"]
    cli.main([*words, "--output", str(tmp_path / "errors.png")])
    expected = genkit.search_errors(tmp_path / "model", PAIRS[:3], beams=(1, 2), max_new_tokens=7)
    assert capsys.readouterr().out == f"{expected}\n" and (tmp_path / "errors.png").exists()
    cli.main([*words, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["errors"] == expected.errors and len(found["rows"]) == 3
