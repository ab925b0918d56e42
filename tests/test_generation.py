import dataclasses
import inspect
import random

import numpy as np
import pytest
import torch
from builders import LETTERS, small_model
from transformers import AutoModelForCausalLM

import genkit
from genkit.commands import common
from genkit.models import lm
from genkit.text import generation
from genkit.text.language_model import LanguageModel
from genkit.text.options import LOAD, MIN_P, GenerationOptions


@pytest.fixture(scope="module", params=["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def language(request) -> LanguageModel:
    return small_model(request.param)


def prompts(count: int, longest: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(LETTERS, k=rng.randint(1, longest))) for _ in range(count)]


def transformers_completion(language, prompt: str, **options) -> list[int]:
    ids = language.tokenizer(prompt, return_tensors="pt")
    output = language.model.generate(**ids, do_sample=False, **options)
    return output[0, ids.input_ids.shape[1] :].tolist()


def test_greedy_gives_the_tokens_of_transformers(language):
    asked = prompts(40, 30)
    found = genkit.generate(asked, model=language, strategy="greedy", max_new_tokens=20)
    for prompt, record in zip(asked, found, strict=True):
        expected = transformers_completion(language, prompt, max_new_tokens=20)
        assert record.tokens == expected


@pytest.mark.parametrize("beams", [pytest.param(1, marks=pytest.mark.slow), 2, 5])
@pytest.mark.parametrize("penalty", [0.0, pytest.param(1.0, marks=pytest.mark.slow), 2.0])
def test_beams_give_the_tokens_of_transformers(language, beams, penalty):
    for prompt in prompts(10, 20):
        options = {"beams": beams, "length_penalty": penalty, "max_new_tokens": 12}
        record = genkit.generate(prompt, model=language, strategy="beam", **options)
        expected = transformers_completion(
            language, prompt, num_beams=beams, length_penalty=penalty, max_new_tokens=12
        )
        assert record.tokens == expected


def test_beams_find_what_greedy_misses(language):
    for prompt in prompts(10, 20, seed=2):
        options = {"model": language, "max_new_tokens": 8}
        greedy = genkit.generate(prompt, strategy="greedy", **options)
        beam = genkit.generate(prompt, strategy="beam", beams=8, length_penalty=0.0, **options)
        assert beam.score >= greedy.score - 1e-4


@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "stochastic"},
        pytest.param(
            {"temperature": 1.3, "top_k": 10, "top_p": 0.9, "min_p": 0.01}, marks=pytest.mark.slow
        ),
        {"temperature": 0.7, "lookup": 4, "stop": "ab", "bad_words": "c"},
        pytest.param({"temperature": 0.7}, marks=pytest.mark.slow),
        pytest.param({"top_k": 5}, marks=pytest.mark.slow),
        pytest.param({"top_p": 0.8}, marks=pytest.mark.slow),
        pytest.param({"min_p": 0.1}, marks=pytest.mark.slow),
        pytest.param({"typical_p": 0.7}, marks=pytest.mark.slow),
        pytest.param(
            {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "no_repeat_ngram": 3},
            marks=pytest.mark.slow,
        ),
        pytest.param({"strategy": "greedy"}, marks=pytest.mark.slow),
    ],
)
def test_a_row_does_not_depend_on_its_batch(language, options):
    """Batches of 1, 7 and 64; prompts of different lengths, some outgrowing the context of 64."""
    asked = prompts(64, 60)
    greedy = options.get("strategy") == "greedy"
    seeds = [None if greedy else 1000 + 7 * i for i in range(len(asked))]
    common = {"model": language, "max_new_tokens": 16, **options}

    def in_batches_of(size: int) -> list[generation.Generation]:
        rows = []
        for first in range(0, len(asked), size):
            own = None if greedy else seeds[first : first + size]
            rows += genkit.generate(asked[first : first + size], seed=own, **common)
        return rows

    alone = in_batches_of(1)
    for size in (7, 64):
        for one, row in zip(alone, in_batches_of(size), strict=True):
            assert (one.tokens, one.seed, one.finish) == (row.tokens, row.seed, row.finish)
            assert np.allclose(one.log_probabilities, row.log_probabilities, atol=1e-4)


def test_an_int_seeds_row_i_with_seed_plus_i(language):
    options = {"model": language, "strategy": "stochastic"}
    rows = genkit.generate(["abc"] * 3, seed=5, **options)
    assert [row.seed for row in rows] == [5, 6, 7]
    assert len({row.completion for row in rows}) == 3
    assert genkit.generate("abc", seed=6, **options).tokens == rows[1].tokens


def test_seeds_may_come_from_numpy(language):
    rows = genkit.generate(["abc"] * 2, model=language, seed=np.array([5, 6]), stop=None)
    assert rows == genkit.generate(["abc"] * 2, model=language, seed=np.int64(5))


