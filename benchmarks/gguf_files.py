"""A saved Llama or GPT-2 as a GGUF file without a tokenizer, for llama.cpp in benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig, AutoModelForCausalLM


def write_gguf(folder: Path, path: Path) -> None:
    """Write a saved model's weights as float32."""
    import gguf

    config = AutoConfig.from_pretrained(folder)
    llama = config.model_type == "llama"
    writer = gguf.GGUFWriter(str(path), config.model_type)
    (_describe_llama if llama else _describe_gpt2)(writer, config)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    arch = gguf.MODEL_ARCH.LLAMA if llama else gguf.MODEL_ARCH.GPT2
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tied = config.tie_word_embeddings
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    for name, tensor in model.state_dict().items():
        if name.startswith("lm_head") and tied and llama:
            continue
        value, own = tensor.numpy(), names.get_name(name, (".weight", ".bias"))
        if not llama and any(part in name for part in ("c_attn.w", "c_proj.w", "c_fc.w")):
            value = np.ascontiguousarray(value.T)
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", _key_heads(config))):
            if part in name:
                value = _interleaved(value, heads)
        writer.add_tensor(own, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _key_heads(config: Any) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _interleaved(value: np.ndarray, heads: int) -> np.ndarray:
    """Order rows as llama.cpp rotates them: pairs side by side, not half a head apart."""
    pairs = value.reshape(heads, 2, len(value) // heads // 2, *value.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(value.shape))


def _describe_llama(writer: Any, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(_key_heads(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)


def _describe_gpt2(writer: Any, config: Any) -> None:
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
