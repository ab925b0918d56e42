"""The compiled kernels: what they compute, for every kind of matrix and of CPU that runs here."""

import functools
import os
import random
import threading

import pytest
import torch
from builders import small_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

import genkit
from genkit.engine import kernels
from genkit.engine.decoder import Stepper
from genkit.engine.kernels import Choice, Matrix, embed, multiply, pack_matrix
from genkit.engine.quantized import QuantizedLinear, count_quantized, quantize_model
from genkit.models import lm
from genkit.text import explain, kv_cache, perplexity
from genkit.text.logits import Filters
from genkit.text.strategies import Completion, Rules, TokenSampler, sample

pytestmark = pytest.mark.skipif(not kernels.available(), reason="installed without a compiler")

KINDS = tuple(kernels.KINDS)
SHAPES = [(1, 1), (5, 7), (8, 32), (13, 100), (64, 96), (70, 33)]  # (outputs, inputs)
NEAR = {"float32": 0.0, "bfloat16": 2**-8, "int8": 1 / 254, "int4": 1 / 15}  # of the largest weight


@pytest.fixture(params=kernels._native.list_targets() if kernels.available() else [])
def target(request):
    """Every kind of kernels that this CPU runs."""
    before = kernels._native.target()
    kernels._native.use_target(request.param)
    yield request.param
    kernels._native.use_target(before)


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unpacked(matrix: Matrix) -> torch.Tensor:
    return embed(matrix, torch.arange(matrix.shape[0]))


# ---- matrices


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_packed_matrix_is_near_the_weights(target, kind, shape):
    """Half a step of a group's rounding, or a step where a line was fitted; scales are float16."""
    weight = some(*shape)
    error = (unpacked(pack_matrix(weight, None, kind)) - weight).abs()
    groups = torch.nn.functional.pad(weight, (0, -shape[1] % 32)).unflatten(1, (-1, 32))
    spread = groups.amax(-1) - groups.amin(-1) if kind == "int4" else groups.abs().amax(-1)
    allowed = (spread * NEAR[kind] * 1.02 + 1e-3 * (kind == "int4")).repeat_interleave(32, 1)
    assert (error <= allowed[:, : shape[1]]).all()


@pytest.mark.parametrize("width", [32, 96])
def test_four_bits_are_nearer_than_between_the_extremes(target, width):
    """In the sum of squares, in every group: by a tenth in all."""
    groups = some(64, width).unflatten(1, (-1, 32))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    steps, low = ((high - low) / 15).half().float(), low.half().float()
    plain = low + ((groups - low) / steps).round().clamp(0, 15) * steps
    ours = unpacked(pack_matrix(groups.flatten(1), None, "int4")).unflatten(1, (-1, 32))
    a, b = ((own - groups).square().sum(-1) for own in (ours, plain))
    assert (a <= b * 1.0001).all() and a.sum() < 0.9 * b.sum()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_transposed_matrix_is_packed_the_same(target, kind):
    """As GPT-2 keeps its matrices."""
    weight = some(50, 70)
    turned = weight.t().contiguous().t()
    assert turned.stride() != weight.stride()
    assert torch.equal(
        unpacked(pack_matrix(turned, None, kind)), unpacked(pack_matrix(weight, None, kind))
    )


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_what_has_so_few_levels_is_packed_exactly(target, kind):
    """Weights that were quantised before are not changed."""
    once = unpacked(pack_matrix(some(24, 96), None, kind))
    assert torch.equal(unpacked(pack_matrix(once, None, kind)), once)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [9, 41])
