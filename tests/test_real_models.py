"""Verbs of text on a language model with real weights, and its fine-tuning."""

import json
import math
from pydoc_data.topics import topics

import pytest
import torch
from builders import run_here

import genkit
from genkit.text import language_model

pytestmark = [pytest.mark.real, pytest.mark.timeout(7200)]
PROMPTS = [
    f"{start} {subject}"
    for start in ("The history of", "Once upon a time,", "In summary,", "Dear reader,", "Why does")
    for subject in (
        *("the sea", "a small town", "music", "the old king", "mathematics"),
        *("my neighbour", "winter", "the first train", "bread", "an honest answer"),
    )
]
NEAR = 1e-3  # logits closer than this may be ordered by rounding
TEXT = topics["exceptions"] + topics["assignment"]


@pytest.fixture(scope="module")
def language(real_model):
    return language_model.load_language_model(real_model("smollm2"))


def ids(language, text: str) -> torch.Tensor:
    return torch.tensor([language.tokenizer(text).input_ids])


def log_probabilities(language, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return language.model(torch.tensor([tokens])).logits[0].log_softmax(-1)


def test_greedy_texts_are_those_of_transformers(language):
    rows = genkit.generate(PROMPTS, model=language, strategy="greedy", max_new_tokens=24)
    ties = 0
    for prompt, record in zip(PROMPTS, rows, strict=True):
        inputs = ids(language, prompt)
        output = language.model.generate(inputs, do_sample=False, max_new_tokens=24)
        expected = output[0, inputs.shape[1] :].tolist()
        if record.tokens != expected:
            ties += 1
            pairs = zip(record.tokens, expected, strict=False)
            same = next(i for i, (own, other) in enumerate(pairs) if own != other)
            last = log_probabilities(language, inputs[0].tolist() + expected[:same])[-1]
            assert abs(last[record.tokens[same]] - last[expected[same]]) < NEAR, prompt
    assert ties <= 2


def test_texts_of_four_beams_are_those_of_transformers(language):
    options = {"max_new_tokens": 16, "min_new_tokens": 16}
    beams = {"strategy": "beam", "beams": 4}
    rows = genkit.generate(PROMPTS, model=language, **options, **beams)
    ties = 0
    for prompt, record in zip(PROMPTS, rows, strict=True):
        inputs = ids(language, prompt)
        output = language.model.generate(inputs, do_sample=False, num_beams=4, **options)
        expected = output[0, inputs.shape[1] :].tolist()
        if record.tokens != expected:  # it may keep another text where two were equally likely
            ties += 1
            logs = log_probabilities(language, inputs[0].tolist() + expected[:-1])
            total = logs[inputs.shape[1] - 1 :].gather(1, torch.tensor(expected)[:, None]).sum()
            assert abs(record.score - total / len(expected)) < NEAR, prompt
    assert ties <= 2


def test_perplexity_is_that_of_a_plain_computation(language):
    tokens = language.tokenizer(TEXT).input_ids[:1500]
    text = language.tokenizer.decode(tokens)
    assert language.tokenizer(text).input_ids == tokens
    logs = log_probabilities(language, tokens[:-1]).double()
    nats = -logs.gather(1, torch.tensor(tokens[1:])[:, None]).mean().item()
    record = genkit.perplexity(text, model=language)
    assert record.tokens_scored == len(tokens) - 1
    assert math.isclose(record.perplexity, math.exp(nats), rel_tol=1e-6)


def test_alternatives_and_beams_are_words_that_a_reader_knows(language):
    record = genkit.alternatives("The capital of France is Paris.", model=language)
    assert "".join(span.text for span in record.spans).endswith("capital of France is Paris.")
    likely = [choice for span in record.spans if span.text == " Paris" for choice in span.choices]
    assert likely[0].rank == 1
    tree = genkit.beam_tree("The capital of France is", model=language, max_new_tokens=3)
    assert "Paris" in tree.best.completion


def test_fine_tuning_by_lora_lowers_the_loss_of_held_out_text(real_model, tmp_path):
    (tmp_path / "text.txt").write_text(topics["formatstrings"] + topics["specialnames"])
    folder = tmp_path / "run"
    words = "--lora_rank 8 --context 128 --batch_size 4 --max_steps 20 --evaluations 2 --compile no"
    model, text = real_model("smollm2"), tmp_path / "text.txt"
    sources = ("--init_from", model, "--text", text, "--output_dir", folder)
    run_here("finetune_gpt2", *sources, *words.split())
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["val_loss"] for line in log if "val_loss" in line]
    assert losses[-1] < losses[0] - 0.1
    tuned = genkit.generate("The ", model=folder, strategy="greedy", max_new_tokens=8)
    assert tuned.completion
