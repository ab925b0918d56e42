"""Settings checked: they name nothing outside their folder, and no impossible size.

transformers and diffusers follow the settings of a saved folder to other files, to code, and to
other repositories. Settings that lead away from the files that were checked are refused here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from genkit.hub import kinds, privacy
from genkit.hub.model_files import PACKED
from genkit.hub.safe_weights import Contents

SETTINGS = 8 << 20  # bytes of a file of settings
DEPTH = 50  # of settings within settings
LAYERS = 1000  # that a network may have, however small its weights
PIXELS = 2048  # a side of its images, likewise
TIMESTEPS = 1_000_000  # of a scheduler
PADDING = 1_000_000  # tokens that a tokenizer may pad a text to
ADDED = 20_000  # tokens beside a vocabulary: tokenizers takes the square of the time for them
GROWTH = 64  # times as long as a text may become before it is cut into tokens
# a tokenizer.json without these cannot replace parts of a text, nor pad it that far; one pattern
# each, beginning with a word, as a search for alternatives takes much longer
SUSPECT = tuple(
    re.compile(pattern)
    for pattern in (
        rb'"type"\s*:\s*"Replace"',
        rb'"Fixed"\s*:\s*\d{7}',
        rb'"pad_to_multiple_of"\s*:\s*\d{7}',
        rb"\\u00[0-7]",  # an escaped letter, which may hide any word
    )
)

PLAIN = re.compile(r"[A-Za-z_]\w*")
# keys that make transformers read files other than those that were checked, or another model
ELSEWHERE = {
    *("transformers_weights", "configuration_files", "fast_tokenizer_files", "gguf_file"),
    *("init_inputs", "tokenizer_object", "backbone", "pretrained_cfg", "adapter_attn_dim"),
    *("mecab_kwargs", "sudachi_kwargs", "jumanpp_kwargs", "sp_model_kwargs"),
}
# keys that make it import code of others, or fetch it from the Hub
CODE = {"quantization_config", "fusion_config"}
KERNELS = re.compile(r"_*(attn|experts)_implementation.*")
OWN_KERNELS = {"eager", "sdpa", "flex_attention", "grouped_mm", "batched_mm"}
FILES = re.compile(r".*(^|_)(file|files|filename|path|dir|folder|vocab|merges)")
COUNTS = re.compile(r".*(^|_)(layers?|blocks?|depths?|layers_per_\w+|repeats?)")
SIZES = re.compile(r".*(^|_)(sample_size|image_size|pos_embed_max_size)")


def check(
    folder: Path, contents: Contents | None, code: bool = False, packed: bool = False
) -> None:
    """Refuse unsafe settings in the folder of a model, or of a component of a pipeline.

    Args:
        folder: whose JSON files are checked.
        contents: what the weights there hold; None if they have not been fetched.
        code: the caller trusts code that the model names.
        packed: the caller reads matrices that genkit packed.

    Raises:
        ValueError: a setting is unsafe; the file and the key are named.
    """
    for file in sorted(folder.glob("*.json")):
        if ".index." in file.name:  # of shards, which are weights
            continue
        if file.name == "tokenizer.json":
            _check_tokenizer(file)
        elif file.name == "model_index.json":
            _check_components(file, code)
        elif file.name == "adapter_config.json":
            raise ValueError(f"{file} leads to weights elsewhere; merge the adapter first")
        elif file.name != "vocab.json":
            settings = read_json(file)
            if file.name == "config.json" and is_packed(settings):
                settings = settings | {"quantization_config": None}
                if not packed:
                    raise ValueError(
                        f"{file}: this model was saved quantised, which only genkit's verbs for "
                        "texts read; give the model that it was made from"
                    )
            _check_settings(file, settings, contents, code)


def is_packed(settings: Any) -> bool:
    """Whether settings are those of a model whose matrices genkit packed."""
    method = settings.get("quantization_config") if isinstance(settings, dict) else None
    return isinstance(method, dict) and method.get("quant_method") == PACKED


def read_json(file: Path) -> Any:
    """Read JSON that every parser reads alike: UTF-8, no key twice, no endless nesting.

    Raises:
        ValueError: it is something else.
    """
    if file.name != "tokenizer.json" and file.stat().st_size > SETTINGS:
        raise ValueError(f"{file} has more than {SETTINGS:,} bytes, the most for settings")
    try:
        return json.loads(file.read_bytes().decode("utf-8"), object_pairs_hook=_as_dict)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read as JSON: {error!s:.200}") from error


def _as_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key that is there twice: parsers differ in which one they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"the key {twice!r:.80} is there twice")
    return found


def _check_settings(file: Path, settings: Any, contents: Contents | None, code: bool) -> None:
    needs_keys = ("config.json", "_config.json")
    if file.name.endswith(needs_keys) and not isinstance(settings, dict):
        raise ValueError(f"{file} holds no settings of a model")
    for name, value in _walk(file, {file.stem: settings}):
        _check_names(file, name, value)
        if not code:
            _check_code(file, name, value)
        if "token" in file.name and isinstance(value, list | dict) and len(value) > ADDED:
            raise ValueError(f"{file}: {name!r} lists {len(value):,} tokens; at most {ADDED:,}")
        if file.name == "config.json" and contents is not None:
            _check_size(file, name, value, contents)
        elif file.name == "scheduler_config.json" and name.endswith("timesteps"):
            _check_most(file, name, value, TIMESTEPS)


def _walk(file: Path, found: Any, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield all names and values of settings, nested ones included."""
    if depth > DEPTH:
        raise ValueError(f"{file} holds settings within settings, more than {DEPTH} deep")
    if isinstance(found, dict):
        for name, value in found.items():
            yield name, value
            yield from _walk(file, value, depth + 1)
    elif isinstance(found, list):
        for value in found:
            yield from _walk(file, value, depth + 1)