def test_products_are_those_of_the_packed_weights(target, kind, shape, rows):
    """Against float64; inputs are rounded to 16 bits in groups where weights are integers."""
    weight, bias, x = some(*shape), some(shape[0], seed=1), some(rows, shape[1], seed=2)
    matrix = pack_matrix(weight, bias, kind)
    found = multiply(matrix, x)
    exact = x.double() @ unpacked(matrix).double().T + bias.double()
    size = x.abs().double() @ unpacked(matrix).abs().double().T + 1
    assert ((found - exact).abs() / size).max() < (1e-4 if kind in ("int8", "int4") else 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_depends_on_nothing_else(target, kind):
    """Bit for bit: neither on other rows, nor on threads."""
    matrix, x = pack_matrix(some(70, 100), some(70), kind), some(23, 100, seed=1)
    together, threads = multiply(matrix, x), torch.get_num_threads()
    alone = torch.cat([multiply(matrix, row[None]) for row in x])
    try:
        torch.set_num_threads(3)
        shared = multiply(matrix, x)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(together, alone) and torch.equal(together, shared)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_is_not_hidden(target, kind):
    matrix = pack_matrix(some(8, 64), None, kind)
    for value in (torch.nan, torch.inf):
        x = some(2, 64)
        x[1, 40] = value
        found = multiply(matrix, x)
        assert found[0].isfinite().all() and not found[1].isfinite().any()


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros(target, kind):
    assert not multiply(pack_matrix(torch.zeros(9, 40), None, kind), some(3, 40)).any()
    assert not multiply(pack_matrix(some(9, 40), None, kind), torch.zeros(3, 40)).any()


@pytest.mark.parametrize("width", [1, 8, 50])
def test_rows_of_8_bits(target, width):
    """Half a step from the numbers; zeros stay zeros, and what is not finite is not hidden."""
    x = some(6, width) * torch.tensor([1e-9, 1.0, 1e9, 0.0, 1.0, 1.0])[:, None]
    x[4, -1], x[5, 0] = torch.nan, -torch.inf
    levels, scales = kernels.round_rows(x)
    error = (levels[:4] * scales[:4, None] - x[:4]).abs()
    assert (error <= x[:4].abs().amax(1, keepdim=True) / 253).all()
    assert levels[:3].abs().amax(1).tolist() == [127, 127, 127] and not levels[3].any()
    assert not scales[4:].isfinite().any()
    sums = torch.arange(-6 * width, 6 * width, dtype=torch.int32).view(6, 2 * width)
    outputs, bias = some(2 * width, seed=1), some(2 * width, seed=2)
    scaled = kernels.scale_sums(sums, scales, outputs, bias)
    assert torch.allclose(scaled[:4], (sums * scales[:, None] * outputs + bias)[:4])
    assert not scaled[4:].isfinite().any()
    assert torch.equal(kernels.scale_sums(sums, scales, outputs, None)[3], torch.zeros(2 * width))


def test_a_token_outside_of_the_vocabulary_is_an_error():
    matrix = pack_matrix(some(9, 40), None, "int8")
    for token in (-1, 9):
        with pytest.raises(IndexError, match=str(token)):
            embed(matrix, torch.tensor([0, token]))


# ---- decoders

SMALL = {"vocab_size": 97, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
LLAMA = {"hidden_size": 36, "intermediate_size": 50, "max_position_embeddings": 48} | SMALL
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 2}
LONG = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0}
LONG |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_head=3, n_embd=42, n_positions=48, **SMALL)
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, **HEADS)),
    "llama, tied, of other rotations": lambda: LlamaForCausalLM(
        LlamaConfig(tie_word_embeddings=True, rope_parameters=LONG, **LLAMA, **HEADS)
    ),
    "llama, with biases": lambda: LlamaForCausalLM(
        LlamaConfig(attention_bias=True, mlp_bias=True, head_dim=10, **LLAMA, **HEADS)
    ),
}


def make(name: str):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 0.5))
    return model


def stock(model) -> Stepper:
    """The same steps by transformers."""
    stepper = Stepper(model, "float32")
    stepper.native = None
    return stepper


def walk(reader: kv_cache.Tree, seed: int) -> list[torch.Tensor]:
    """Grow and branch at random; return the logits after every step."""
    rng, found = random.Random(seed), [reader.logits]
    for step in range(20):
        width = len(reader.lines[0])
        found.append(reader.step([[rng.randrange(97) for _ in range(width)] for _ in reader.lines]))
        if step % 3 == 0:
            reader.branch([[rng.randrange(width) for _ in range(3)] for _ in reader.lines])
        if step == 10:
            reader.branch([[0] for _ in reader.lines])
            tokens = [[rng.randrange(97) for _ in range(4)] for _ in reader.lines]
            found.append(reader.step(tokens, chain=True))
            reader.branch([[2] for _ in reader.lines])
    return found


PROMPTS = [[5, 6, 7], list(range(1, 30)), [3]]


