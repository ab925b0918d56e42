"""Values for changes of saved folders: odd ones, keys that lead elsewhere, tokenizers, file names.

They are written as in changes; see fuzz_changes.py for what `@outside` and the like stand for.
"""

from __future__ import annotations

import base64
from typing import Any

SIZES = [0, -1, 1, 2.5, 1 << 20, 10**9, 10**12, 1 << 63, 10**400, 1e308]
WORDS = ["", "x", "../x", "/etc/passwd", "@outside/secret.json", "a/b", "é\u2028\0", "\ud800"]
ODD: list[Any] = [None, True, False, [], {}, [[]], [1, 2], {"a": 1}, "NaN", "Infinity"]
ODD += [{"@repeat": ["x", 100_000]}, {"@deep": 1000}, {"@list": 100_000}, *SIZES, *WORDS]
# keys that lead elsewhere in transformers and diffusers, and values for them
LEADING: list[tuple[str, Any]] = [
    ("auto_map", {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}),
    ("auto_map", {"AutoTokenizer": ["own.Own", None], "AutoImageProcessor": "own.Own"}),
    ("auto_map", {"AutoModel": "evil/repo--own.Own"}),
    ("model_type", "own"),
    ("model_type", "detr"),
    ("model_type", "wav2vec2"),
    ("model_type", "timm_wrapper"),
    ("model_type", "bert"),
    ("model_type", {"@outside": 1}),
    ("backbone", "evil/repo"),
    ("use_timm_backbone", False),
    ("transformers_weights", "adapter_model.bin"),
    ("transformers_weights", "deep/er/model.safetensors.index.json"),
    ("transformers_weights", "../outside/out.safetensors"),
    ("configuration_files", ["config.4.0.0.json"]),
    ("fast_tokenizer_files", ["../../outside/tokenizer.4.0.0.json"]),
    ("fast_tokenizer_files", ["tokenizer.4.0.0.json"]),
    ("_attn_implementation", "evil/kernel:run"),
    ("attn_implementation", {"": "evil/kernel"}),
    ("attn_implementation", "flash_attention_2"),
    ("_attn_implementation_internal", "evil/kernel"),
    ("_experts_implementation", "evil/kernel"),
    ("text_config", {"attn_implementation": "evil/kernel", "model_type": "llama"}),
    ("quantization_config", {"quant_method": "fp8"}),
    ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    ("fusion_config", {"patch_embeddings": True}),
    ("per_layer_config", {"0": {"attn_implementation": "evil/kernel"}}),
    ("adapter_attn_dim", 4),
    ("target_lang", "../../outside/out"),
    ("base_model_name_or_path", "evil/repo"),
    ("custom_pipeline", "own"),
    ("custom_generate", "own"),
    ("tokenizer_class", "GPT2Tokenizer"),
    ("tokenizer_class", "BertJapaneseTokenizer"),
    ("tokenizer_class", "EsmTokenizer"),
    ("mecab_kwargs", {"mecab_option": "-r @outside/secret.json -d @outside"}),
    ("tokenizer_file", "@outside/tokenizer.4.0.0.json"),
    ("vocab_file", "@outside/secret.json"),
    ("vocab", "@outside/secret.json"),
    ("merges", "@outside/merges.txt"),
    ("gguf_file", "@outside/out.gguf"),
    ("init_inputs", ["@outside/secret.json"]),
    ("name_or_path", "@outside"),
    ("_name_or_path", "@outside"),
    ("image_processor_type", "OneFormerImageProcessor"),
    ("image_processor", {"auto_map": {"AutoImageProcessor": "own.Own"}}),
    ("chat_template", "{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    ("to_dict", 1),
    ("get_text_config", 1),
    ("attribute_map", {"hidden_size": "vocab_size"}),
    ("return_dict", False),
    ("dtype", "load"),
    ("torch_dtype", "save"),
    ("id2label", {"@list": 100_000}),
    ("added_tokens_decoder", {"1000000000000": {"content": "a", "special": True}}),
    ("extra_special_tokens", {"@list": 100_000}),
    ("model_max_length", 0),
    ("eos_token_id", [10**12]),
    ("forced_bos_token_id", -5),
    ("suppress_tokens", {"@list": 100_000}),
    ("decoder_start_token_id", 10**9),
    ("is_encoder_decoder", True),
    ("_class_name", "AutoModel"),
    ("_class_name", ["../LICENSE", "Generator"]),
    ("_class_name", "WuerstchenCombinedPipeline"),
    ("_class_name", "StableDiffusionPipeline"),
    ("architectures", ["GPT2LMHeadModel"]),
    ("architectures", ["LlamaForQuestionAnswering"]),
    ("architectures", ["ViTForImageClassification"]),
    ("num_labels", 10**9),
    ("num_hidden_layers", 10**6),
    ("n_layer", 10**6),
    ("num_attention_heads", 0),
    ("rope_parameters", {"rope_type": "yarn", "factor": 1e30, "rope_theta": 0}),
    ("layers_per_block", 10**6),
    ("sample_size", 10**6),
    ("num_train_timesteps", 10**9),
    ("num_class_embeds", 10**9),
    ("time_cond_proj_dim", 10**9),
]
COMPONENTS: list[tuple[str, Any]] = [  # of a model_index.json
    ("generator", ["../LICENSE", "Generator"]),
    ("unet", ["own", "Own"]),
    ("unet", ["os", "system"]),
    ("unet", ["pipeline_utils", "DiffusionPipeline"]),
    ("vae", ["transformers", "Wav2Vec2ForCTC"]),
    ("text_encoder", ["transformers", "Qwen2_5OmniForConditionalGeneration"]),
    ("text_encoder", ["transformers", "RagTokenForGeneration"]),
    ("text_encoder", ["own", "Own"]),
    ("tokenizer", ["transformers", "BertJapaneseTokenizer"]),
    ("feature_extractor", ["transformers", "OneFormerImageProcessor"]),
    ("safety_checker", ["diffusers", "OnnxRuntimeModel"]),
    ("@outside/project", ["gan", "X"]),
    ("../outside/project", ["autoencoder", "X"]),
    (".", ["gan", "X"]),
    ("..", ["gan", "X"]),
    ("samples", ["gan", "X"]),
    ("scheduler", ["diffusers", "DDIMScheduler"]),
    ("scheduler", [None, None]),
    ("extra", ["gan", "Generator"]),
]
# edits of a tokenizer.json: the part and what comes there
TOKENIZERS: list[tuple[str, Any]] = [
    ("normalizer", {"type": "Replace", "pattern": {"String": ""}, "content": "x" * 1000}),
    ("normalizer", {"type": "Replace", "pattern": {"Regex": "."}, "content": "x" * 100_000}),
    ("normalizer", {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}),
    ("normalizer", {"type": "Replace", "pattern": {"Regex": "(?:"}, "content": ""}),
    ("normalizer", {"type": "Prepend", "prepend": "x" * 1_000_000}),
    (
        "normalizer",
        {
            "type": "Sequence",
            "normalizers": [
                {"type": "Replace", "pattern": {"Regex": "."}, "content": "xxxxxxxxxx"},
            ]
            * 9,
        },
    ),
    (
        "normalizer",
        {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(b"ab").decode()},
    ),
    (
        "pre_tokenizer",
        {"type": "Split", "pattern": {"Regex": "(?=a)*"}, "behavior": "Isolated", "invert": False},
    ),
    (
        "pre_tokenizer",
        {
            "type": "Split",
            "pattern": {"Regex": "(.*)*\\1{1000}"},
            "behavior": "Removed",
            "invert": True,
        },
    ),
    (
        "pre_tokenizer",
        {
            "type": "Split",
            "pattern": {"Regex": "((((.+)+)+)+)+!"},
            "behavior": "Removed",
            "invert": False,
        },
    ),
    ("pre_tokenizer", {"type": "Metaspace", "replacement": "__", "prepend_scheme": "always"}),
    ("pre_tokenizer", None),
    ("decoder", {"type": "Strip", "content": "a", "start": 10**18, "stop": 10**18}),
    ("decoder", {"type": "Replace", "pattern": {"Regex": "."}, "content": "x" * 100_000}),
    (
        "post_processor",
        {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "?", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        },
    ),
    ("post_processor", {"type": "BertProcessing", "sep": ["a", 10**9], "cls": ["b", 10**9]}),
    (
        "padding",
        {
            "strategy": {"Fixed": 10**9},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "a",
        },
    ),
    (
        "padding",
        {
            "strategy": "BatchLongest",
            "direction": "Right",
            "pad_to_multiple_of": 0,
            "pad_id": 10**9,
            "pad_type_id": 0,
            "pad_token": "",
        },
    ),
    ("truncation", {"direction": "Left", "max_length": 0, "strategy": "LongestFirst", "stride": 9}),
    ("model", {"type": "Unigram", "unk_id": 99, "vocab": [["a", -1.0]], "byte_fallback": True}),
    ("model", {"type": "Unigram", "unk_id": None, "vocab": []}),
    ("model", {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}),
    ("model", {"type": "WordLevel", "vocab": {"a": 4294967295}, "unk_token": "?"}),
    (
        "model",
        {
            "type": "WordPiece",
            "vocab": {"a": 0},
            "unk_token": "?",
            "continuing_subword_prefix": "",
            "max_input_chars_per_word": 10**12,
        },
    ),
    ("added_tokens", {"@tokens": 100_000}),
    (
        "added_tokens",
        [
            {
                "id": 4294967295,
                "content": "a",
                "special": True,
                "lstrip": True,
                "rstrip": True,
                "single_word": False,
                "normalized": False,
            }
        ],
    ),
    ("version", "9.9"),
]
FILES = ["delete", "empty", "cut", "append", "flip", "fifo", "socket", "folder", "twice"]
FILES += ["link out", "link in", "link itself", "link missing", "rename", "secret"]
BROUGHT = ["LICENSE.py", "own.py", "gan.py", "diffusion.py", "unet/own.py", "vae/own.py"]
BROUGHT += ["LICENSE", "custom_generate/generate.py", "modeling_own.py", "text_encoder/own.py"]
PICKLES = ["pytorch_model.bin", "adapter_model.bin", "model.pt", "adapter.eng.bin", "spk_dict.pt"]
PICKLES += ["unet/diffusion_pytorch_model.bin", "generator/diffusion_pytorch_model.bin"]
PICKLES += ["model.safetensors", "optimizer.pt", "text_encoder/pytorch_model.bin"]
SHARDS: list[Any] = [
    "../../outside/out.safetensors",
    "@outside/out.safetensors",
    "pytorch_model.bin",
    "..",
    3,
]
SHARDS += ["a/b.safetensors", "model.safetensors", "missing.safetensors", "..\\out.safetensors", ""]
