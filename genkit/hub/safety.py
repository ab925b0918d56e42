"""The check that a saved model's folder passes before anything of it is used.

What is checked is what is read: files are opened once, settings are copied, weights are reached by
the descriptor that was checked, and libraries are given a private folder of these.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from genkit import errors, files
from genkit.hub import model_files, names, safe_configs, safe_weights

CODE = re.compile(r"\w[\w.-]*\.(py|json|txt)")  # Python files of a model, and files for them
LARGEST = 48 << 20  # bytes of a file of settings, or of a vocabulary
ENTRIES = 100_000  # files and folders in a model's folder
HINT = (
    "give the folder of a model that a recipe trained, or the id of one on the Hub with weights in "
    "safetensors"
)


def check(folder: str | Path, argument: str = "model") -> None:
    """Refuse a model whose files are not safe to load; see `opened`."""
    with opened(folder, argument=argument):
        pass


@contextlib.contextmanager
def opened(
    folder: str | Path,
    *,
    argument: str = "model",
    weights: bool = True,
    code: bool = False,
    packed: bool = False,
) -> Iterator[Path]:
    """Yield a private folder with the files of a model that loaders read, each of them checked.

    An error that a library raises inside the block becomes a ValueError of one line.

    Args:
        folder: of the model, in the layout of transformers or diffusers.
        argument: the name of the folder's argument, for messages.
        weights: whether the weights have been fetched, and not only the settings.
        code: include the Python files that the model brings along.
        packed: the block reads matrices that genkit packed, too.

    Raises:
        ValueError: a file is not a regular one, leads out of the folder, or is not of the format
            that its name says; settings name files outside the folder, or impossible sizes; weights
            in safetensors are missing. Also if a loader fails inside the block.
    """
    source = Path(folder)
    with files.scratch_folder() as scratch, contextlib.ExitStack() as stack:
        private = scratch / (source.resolve().name or "model")
        try:
            _check_entries(source)
            parts = _copy(source, private, code, stack)
            contents = {part: safe_weights.check(part) for part in parts}
            for part in parts:
                safe_configs.check(part, contents[part] if weights else None, code, packed)
            if weights and not any(each.tensors for each in contents.values()):
                raise ValueError(f"'{private}' holds no weights in safetensors; {HINT}")
            with safe_weights.limited(contents.values() if weights else []):
                yield private
        except BaseException as error:
            if not isinstance(error, Exception) and not errors.is_panic(error):
                raise
            raise ValueError(_line(error, argument, private, source)) from error


def _line(error: BaseException, argument: str, private: Path, source: Path) -> str:
    """Write an error in one line that names what the user gave."""
    name = names.describe(source)
    text = str(error).replace(str(private), name).replace(str(source), name)
    text = " ".join(text.split())
    if text.startswith(f"{argument}: "):
        return text
    if isinstance(error, ValueError) and name in text:
        return f"{argument}: {text}"
    return f"{argument}: cannot load {name!r}: {text or type(error).__name__}"


def _check_entries(folder: Path) -> None:
    """Refuse links out of a folder, pipes and devices, at every depth."""
    count = 0
    for home, folders, others in os.walk(folder, onerror=_raise_unless_gone):
        count += len(folders) + len(others)
        if count > ENTRIES:
            raise ValueError(
                f"{folder} holds more than {ENTRIES:,} files; give a model's own folder"
            )
        for entry in (Path(home, name) for name in (*folders, *others)):
            with contextlib.suppress(FileNotFoundError):  # deleted by a run since
                _check_entry(entry, folder)


def _check_entry(entry: Path, folder: Path) -> None:
    mode = entry.lstat().st_mode
    if stat.S_ISLNK(mode):
        files.check_inside(entry, folder)
    elif not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ValueError(f"{entry} is not a regular file")


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _copy(source: Path, private: Path, code: bool, stack: contextlib.ExitStack) -> list[Path]:
    """Fill a private folder; return it and its folders of components."""
    _copy_files(source, private, source, code, stack)
    parts = [private]
    for name in _list_components(private):
        if (source / name).is_dir():
            _copy_files(source / name, private / name, source, code, stack)
            parts.append(private / name)
    return parts


def _list_components(private: Path) -> list[str]:
    """Return the names of the folders inside a model's own that loaders read."""
    if not (private / "model_index.json").exists():
        return ["additional_chat_templates"]
    index = safe_configs.read_index(private / "model_index.json")
    return [name for name, kind in index.items() if isinstance(kind, list) and name[0] != "_"]


def _copy_files(
    part: Path, private: Path, source: Path, code: bool, stack: contextlib.ExitStack
) -> None:
    """Copy settings, and link to the descriptors of weights, which stay open until `stack` ends."""
    private.mkdir()
    for file in sorted(part.iterdir()):
        if not (model_files.is_loaded(file.name) or (code and CODE.fullmatch(file.name))):
            continue
        if file.suffix == ".safetensors":
            opened = stack.enter_context(files.open_inside(file, source))
            (private / file.name).symlink_to(files.descriptor_path(opened.fileno()))
        else:
            (private / file.name).write_bytes(files.read_inside(file, source, LARGEST))