@pytest.mark.parametrize("name", MODELS)
def test_steps_are_those_of_the_stock_model(target, name):
    model = make(name)
    assert Stepper(model, "float32").native is not None
    ours = walk(kv_cache.Tree(Stepper(model, "float32"), PROMPTS), 0)
    theirs = walk(kv_cache.Tree(stock(model), PROMPTS), 0)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < 1e-4 * b.std()


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("name", MODELS)
def test_a_quantised_model_is_the_same_by_steps_and_whole(target, name, kind):
    """By the kernels alone, and by transformers with quantised layers."""
    model = make(name)
    count = sum(p.numel() for p in model.parameters())
    quantize_model(model, kind)
    assert sum(p.numel() for p in model.parameters()) + count_quantized(model) == count
    assert sum(isinstance(layer, QuantizedLinear) for layer in model.modules()) > 8
    ours = walk(kv_cache.Tree(Stepper(model, kind), PROMPTS), 0)
    theirs = walk(kv_cache.Tree(stock(model), PROMPTS), 0)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < 1e-3 * b.std()


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("name", MODELS)
def test_a_text_does_not_depend_on_its_batch(target, name, kind):
    """Bit for bit, as reading it alone."""
    stepper = Stepper(make(name), kind)
    reader = kv_cache.Tree(stepper, PROMPTS)
    for token in (4, 5):
        reader.step([[token]] * 3)
        reader.branch([[0, 0]] * 3)
        reader.step([[1, 2]] * 3)
        for text in range(3):
            for branch in range(2):
                alone = reader.read_alone(text, branch)
                assert torch.equal(reader.logits[text, branch], alone)
        reader.branch([[1]] * 3)


# ---- many steps in one call


def write_all(reader: kv_cache.Tree, draw: TokenSampler, singly: bool) -> list[Completion]:
    """The completions; singly: by a guess that is always empty, which many steps do not take."""
    found: dict[int, Completion] = {}
    propose = (lambda texts, lines: [[] for _ in texts]) if singly else None
    for text, (completion,) in sample(reader, draw, propose):
        found[text] = completion
    return [found[text] for text in range(len(found))]


DRAWS = [Filters(), Filters(min_p=0.1), Filters(temperature=0.4), Filters(1.7, min_p=0.02)]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", ["float32", "int8"])
@pytest.mark.parametrize("filters", [None, *DRAWS], ids=str)
def test_many_steps_at_once_are_those_one_by_one(target, name, kind, filters):
    """Past the end of the context, with tokens that end texts, and rows that leave the batch."""
    stepper = Stepper(make(name), kind)
    rules = Rules(longest=90, shortest=3, ends=frozenset(range(12)))
    seeds = None if filters is None else (3, 4, 5)
    draw = TokenSampler(rules, filters or Filters(), seeds, tuple(map(len, PROMPTS)))
    many, one = (
        write_all(kv_cache.Tree(stepper, PROMPTS), draw, singly) for singly in (False, True)
    )
    assert many == one  # tokens, log-probabilities and why each ends, to the last bit


def test_many_steps_stop_where_the_kernels_may_not_decide():
    stepper = Stepper(make("llama"), "float32")
    reader = kv_cache.Tree(stepper, PROMPTS[:1])
    choice = functools.partial(Choice, temperature=1.0, min_p=0.0, near=1e-3)
    assert reader.write(9, choice(None, ends=frozenset(range(97))))[0] == [[]]
    level = -reader.logits[0].expand(1, 9, 97)  # all tokens are equally likely with this noise
    assert reader.write(9, choice(level.contiguous(), ends=frozenset()))[0] == [[]]
    first = int(reader.logits.argmax())
    tokens, logits = reader.write(9, choice(None, ends=frozenset()))
    assert len(tokens[0]) == len(logits) > 2 and tokens[0][0] == first
    assert reader.lines[0][0] == PROMPTS[0] + tokens[0]
    assert (reader.logits[0, 0] - reader.read_alone(0, 0)).abs().max() < 1e-3


def test_many_steps_do_not_leave_their_room():
    reader = kv_cache.Tree(Stepper(make("llama"), "float32"), PROMPTS)
    assert reader.steps_at_once() == 48 - len(PROMPTS[1])
    with pytest.raises(IndexError):
        reader.write(48, Choice(None, 1.0, 0.0, 1e-3, frozenset()))


