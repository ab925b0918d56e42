import math
import os
import random
import socket
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import BloomConfig, BloomForCausalLM

from genkit.data import character_corpus, characters
from genkit.models import lm
from genkit.text import perplexity as module
from genkit.text.language_model import LanguageModel
from genkit.text.perplexity import PerplexityMetric, perplexity

LETTERS = "abcdefghijklmnop .\n"
CONTEXT = 16


def small_model(architecture: str, context: int = CONTEXT) -> LanguageModel:
    """A random model whose predictions differ from token to token and depend on what was read."""
    torch.manual_seed(1)
    tokenizer = characters.make_tokenizer(LETTERS)
    model = lm.make_model(architecture, len(tokenizer), context, 2, 32, 2, 0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    return LanguageModel(model.eval(), tokenizer, architecture)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def language(request) -> LanguageModel:
    return small_model(request.param)


def some_text(length: int, seed: int = 0) -> str:
    return "".join(random.Random(seed).choices(LETTERS, k=length))


def ids_of(language, text: str) -> torch.Tensor:
    return torch.tensor(language.tokenizer(text).input_ids)


@torch.inference_mode()
def loss_of_transformers(model, ids: torch.Tensor) -> float:
    return model(input_ids=ids[None], labels=ids[None]).loss.item()


@torch.inference_mode()
def token_by_token(language, text: str, stride: int) -> float:
    """Mean loss, every token predicted by itself from what the window that scores it holds."""
    ids, losses = ids_of(language, text), []
    for place in range(1, len(ids)):
        start = 0
        while start + CONTEXT < place:  # the first window that reaches the token scores it
            start += stride
        logits = language.model(ids[None, start:place]).logits[0, -1]
        losses.append(-logits.log_softmax(-1)[ids[place]].item())
    return float(np.mean(losses))


@torch.inference_mode()
def loop_of_the_documentation(model, ids: torch.Tensor, window: int, stride: int) -> float:
    """The loop of transformers' page, with the tokens that were scored counted exactly."""
    total, count, before = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        labels = ids[begin:end].clone()
        labels[: before - begin] = -100
        scored = int((labels[1:] != -100).sum())
        loss = model(input_ids=ids[None, begin:end], labels=labels[None]).loss
        total, count, before = total + loss.item() * scored, count + scored, end
        if end == len(ids):
            break
    return total / count


# ---- the figure


@pytest.mark.parametrize("length", [2, 3, CONTEXT - 1, CONTEXT])
def test_one_window_is_the_loss_of_transformers(language, length):
    text = some_text(length)
    expected = loss_of_transformers(language.model, ids_of(language, text))
    for stride in (None, 1, CONTEXT):
        record = perplexity(text, model=language, stride=stride)
        assert record.nats_per_token == pytest.approx(expected, abs=1e-5)
        assert record.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
        assert record.tokens_scored == length - 1


@pytest.mark.slow
@pytest.mark.parametrize("stride", [1, 2, 5, 8, 15, 16])
def test_windows_are_a_token_by_token_reading(language, stride):
    for length in (15, 16, 17, 18, 31, 32, 33, 34, 70):
        text = some_text(length, seed=length)
        found = perplexity(text, model=language, stride=stride)
        assert found.nats_per_token == pytest.approx(
            token_by_token(language, text, stride), abs=1e-5
        )
        assert found.tokens_scored == length - 1


def test_without_a_stride_windows_do_not_overlap(language):
    text = some_text(100)
    whole = perplexity(text, model=language)
    assert whole == perplexity(text, model=language, stride=CONTEXT)
    assert whole.stride == whole.context == CONTEXT


@pytest.mark.parametrize("stride", [1, 3, 8, 16])
def test_the_protocol_is_that_of_the_documentation_with_windows_one_longer(stride):
    language = small_model("llama")  # whose positions have no end
    for length in (10, 17, 18, 40, 65):
        text = some_text(length, seed=length)
        expected = loop_of_the_documentation(
            language.model, ids_of(language, text), CONTEXT + 1, stride
        )
        found = perplexity(text, model=language, stride=stride)
        assert found.nats_per_token == pytest.approx(expected, abs=1e-5)


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary_is_large(language):
    nothing = small_model(language.name)
    with torch.no_grad():
        nothing.model.get_output_embeddings().weight.zero_()
    record = perplexity([some_text(50), "ab"], model=nothing, stride=7)
    size = len(nothing.tokenizer)
    assert record.perplexity == pytest.approx(size, rel=1e-6)
    assert record.bits_per_character == pytest.approx(50 * math.log2(size) / 52, rel=1e-6)


def test_a_model_without_a_limit_reads_a_text_whole():
    torch.manual_seed(0)
    tokenizer = characters.make_tokenizer(LETTERS)
    config = BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=1, n_head=2)
    language = LanguageModel(BloomForCausalLM(config).eval(), tokenizer, "bloom")
    text = some_text(50)
    record = perplexity([text, text[:20]], model=language)
    first, second = (
        loss_of_transformers(language.model, ids_of(language, t)) for t in (text, text[:20])
    )
    assert record.nats_per_token == pytest.approx((49 * first + 19 * second) / 68, abs=1e-5)
    assert record.context == 50
    strided = perplexity([text, text[:20]], model=language, stride=512)
    assert strided.nats_per_token == record.nats_per_token