# ---------------------------------------------------------------------------------------------
# What settings name


def _check_names(file: Path, name: str, value: Any) -> None:
    """Refuse a setting that leads to files that were not checked, or to another model."""
    if value in (None, "", [], {}, False):
        return
    if name in ELSEWHERE:
        raise ValueError(f"{file} leads to other files by {name!r}: {value!r:.200}")
    if FILES.fullmatch(name) and name not in privacy.ORIGINS:
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, str) and Path(each).name != each:
                raise ValueError(f"{file} leads out of its folder by {name!r}: {each!r:.200}")


def _check_code(file: Path, name: str, value: Any) -> None:
    """Refuse a setting by which libraries run code of others."""
    if name in CODE and value:
        raise ValueError(f"{file} names code elsewhere: {name} {value!r:.200}")
    if KERNELS.fullmatch(name):
        for each in value.values() if isinstance(value, dict) else [value]:
            if each is not None and each not in OWN_KERNELS:
                raise ValueError(f"{file} names code elsewhere: {name} {each!r:.200}")


def read_index(file: Path) -> dict[str, Any]:
    """Read the components of a pipeline; their names are also those of its folders.

    Raises:
        ValueError: the file holds none, or a name could lead out of the folder.
    """
    index = read_json(file)
    if not isinstance(index, dict):
        raise ValueError(f"{file} holds no settings of a model")
    for name in index:
        if not PLAIN.fullmatch(name):
            raise ValueError(f"{file} has a component of an invalid name: {name!r:.200}")
    return index


def _check_components(file: Path, code: bool) -> None:
    """Refuse a pipeline with a component that is missing, or of an unknown class."""
    for name, value in read_index(file).items():
        if not name.startswith("_") and isinstance(value, list) and value != [None, None]:
            if not (file.parent / name).is_dir():  # libraries would read the files around it
                raise ValueError(f"{file} names a component that has no folder: {name!r}")
            if not code:
                _check_class(file, name, value)