def test_a_head_that_shares_the_weights_of_the_embedding_keeps_its_bias():
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = PhiConfig(num_attention_heads=4, tie_word_embeddings=True, **shape, **SMALL)
    model, ids = PhiForCausalLM(config).eval(), torch.tensor([[3, 4, 5]])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.nn.init.normal_(model.lm_head.bias, std=10)
    count = sum(p.numel() for p in model.parameters())
    with torch.inference_mode():
        before = model(ids).logits
        quantize_model(model, "int8")
        after = model(ids).logits
    assert (after - before).abs().max() < 0.1 and before.abs().max() > 10
    assert sum(p.numel() for p in model.parameters()) + count_quantized(model) == count


def test_a_quantised_model_of_another_kind_is_not_copied():
    other = LlamaForCausalLM(LlamaConfig(hidden_act="gelu", **LLAMA, **HEADS)).eval()
    quantize_model(other, "int8")
    stepper = Stepper(other, "int8")
    assert stepper.native is None and stepper.model is other
    reader = kv_cache.Tree(stepper, PROMPTS)
    reader.step([[7]] * 3)
    assert (reader.logits[1, 0] - reader.read_alone(1, 0)).abs().max() < 1e-3


def test_hidden_states_are_those_of_the_stock_model():
    model = make("llama")
    ours, theirs = (
        kv_cache.Tree(s, PROMPTS, hidden=True) for s in (Stepper(model, "float32"), stock(model))
    )
    for reader in (ours, theirs):
        reader.step([[7]] * 3)
    for a, b in zip(ours.hidden, theirs.hidden, strict=True):
        assert (a - b).abs().max() < 1e-4


def test_models_that_the_kernels_do_not_know_are_left_to_transformers():
    model = make("llama")
    model.model.layers[0].mlp.up_proj = torch.nn.Sequential(model.model.layers[0].mlp.up_proj)
    model.model.layers[0].mlp.up_proj.weight = torch.zeros(2, 2)  # a layer of somebody's own
    assert Stepper(model, "float32").native is None
    model = make("llama")
    model.model.layers[1].mlp = type("Mine", (type(model.model.layers[1].mlp),), {})(model.config)
    assert Stepper(model, "float32").native is None
    other = LlamaForCausalLM(LlamaConfig(hidden_act="gelu", **LLAMA, **HEADS)).eval()
    assert Stepper(other, "float32").native is None
    assert Stepper(make("llama").double(), "float32").native is None


def test_a_step_outside_of_the_context_is_an_error():
    stepper = Stepper(make("gpt2"), "float32")
    keys, values = ([torch.zeros(1, 3, 4, 14) for _ in range(2)] for _ in range(2))
    seen = torch.ones(1, 1, 4, dtype=torch.bool)

    def step(token: int, position: int, slot: int) -> None:
        numbers = (torch.tensor([[n]]) for n in (token, position, slot))
        stepper(*numbers, seen, keys, values, kept=1)

    step(96, 47, 3)
    for wrong in ((97, 0, 0), (-1, 0, 0), (0, 48, 0), (0, 0, 4)):
        with pytest.raises(IndexError):
            step(*wrong)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_every_verb_of_text_runs_on_a_quantised_model(tmp_path, kind):
    """As near to float32 as the weights are."""
    language = small_model("llama")
    language.model.save_pretrained(tmp_path)
    lm.save_tokenizer(language.tokenizer, tmp_path)
    exact, rough = genkit.load(tmp_path), genkit.load(tmp_path, quantize=kind)
    assert repr(rough).split(":")[1].split(",")[:2] == repr(exact).split(":")[1].split(",")[:2]
    before, after = (perplexity.perplexity("abc abc bca" * 5, model=m) for m in (exact, rough))
    assert (before.dtype, after.dtype) == ("float32", kind)
    assert after.perplexity == pytest.approx(before.perplexity, rel=0.3)
    assert explain.next_tokens("abc", model=rough)
    for strategy in ("greedy", "stochastic", "beam", "contrastive"):
        record = genkit.generate(["abc", "b"], model=rough, strategy=strategy, max_new_tokens=5)
        assert len(record) == 2


# ---- threads and processes


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def test_calls_from_several_threads_at_once(two_threads):
    matrix, x = pack_matrix(some(200, 300), None, "int8"), some(5, 300)
    expected, wrong = multiply(matrix, x), []

    def work() -> None:
        for _ in range(50):
            if not torch.equal(multiply(matrix, x), expected):
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_threads_of_its_own(two_threads):
    """A fork copies no threads: waiting for them would last for ever."""
    matrix, x = pack_matrix(some(200, 300), None, "int8"), some(5, 300)
    expected = multiply(matrix, x)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(multiply(matrix, x), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
