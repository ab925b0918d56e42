"""Small changes of single files: of JSON, of safetensors, of a file as a whole.

In the values of changes `@outside` stands for a folder that nothing may touch, `@canary` for a file
that only code of the example would create; `{"@repeat": [text, times]}`, `{"@list": count}` and
`{"@deep": depth}` for values that are long to print.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from benchmarks.fuzz_watch import SECRET, World
from genkit.hub import model_files

Change = list[Any]
HEADERS = ["longer", "shorter", "huge", "negative", "empty", "million", "overlap", "beyond"]
HEADERS += ["dtype", "shape", "missing", "extra", "transposed", "nan", "inf", "metadata", "rename"]
SPELLINGS = ["bom", "utf-16", "utf-32", "latin-1", "cut", "twice", "comma", "nan", "deep", "words"]
EXTRA = [
    "adapter_config.json",
    "config.4.0.0.json",
    "tokenizer.4.0.0.json",
    "processor_config.json",
]
EXTRA += ["special_tokens_map.json", "added_tokens.json", "generation_config.json", "tekken.json"]
EXTRA += ["preprocessor_config.json", "deep/er/config.json", "tiktoken.model", "tokenizer.model.v3"]
EXTRA += [
    "shard-00000-model-00000-of-00000.safetensors",
    "secret.json",
    "-rf.json",
    "$(touch x).json",
]
# what a change raises if an earlier change has made it impossible
CANNOT: tuple[type[Exception], ...] = (OSError, ValueError, LookupError, TypeError, StopIteration)
CANNOT += (AttributeError, RecursionError, ArithmeticError, struct.error)
CODE = "from pathlib import Path\nPath({canary!r}).touch()\nclass Own: pass\nGenerator = X = Own\n"


def expand(value: Any, world: World) -> Any:
    """Return the value that a value of a change stands for."""
    if isinstance(value, str):
        return value.replace("@outside", str(world.outside)).replace("@canary", str(world.canary))
    if isinstance(value, list):
        return [expand(each, world) for each in value]
    if not isinstance(value, dict):
        return value
    if "@repeat" in value:
        text, times = value["@repeat"]
        return text * times
    if "@list" in value:
        return {str(i): str(i) for i in range(value["@list"])}
    if "@tokens" in value:
        flags = dict.fromkeys(("special", "lstrip", "rstrip", "single_word", "normalized"), False)
        return [{"id": i, "content": f"t{i}", **flags} for i in range(value["@tokens"])]
    return {expand(key, world): expand(each, world) for key, each in value.items()}


def edit_json(file: Path, keys: list[Any], value: Any, world: World) -> None:
    """Set, or with the value `@delete` drop, what lies at some keys of a JSON file."""
    found = json.loads(file.read_text(encoding="utf-8"))
    if not keys:
        found = value
    else:
        inner = found
        for key in keys[:-1]:
            inner = inner[key]
        if value == "@delete":
            del inner[keys[-1]]
        else:
            inner[expand(keys[-1], world)] = expand(value, world)
    text = json.dumps(found)
    if isinstance(value, dict) and "@deep" in value:
        text = text.replace(json.dumps(value), "[" * value["@deep"] + "]" * value["@deep"])
    file.write_text(text, encoding="utf-8")


def rewrite_json(file: Path, how: str) -> None:
    """Write a JSON file in another encoding or spelling, or damage it."""
    text = file.read_text(encoding="utf-8")
    if how == "bom":
        file.write_text(text, encoding="utf-8-sig")
    elif how in ("utf-16", "utf-32"):
        file.write_text(text, encoding=how)
    elif how == "latin-1":
        file.write_bytes(text.replace('"', '"\xe9', 1).encode("latin-1"))
    elif how == "cut":
        file.write_text(text[: len(text) // 2], encoding="utf-8")
    elif how == "twice":
        file.write_text(text.replace("{", '{"model_type": "own", "_class_name": 1,', 1))
    elif how == "comma":
        file.write_text(text.rstrip().removesuffix("}") + ",}")
    elif how == "nan":
        file.write_text(text.rstrip().removesuffix("}") + ', "vocab_size": NaN, "q": -Infinity}')
    elif how == "deep":
        file.write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    else:
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def change_file(file: Path, how: str, number: int, world: World) -> None:
    """Change a file as a whole."""
    data, other = file.read_bytes(), world.outside / f"out{file.suffix}"
    if how in ("cut", "append", "flip", "empty"):
        offset = number % max(len(data), 1)
        flipped = data[:offset] + bytes([data[offset] ^ (1 << number % 8)]) + data[offset + 1 :]
        made = {"cut": data[:offset], "append": data + b"\0" * (number % 4096), "empty": b""}
        file.write_bytes(made.get(how, flipped))
        return
    file.unlink()
    if how == "fifo":
        os.mkfifo(file)
    elif how == "socket":
        at = os.open(file.parent, os.O_RDONLY)
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(f"/proc/self/fd/{at}/{file.name}")
        os.close(at)
    elif how == "folder":
        file.mkdir()
        (file / file.name).write_bytes(data)
    elif how == "link out":
        file.symlink_to(other)
    elif how == "link in":
        file.with_name(f"real-{file.name}").write_bytes(data)
        file.symlink_to(f"real-{file.name}")
    elif how == "link itself":
        file.symlink_to(file.name)
    elif how == "link missing":
        file.symlink_to("nothing")
    elif how == "rename":
        file.with_name(EXTRA[number % len(EXTRA)].split("/")[-1]).write_bytes(data)
    elif how == "twice":
        file.write_bytes(data)
        file.with_name(f"copy-{file.name}").write_bytes(data)
    elif how == "secret":
        if model_files.is_loaded(file.name):
            raise ValueError("a model's own files are pushed, whatever they say")
        file.write_text(json.dumps({"secret": SECRET}))


def change_header(file: Path, how: str, number: int) -> None:
    """Change the header, or the numbers, of a file of safetensors."""
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + size]), bytearray(data[8 + size :])
    sizes = {"longer": size + 99, "shorter": size - 9, "huge": 1 << 62, "negative": (1 << 64) - 1}
    if how in sizes:
        file.write_bytes(struct.pack("<Q", sizes[how]) + data[8:])
        return
    names = [name for name in header if name != "__metadata__"]
    if how in ("nan", "inf"):  # of floating-point numbers only
        names = [name for name in names if header[name]["dtype"] == "F32"]
    name = names[number % len(names)]
    tensor = header[name]
    first, last = tensor["data_offsets"]
    if how == "empty":
        header, body = {}, bytearray()
    elif how == "million":
        none = {"dtype": "F32", "shape": [0], "data_offsets": [len(body), len(body)]}
        header |= {f"t{i}": none for i in range(1_000_000)}
    elif how == "overlap":
        header["other"] = dict(tensor)
    elif how == "beyond":
        tensor["data_offsets"] = [first, last + (1 << 40)]
    elif how == "dtype":
        tensor["dtype"] = ["F64", "I32", "BOOL", "F8_E4M3", "U64", "C64", "X", None][number % 8]
    elif how == "shape":
        tensor["shape"] = [[1 << 40], [0], [], [-1], [*tensor["shape"], 1], "x"][number % 6]
    elif how == "transposed":
        tensor["shape"] = tensor["shape"][::-1]
    elif how == "missing":
        return _delete_tensor(file, name)
    elif how == "extra":
        header["extra"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(body), len(body) + 4]}
        body += b"\0" * 4
    elif how in ("nan", "inf"):
        values = np.frombuffer(bytes(body[first:last]), np.float32).copy()
        values[number % len(values)] = np.nan if how == "nan" else np.inf
        body[first:last] = values.tobytes()
    elif how == "metadata":
        header["__metadata__"] = [{"format": 1}, {"format": "tf"}, 3, {"a": "x" * 10**6}][
            number % 4
        ]
    elif how == "rename":
        header[f"../{name}"] = header.pop(name)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return None


def _delete_tensor(file: Path, name: str) -> None:
    """Write a file of safetensors anew without a tensor."""
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, {"format": "pt"})


def paths(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the keys to all places of a JSON value, but for those of long lists."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for number, (key, each) in enumerate(inner):
        if number > 60:
            return
        yield (*before, key)
        if isinstance(each, dict | list):
            yield from paths(each, (*before, key))