def window_facts(length: int, context: int, stride: int) -> dict[int, int]:
    """How many tokens are read before each token that is scored."""
    read: dict[int, int] = {}
    for inputs, targets in module._windows(torch.arange(length), context, stride):
        assert 1 <= len(inputs) == len(targets) <= context
        for i, target in enumerate(targets.tolist()):
            assert target in (inputs[i].item() + 1, module.UNSCORED)
            if target != module.UNSCORED:
                assert target not in read
                read[target] = i + 1
    assert list(read) == list(range(1, length))
    return read


@given(st.integers(2, 80), st.integers(1, 20), st.data())
def test_every_token_is_scored_once_and_smaller_strides_read_no_less(length, context, data):
    stride = data.draw(st.integers(1, context))
    read = window_facts(length, context, stride)
    assert all(count >= min(place, context - stride + 1) for place, count in read.items())
    smaller = data.draw(st.integers(1, stride))
    closer = window_facts(length, context, smaller)
    assert min(list(closer.values())[context:], default=0) >= min(
        list(read.values())[context:], default=0
    )
    if stride % smaller == 0:
        assert all(closer[place] >= read[place] for place in read)
    exact = window_facts(length, context, 1)
    assert exact == {place: min(place, context) for place in range(1, length)}


# ---- several documents, batches


def documents() -> list[str]:
    return [some_text(length, seed=length) for length in (2, 50, 7, 16, 17, 33, 3, 120)]


@pytest.mark.parametrize("stride", [None, 1, 5])
def test_documents_together_are_documents_alone(language, stride):
    together = perplexity(documents(), model=language, stride=stride)
    alone = [perplexity(text, model=language, stride=stride) for text in documents()]
    nats = sum(each.nats_per_token * each.tokens_scored for each in alone)
    assert together.tokens_scored == sum(each.tokens_scored for each in alone)
    assert together.nats_per_token == pytest.approx(nats / together.tokens_scored, abs=1e-5)
    assert together.characters == sum(map(len, documents()))
    assert together.documents == len(documents())


@pytest.mark.parametrize(("name", "value"), [("ROWS", 1), ("ROWS", 3), ("LOGITS", 1)])
def test_batches_are_windows_one_by_one(language, name, value, monkeypatch):
    whole = perplexity(documents(), model=language, stride=5)
    monkeypatch.setattr(module, name, value)
    apart = perplexity(documents(), model=language, stride=5)
    assert whole.nats_per_token == pytest.approx(apart.nats_per_token, abs=1e-5)


def test_global_random_state_is_neither_read_nor_changed(language):
    torch.manual_seed(3)
    before = torch.get_rng_state().tolist()
    first = perplexity(documents(), model=language)
    assert torch.get_rng_state().tolist() == before
    torch.manual_seed(4)
    assert perplexity(documents(), model=language) == first


# ---- characters, bytes, start tokens


