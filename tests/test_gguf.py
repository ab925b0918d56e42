"""GGUF files: read as any other model, and refused where they are none."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import genkit
from genkit.engine import kernels

gguf = pytest.importorskip("gguf")

LETTERS = ["<s>", "</s>", *"abcdefgh", "Ġ", "Ċ", "ab", "cd"]
SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "vocab_size": len(LETTERS),
    "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def stock() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.ndim > 1 else 1)
    return model


@pytest.fixture(scope="module")
def file(stock, tmp_path_factory) -> Path:
    """The same model as llama.cpp would have it: names, and the order of rotated rows, are its."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(stock.config.rms_norm_eps)
    writer.add_rope_freq_base(1e4)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(len(LETTERS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(LETTERS)
    writer.add_token_types([3, 3] + [1] * (len(LETTERS) - 2))
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in stock.state_dict().items():
        value, own = tensor.numpy(), names.get_name(name, (".weight",))
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        if heads:
            halves = value.reshape(heads, 2, 4, 32)
            value = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(value.shape))
        writer.add_tensor(own, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_the_model_that_it_was_written_from(file, stock):
    language = genkit.load(file)
    assert genkit.load(str(file)) is language
    assert language.tokenizer("abcd").input_ids[-2:] == [LETTERS.index("ab"), LETTERS.index("cd")]
    ids = torch.tensor([language.tokenizer("abcdabgh").input_ids])
    with torch.inference_mode():
        assert torch.allclose(language.model(ids).logits, stock(ids).logits, atol=1e-4)
    record = genkit.generate("abcd", model=file, strategy="greedy", max_new_tokens=10)
    assert record.text.startswith("abcd") and len(record.tokens) <= 10


@pytest.mark.skipif(not kernels.available(), reason="installed without a compiler")
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_gguf_file_is_quantised_like_a_folder(file, kind):
    record = genkit.generate("abcd", model=file, quantize=kind, seed=1, max_new_tokens=5)
    assert record.text.startswith("abcd")


def test_nothing_beside_the_file_is_read(tmp_path, file):
    """Settings of another model, which would fail, or run code, if they were."""
    (tmp_path / "tiny.gguf").write_bytes(file.read_bytes())
    for name in ("config", "tokenizer_config", "generation_config"):
        (tmp_path / f"{name}.json").write_text('{"auto_map": {"AutoConfig": "x.Y"}, "broken": ')
    found = genkit.load(tmp_path / "tiny.gguf").model.state_dict()
    for name, tensor in genkit.load(file).model.state_dict().items():
        assert torch.equal(found[name], tensor)
    with pytest.raises(ValueError, match="revision"):
        genkit.load(file, revision="main")


def test_what_is_no_gguf_file_is_refused_in_one_line(tmp_path, file):
    whole = file.read_bytes()
    for name, content in (
        ("empty", b""),
        ("text", b"hello, world"),
        ("old", b"GGUF\x01\0\0\0" + whole[8:]),
        ("short", whole[: len(whole) // 2]),
        ("head", whole[:40]),
    ):
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"\Amodel: ") as raised:
            genkit.load(path)
        assert len(str(raised.value).splitlines()) == 1
    for path in (tmp_path / "missing.gguf", tmp_path):
        with pytest.raises(ValueError, match="model"):
            genkit.load(str(path) if path.suffix else f"{path}/x.gguf")
