"""Saved folders spoilt by small changes: an example is a kind, a use and up to four of them.

A change is a list of plain JSON, so that an example can be printed, made smaller and repeated; see
fuzz_changes.py.
"""

from __future__ import annotations

import base64
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from benchmarks.fuzz_changes import (
    CANNOT,
    CODE,
    EXTRA,
    HEADERS,
    SPELLINGS,
    Bomb,
    Change,
    edit,
    head,
    paths,
    spell,
    spoil,
    written,
)
from benchmarks.fuzz_models import MAKE, PUSH, USES
from benchmarks.fuzz_watch import SECONDS, SECRET, Outcome, World, watch

Example = dict[str, Any]  # "kind", "use" and "changes"

# ---------------------------------------------------------------------------------------------
# What changes are made of

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

# ---------------------------------------------------------------------------------------------
# Making a change


def _bring(folder: Path, what: str, name: Any, world: World) -> None:
    """Put a file into a folder that was not there."""
    if what == "index":
        target = next(iter(sorted(folder.rglob("*.safetensors"))))
        told = {"metadata": {}, "weight_map": {"a": written(name, world)}}
        target.with_name(f"{target.name}.index.json").write_text(json.dumps(told))
        if target.name == "model.safetensors":
            target.unlink()
        return
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    if what == "code":
        file.write_text(CODE.format(canary=str(world.canary)))
    elif what == "pickle":
        file.unlink(missing_ok=True)
        file.write_bytes(pickle.dumps({"a": Bomb(world.canary)}))
    else:  # another's settings, or weights, in a place where somebody may look for them
        tables = (folder / "config.json", folder / "model_index.json")
        own = next(table for table in tables if table.exists())
        shutil.copyfile(own, file, follow_symlinks=False)  # which may lead out by now


def change(folder: Path, made: Change, world: World) -> None:
    """Make one change of a folder."""
    kind, *told = made
    if kind in ("set", "spell", "spoil", "head"):
        file = folder / told[0]
        if file.is_symlink() or not file.is_file():  # an earlier change has made it something else
            raise FileNotFoundError(file)
    if kind == "set":
        edit(folder / told[0], told[1], told[2], world)
    elif kind == "spell":
        spell(folder / told[0], told[1])
    elif kind == "spoil":
        spoil(folder / told[0], told[1], told[2], world)
    elif kind == "head":
        head(folder / told[0], told[1], told[2])
    elif kind == "bring":
        _bring(folder, told[0], told[1], world)
    elif kind == "deep link":
        (folder / told[0]).mkdir(parents=True, exist_ok=True)
        (folder / told[0] / "out.json").symlink_to(world.outside / "secret.json")
    else:
        raise ValueError(f"no such change: {kind}")


# ---------------------------------------------------------------------------------------------
# Drawing examples


def _of_json(folder: Path, file: str) -> st.SearchStrategy[Change]:
    """Draw changes of one JSON file."""
    found = json.loads((folder / file).read_text())
    places = [list(path) for path in paths(found)] or [[]]
    sizes = [p for p in places if isinstance(_at(found, p), int | float) and _at(found, p) > 1]
    place, target = st.sampled_from(places), st.just(file)
    leading = [["set", file, [key], value] for key, value in LEADING]
    leading += [["set", file, [k], v] for k, v in COMPONENTS if file == "model_index.json"]
    leading += [["set", file, [k], v] for k, v in TOKENIZERS if file.endswith("tokenizer.json")]
    draws: list[st.SearchStrategy[Any]] = [
        st.tuples(st.just("set"), target, place, st.sampled_from(ODD)),
        st.tuples(st.just("set"), target, place, st.just("@delete")),
        st.sampled_from(leading),
        st.sampled_from(leading),
        st.tuples(st.just("spell"), target, st.sampled_from(SPELLINGS)),
    ]
    if sizes:
        draws.append(
            st.tuples(st.just("set"), target, st.sampled_from(sizes), st.sampled_from(SIZES))
        )
    return st.one_of(draws).map(list)


def _at(value: Any, path: list[Any]) -> Any:
    for key in path:
        value = value[key]
    return value


