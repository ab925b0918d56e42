"""Files of folders that others can write in."""

import os
import socket

import pytest

from genkit.files import read_regular


def test_a_regular_file_is_read(tmp_path):
    (tmp_path / "real/inner").mkdir(parents=True)
    (tmp_path / "real/inner/file").write_bytes(b"12345")
    (tmp_path / "way").symlink_to("real")  # how the folder is reached is the caller's
    assert read_regular(tmp_path / "real", "inner/file", 5) == b"12345"
    assert read_regular(tmp_path / "way", "inner/file", 5) == b"12345"
    with pytest.raises(ValueError, match=r"inner/file in .* has more than 4 bytes"):
        read_regular(tmp_path / "real", "inner/file", 4)
    for name in ("gone", "gone/file", "inner/gone"):
        with pytest.raises(FileNotFoundError):
            read_regular(tmp_path / "real", name, 5)


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
    names = ["link", "own_link", "inner/link", "linked/file", "loop", "pipe", "inner", "file/file"]
    names += ["../secret", "inner/../file", "..", f"{tmp_path}/secret"]
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "socket"))
        for name in [*names, "socket"]:
            with pytest.raises(ValueError, match=name):
                read_regular(folder, name, 100)
    with pytest.raises(ValueError):
        read_regular("/dev", "zero", 100)
