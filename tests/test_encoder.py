"""Encoders run by packed matrices and compiled: the same answers, whichever runs."""

import pytest
import torch
import torch.nn.functional as F
from readers import random_reader

import genkit
from genkit.engine import compiled as compiling
from genkit.engine import packed as packing
from genkit.engine.encoder import SpanEncoder, _low_attention
from genkit.qa.reader import load_reader

CLOSE = {"float32": 1e-5, "bfloat16": 0.1, "int8": 0.3}  # of logits whose deviation is about 4


def batch(reader, windows, tokens, seed=0):
    """Random tokens, the first window whole and the others padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, len(reader.tokenizer), (windows, tokens), generator=generator)
    sizes = torch.randint(1, tokens + 1, (windows, 1), generator=generator)
    sizes[0] = tokens
    mask = (torch.arange(tokens) < sizes).long()
    inputs = {"input_ids": ids, "attention_mask": mask}
    if reader.model.config.to_dict().get("type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = (torch.arange(tokens) > tokens // 2).long().repeat(windows, 1)
    return inputs


def worst(ours, theirs, mask):
    """The largest difference where there are tokens, in standard deviations."""
    both = zip(ours, theirs, strict=True)
    return max(float(((a - b)[mask > 0].abs().max()) / b[mask > 0].std()) for a, b in both)


@torch.inference_mode()
def check(reader, encoder, precision):
    for windows, tokens in ((1, 9), (3, 11), (2, 64), (7, 2), (1, 1)):
        inputs = batch(reader, windows, tokens)
        stock = reader.model(**inputs)
        logits = encoder(inputs)
        if tokens > 2:
            far = worst(logits, (stock.start_logits, stock.end_logits), inputs["attention_mask"])
            assert far < CLOSE[precision], (windows, tokens, far)
        assert all(x.shape == (windows, tokens) for x in logits)


@pytest.mark.parametrize("precision", CLOSE)
@pytest.mark.parametrize("kind", ["cased", "uncased", "bytes"])
def test_packed_matrices_compute_the_same(kind, precision, monkeypatch):
    monkeypatch.setattr(packing, "WORTHWHILE", 1)  # these matrices are small
    reader = random_reader(kind)
    encoder = SpanEncoder(reader.model, precision, False, kind == "uncased")
    packed = [m for m in encoder._packed.modules() if isinstance(m, packing.PackedLinear)]
    assert len(packed) == 12 and {m.precision for m in packed} == {precision}  # 6 a layer
    check(reader, encoder, precision)


@pytest.mark.parametrize("keys", [1, 2, 4])
def test_attention_is_torchs_own(keys):
    """In bfloat16, padded, with several queries a key."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, heads, 9, 8) for heads in (4, keys, keys))
    seen = torch.arange(9) < torch.tensor([9, 4, 1])[:, None]
    mask = torch.zeros(3, 1, 9, 9).masked_fill(~seen[:, None, None], -1e30)
    ours, _ = _low_attention(torch.nn.Module(), q, k, v, mask)
    k, v = (x.repeat_interleave(4 // keys, 1) for x in (k, v))
    exact = F.scaled_dot_product_attention(q, k, v, mask)
    assert (ours - exact.transpose(1, 2)).abs().max() < 0.03


def compiled(kind, precision, folder, monkeypatch):
    """An encoder that compiles when it has hardly begun."""
    monkeypatch.setenv("GENKIT_CACHE", str(folder))
    reader = random_reader(kind)
    with monkeypatch.context() as now:
        now.setattr(compiling, "READYING", 0.0)
        now.setattr(compiling, "COMPILING", 0.0)
        choice = True if precision == "float32" else None
        encoder = SpanEncoder(reader.model, precision, choice, kind == "uncased")
        with torch.inference_mode():
            for _ in range(3):
                encoder(batch(reader, 2, 8))
    assert encoder._run is not None
    return reader, encoder


@pytest.mark.slow
def test_a_compiled_encoder_computes_the_same_at_every_shape(tmp_path, monkeypatch):
    """One artefact for any batch and length; kept in the cache, made once, for all siblings."""
    reader, encoder = compiled("uncased", "int8", tmp_path, monkeypatch)
    check(reader, encoder, "int8")
    (path,) = (tmp_path / "compiled").iterdir()
    stamp = path.stat().st_mtime_ns
    sibling = random_reader("uncased")
    with torch.no_grad():
        for parameter in sibling.model.bert.encoder.parameters():
            parameter.mul_(0.9)
    check(sibling, SpanEncoder(sibling.model, "int8", True, True), "int8")
    assert [p.stat().st_mtime_ns for p in path.parent.iterdir()] == [stamp]


@pytest.mark.slow
@pytest.mark.parametrize("precision", CLOSE)
@pytest.mark.parametrize("kind", ["cased", "uncased", "bytes"])
def test_every_encoder_compiles(kind, precision, tmp_path, monkeypatch):
    check(*compiled(kind, precision, tmp_path, monkeypatch), precision)


@pytest.mark.slow
def test_an_encoder_that_does_not_compile_is_run_without(tmp_path, monkeypatch):
    """A cache that cannot be written."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(compiling, "READYING", 0.0)
    monkeypatch.setattr(compiling, "COMPILING", 0.0)
    reader = random_reader("cased")
    encoder = SpanEncoder(reader.model, "int8", None, False)
    with torch.inference_mode(), pytest.warns(UserWarning, match="does not compile"):
        for _ in range(3):
            encoder(batch(reader, 2, 8))
    check(reader, encoder, "int8")


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