def test_without_a_seed_the_record_has_the_drawn_one(language):
    first, second = (genkit.generate("abc", model=language) for _ in range(2))
    assert first.seed != second.seed  # the texts may be equal: this model likes to repeat itself
    assert genkit.generate("abc", model=language, seed=first.seed) == first


def test_global_random_state_is_neither_read_nor_changed(language):
    def states():
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()

    torch.manual_seed(3)
    before = states()
    first = genkit.generate("abc", model=language, seed=1)
    assert states() == before
    torch.manual_seed(4)
    assert genkit.generate("abc", model=language, seed=1) == first


def test_beyond_the_context_the_later_half_goes_on():
    language = small_model("llama", context=8)
    record = genkit.generate("abcdefgh", model=language, strategy="greedy", max_new_tokens=30)
    text, start = language.tokenizer("abcdefgh").input_ids, 0
    for token in record.tokens:
        if len(text) - start > 8:
            start = len(text) - 4
        with torch.inference_mode():
            logits = language.model(torch.tensor([text[start:]])).logits[0, -1]
        assert logits[token] > logits.max() - 1e-4
        text.append(token)


def test_log_probabilities_are_the_models_own(language):
    record = genkit.generate("abc", model=language, temperature=0.5, max_new_tokens=10, seed=1)
    ids = torch.tensor([language.tokenizer(record.text).input_ids])
    with torch.inference_mode():
        logs = language.model(ids).logits[0].log_softmax(-1)
    expected = [logs[2 + i, token].item() for i, token in enumerate(record.tokens)]
    assert np.allclose(record.log_probabilities, expected, atol=1e-4)
    assert np.isclose(record.score, sum(expected), atol=1e-3)


def test_a_text_ends_at_eos_and_leaves_the_batch(language):
    model = language.model
    often = int(genkit.generate("abc", model=language, strategy="greedy").tokens[3])
    model.generation_config.eos_token_id = [often]
    try:
        rows = genkit.generate(prompts(20, 20), model=language, seed=0, max_new_tokens=30)
        for row in rows:
            assert often not in row.tokens[:-1]
            assert (row.tokens[-1] == often) == (row.finish == "eos")
            assert row.finish == "eos" or len(row.tokens) == 30
        assert {row.finish for row in rows} >= {"eos"}
        for row in rows:
            alone = genkit.generate(row.prompt, model=language, seed=row.seed, max_new_tokens=30)
            assert alone.tokens == row.tokens
    finally:
        model.generation_config.eos_token_id = 0


# ---- the default, and what a record says of it


def test_the_default_cuts_off_what_is_unlikely(language):
    texts, options = prompts(8, 20), {"model": language, "max_new_tokens": 12, "seed": 1}
    plain = genkit.generate(texts, **options)
    assert plain == genkit.generate(texts, min_p=MIN_P, **options)
    assert plain[0].options == {"strategy": "sample", "max_new_tokens": 12, "min_p": MIN_P}
    assert "'min_p'" in repr(plain[0])


@pytest.mark.parametrize("given", [{"temperature": 1}, {"top_p": 1.0}])
def test_a_given_filter_replaces_the_default(language, given):
    texts, options = prompts(8, 20), {"model": language, "max_new_tokens": 12, "seed": 1}
    found = genkit.generate(texts, **given, **options)
    whole = genkit.generate(texts, strategy="stochastic", **options)
    assert [row.tokens for row in found] == [row.tokens for row in whole]
    assert found[0].options == {"strategy": "sample", "max_new_tokens": 12} | given


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7, "top_k": 5, "stop": "a", "repetition_penalty": 1.2},
        {"strategy": "greedy", "lookup": 3, "bad_words": ["b"]},
        {"strategy": "beam", "n_best": 2},
        {"strategy": "diverse_beam", "groups": 4},
        {"strategy": "contrastive", "prefix": "ab"},
    ],
)
def test_the_options_of_a_record_repeat_its_text(language, options):
    record = genkit.generate("abc", model=language, max_new_tokens=12, **options)
    seed = {} if record.seed is None else {"seed": record.seed}
    again = genkit.generate(record.prompt, model=language, **seed, **record.options)
    assert again == record
    common.print_json(record)


def test_texts_that_may_outgrow_the_context_are_warned_of_once(caplog):
    language = small_model("llama", context=16)
    language.name = "a short one"
    for _ in range(2):
        genkit.generate("abc", model=language, max_new_tokens=14, strategy="greedy")
    assert caplog.text == ""
    for _ in range(2):
        genkit.generate("abc", model=language, max_new_tokens=15, strategy="greedy")
    assert caplog.text.count("the context of a short one, 16 tokens") == 1


