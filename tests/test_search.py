"""Every strategy against transformers, against a plain reference, or against what it promises."""

import itertools

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

import genkit
from genkit.data import characters
from genkit.models import lm
from genkit.text import generation, kv_cache
from genkit.text.language_model import LanguageModel
from tests.test_generation import LETTERS, prompts, small_model
from tests.test_reading import BART, T5

STRATEGIES = {
    "greedy": {"strategy": "greedy"},
    "stochastic": {"strategy": "stochastic", "seed": 3},
    "sample": {"temperature": 0.8, "top_p": 0.9, "seed": 3},
    "beam": {"strategy": "beam"},
    "diverse_beam": {"strategy": "diverse_beam"},
    "contrastive": {"strategy": "contrastive"},
}


def encoder_decoder(name: str) -> LanguageModel:
    tokenizer = characters.make_tokenizer(LETTERS)
    size = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    torch.manual_seed(2)
    if name == "t5":
        model = T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **T5, **size))
    else:
        model = BartForConditionalGeneration(BartConfig(**BART, **size))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
        model.get_input_embeddings().weight[257:].mul_(3)  # letters: bytes and <eos> are rare
    return LanguageModel(model.eval(), tokenizer, name)


@pytest.fixture(
    scope="module",
    params=["gpt2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("llama", "t5", "bart"))],
)
def language(request) -> LanguageModel:
    made = encoder_decoder if request.param in ("t5", "bart") else small_model
    return made(request.param)


@pytest.fixture(scope="module")
def llama() -> LanguageModel:
    return small_model("llama")


def by_transformers(language: LanguageModel, texts: list[str], **options) -> list[list[int]]:
    """The completions of model.generate on a padded batch, cut after their end."""
    inputs = language.tokenizer(texts, return_tensors="pt", padding=True)
    if language.model.config.is_encoder_decoder:
        inputs = language.tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    output = language.model.generate(**inputs, do_sample=False, pad_token_id=0, **options)
    start = 1 if language.model.config.is_encoder_decoder else inputs.input_ids.shape[1]
    rows = [row[start:].tolist() for row in output]
    return [row[: row.index(0) + 1] if 0 in row else row for row in rows]


def is_near_tie(language: LanguageModel, prompt: str, ours: list[int], theirs: list[int]) -> bool:
    """Whether two completions part where two logits are closer than 1e-4."""
    place = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    row = language.tokenizer(prompt).input_ids
    reader = kv_cache.read_prompts(language.stepper, [row])
    for token in ours[:place]:
        reader.step([[token]])
    logits = reader.read_alone(0, 0)
    return abs(float(logits[ours[place]] - logits[theirs[place]])) < 1e-4


def test_greedy_is_that_of_transformers_with_and_without_padding(language):
    """Three hundred random prompts."""
    texts = prompts(300, 30, seed=4)
    found = genkit.generate(texts, model=language, strategy="greedy", max_new_tokens=16)
    theirs = [
        row
        for first in range(0, 300, 25)
        for row in by_transformers(language, texts[first : first + 25], max_new_tokens=16)
    ]
    flips = 0
    for text, record, expected in zip(texts, found, theirs, strict=True):
        if record.tokens != expected:
            flips += 1
            assert is_near_tie(language, text, record.tokens, expected)
    assert flips <= 3
    for text, record in zip(texts[:30], found, strict=False):
        assert record.tokens == by_transformers(language, [text], max_new_tokens=16)[0]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"early_stopping": True, "length_penalty": 0.5}, {}),
        ({"early_stopping": "never", "length_penalty": 2.0}, {}),
        ({"repetition_penalty": 1.3}, {}),
        ({"no_repeat_ngram": 2}, {"no_repeat_ngram_size": 2}),
        ({"min_new_tokens": 8}, {}),
    ],
)
def test_beams_are_those_of_transformers(language, ours, theirs):
    """Texts, all of the n best, and their scores."""
    options = {"num_beams": 4, "max_new_tokens": 10, "num_return_sequences": 3} | theirs
    options |= {k: v for k, v in ours.items() if k != "no_repeat_ngram"}
    for text in prompts(6, 20, seed=7):
        asked = {"strategy": "beam", "beams": 4, "n_best": 3, "max_new_tokens": 10}
        best = genkit.generate(text, model=language, **asked, **ours)
        found = [best, *best.alternatives]
        inputs = language.tokenizer(text, return_tensors="pt")
        output = language.model.generate(
            **inputs,
            do_sample=False,
            pad_token_id=0,
            output_scores=True,
            return_dict_in_generate=True,
            **options,
        )
        expected = by_transformers(language, [text], **options)
        assert [r.tokens for r in found] == expected
        scores = torch.tensor([r.score for r in found])
        assert torch.allclose(scores, output.sequences_scores, atol=1e-4)