def _of_kind(folder: Path) -> st.SearchStrategy[Change]:
    """Draw changes of one kind of model."""
    files = sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())
    tables = [f for f in files if f.endswith(".json")]
    weights = [f for f in files if f.endswith(".safetensors")]
    number = st.integers(0, 1 << 16)
    in_json = st.sampled_from(tables).flatmap(lambda file: _of_json(folder, file))
    brought = [["bring", "code", name] for name in BROUGHT]
    brought += [["bring", "pickle", name] for name in PICKLES]
    brought += [["bring", "index", name] for name in SHARDS]
    brought += [["bring", "copy", name] for name in EXTRA]
    brought += [["deep link", name] for name in ("a", "a/b/c", "unet/deep", "samples", "..b")]
    whole = st.tuples(st.just("spoil"), st.sampled_from(files), st.sampled_from(FILES), number)
    header = st.tuples(st.just("head"), st.sampled_from(weights), st.sampled_from(HEADERS), number)
    draws: list[st.SearchStrategy[Any]] = [in_json] * 4  # most reach deep into a loader
    return st.one_of([*draws, whole, header, st.sampled_from(brought)]).map(list)


def strategy(models: Path) -> st.SearchStrategy[Example]:
    """Draw examples: most have one or two changes, and a push is one in a hundred."""
    drawn = []
    for kind in MAKE:
        changes = st.lists(_of_kind(models / kind), min_size=1, max_size=4)
        cheap = [use for use in USES[kind] if use != PUSH]
        use = st.sampled_from(cheap * (100 // len(cheap)) + [PUSH])
        drawn.append(st.fixed_dictionaries({"kind": st.just(kind), "use": use, "changes": changes}))
    return st.one_of(drawn)


# ---------------------------------------------------------------------------------------------
# Running an example


class Folders:
    """The part of the fuzzer that spoils saved folders.

    Args:
        world: with the models in `home / "models"`.
    """

    def __init__(self, world: World) -> None:
        self.world, self.models = world, world.home / "models"
        self.strategy, self.seeds = strategy(self.models), SEEDS

    def run(self, example: Example) -> Outcome | None:
        """Spoil a folder and use it; None where the changes cannot be made together."""
        folder = self.world.home / "case" / example["kind"]
        shutil.rmtree(folder.parent, ignore_errors=True)
        shutil.copytree(self.models / example["kind"], folder)
        try:
            for made in example["changes"]:
                change(folder, made, self.world)
        except CANNOT:
            return None
        use, name = USES[example["kind"]][example["use"]], example["use"]
        limit = 4 * SECONDS if name == PUSH else SECONDS  # a push starts two programs
        told = watch(lambda: use(folder), self.world, folder, network=name == PUSH, limit=limit)
        if told.kind == "result" and _must_be_refused(example):
            return Outcome("failure", f"not refused: {told.text}", told.memory, told.seconds)
        return told


def _must_be_refused(example: Example) -> bool:
    """Whether a model cannot be used: its weights lack a tensor, or hold no numbers."""
    if len(example["changes"]) != 1 or example["use"] == "stage":
        return False
    kind, *told = example["changes"][0]
    plain = kind == "head" and not told[0].endswith("raw.safetensors")
    return plain and told[1] in ("missing", "nan", "inf", "empty", "rename")


def outside(world: World) -> None:
    """Fill the folder that nothing may touch."""
    code = CODE.format(canary=str(world.canary))
    (world.outside / "project").mkdir()
    for name in ("out.py", "LICENSE.py", "own.py", "project/gan.py"):
        (world.outside / name).write_text(code)
    for name in ("secret.json", "out.json", "out.txt", "out.md", "merges.txt", "out.gguf", "out"):
        (world.outside / name).write_text(json.dumps({SECRET: 0}))
    shutil.copy(world.home / "models/text/tokenizer.json", world.outside / "tokenizer.4.0.0.json")
    shutil.copy(world.home / "models/text/model.safetensors", world.outside / "out.safetensors")
    (world.outside / "out.bin").write_bytes(pickle.dumps(Bomb(world.canary)))


def _seed(kind: str, use: str, *changes: Change) -> Example:
    return {"kind": kind, "use": use, "changes": list(changes)}


# What has broken before, first of all
TEXTS = ("generate", "load", "init_from")
WEIGHTS, PARTS = "model.safetensors", "diffusion_pytorch_model.safetensors"
SEEDS: list[Example] = [_seed(kind, use) for kind in MAKE for use in USES[kind] if use != PUSH]
SEEDS += [_seed(kind, PUSH) for kind in ("text", "gan")]
SEEDS += [
    _seed(
        kind,
        use,
        ["bring", "code", "LICENSE.py"],
        ["set", "model_index.json", [key], ["../LICENSE", "Generator"]],
    )
    for kind, key in (("gan", "generator"), ("diffusion", "unet"))
    for use in (PUSH, "stage", "sample")
]
SEEDS += [
    _seed(kind, use, ["set", "model_index.json", [key], ["gan", "X"]])
    for key in ("@outside/project", ".", "..", "../outside/project")
    for kind, use in (("gan", "stage"), ("gan", PUSH), ("pictures", "imagine"))
]
SEEDS += [_seed("text", "load", ["bring", "index", shard]) for shard in SHARDS]
SEEDS += [_seed("text", "load", ["set", "config.json", [k], v]) for k, v in LEADING]
SEEDS += [
    _seed("text", "load", ["set", "tokenizer_config.json", [k], v], *without)
    for k, v in LEADING
    for without in ([], [["spoil", "tokenizer.json", "delete", 0]])
    if k.endswith(("_file", "_files", "vocab", "merges", "inputs", "_class", "kwargs"))
]
SEEDS += [
    _seed("text", use, *changes)
    for use in TEXTS
    for changes in (
        [
            ["set", "config.json", ["transformers_weights"], "adapter_model.bin"],
            ["bring", "pickle", "adapter_model.bin"],
        ],
        [
            ["bring", "copy", "config.4.0.0.json"],
            ["set", "config.4.0.0.json", ["_attn_implementation"], "evil/kernel:run"],
            ["set", "config.json", ["configuration_files"], ["config.4.0.0.json"]],
        ],
        [["deep link", "a/b/c"]],
        [["head", WEIGHTS, "missing", 3]],
        [["head", WEIGHTS, "million", 0]],
        [["set", "config.json", ["num_hidden_layers"], 10**6]],
        [["spoil", "tokenizer.json", "fifo", 0]],
        [["bring", "copy", "shard-00000-model-00000-of-00000.safetensors"]],
    )
]
SEEDS += [_seed("text", "command", ["set", "tokenizer.json", [k], v]) for k, v in TOKENIZERS]
SEEDS += [
    _seed(kind, use, ["head", file, how, 1])
    for kind, use, file in (
        ("answers", "answer", WEIGHTS),
        ("classifier", "features", WEIGHTS),
        ("pixels", "sample", WEIGHTS),
        ("gan", "sample", f"generator/{PARTS}"),
        ("autoencoder", "sample", f"vae/{PARTS}"),
        ("told", "sample", f"unet/{PARTS}"),
        ("pictures", "imagine", f"unet/{PARTS}"),
        ("pictures", "imagine", f"text_encoder/{WEIGHTS}"),
    )
    for how in ("nan", "missing")
]
SEEDS += [
    _seed(kind, use, ["set", file, [key], value])
    for kind, use, file, key in (
        ("diffusion", "sample", "unet/config.json", "layers_per_block"),
        ("diffusion", "sample", "unet/config.json", "sample_size"),
        ("diffusion", "sample", "scheduler/scheduler_config.json", "num_train_timesteps"),
        ("pictures", "imagine", "unet/config.json", "layers_per_block"),
        ("pictures", "imagine", "scheduler/scheduler_config.json", "num_train_timesteps"),
        ("classifier", "features", "config.json", "num_labels"),
        ("answers", "answer", "config.json", "n_layers"),
        ("answers", "answer", "config.json", "num_labels"),
        ("pixels", "sample", "config.json", "num_hidden_layers"),
    )
    for value in (10**6, 10**9)
]
SEEDS += [
    _seed("pictures", "imagine", ["set", "model_index.json", [key], value])
    for key, value in COMPONENTS
]
