"""Checkpoints that survive anything: written aside, sealed by a manifest, renamed into place.

    checkpoints/
      step-00000900/
        tensors.safetensors   every tensor of the state
        state.json            everything else, pointing at the tensors by name
        manifest.json         size and SHA-256 of the two files above; written last
      step-….aside-1        a damaged checkpoint, or something else with the name of one
      .writing-…, .deleting-… a save or a deletion that was under way

A folder named `step-…` exists only after all of its bytes, and its manifest, are on the disk.
What has another name, or is no folder, is the user's own, and left alone.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from genkit import files

NAME = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,14})")  # as f"{step:08d}" writes it
LEFTOVER = re.compile(rf"\.(writing|deleting)-{NAME.pattern}")
ASIDE = 10  # that are kept: a disk that damages more is not to be trained on
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
FILES = (TENSORS, STATE, MANIFEST)


class CheckpointError(ValueError):
    """A checkpoint could not be written, or differs from what was written."""


# ---------------------------------------------------------------------------------------------
# A state is a tree of dicts, lists, tensors and plain values: JSON with the tensors taken out


def pack(
    tree: Any,
    tensors: dict[str, torch.Tensor],
    path: str = "",
    names: dict[tuple[Any, ...], str] | None = None,
) -> Any:
    """Turn a state tree into JSON, moving its tensors into `tensors`.

    Dicts become lists of pairs, because optimizer states have integers for keys. Two references
    to the same memory (tied weights) become one tensor.

    Args:
        path: of the tree, which names its tensors.
        names: of tensors by their memory; it is filled.
    """
    names = {} if names is None else names
    if isinstance(tree, torch.Tensor):
        name = names.setdefault(_memory(tree), path) if tree.numel() else path
        tensors.setdefault(name, tree.detach())
        return {"tensor": name}
    if isinstance(tree, dict):
        return {"dict": [[k, pack(v, tensors, f"{path}/{k}", names)] for k, v in tree.items()]}
    if isinstance(tree, list | tuple):
        items = [pack(v, tensors, f"{path}/{i}", names) for i, v in enumerate(tree)]
        return {"tuple": items} if isinstance(tree, tuple) else items
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise TypeError(f"state{path} is a {type(tree).__name__}; a checkpoint holds tensors and JSON")


def unpack(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Undo `pack`."""
    if isinstance(tree, list):
        return [unpack(v, tensors) for v in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, value),) = tree.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {k: unpack(v, tensors) for k, v in value}
    return tuple(unpack(v, tensors) for v in value)