def test_beams_of_many_prompts_are_those_of_each(language):
    texts = prompts(9, 25, seed=3)
    options = {"strategy": "beam", "beams": 3, "max_new_tokens": 12, "model": language}
    together = genkit.generate(texts, **options)
    for text, record in zip(texts, together, strict=True):
        assert genkit.generate(text, **options).tokens == record.tokens


def test_a_wide_beam_finds_the_best_of_all_texts():
    """Against every text of three letters, scored one by one."""
    language = small_model("gpt2")
    model, row = language.model, language.tokenizer("ab").input_ids
    record = genkit.generate(
        "ab", model=language, strategy="beam", beams=400, max_new_tokens=2, length_penalty=0.0
    )
    with torch.inference_mode():
        first = model(torch.tensor([row])).logits[0, -1].log_softmax(-1)
        rows = torch.tensor([[*row, token] for token in range(1, len(first))])
        second = model(rows).logits[:, -1].log_softmax(-1)
    best = max((first[1:, None] + second).max().item(), first[0].item())
    assert abs(record.score - best) < 1e-4


# ---- diverse beams


def diverse_reference(language, prompt, beams, groups, diversity, length):
    """Vijayakumar et al. 2018, algorithm 1, without cache or batch; no text ends."""
    row, size = language.tokenizer(prompt).input_ids, beams // groups
    kept = [[([], 0.0)] for _ in range(groups)]
    for _ in range(length):
        taken: list[int] = []
        for group in range(groups):
            options = []
            for tokens, total in kept[group]:
                ids = torch.tensor([row + tokens])
                with torch.inference_mode():
                    logs = language.model(ids).logits[0, -1].log_softmax(-1)
                for token, log in enumerate(logs.tolist()):
                    rank = total + log - diversity * taken.count(token)
                    options.append((rank, total + log, [*tokens, token]))
            best = sorted(options, key=lambda o: -o[0])[:size]
            kept[group] = [(tokens, total) for _, total, tokens in best]
            taken += [tokens[-1] for tokens, _ in kept[group]]
    return sorted((pair for group in kept for pair in group), key=lambda pair: -pair[1])


@pytest.mark.parametrize(("beams", "groups"), [(4, 2), (3, 3), (4, 1)])
def test_diverse_beams_are_those_of_the_paper(beams, groups):
    language = small_model("gpt2")
    language.model.generation_config.eos_token_id = None
    options = {"beams": beams, "groups": groups, "diversity": 0.7, "n_best": beams}
    for text in prompts(4, 10, seed=8):
        best = genkit.generate(
            text, model=language, strategy="diverse_beam", max_new_tokens=5, **options
        )
        expected = diverse_reference(language, text, beams, groups, 0.7, 5)
        found = [best, *best.alternatives]
        distinct = {tuple(tokens): total for tokens, total in expected}  # groups may agree
        assert [tuple(r.tokens) for r in found] == list(distinct)
        assert torch.allclose(
            torch.tensor([r.score for r in found]),
            torch.tensor([total / 5 for total in distinct.values()]),
            atol=1e-4,
        )


def test_groups_that_cost_enough_begin_differently(llama):
    best = genkit.generate(
        "abc",
        model=llama,
        strategy="diverse_beam",
        beams=4,
        groups=4,
        diversity=100.0,
        n_best=4,
        max_new_tokens=6,
    )
    assert len({r.tokens[0] for r in [best, *best.alternatives]}) == 4


# ---- contrastive search


def contrastive_reference(language, prompt, top_k, alpha, length):
    """Su et al. 2022, equation 5, each text read from its beginning."""
    row, start = language.tokenizer(prompt).input_ids, len(language.tokenizer(prompt).input_ids)
    for _ in range(length):
        with torch.inference_mode():
            logits = language.model(torch.tensor([row])).logits[0, -1]
            scores = []
            for p, token in zip(*logits.softmax(-1).topk(top_k), strict=True):
                ids = torch.tensor([[*row, int(token)]])
                states = language.model(ids, output_hidden_states=True).hidden_states[-1][0]
                states = torch.nn.functional.normalize(states, dim=-1)
                likeness = (states[:-1] @ states[-1]).max()
                scores.append(((1 - alpha) * p - alpha * likeness, int(token)))
        row = [*row, max(scores)[1]]
        if row[-1] == 0:
            break
    return row[start:]


