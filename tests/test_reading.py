import random

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from genkit.engine import decoder, kernels, private_ops
from genkit.engine import packed as packing
from genkit.text import kv_cache

SMALL = {"vocab_size": 97, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 48,
}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 48,
    "decoder_start_token_id": 0,
    "forced_eos_token_id": None,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}

MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=48, **SMALL)
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, **SMALL)),
    "mistral, with a sliding window": lambda: MistralForCausalLM(
        MistralConfig(sliding_window=8, **LLAMA, **SMALL)
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(sliding_window=None, **LLAMA, **SMALL)),
    "mamba, without a cache of keys": lambda: MambaForCausalLM(
        MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, **SMALL)
    ),
    "bloom": lambda: BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=2, **SMALL)),
    "t5": lambda: T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **T5, **SMALL)),
    "bart": lambda: BartForConditionalGeneration(BartConfig(**BART, **SMALL)),
}


def make(name: str):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)
    return model


def random_prompts(rng: random.Random, count: int, longest: int) -> list[list[int]]:
    return [[rng.randrange(1, 97) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def worst(reader) -> float:
    """How far the logits are from those of every branch read by itself."""
    texts = [(i, b) for i, lines in enumerate(reader.lines) for b in range(len(lines))]
    return max((reader.logits[i, b] - reader.read_alone(i, b)).abs().max().item() for i, b in texts)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_texts_that_grow_branch_and_end_are_read_as_if_alone(name):
    """A random walk through steps, branches, chains and endings, twice beyond the context."""
    model, rng = make(name), random.Random(0)
    prompts = random_prompts(rng, 5, 20)
    reader = kv_cache.read_prompts(decoder.Stepper(model, "float32"), [*prompts, list(prompts[2])])
    assert isinstance(reader, kv_cache.Tree) == (name in ("gpt2", "llama", "mistral"))
    assert worst(reader) < 1e-4
    for step in range(90):
        width = len(reader.lines[0])
        reader.step([[rng.randrange(1, 97) for _ in range(width)] for _ in reader.lines])
        if step % 3 == 0:
            count = rng.randint(1, 3)
            reader.branch([[rng.randrange(width) for _ in range(count)] for _ in reader.lines])
        if step in (20, 40):
            reader.keep([0, 2, len(reader.lines) - 1] if step == 20 else [1])
        if isinstance(reader, kv_cache.Tree) and step % 7 == 0:
            chain(reader, rng)
        if step % 4 == 0 or step > 80:
            assert worst(reader) < 1e-4


@pytest.mark.parametrize("name", ["bloom", "mistral"])
def test_a_step_reads_only_the_new_token(name):
    """Whatever the model's forward calls its keys and values."""
    model, widths = make(name), []
    reader = kv_cache.read_prompts(decoder.Stepper(model, "float32"), [[5, 6, 7]])
    model.register_forward_pre_hook(
        lambda _, __, options: widths.append(options["input_ids"].shape[1]), with_kwargs=True
    )
    for token in (3, 4, 5):
        reader.step([[token]])
    assert widths == [1, 1, 1]


def chain(reader: kv_cache.Tree, rng: random.Random) -> None:
    """Read a few tokens at once, all of which but a random beginning is forgotten."""
    reader.branch([[0] for _ in reader.lines])
    width = min(4, reader.room)
    if width > 0:
        before = [lines[0] for lines in reader.lines]
        tokens = [[rng.randrange(1, 97) for _ in range(width)] for _ in reader.lines]
        reader.step(tokens, chain=True)
        assert worst(reader) < 1e-4
        kept = [rng.randrange(width) for _ in reader.lines]
        reader.branch([[k] for k in kept])
        for line, own, tail, k in zip(reader.lines, before, tokens, kept, strict=True):
            assert line == [own + tail[: k + 1]]


def test_steps_can_be_taken_back():
    model, rng = make("llama"), random.Random(1)
    reader = kv_cache.Tree(decoder.Stepper(model, "float32"), random_prompts(rng, 3, 10))
    lines, logits = [[list(line) for line in own] for own in reader.lines], reader.logits.clone()
    mark = reader.mark(5)
    for _ in range(5):
        reader.step([[rng.randrange(97)] for _ in range(3)])
    reader.back_to(mark)
    assert reader.lines == lines and torch.equal(reader.logits, logits)
    reader.step([[5], [6], [7]])
    assert worst(reader) < 1e-4


def test_the_pool_does_not_grow_by_what_nobody_sees():
    """Thirty steps of eight branches of which one survives: 30 live places, not 240."""
    reader = kv_cache.Tree(decoder.Stepper(make("gpt2"), "float32"), [[1, 2, 3]])
    for _ in range(30):
        reader.branch([[0] * 8])
        reader.step([[1] * 8])
        reader.branch([[3]])
    assert reader._keys[0].shape[2] <= 2 * kv_cache.BLOCK
    assert worst(reader) < 1e-4


# ---- packed matrices


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bart"])
@pytest.mark.parametrize(
    ("precision", "near"), [("float32", 1e-5), ("bfloat16", 0.04), ("int8", 0.06)]
)
def test_packed_models_compute_nearly_the_same(monkeypatch, name, precision, near):
    monkeypatch.setattr(packing, "WORTHWHILE", 1)
    model = make(name)
    packed = packing.pack(model, precision)
    ids = torch.randint(1, 97, (3, 9), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(1)
    with torch.inference_mode():
        exact, found = model(**inputs).logits, packed(**inputs).logits
    assert 0 < (found - exact).std() / exact.std() < near or precision == "float32"
    assert (found - exact).std() / exact.std() < near
    layers = [layer for layer in packed.modules() if isinstance(layer, packing.PackedLinear)]
    assert len(layers) > 8
    assert all(a is b for a, b in zip(shared(model), shared(packed), strict=True))


def shared(model) -> list[torch.Tensor]:
    return [p for n, p in model.named_parameters() if "norm" in n or "ln_" in n or "embed" in n]


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_a_row_of_a_packed_product_does_not_depend_on_the_others(precision):
    """Bit for bit: one scale a row, and sums of integers, or of few enough numbers, are exact."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(70, 50, generator=generator)
    bias = torch.randn(70, generator=generator)
    layer = packing.PackedLinear(weight, bias, precision)
    x = torch.randn(64, 50, generator=generator) * torch.rand(64, 1, generator=generator) * 100
    alone = torch.cat([layer(row[None]) for row in x])
    assert torch.equal(layer(x), alone)
    exact = torch.nn.functional.linear(x, weight, bias)
    assert ((alone - exact).norm(dim=1) / exact.norm(dim=1)).max() < 0.02


@pytest.mark.skipif(not kernels.available(), reason="installed without a compiler")
@pytest.mark.parametrize("make_product", [packing.by_row, packing.by_many_rows])
def test_int8_is_the_arithmetic_it_says(make_product):
    """Products of 8 bits, which are for CPUs with VNNI, against integer sums in float64."""
    if make_product is packing.by_row and not private_ops.has_vnni():
        pytest.skip("FBGEMM clips on this CPU")
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(40, 30, generator=generator), torch.randn(50, 30, generator=generator)
    bias = torch.randn(40, generator=generator)
    scale, largest = weight.abs().amax(1) / 127, x.abs().amax(1, keepdim=True)
    levels = (weight / scale[:, None]).round().double(), (x / largest * 127).round().double()
    expected = levels[1] @ levels[0].T * scale * largest / 127 + bias
    found = make_product(weight, bias)(x)
    assert torch.allclose(found.double(), expected, atol=1e-4)
    assert torch.allclose(make_product(weight, None)(x) + bias, found)