def _memory(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Describe where numbers are; an address may be a handle, to which no offset can be added."""
    start = tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.device
    return *start, tensor.shape, tensor.stride(), tensor.dtype


def trained_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a network's state without its frozen parameters: they are as they were loaded."""
    named = module.named_parameters(remove_duplicate=False)
    frozen = {name for name, parameter in named if not parameter.requires_grad}
    return {name: value for name, value in module.state_dict().items() if name not in frozen}


def load_trained_state(module: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Undo `trained`.

    Raises:
        RuntimeError: the state is that of another network.
    """
    whole, changing = module.state_dict(), trained_state(module)
    frozen = {name: value for name, value in whole.items() if name not in changing}
    module.load_state_dict(frozen | state)


# ---------------------------------------------------------------------------------------------
# Writing


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `state` as `folder/step-…`, then delete all but the newest `keep` checkpoints.

    At every instant the newest complete checkpoint is untouched. A step that is already saved
    and intact is left as it is. Those of later steps are damaged, or the run would have gone on
    from them: they are set aside, as is anything else that has the new one's name.

    Raises:
        CheckpointError: the disk refused (full, read-only, …); earlier checkpoints are intact.
    """
    final = folder / f"step-{step:08d}"
    scratch = folder / f".writing-{final.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(final):
            if not final.is_symlink() and final.is_dir() and find_damage(final) is None:
                return final
            set_aside(final)
        _write(scratch, state)
        scratch.rename(final)
        files.sync(folder)
        found = list_checkpoints(folder)
        for later in (other for other in found if step_of(other) > step):
            set_aside(later)
        for old in [other for other in found if step_of(other) <= step][keep:]:
            delete_checkpoint(old)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise CheckpointError(
            f"could not save {final}: {files.reason(error)}. Earlier checkpoints are intact: "
            "make room or change the disk, then go on with --resume"
        ) from error
    return final


def _write(scratch: Path, state: dict[str, Any]) -> None:
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    tree = pack(state, tensors)
    mode = files.make_empty(scratch / TENSORS)
    save_file({name: t.contiguous() for name, t in tensors.items()}, scratch / TENSORS)
    (scratch / TENSORS).chmod(mode)
    (scratch / STATE).write_text(json.dumps(tree), encoding="utf-8")
    manifest = {name: _seal(scratch / name) for name in (TENSORS, STATE)}
    (scratch / MANIFEST).write_text(json.dumps(manifest, indent=2))
    files.sync(scratch / MANIFEST)
    files.sync(scratch)


def _seal(path: Path) -> dict[str, Any]:
    """Push a file to the disk and describe it for the manifest."""
    files.sync(path)
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def delete_checkpoint(checkpoint: Path) -> None:
    """Delete by renaming first, so that a half-deleted checkpoint never looks like one.

    What the user has put into it stays, in a folder that is set aside.
    """
    if {entry.name for entry in os.scandir(checkpoint)} - set(FILES):
        aside = set_aside(checkpoint)
        for name in FILES:
            (aside / name).unlink(missing_ok=True)
        return
    doomed = checkpoint.with_name(f".deleting-{checkpoint.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, or what has the name of one: nothing of it is lost.

    Raises:
        CheckpointError: many were set aside before.
    """
    if len(list(path.parent.glob("step-*.aside-*"))) >= ASIDE:
        raise CheckpointError(
            f"{path.parent} holds {ASIDE} checkpoints that were damaged (step-….aside-…): check "
            "this disk, and delete them to continue"
        )
    names = (path.with_name(f"{path.name}.aside-{number}") for number in itertools.count(1))
    aside = next(name for name in names if not os.path.lexists(name))
    path.rename(aside)
    files.sync(path.parent)
    return aside


def remove_leftovers(folder: Path) -> None:
    """Remove checkpoints that a killed process left half written or half deleted."""
    for leftover in folder.glob(".*"):
        if LEFTOVER.fullmatch(leftover.name) and leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)


# ---------------------------------------------------------------------------------------------
# Reading


def find_newest(folder: Path) -> tuple[Path | None, list[str]]:
    """Find the newest complete checkpoint in `folder`.

    Returns:
        Its path, or None when there is none, and one line for each newer one that is damaged.

    Raises:
        CheckpointError: the folder, or a checkpoint in it, cannot be read.
    """
    problems: list[str] = []
    for checkpoint in list_checkpoints(folder):
        found = find_damage(checkpoint)
        if found is None:
            return checkpoint, problems
        problems.append(f"{checkpoint} is damaged: {found}")
    return None, problems


def list_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints in `folder`, newest first.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            names = [
                e.name
                for e in entries
                if NAME.fullmatch(e.name) and e.is_dir(follow_symlinks=False) and _is_ours(e)
            ]
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not folder.is_symlink():
            return []
        raise CheckpointError(
            f"{folder} cannot be read ({files.reason(error)}): nothing was changed; make its disk "
            "readable, then go on"
        ) from error
    return sorted((folder / name for name in names), key=step_of, reverse=True)


def _is_ours(entry: os.DirEntry[str]) -> bool:
    """Distinguish a checkpoint, whole or not, from a folder that the user gave such a name."""
    try:
        return any(file.name in FILES for file in Path(entry.path).iterdir())
    except OSError:  # reported when it is read
        return True


def step_of(checkpoint: Path) -> int:
    """Return the step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("step-"))


def find_damage(checkpoint: Path) -> str | None:
    """Describe what is wrong with a checkpoint; None if every byte is as it was written.

    Raises:
        CheckpointError: it cannot be read, which is no damage: its disk may come back.
    """
    try:
        manifest = json.loads(files.read_regular(checkpoint / MANIFEST))
        for name in (TENSORS, STATE):
            path, want = checkpoint / name, manifest[name]
            if path.stat().st_size != want["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, {want['bytes']} were written"
            if _sha256(path) != want["sha256"]:
                return f"{name} does not have the SHA-256 that its manifest records"
    except OSError as error:
        missing = Path(str(error.filename))
        gone = isinstance(error, FileNotFoundError) and not missing.is_symlink()
        if gone and checkpoint.is_dir():
            return f"{missing.name} is missing"
        raise _unreadable(checkpoint, error) from error
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read ({files.reason(error)})"
    return None


def _unreadable(checkpoint: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint} cannot be read ({files.reason(error)}): nothing was changed; make its disk "
        "readable, or move it elsewhere to go on from an earlier one"
    )


def load_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint back, on the CPU.

    Raises:
        CheckpointError: any byte differs from what was written, or it cannot be read.
    """
    found = find_damage(checkpoint)
    if found is not None:
        raise CheckpointError(f"{checkpoint} is damaged: {found}")
    try:
        tree = json.loads(files.read_regular(checkpoint / STATE))
        state = unpack(tree, load_file(checkpoint / TENSORS))
        if not isinstance(state, dict):
            raise TypeError(f"a {type(state).__name__}")
        return state
    except OSError as error:
        raise _unreadable(checkpoint, error) from error
    except (ValueError, LookupError, TypeError, RecursionError, SafetensorError) as error:
        raise CheckpointError(
            f"{checkpoint} holds no state of a run ({files.reason(error)}); move it elsewhere to "
            "go on from an earlier one"
        ) from error