@pytest.mark.slow
@pytest.mark.parametrize(("top_k", "alpha"), [(4, 0.6), (2, 0.3), (5, 1.0), (1, 0.6)])
def test_contrastive_search_is_that_of_the_paper(top_k, alpha):
    for name, text in itertools.product(("gpt2", "llama"), prompts(4, 12, seed=9)):
        language = small_model(name)
        options = {"strategy": "contrastive", "top_k": top_k, "alpha": alpha}
        found = genkit.generate(text, model=language, max_new_tokens=12, **options)
        assert found.tokens == contrastive_reference(language, text, top_k, alpha, 12)


def test_contrastive_search_never_takes_what_is_ruled_out():
    """Every token a candidate, and unlikeness all that counts."""
    language = small_model("gpt2")
    options = {"strategy": "contrastive", "top_k": 300, "alpha": 1.0, "model": language}
    for record in genkit.generate(
        prompts(4, 8, seed=3), min_new_tokens=20, max_new_tokens=20, no_repeat_ngram=1, **options
    ):
        assert len(set(record.tokens)) == 20 and 0 not in record.tokens


def test_contrastive_search_without_contrast_is_greedy(language):
    texts = prompts(8, 20, seed=5)
    options = {"model": language, "max_new_tokens": 20}
    plain = genkit.generate(texts, strategy="greedy", **options)
    contrastive = genkit.generate(texts, strategy="contrastive", alpha=0.0, **options)
    assert [r.tokens for r in plain] == [r.tokens for r in contrastive]


# ---- speculation


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "greedy"},
        {"strategy": "stochastic", "seed": 5},
        {"temperature": 0.6, "top_k": 6, "seed": 5},
        {"top_p": 0.8, "seed": 5, "repetition_penalty": 1.2, "stop": "ab"},
        {"strategy": "greedy", "no_repeat_ngram": 3, "bad_words": ["e"], "prefix": "ba"},
    ],
)
def test_guesses_change_no_text(llama, options):
    """Prompt lookup and a draft model, beyond the context of 64, in a batch of ragged rows."""
    texts = prompts(7, 40, seed=6)
    plain = genkit.generate(texts, model=llama, max_new_tokens=60, **options)
    draft = small_model("gpt2", context=38)  # shorter than some prompts
    for guess in ({"lookup": 1}, {"lookup": 6}, {"draft": draft}, {"draft": llama}):
        found = genkit.generate(texts, model=llama, max_new_tokens=60, **options, **guess)
        assert [(r.tokens, r.finish, r.seed) for r in found] == [
            (r.tokens, r.finish, r.seed) for r in plain
        ]


def test_right_guesses_save_steps(llama, monkeypatch):
    steps = 0
    whole = kv_cache.Tree.step

    def counted(self, tokens, chain=False):
        nonlocal steps
        steps += self.stepper is llama.stepper
        return whole(self, tokens, chain)

    monkeypatch.setattr(kv_cache.Tree, "step", counted)
    draft = small_model("llama")  # the same weights: all its guesses are right
    options = {"strategy": "stochastic", "seed": 1, "max_new_tokens": 36, "min_new_tokens": 36}
    genkit.generate("abc", model=llama, **options)
    alone, steps = steps, 0
    genkit.generate("abc", model=llama, draft=draft, **options)
    assert alone == 35 and steps <= 7


# ---- rules


@pytest.mark.parametrize("name", STRATEGIES)
def test_rules_hold_for_every_strategy(language, name):
    texts = prompts(6, 20, seed=1)
    common = {"model": language, "max_new_tokens": 24, **STRATEGIES[name]}
    free = genkit.generate(texts, **common)
    often = max(LETTERS, key=lambda c: sum(r.completion.count(c) for r in free))
    for record in genkit.generate(texts, bad_words=[often], **common):
        assert often not in record.completion
    for record in genkit.generate(texts, bad_words=often + "a", prefix="b", **common):
        assert record.completion.startswith("b")
    for record in genkit.generate(texts, stop=[often, "zz"], **common):
        assert often not in record.completion
        assert (record.finish == "stop") == (often in language.tokenizer.decode(record.tokens))
    late = {"stop": often, "min_new_tokens": 12}
    for record in genkit.generate(texts, **late, **common):
        text = language.tokenizer.decode(record.tokens)
        assert len(record.tokens) >= 12
        assert often not in text[11:-1]
        assert (record.finish == "stop") == (often in text[11:])
        assert record.completion == (text[:-1] if record.finish == "stop" else text)
    pieces = list(genkit.stream(texts, **late, **common))
    for piece in pieces:
        if piece.record:
            assert "".join(p.text for p in pieces if p.row == piece.row) == piece.record.completion
    for record in genkit.generate(texts, prefix="fed ", **common):
        assert record.completion.startswith("fed ")
    for record in genkit.generate(texts, no_repeat_ngram=2, **common):
        pairs = list(itertools.pairwise(record.tokens))
        assert len(set(pairs)) == len(pairs)


