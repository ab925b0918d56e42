"""Files of folders that others can write in."""

import os
import socket
from pathlib import Path

import pytest
import torch
from builders import MAKE, run_here
from safetensors.torch import save_file

from genkit import files
from genkit.files import read_inside
from genkit.training import checkpoints
from genkit.training.folder import RunFolder
from genkit.vision import image_grid


def test_a_regular_file_is_read(tmp_path):
    (tmp_path / "real/inner").mkdir(parents=True)
    (tmp_path / "real/inner/file").write_bytes(b"12345")
    (tmp_path / "way").symlink_to("real")  # how the folder is reached is the caller's
    assert read_inside(tmp_path / "real/inner/file", tmp_path / "real", 5) == b"12345"
    assert read_inside(tmp_path / "way/inner/file", tmp_path / "way", 5) == b"12345"
    with pytest.raises(ValueError, match=r"inner/file has more than 4 bytes"):
        read_inside(tmp_path / "real/inner/file", tmp_path / "real", 4)
    for name in ("gone", "gone/file", "inner/gone"):
        with pytest.raises(FileNotFoundError):
            read_inside(tmp_path / "real" / name, tmp_path / "real", 5)


def test_nothing_else_is(tmp_path):
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "others").mkdir()
    (tmp_path / "others/file").write_text("secret")
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "file").write_text("own")
    (folder / "link").symlink_to("../secret")
    (folder / "own_link").symlink_to("file")
    (folder / "inner/link").symlink_to("../../secret")
    (folder / "linked").symlink_to("../others")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    names = ["link", "inner/link", "linked/file", "loop", "pipe", "inner", "file/file"]
    names += ["../secret", "..", f"{tmp_path}/secret"]
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "socket"))
        for name in [*names, "socket"]:
            with pytest.raises(ValueError, match=name):
                read_inside(folder / name, folder, 100)
    with pytest.raises(ValueError, match="zero"):
        read_inside(Path("/dev/zero"), Path("/dev"), 100)
    assert read_inside(folder / "own_link", folder, 100) == b"own"


def test_named_write_errors_are_for_the_file_that_is_written(tmp_path):
    """An error of what was to be written is not the disk's."""
    for error in (ChildProcessError("ended"), FileNotFoundError(2, "No such file", "/elsewhere/a")):
        with pytest.raises(type(error)) as raised, files.written_whole(tmp_path / "table"):
            raise error
        assert raised.value is error
    with pytest.raises(files.WriteError, match="table"), files.written_whole(tmp_path / "table"):
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def assert_modes(folder: Path, umask: int) -> None:
    found = list(folder.rglob("*"))
    assert found
    for path in found:
        new = 0o777 if path.is_dir() else 0o666
        assert path.stat().st_mode & 0o777 == new & ~umask, path


def test_files_are_written_with_the_umasks_mode(tmp_path, umask):
    """Weights, too, which safetensors writes for their owner alone."""
    weight = torch.ones(2)
    with files.written_whole(tmp_path / "cache" / "a.safetensors", shared=True) as scratch:
        save_file({"weight": weight}, scratch)
    files.write_text(tmp_path / "run.json", "{}")
    checkpoints.save_checkpoint(tmp_path / "checkpoints", 1, {"weight": weight}, keep=1)
    image_grid.grid(torch.zeros(4, 1, 8, 8), tmp_path / "samples.png")
    (tmp_path / "run").mkdir()
    run = RunFolder(tmp_path / "run")
    run.publish(lambda folder: MAKE["gan"](folder))
    run.write("samples/step-00000001.md", "text")
    assert_modes(tmp_path, umask)


@pytest.mark.slow
def test_all_files_of_a_run_have_the_umasks_mode(tmp_path, umask):
    short = ("--max_steps", "2", "--batch_size", "8", "--evaluations", "1", "--compile", "no")
    small = ("--widths", "8", "--discriminator_widths", "8", "--eval_samples", "16")
    run_here("train_gan", *short, *small, "--output_dir", tmp_path / "run")
    assert_modes(tmp_path / "run", umask)