# ---- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature must be above 0, got 0; .*greedy"),
        ({"temperature": -1.0}, "temperature must be above 0, got -1.0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": 0}, "top_k must be 1 or more, got 0"),
        ({"strategy": "beam", "beams": 0}, "beams must be 1 or more, got 0"),
        ({"strategy": "greedy", "temperature": 0.5}, "temperature=0.5 is for strategy='sample'"),
        ({"strategy": "beam", "top_p": 0.5}, "top_p=0.5 is for strategy='sample'"),
        ({"strategy": "stochastic", "top_k": 5}, "top_k=5 is for strategy='sample'"),
        ({"beams": 3}, "beams=3 is for strategy='beam' or 'diverse_beam', not for 'sample'"),
        ({"strategy": "greedy", "seed": 1}, "seed=1 is for strategy='sample' or 'stochastic'"),
        ({"strategy": "beam", "lookup": 3}, "lookup=3 is for"),
        ({"strategy": "beam", "groups": 2}, "groups=2 is for strategy='diverse_beam'"),
        ({"strategy": "diverse_beam", "beams": 3}, "3 beams do not divide into 2 groups"),
        ({"strategy": "beam", "n_best": 5}, "n_best must be at most beams=4, got 5"),
        ({"strategy": "beam", "early_stopping": "soon"}, "early_stopping must be True"),
        ({"strategy": "contrastive", "alpha": 1.5}, "alpha must be 0 or more and at most 1"),
        ({"min_p": 0}, "min_p must be above 0 and at most 1, got 0"),
        ({"typical_p": 2}, "typical_p must be above 0 and at most 1, got 2"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0, got 0.0"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty must be finite, got inf"),
        ({"no_repeat_ngram": 0}, "no_repeat_ngram must be 1 or more"),
        ({"min_new_tokens": 300}, "min_new_tokens must be between 0 and max_new_tokens=200"),
        ({"stop": ""}, "stop: an empty string"),
        ({"bad_words": ["a", ""]}, "bad_words: an empty string"),
        ({"bad_words": ["b"], "prefix": "abc"}, "bad_words: 'b' is in the prefix"),
        ({"prefix": "abc", "max_new_tokens": 2}, "prefix: 3 tokens are more than max_new_tokens=2"),
        ({"prefix": "\u20ac"}, "prefix: .* never seen '\u20ac'"),
        ({"lookup": 3, "draft": "x"}, "lookup=3 and draft are both guesses"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16' is for loading"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number, got 2.5"),
        ({"model": "x", "dtype": "int4"}, "dtype must be one of"),
        ({"model": "x", "quantize": "int2"}, "quantize must be 'int8' or 'int4', got 'int2'"),
        ({"model": "x", "quantize": "int8", "dtype": "bfloat16"}, "both precisions"),
        ({"model": "x", "dtype": "float16"}, "dtype='float16' is for a GPU"),
        ({"strategy": "best"}, "strategy must be one of"),
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more"),
        ({"seed": [1, 2]}, "2 seeds for 1 prompts"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"seed": 1.5}, "seed must be a whole number, or one a prompt, got 1.5"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": 5}, "prompt must be a text, a list of texts or a chat, got 5"),
        ({"prompt": None}, "prompt must be a text, a list of texts or a chat, got None"),
        ({"prompt": b"ab"}, "prompt must be a text, a list of texts or a chat, got b'ab'"),
        ({"prompt": ["ab", 5]}, r"prompt\[1\] must be a text, got 5"),
        ({"prompt": "a\ud800"}, "prompt is not valid Unicode"),
        ({"stop": ["a", "\ud800"]}, "stop is not valid Unicode"),
        ({"bad_words": "\ud800"}, "bad_words is not valid Unicode"),
        ({"prefix": "\ud800"}, "prefix is not valid Unicode"),
        ({"min_new_tokens": -1}, "min_new_tokens must be 0 or more, got -1"),
        ({"prompt": ["a", "a" * 99]}, r"prompt\[1\]: 99 tokens are more"),
        ({"stop": 5}, "stop must be a text or a list of texts, got 5"),
        ({"bad_words": ["a", 5]}, "bad_words must be a text or a list of texts"),
        ({"prefix": 5}, "prefix must be a text, got 5"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"temperature": 1e-45}, "temperature must be 1e-30 or more, got 1e-45"),
        ({"max_new_tokens": None}, "max_new_tokens must be a whole number, got None"),
        ({"top_k": True}, "top_k must be a whole number, got True"),
        ({"repetition_penalty": 1e9}, "repetition_penalty must be from 1e-06 to 1e.06, got"),
        ({"strategy": "beam", "length_penalty": 1e3}, "length_penalty must be from -20 to 20"),
        ({"prompt": "a" * 65}, "65 tokens are more than the model's context of 64"),
        ({"prompt": "a\u20acb"}, "never seen '\u20ac'"),
    ],
)
def test_bad_arguments_are_named(language, options, message):
    with pytest.raises(ValueError, match=message):
        genkit.generate(**({"prompt": "abc", "model": language} | options))