@pytest.mark.slow
def test_a_text_may_not_end_before_its_shortest_length(language):
    """The most likely token made the end token: it is always chosen, but not before."""
    settings = language.model.generation_config
    free = genkit.generate("abc", model=language, strategy="greedy", max_new_tokens=5)
    settings.eos_token_id = [free.tokens[0], 0]
    try:
        for options in STRATEGIES.values():
            record = genkit.generate("abc", model=language, min_new_tokens=5, **options)
            assert len(record.tokens) >= 5 and free.tokens[0] not in record.tokens[:4]
        ended = genkit.generate("abc", model=language, strategy="greedy")
        assert (ended.tokens, ended.finish) == (free.tokens[:1], "eos")
    finally:
        settings.eos_token_id = 0


def test_an_encoder_decoder_begins_and_ends_as_its_settings_force_it():
    language = encoder_decoder("bart")
    settings = language.model.generation_config
    settings.forced_bos_token_id, settings.forced_eos_token_id = 260, 0
    for options in ({"strategy": "greedy"}, {"strategy": "beam", "beams": 3}):
        record = genkit.generate("abc", model=language, max_new_tokens=7, **options)
        beams = {"num_beams": options.get("beams", 1)}
        assert [record.tokens] == by_transformers(language, ["abc"], max_new_tokens=7, **beams)
        assert record.tokens[0] == 260 and record.tokens[-1] == 0


def test_an_encoder_decoder_answers_and_cannot_be_guessed(tmp_path):
    language = encoder_decoder("t5")
    language.model.save_pretrained(tmp_path)
    lm.save_tokenizer(language.tokenizer, tmp_path)
    record = genkit.generate("abc", model=tmp_path, quantize="int8", strategy="greedy")
    assert record.text == record.completion and str(record) == record.completion
    with pytest.raises(ValueError, match="lookup: t5 is no decoder with full attention"):
        genkit.generate("abc", model=language, strategy="greedy", lookup=3)


def test_a_draft_must_have_the_same_tokens(llama):
    other = LanguageModel(llama.model, characters.make_tokenizer("xyz"), "other")
    with pytest.raises(ValueError, match="draft: other has other tokens than llama"):
        genkit.generate("abc", model=llama, draft=other)


# ---- streaming


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("stop", [(), ("ab", " d")])
def test_pieces_make_up_the_completion(language, name, stop):
    texts = prompts(4, 20, seed=2)
    options = {"model": language, "max_new_tokens": 30, "stop": stop, **STRATEGIES[name]}
    written, records = [""] * 4, {}
    for piece in genkit.stream(texts, **options):
        assert piece.row not in records
        written[piece.row] += str(piece)
        if piece.record:
            records[piece.row] = piece.record
    expected = genkit.generate(texts, **options)
    assert [records[i] for i in range(4)] == expected
    assert written == [r.completion for r in expected]


def test_pieces_come_while_the_text_is_written(llama):
    for name, least in {"greedy": 40, "sample": 40, "contrastive": 40, "beam": 2}.items():
        options = {"max_new_tokens": 40, "min_new_tokens": 40, **STRATEGIES[name]}
        assert len(list(genkit.stream("abc", model=llama, **options))) >= least


def test_a_piece_holds_back_what_more_tokens_could_change():
    assert generation._certain_part("one STO", ("STOP",)) == "one "
    assert generation._certain_part("one STOx", ("STOP",)) == "one STOx"
    assert generation._certain_part("a\n", ("\n\n", "b")) == "a"


def test_a_wrong_argument_of_a_stream_is_refused_at_once(llama):
    with pytest.raises(ValueError, match="temperature"):
        genkit.stream("abc", model=llama, temperature=-1)


# ---- looking into a beam


def test_a_trace_has_every_candidate(llama):
    trace, best = generation.trace_beams("abc", model=llama, beams=3, max_new_tokens=6)
    assert [r.tokens for r in [best]] == [
        genkit.generate("abc", model=llama, strategy="beam", beams=3, max_new_tokens=6).tokens
    ]
    lines, totals = [[]], [0.0]
    for step in trace:
        assert [c.total for c in step] == sorted((c.total for c in step), reverse=True)
        for c in step:
            assert abs(totals[c.parent] + c.log_probability - c.total) < 1e-4
        kept = [c for c in step if c.fate == "kept"]
        assert len(kept) == 3 and {c.fate for c in step} <= {"kept", "dropped", "finished"}
        lines = [[*lines[c.parent], c.token] for c in kept]
        totals = [c.total for c in kept]
    assert best.tokens in lines or best.finish == "eos"