def test_unknown_characters_are_scored_as_bytes(language):
    text = "abc €🙂é abc"
    record = perplexity(text, model=language)
    assert record.characters == len(text) == 11
    assert record.tokens_scored == 8 + 3 + 4 + 2 - 1
    bits = record.nats_per_token * record.tokens_scored / math.log(2)
    assert record.bits_per_character == pytest.approx(bits / 11, rel=1e-12)
    assert record.bits_per_byte == pytest.approx(bits / 17, rel=1e-12)
    expected = token_by_token(language, text, CONTEXT)
    assert record.nats_per_token == pytest.approx(expected, abs=1e-5)


def test_a_start_token_has_the_first_token_scored():
    language = small_model("gpt2")
    language.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", special_tokens=[(characters.EOS, 0)]
    )
    text = some_text(10)
    record = perplexity(text, model=language)
    ids = ids_of(language, text)
    assert ids[0] == 0 and len(ids) == 11
    assert record.tokens_scored == record.characters == 10
    assert record.nats_per_token == pytest.approx(
        loss_of_transformers(language.model, ids), abs=1e-5
    )
    assert perplexity("a", model=language).tokens_scored == 1


def test_the_text_is_named_by_the_hash_of_its_bytes(tmp_path, language):
    texts = ["first é\r\n", "second"]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_bytes(text.encode())
    several = perplexity(texts, model=language)
    assert several.text_sha256 == character_corpus.survey_corpus(str(tmp_path)).sha256
    one = perplexity(texts[0], model=language)
    assert one.text_sha256 == character_corpus.survey_corpus(str(tmp_path / "0.txt")).sha256


def test_it_prints_every_figure_and_its_protocol(language):
    half = LanguageModel(
        small_model(language.name).model.to(torch.bfloat16), language.tokenizer, "half"
    )
    record = perplexity(["abc def", "ab"], model=half, stride=4)
    written = str(record)
    for part in (
        f"perplexity {record.perplexity:.4g}:",
        f"{record.nats_per_token:.4f} nats a token",
        f"{record.bits_per_character:.4f} bits a character",
        f"{record.bits_per_byte:.4f} a byte",
        "7 tokens scored of 9 characters in 2 documents",
        record.text_sha256[:12],
        "half in bfloat16, vocabulary 276, context 16, stride 4",
    ):
        assert part in written


# ---- the recipe's figure


def test_the_default_stride_is_the_protocol_of_training(language):
    for length in (17, 33, 40, 500):
        text = some_text(length, seed=length)
        ids = np.array(language.tokenizer(text).input_ids, dtype=np.uint16)
        windows = range(math.ceil((length - 1) / CONTEXT))
        nats, count = lm.total_loss(language.model, ids, CONTEXT, windows).tolist()
        record = perplexity(text, model=language)
        assert record.tokens_scored == count
        assert record.nats_per_token == pytest.approx(nats / count, abs=1e-5)
        of_the_recipe = nats / count / math.log(2)
        counted = length / (length - 1)  # the first character is not scored
        assert record.bits_per_character * counted == pytest.approx(of_the_recipe, abs=1e-5)


@pytest.mark.slow
def test_a_trained_folder_has_the_figures_of_its_card(trained, text_file):
    text = text_file.read_text()
    record = perplexity(text[int(len(text) * 0.9) :], model=trained)
    rows = [line.split("|") for line in (trained / "README.md").read_text().splitlines()]
    card = {row[1].strip(): row[2] for row in rows if len(row) == 4}
    assert record.nats_per_token == pytest.approx(float(card["val_loss"]), abs=1e-4)
    bits = record.bits_per_character * record.characters / record.tokens_scored
    assert bits == pytest.approx(float(card["bits_per_character"]), abs=1e-4)