def test_signatures_have_every_option_with_its_type_and_default():
    verbs = [inspect.signature(verb).parameters for verb in (genkit.generate, genkit.stream)]
    assert list(verbs[0].values()) == list(verbs[1].values())
    options = dataclasses.fields(GenerationOptions)
    assert list(verbs[0]) == ["prompt", "model", *LOAD, *(option.name for option in options)]
    for option in options:
        assert verbs[0][option.name].annotation == option.type
        assert verbs[0][option.name].default == option.default
    with pytest.raises(TypeError, match="temprature"):
        genkit.generate("abc", temprature=1.0)


def test_a_missing_model_says_what_would_do(tmp_path):
    with pytest.raises(ValueError, match=r"cannot load .*genkit train charlm"):
        genkit.generate("abc", model=tmp_path / "nothing")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "llama"
    language = small_model("llama")
    language.model.save_pretrained(path)
    lm.save_tokenizer(language.tokenizer, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"quantize": "int8"}])
def test_lower_precisions_write_nearly_as_well(folder, options):
    """Log-probabilities of texts that float32 wrote, under a model that is packed."""
    exact, rough = genkit.load(folder), genkit.load(folder, **options)
    assert genkit.load(folder, **options) is rough is not exact
    records = genkit.generate(prompts(8, 20), model=exact, max_new_tokens=30, seed=1)
    for record in records:
        line = exact.tokenizer(record.prompt).input_ids
        found = []
        for token in record.tokens:
            found.append(rough.stepper.read_alone(line).log_softmax(-1)[token].item())
            line = [*line, token]
        difference = np.abs(np.array(found) - record.log_probabilities)
        assert 0 < difference.mean() < 0.05
    for strategy in ("greedy", "beam", "contrastive", "stochastic"):
        text = genkit.generate("abc", model=folder, strategy=strategy, **options).text
        assert text.startswith("abc")


def test_changed_weights_are_seen(language):
    """Packed weights are copies: they are made again."""
    packed = LanguageModel(language.model, language.tokenizer, "packed", "int8")
    embeddings = language.model.get_input_embeddings().weight
    matrices = [p for p in language.model.parameters() if p.ndim > 1 and p is not embeddings]

    def written() -> list[float]:
        record = genkit.generate("abc", model=packed, strategy="greedy", max_new_tokens=8)
        return record.log_probabilities

    def turn() -> None:
        with torch.no_grad():
            for matrix in matrices:
                matrix.neg_()

    before = written()
    turn()
    turned = written()
    turn()
    assert not np.allclose(turned, before, atol=1e-3) and np.allclose(written(), before)


def test_models_that_would_run_code_or_leave_the_folder_are_refused(tmp_path):
    language = small_model("llama")
    language.model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    lm.save_tokenizer(language.tokenizer, tmp_path / "shards")
    assert genkit.generate("abc", model=tmp_path / "shards", seed=1).text.startswith("abc")
    index = tmp_path / "shards" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../model-00001"))
    with pytest.raises(ValueError, match="outside its folder"):
        genkit.generate("abc", model=tmp_path / "shards")

    canary = tmp_path / "canary"
    language.model.config.save_pretrained(tmp_path / "pickle")
    lm.save_tokenizer(language.tokenizer, tmp_path / "pickle")
    import pickle

    class Attack:
        def __reduce__(self):
            return (type(canary).touch, (canary,))

    (tmp_path / "pickle" / "pytorch_model.bin").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(ValueError, match="holds no weights in safetensors"):
        genkit.generate("abc", model=tmp_path / "pickle")
    assert not canary.exists()


def test_a_retrained_folder_is_read_again(tmp_path):
    language = small_model("llama")
    lm.save_tokenizer(language.tokenizer, tmp_path)
    language.model.save_pretrained(tmp_path)
    first = genkit.load(tmp_path)
    assert genkit.load(tmp_path) is first
    torch.manual_seed(9)
    lm.make_model("llama", len(language.tokenizer), 64, 2, 32, 2, 0.0).save_pretrained(tmp_path)
    second = genkit.load(tmp_path)
    assert not torch.equal(first.model.lm_head.weight, second.model.lm_head.weight)


@pytest.mark.slow
def test_the_folder_is_an_ordinary_model(trained):
    model = AutoModelForCausalLM.from_pretrained(trained)
    assert sum(p.numel() for p in model.parameters()) > 1000
