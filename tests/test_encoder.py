"""Encoders run by packed matrices, without padding: the logits of the stock models."""

import pytest
import torch
from readers import random_reader
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    CamembertConfig,
    CamembertForQuestionAnswering,
    DistilBertConfig,
    DistilBertForQuestionAnswering,
    ElectraConfig,
    ElectraForQuestionAnswering,
    LlamaConfig,
    LlamaForQuestionAnswering,
    RobertaConfig,
    RobertaForQuestionAnswering,
    XLMRobertaConfig,
    XLMRobertaForQuestionAnswering,
)

import genkit
from genkit.engine.encoder import SpanEncoder
from genkit.qa.reader import load_reader

CLOSE = {"float32": 1e-5, "bfloat16": 0.1, "int8": 0.3}  # of the deviation of logits


def worst(ours, theirs, mask):
    """The largest difference where there are tokens, in standard deviations."""
    both = zip(ours, theirs, strict=True)
    return max(float(((a - b)[mask > 0].abs().max()) / b[mask > 0].std()) for a, b in both)


SMALL = {"vocab_size": 99, "num_hidden_layers": 2, "max_position_embeddings": 70}
MODELS = {
    "bert": (BertConfig, BertForQuestionAnswering),
    "camembert": (CamembertConfig, CamembertForQuestionAnswering),
    "electra": (ElectraConfig, ElectraForQuestionAnswering),
    "roberta": (RobertaConfig, RobertaForQuestionAnswering),
    "xlm-roberta": (XLMRobertaConfig, XLMRobertaForQuestionAnswering),
}


def network(kind, size=48, **settings):
    """A model with random weights and four heads, which matter to its answer."""
    torch.manual_seed(0)
    if kind == "distilbert":
        small = {"vocab_size": 99, "n_layers": 2, "max_position_embeddings": 70}
        shape = {"dim": size, "n_heads": 4, "hidden_dim": 2 * size}
        model = DistilBertForQuestionAnswering(DistilBertConfig(**small, **shape, **settings))
    else:
        config, head = MODELS[kind]
        shape = {"hidden_size": size, "num_attention_heads": 4, "intermediate_size": 2 * size}
        model = head(config(**SMALL, **shape, **settings))
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.weight.mul_(4)
                layer.bias.normal_()
    return model.eval()


def windows(*sizes, seed=0, typed=False):
    """Windows of random tokens, padded to the longest."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(sizes)
    ids = torch.randint(5, 99, (len(sizes), longest), generator=generator)
    mask = (torch.arange(longest) < torch.tensor(sizes)[:, None]).long()
    inputs = {"input_ids": ids, "attention_mask": mask}
    types = {"token_type_ids": (torch.arange(longest) > 3).long().expand_as(ids)}
    return inputs | types if typed else inputs


KINDS = ["distilbert", *MODELS]


@pytest.mark.parametrize("precision", CLOSE)
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_rows_without_padding_are_the_stock_models(kind, precision):
    """Windows of any length, the full one of the model included."""
    model = network(kind)
    encoder = SpanEncoder(model, precision)
    assert encoder._unpadded
    full = 70 - encoder._first
    for sizes in ((9,), (11, 3, 1), (64, 20, 31), (full, full - 1), (7, 2)):
        for typed in (False, True)[: 1 + (kind in ("bert", "electra"))]:
            inputs = windows(*sizes, typed=typed)
            stock, found = model(**inputs), encoder(inputs)
            both = found, (stock.start_logits, stock.end_logits)
            assert worst(*both, inputs["attention_mask"]) < CLOSE[precision]
            assert all(x.shape == inputs["input_ids"].shape for x in found)


@pytest.mark.parametrize("size", [20, 36, 44])
@torch.inference_mode()
def test_heads_have_any_size(size):
    """5, 9 and 11, none a multiple of what a vector holds."""
    model, inputs = network("distilbert", size), windows(17, 9, 12)
    stock = model(**inputs)
    for precision, close in CLOSE.items():
        found = SpanEncoder(model, precision)(inputs)
        stocks = stock.start_logits, stock.end_logits
        assert worst(found, stocks, inputs["attention_mask"]) < close


@pytest.mark.parametrize("precision", CLOSE)
@pytest.mark.parametrize("kind", ["distilbert", "bert", "roberta"])
@torch.inference_mode()
def test_a_window_depends_on_nothing_else(kind, precision):
    """Bit for bit: neither on other windows, nor on their order, nor on threads."""
    encoder = SpanEncoder(network(kind, 64), precision)
    sizes = (33, 5, 64, 7, 12, 41)
    inputs, threads = windows(*sizes), torch.get_num_threads()
    together = torch.stack(encoder(inputs))
    for row, size in enumerate(sizes):
        alone = {name: x[row : row + 1, :size] for name, x in inputs.items()}
        assert torch.equal(torch.stack(encoder(alone))[:, 0], together[:, row, :size])
    backwards = {name: x.flip(0) for name, x in inputs.items()}
    assert torch.equal(torch.stack(encoder(backwards)).flip(1), together)
    try:
        torch.set_num_threads(3)
        assert torch.equal(torch.stack(encoder(inputs)), together)
    finally:
        torch.set_num_threads(threads)


@torch.inference_mode()
def test_other_models_are_read_with_padding():
    """A layer of somebody else's, and a kind that is not known to need none."""
    model, inputs = network("distilbert"), windows(9, 4)

    class Own(torch.nn.Linear):
        pass

    layer = model.distilbert.transformer.layer[0].ffn
    own = Own(layer.lin1.in_features, layer.lin1.out_features)
    own.load_state_dict(layer.lin1.state_dict())
    layer.lin1 = own
    other = LlamaForQuestionAnswering(
        LlamaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    ).eval()
    for each in (model, other):
        encoder = SpanEncoder(each, "float32")
        stock = each(**inputs)
        both = encoder(inputs), (stock.start_logits, stock.end_logits)
        assert not encoder._unpadded and worst(*both, inputs["attention_mask"]) < 1e-5


def test_weights_that_changed_are_read_again():
    reader = random_reader("cased")
    before = genkit.answer("a", "the cat sat on the mat", model=reader)
    with torch.no_grad():
        reader.model.qa_outputs.weight.mul_(0.0)
    after = genkit.answer("a", "the cat sat on the mat", model=reader)
    assert before.score > after.score


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"quantize": "int8"}, {}])
def test_a_precision_is_that_of_the_loaded(tmp_path, options):
    reader = random_reader("cased")
    with torch.no_grad():
        for layer in reader.model.distilbert.transformer.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.weight.mul_(5)  # that it matters how they are multiplied
    reader.model.save_pretrained(tmp_path)
    reader.tokenizer.save_pretrained(tmp_path)
    question, context = "who?", "the cat sat on the mat, and the dog looked on"
    exact = genkit.answer(question, context, model=reader)
    found = genkit.answer(question, context, model=tmp_path, **options)
    assert found.score == pytest.approx(exact.score, rel=0.5 if options else 1e-5)
    assert (abs(found.score - exact.score) > 1e-7) == bool(options)
    with pytest.raises(ValueError, match="the model given is loaded"):
        genkit.answer(question, context, model=load_reader(tmp_path), dtype="bfloat16")
