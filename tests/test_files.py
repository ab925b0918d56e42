"""Files of folders that others can write in."""

import os
import socket
from pathlib import Path

import pytest

from genkit import files
from genkit.files import read_inside


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