# ---- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": ""}, "text is empty"),
        ({"text": []}, r"text: \[\]"),
        ({"text": "a"}, "text: 'a' "),
        ({"text": ["abc", ""]}, r"text\[1\] is empty"),
        ({"text": ["abc", "b", "abc"]}, r"text\[1\]: 'b'"),
        ({"text": ["abc", None]}, r"text\[1\] must be a text, got None"),
        ({"text": b"abc"}, r"text\[0\] must be a text, got 97"),
        ({"text": "ab\ud83d"}, r"text is .*\\ud83d"),
        ({"stride": 0}, "stride must be 1 or more, got 0"),
        ({"stride": -3}, "stride must be 1 or more, got -3"),
        ({"stride": CONTEXT + 1}, "stride must be at most the model's context of 16, got 17"),
        ({"model": "no/such/model"}, "model: cannot load"),
    ],
)
def test_bad_arguments_are_named(language, options, message):
    with pytest.raises(ValueError, match=message):
        perplexity(**({"text": "abc", "model": language} | options))


def test_a_model_in_training_mode_is_refused():
    language = small_model("gpt2")
    language.model.train()
    with pytest.raises(ValueError, match=r"model: gpt2 is in training mode; call eval\(\)"):
        perplexity("abc", model=language)


# ---- evaluate


def no_network(*address):
    raise AssertionError(f"the network was asked for {address}")


def test_the_metric_is_the_function(tmp_path, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", no_network)
    language = small_model("llama")
    expected = asdict(perplexity(documents(), model=language, stride=5))
    metric = PerplexityMetric(cache_dir=str(tmp_path))
    assert metric.compute(predictions=documents(), model=language, stride=5) == expected
    metric.add_batch(predictions=documents()[:3])
    metric.add_batch(predictions=documents()[3:-1])
    metric.add(prediction=documents()[-1])
    assert metric.compute(model=language, stride=5) == expected
    in_memory = PerplexityMetric(cache_dir=str(tmp_path / "m"), keep_in_memory=True)
    assert in_memory.compute(predictions=documents(), model=language, stride=5) == expected
    assert not list(tmp_path.rglob("*.arrow"))


def test_the_metric_refuses_by_name_and_goes_on(tmp_path):
    language = small_model("llama")
    metric = PerplexityMetric(cache_dir=str(tmp_path))
    for predictions, message in (([], r"text: \[\]"), (["abc", "a"], r"text\[1\]: 'a'")):
        with pytest.raises(ValueError, match=message):
            metric.compute(predictions=predictions, model=language)
    found = metric.compute(predictions=["abc"], model=language)
    assert found == asdict(perplexity(["abc"], model=language))


def test_two_metrics_at_once_keep_their_texts_apart(tmp_path):
    language = small_model("llama")
    first, second = (PerplexityMetric(cache_dir=str(tmp_path)) for _ in range(2))
    first.add_batch(predictions=["abc"])
    second.add_batch(predictions=["ponm"])
    first.add(prediction="def")
    assert second.compute(model=language) == asdict(perplexity(["ponm"], model=language))
    assert first.compute(model=language) == asdict(perplexity(["abc", "def"], model=language))


SCRIPT = """
import pathlib, sys, time
from genkit.text.perplexity import PerplexityMetric
folder, model, mine, other = sys.argv[1:]
metric = PerplexityMetric(cache_dir=folder)
metric.add_batch(predictions=[mine * 5])
pathlib.Path(folder, mine).touch()
while not pathlib.Path(folder, other).exists():  # both hold texts now
    time.sleep(0.05)
metric.add_batch(predictions=[mine * 9])
for _ in range(5):
    print(metric.compute(model=model)["text_sha256"])
    metric.add_batch(predictions=[mine * 5, mine * 9])
"""


@pytest.mark.slow
def test_two_processes_at_once_keep_their_texts_apart(tmp_path):
    language = small_model("llama")
    folder = tmp_path / "model"
    language.model.save_pretrained(folder)
    lm.save_tokenizer(language.tokenizer, folder)
    pairs = (("ab", "cd"), ("cd", "ab"))
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", SCRIPT, tmp_path, folder, *pair],
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for pair in pairs
    ]
    for (mine, _), process in zip(pairs, started, strict=True):
        output, _ = process.communicate(timeout=120)
        expected = perplexity([mine * 5, mine * 9], model=language).text_sha256
        assert process.returncode == 0
        assert output.split() == [expected] * 5


def test_importing_genkit_imports_neither_torch_nor_evaluate():
    code = "import sys, genkit; assert not {'torch', 'evaluate', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
