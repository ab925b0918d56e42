"""What can be trusted: a model's folder, looked at before anything of it is loaded.

Code that a folder brings along is not looked at: nothing runs it unless the caller says so.
"""

from __future__ import annotations

import json
from pathlib import Path

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
    home = folder.resolve()
    homes = [home]
    if home.parent.name == "snapshots":  # of the Hub's cache, where files are links to blobs
        homes.append(home.parent.parent / "blobs")
    for pattern in FILES:
        for file in sorted((*folder.glob(pattern), *folder.glob(f"*/{pattern}"))):
            if not any(file.resolve().is_relative_to(known) for known in homes):
                raise ValueError(f"{argument}: {file} is a link that leads out of its folder")
            _check_file(file, argument)
    if weights and not any((*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors"))):
        raise ValueError(
            f"{argument}: '{folder}' holds no weights in safetensors, and no others are read; give "
            "the folder of a model that a recipe trained, or the id of one on the Hub"
        )


def _check_file(file: Path, argument: str) -> None:
    if file.name == "adapter_config.json":
        raise ValueError(f"{argument}: {file} leads to weights elsewhere; merge the adapter first")
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
