"""Names that users give: paths of this machine, or ids on the Hub."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

RUNS = "runs"  # where recipes put their runs
ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
FILE = re.compile(
    r".*\.(txt|md|csv|jsonl?|parquet|arrow|png|jpe?g|zip|safetensors|bin|pt|gguf)", re.I
)
LONGEST = 96  # characters of an id
SHOWN = 60  # characters of a name in messages


def is_path(name: str) -> bool:
    """Whether a name is that of a file or folder here, present or missing, and not a Hub id.

    `user/name` is an id; `runs/vae`, and a name whose first part is a folder here, are paths.
    """
    if os.path.lexists(name) or len(name) > LONGEST or FILE.fullmatch(name):
        return True
    first, slash, _ = name.partition("/")
    plain = ID.fullmatch(name) and not name.startswith(".")
    return not plain or first == RUNS or (bool(slash) and is_folder(first))


def is_dataset_id(name: str) -> bool:
    """Whether a name can only be the id of a dataset on the Hub, which has an owner."""
    return "/" in name and not is_path(name)


def is_folder(name: str) -> bool:
    """Whether there is a folder of this name; none has a name that is too long."""
    return os.path.isdir(name)  # noqa: PTH112  Path's own raises for such a name


def as_path(name: str, argument: str) -> Path:
    """Return a name as a path that can be looked up.

    Raises:
        ValueError: no file can have this name, as it is too long, or not a name at all.
    """
    path = Path(os.path.expanduser(name))  # noqa: PTH111  Path's own raises for unknown users
    try:
        path.lstat()
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) or error.errno == errno.ENAMETOOLONG:
            raise ValueError(
                f"{argument} must name a file or a folder, got {quote(name)}, which no file can be "
                "called"
            ) from None
    return path


def quote(name: str) -> str:
    """Return a name for a message; a long one is cut."""
    cut = f"{name[:SHOWN]!r}… ({len(name):,} characters)"
    return repr(name) if len(name) <= 2 * SHOWN else cut


def describe(folder: Path) -> str:
    """Return the path of a folder, or of one in the Hub's cache its repository and commit."""
    found = re.search(r"(?:models|datasets)--([^/]+)/snapshots/(\w{7})\w*$", str(folder))
    return f"{found[1].replace('--', '/')} at {found[2]}" if found else str(folder)


def check_no_file(name: str, text: str) -> None:
    """Refuse the name of a file where a text is meant.

    Raises:
        ValueError: there is a file of that name.
    """
    if re.fullmatch(r"\S*[./]\S*", text) and os.path.isfile(text):  # noqa: PTH113  as above
        raise ValueError(
            f"{name} must be a text, and {text!r} is the name of a file; give what is in it: "
            f"pathlib.Path({text!r}).read_text()"
        )


def is_gguf(name: str) -> bool:
    """Whether a name is that of a GGUF file, llama.cpp's format."""
    return name.lower().endswith(".gguf")