def _data_classes() -> tuple[type, ...]:
    """Return the base classes of components that hold data: networks, schedulers, processors."""
    import diffusers
    import transformers

    return (
        diffusers.ModelMixin,
        diffusers.SchedulerMixin,
        transformers.PreTrainedModel,
        transformers.PreTrainedTokenizerBase,
        transformers.ProcessorMixin,
        transformers.FeatureExtractionMixin,
        transformers.image_processing_base.ImageProcessingMixin,
    )


def _check_class(file: Path, name: str, value: list[Any]) -> None:
    """Refuse a component unless its class holds data, and is of a library or of genkit."""
    if tuple(map(str, value)) in kinds.COMPONENTS:
        return
    import diffusers
    import transformers

    plain = len(value) == 2 and all(isinstance(x, str) and PLAIN.fullmatch(x) for x in value)
    library, cls = value if plain else ("", "")
    homes = {"diffusers": diffusers, "transformers": transformers}
    home = homes.get(library) or getattr(diffusers.pipelines, library or "none", None)
    found = getattr(home, cls or "none", None)
    if not isinstance(found, type) or not issubclass(found, _data_classes()):
        raise ValueError(
            f"{file}: the {name} is of the class {value!r:.200}, which neither diffusers nor "
            "transformers has; if you trust its code, genkit.imagine takes trust_remote_code=True"
        )


# ---------------------------------------------------------------------------------------------
# Sizes


def _check_size(file: Path, name: str, value: Any, contents: Contents) -> None:
    """Refuse a size that a network of these weights cannot have."""
    if COUNTS.fullmatch(name):
        _check_most(file, name, value, max(LAYERS, contents.tensors))
    elif SIZES.fullmatch(name):
        _check_most(file, name, value, max(PIXELS, contents.widest))
    elif name == "num_labels":
        _check_most(file, name, value, max(LAYERS, contents.widest))
    if isinstance(value, list) and len(value) > max(LAYERS, contents.tensors, contents.widest):
        raise ValueError(f"{file}: {name!r} lists {len(value):,}, more than the weights have")


def _check_most(file: Path, name: str, value: Any, most: int) -> None:
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, int | float) and number > most:
            raise ValueError(f"{file}: {name!r} is {number:,}; at most {most:,} can be")


def _check_tokenizer(file: Path) -> None:
    """Refuse a tokenizer that makes a text many times as long, or pads it to gigabytes."""
    data = file.read_bytes()  # parsing a large vocabulary takes as long as loading a model
    added = data.count(b'"single_word"')
    if added > ADDED:
        raise ValueError(f"{file} adds {added:,} tokens; at most {ADDED:,} are read")
    if not any(pattern.search(data) for pattern in SUSPECT):
        return
    tokenizer = read_json(file)
    if not isinstance(tokenizer, dict):
        raise ValueError(f"{file} holds no tokenizer")
    if len(tokenizer.get("added_tokens") or ()) > ADDED:
        raise ValueError(f"{file} adds more than {ADDED:,} tokens")
    growth = 1.0
    for step in _steps(file, tokenizer.get("normalizer")):
        growth *= _growth(step)
    if growth > GROWTH:
        raise ValueError(f"{file}: its 'normalizer' makes a text {growth:,.0f} times as long")
    for name, value in _walk(file, tokenizer.get("padding")):
        _check_most(file, name, value, PADDING)


def _steps(file: Path, normalizer: Any) -> Iterator[dict[str, Any]]:
    """Yield the steps of a normalizer, in their order."""
    for _, value in _walk(file, {"": normalizer}):
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, dict) and "type" in each:
                yield each


def _growth(step: dict[str, Any]) -> float:
    """Return how many times as long a step can make a text."""
    content, pattern = step.get("content"), step.get("pattern")
    if step["type"] != "Replace" or not isinstance(content, str) or not isinstance(pattern, dict):
        return 1.0
    found = pattern.get("String")
    return max(1.0, len(content) / len(found) if found else 1.0 + len(content))
