"""What can be trusted: the one gate that a saved model's folder passes before it is used.

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
from genkit.hub import safe_configs, safe_weights

# What loaders read, by the names that transformers and diffusers give; never pickles
MODEL = re.compile(
    r"(config|generation_config|model_index|scheduler_config|(video_)?preprocessor_config"
    r"|processor_config|adapter_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens"
    r"|vocab|chat_template)\.json|(vocab|merges)\.txt|\w[\w.-]*\.(model|jinja)"
    r"|(diffusion_pytorch_)?model(\.\w+)?(-\d+-of-\d+)?(\.\w+)?\.safetensors"
    r"|\w[\w.-]*\.safetensors\.index(\.\w+)?\.json"
)
CODE = re.compile(r"\w[\w.-]*\.(py|json|txt)")  # and what code may read
LARGEST = 48 << 20  # bytes of a file of settings, or of a vocabulary
ENTRIES = 100_000  # files and folders that are looked at
HINT = (
    "give the folder of a model that a recipe trained, or the id of one on the Hub with weights in "
    "safetensors"
)


def check(folder: str | Path, argument: str = "model") -> None:
    """Refuse a model whose files cannot be trusted; see `opened`."""
    with opened(folder, argument=argument):
        pass


@contextlib.contextmanager
def opened(
    folder: str | Path, *, argument: str = "model", weights: bool = True, code: bool = False
) -> Iterator[Path]:
    """Yield a private folder with the files of a model that loaders read, each of them checked.

    Whatever a library raises inside the block becomes a ValueError of one line.

    Args:
        folder: of the model, in a layout of transformers or diffusers.
        argument: how an error calls what was given.
        weights: whether they are there already, and not only the settings.
        code: take along the code that the model brings.

    Raises:
        ValueError: a file is none, leads elsewhere or is not what its name says; settings name
            what lies outside the folder or sizes that cannot be; there are no weights in
            safetensors, or not all of them. What a loader refuses inside the block, too.
    """
    source = Path(folder)
    with files.scratch_folder() as scratch, contextlib.ExitStack() as stack:
        private = scratch / (source.resolve().name or "model")
        try:
            _check_entries(source)
            parts = _copy(source, private, code, stack)
            contents = {part: safe_weights.check(part) for part in parts}
            for part in parts:
                safe_configs.check(part, contents[part] if weights else None, code)
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
    text = " ".join(str(error).replace(str(private), str(source)).split())
    if text.startswith(f"{argument}: "):
        return text
    if isinstance(error, ValueError) and str(source) in text:
        return f"{argument}: {text}"
    return f"{argument}: cannot load {str(source)!r}: {text or type(error).__name__}"


def _check_entries(folder: Path) -> None:
    """Refuse links out of a folder, and whatever is neither file nor folder, at every depth."""
    count = 0
    for home, folders, names in os.walk(folder, onerror=_refuse):
        count += len(folders) + len(names)
        if count > ENTRIES:
            raise ValueError(
                f"{folder} holds more than {ENTRIES:,} files; give a model's own folder"
            )
        for entry in (Path(home, name) for name in (*folders, *names)):
            with contextlib.suppress(FileNotFoundError):  # a run writes there, and deletes
                _check_entry(entry, folder)


def _check_entry(entry: Path, folder: Path) -> None:
    mode = entry.lstat().st_mode
    if stat.S_ISLNK(mode):
        files.check_inside(entry, folder)
    elif not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ValueError(f"{entry} is no regular file")


def _refuse(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _copy(source: Path, private: Path, code: bool, stack: contextlib.ExitStack) -> list[Path]:
    """Fill a private folder, and return it and its folders of components."""
    _copy_files(source, private, source, code, stack)
    parts = [private]
    for name in _components(private):
        if (source / name).is_dir():
            _copy_files(source / name, private / name, source, code, stack)
            parts.append(private / name)
    return parts


def _components(private: Path) -> list[str]:
    """Return the names of folders that loaders read, beside the model's own."""
    if not (private / "model_index.json").exists():
        return ["additional_chat_templates"]
    index = safe_configs.read_index(private / "model_index.json")
    return [name for name, kind in index.items() if isinstance(kind, list) and name[0] != "_"]


def _copy_files(
    part: Path, place: Path, source: Path, code: bool, stack: contextlib.ExitStack
) -> None:
    place.mkdir()
    for file in sorted(part.iterdir()):
        if not (MODEL.fullmatch(file.name) or (code and CODE.fullmatch(file.name))):
            continue
        if file.suffix == ".safetensors":
            opened = stack.enter_context(files.open_inside(file, source))
            (place / file.name).symlink_to(files.descriptor_path(opened.fileno()))
        else:
            (place / file.name).write_bytes(files.read_inside(file, source, LARGEST))
