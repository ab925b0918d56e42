"""What can be trusted: a model's folder, looked at before anything of it is loaded.

Code that a folder brings along is not looked at: nothing runs it unless the caller says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py")  # what loaders read


def check(folder: Path, weights: bool = True, argument: str = "model") -> None:
    """Refuse a model whose files lead elsewhere, or are not what their names say.

    Args:
        folder: of the model, in a layout of transformers or diffusers.
        weights: whether they are there already, and not only the settings.
        argument: how an error calls what was given.

    Raises:
        ValueError: there are no weights but such as may run code; a file is a link out of the
            folder, or no safetensors under their name; an index names weights elsewhere; an
            adapter leads to another model.
    """
    for pattern in FILES:
        for file in sorted((*folder.glob(pattern), *folder.glob(f"*/{pattern}"))):
            check_link(file, folder, argument)
            _check_file(file, argument)
    if weights and not any((*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors"))):
        raise ValueError(
            f"{argument}: '{folder}' holds no weights in safetensors, and no others are read; give "
            "the folder of a model that a recipe trained, or the id of one on the Hub"
        )


def check_link(file: Path, folder: Path, argument: str = "model") -> None:
    """Refuse a file of a folder that is a link out of it.

    Raises:
        ValueError: it is.
    """
    home, place = folder.resolve(), file.resolve()
    blobs = home.parent.parent / "blobs"  # of the Hub's cache, whose snapshots are links to them
    if place.is_relative_to(home) or (home.parent.name == "snapshots" and place.parent == blobs):
        return
    raise ValueError(f"{argument}: {file} is a link that leads out of its folder")


def _check_file(file: Path, argument: str) -> None:
    if file.name == "adapter_config.json":
        raise ValueError(f"{argument}: {file} leads to weights elsewhere; merge the adapter first")
    if file.name == "config.json":
        _check_kernels(file, argument)
    if file.name.endswith(".index.json"):
        _check_index(file, argument)
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "np"):  # reads the header, and compares it with the file's size
                pass
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{argument}: {file} is not what safetensors holds ({error})"
            ) from error


def _check_index(index: Path, argument: str) -> None:
    """Refuse a list of shards that leads out of its folder: libraries join its names unchecked."""
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(f"{argument}: {index} is no list of shards ({error!r})") from error
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard or "\\" in shard:
            raise ValueError(f"{argument}: {index} names a shard outside its folder: {shard!r}")


def _check_kernels(config: Path, argument: str) -> None:
    """Refuse settings that name code on the Hub: transformers would fetch and run such a kernel."""
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
    except ValueError:
        return  # whoever loads it will say so
    for name, value in _settings(found):
        kernel = name.lstrip("_").startswith(("attn_implementation", "experts_implementation"))
        if kernel and "/" in str(value):
            raise ValueError(f"{argument}: {config} names code elsewhere: {name} {value!r}")


def _settings(found: Any) -> Iterator[tuple[str, Any]]:
    """Yield all names and values of settings, nested ones included."""
    if isinstance(found, dict):
        for name, value in found.items():
            yield name, value
            yield from _settings(value)
    elif isinstance(found, list):
        for value in found:
            yield from _settings(value)
