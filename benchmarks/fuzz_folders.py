"""Saved folders corrupted by small changes: an example is a kind, a use and up to four changes.

A change is a list of plain JSON, so that an example can be printed, made smaller and repeated; see
fuzz_changes.py.
"""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

from builders import Bomb  # type: ignore[import-not-found]
from hypothesis import strategies as st

from benchmarks.fuzz_changes import (
    CANNOT,
    CODE,
    EXTRA,
    HEADERS,
    SPELLINGS,
    Change,
    change_file,
    change_header,
    edit_json,
    expand,
    paths,
    rewrite_json,
)
from benchmarks.fuzz_models import MAKE, PUSH, USES
from benchmarks.fuzz_values import (
    BROUGHT,
    COMPONENTS,
    FILES,
    LEADING,
    ODD,
    PICKLES,
    SHARDS,
    SIZES,
    TOKENIZERS,
)
from benchmarks.fuzz_watch import SECONDS, SECRET, Outcome, World, watch

Example = dict[str, Any]  # "kind", "use" and "changes"

# ---------------------------------------------------------------------------------------------
# Making a change


def _bring(folder: Path, what: str, name: Any, world: World) -> None:
    """Add a file to a folder."""
    if what == "index":
        target = next(iter(sorted(folder.rglob("*.safetensors"))))
        index = {"metadata": {}, "weight_map": {"a": expand(name, world)}}
        target.with_name(f"{target.name}.index.json").write_text(json.dumps(index))
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
    else:  # a copy of the settings under a name that a loader may look for
        tables = (folder / "config.json", folder / "model_index.json")
        own = next(table for table in tables if table.exists())
        shutil.copyfile(own, file, follow_symlinks=False)  # it may be a link by now


def change(folder: Path, made: Change, world: World) -> None:
    """Make one change of a folder."""
    kind, name, *options = made
    file = folder / name
    if kind in ("set", "spell", "spoil", "head") and (file.is_symlink() or not file.is_file()):
        raise FileNotFoundError(file)  # an earlier change has made it something else
    if kind == "set":
        edit_json(file, options[0], options[1], world)
    elif kind == "spell":
        rewrite_json(file, options[0])
    elif kind == "spoil":
        change_file(file, options[0], options[1], world)
    elif kind == "head":
        change_header(file, options[0], options[1])
    elif kind == "bring":
        _bring(folder, name, options[0], world)
    elif kind == "deep link":
        file.mkdir(parents=True, exist_ok=True)
        (file / "out.json").symlink_to(world.outside / "secret.json")
    else:
        raise ValueError(f"no such change: {kind}")


# ---------------------------------------------------------------------------------------------
# Drawing examples


def _of_json(folder: Path, file: str) -> st.SearchStrategy[Change]:
    """Draw changes of one JSON file."""
    found = json.loads((folder / file).read_text())
    keys = [list(path) for path in paths(found)] or [[]]
    sizes = [k for k in keys if isinstance(_get(found, k), int | float) and _get(found, k) > 1]
    key, target = st.sampled_from(keys), st.just(file)
    leading = [["set", file, [key], value] for key, value in LEADING]
    leading += [["set", file, [k], v] for k, v in COMPONENTS if file == "model_index.json"]
    leading += [["set", file, [k], v] for k, v in TOKENIZERS if file.endswith("tokenizer.json")]
    draws: list[st.SearchStrategy[Any]] = [
        st.tuples(st.just("set"), target, key, st.sampled_from(ODD)),
        st.tuples(st.just("set"), target, key, st.just("@delete")),
        st.sampled_from(leading),
        st.sampled_from(leading),
        st.tuples(st.just("spell"), target, st.sampled_from(SPELLINGS)),
    ]
    if sizes:
        draws.append(
            st.tuples(st.just("set"), target, st.sampled_from(sizes), st.sampled_from(SIZES))
        )
    return st.one_of(draws).map(list)


def _get(value: Any, path: list[Any]) -> Any:
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
    """The part of the fuzzer that corrupts saved folders.

    Args:
        world: with the models in `home / "models"`.
    """

    def __init__(self, world: World) -> None:
        self.world, self.models = world, world.home / "models"
        self.strategy, self.seeds = strategy(self.models), SEEDS

    def run(self, example: Example) -> Outcome | None:
        """Corrupt a folder and use it; None if the changes cannot be made together."""
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
        outcome = watch(lambda: use(folder), self.world, folder, network=name == PUSH, limit=limit)
        if outcome.kind == "result" and _must_be_refused(example):
            text = f"not refused: {outcome.text}"
            return Outcome("failure", text, outcome.memory, outcome.seconds)
        return outcome


def _must_be_refused(example: Example) -> bool:
    """Whether a model cannot be used: its weights lack a tensor, or hold no numbers."""
    if len(example["changes"]) != 1 or example["use"] == "stage":
        return False
    kind, name, *options = example["changes"][0]
    plain = kind == "head" and not name.endswith("raw.safetensors")
    return plain and options[0] in ("missing", "nan", "inf", "empty", "rename")


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


# Examples that failed in the past
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
        ("class_conditional", "sample", f"unet/{PARTS}"),
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
