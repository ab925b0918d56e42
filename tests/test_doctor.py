"""genkit doctor and genkit cache: what they say, and that only the cache's files are deleted."""

import re
import tempfile

import pytest

from genkit import __version__, cli, files
from genkit.commands import cache, doctor


def test_doctor_says_what_there_is_and_passes(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path / "kept"))
    cli.main(["doctor"])
    shown = capsys.readouterr().out
    assert shown.startswith(f"genkit      {__version__}, Python 3.")
    for name in ("libraries", "extras", "devices", "bfloat16", "kernels", "compiler", "cache"):
        assert re.search(rf"^{name} +\S", shown, re.M), name
    assert "~/kept: 0 files, 0 B" in shown and str(tmp_path) not in shown
    assert re.search(r"^test +passed: .*, \d+\.\d s$", shown, re.M)


def test_doctor_ends_with_an_error_where_nothing_is_learned(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "STEPS", 1)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor"])
    assert stopped.value.code == 1
    assert re.search(
        r"^test +failed: the loss went from (\S+) to \1", capsys.readouterr().out, re.M
    )


def test_doctor_names_an_error_of_any_kind(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "full"))
    fault = doctor.find_fault()
    assert fault is not None and fault.startswith("failed: FileNotFoundError: ")


def test_cache_is_cleared_of_its_own_files_alone(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path))
    own = [f"{'0a' * 32}.pixels", f"{'1b' * 32}.features.safetensors", ".writing-77.json"]
    others = ["notes.txt", f"{'0a' * 31}.pixels", "0a"]
    for name in (*own, *others):
        (tmp_path / name).write_bytes(b"x" * 700)
    (tmp_path / f"{'2c' * 32}.folder").mkdir()
    cli.main(["cache"])
    assert capsys.readouterr().out == f"{tmp_path}: 3 files, 2.1 kB\n"
    assert {path.name for path in files.list_cached()} == set(own)
    cli.main(["cache", "--clear"])
    assert capsys.readouterr().out == f"{tmp_path}: 3 files, 2.1 kB deleted\n"
    assert files.list_cached() == [] and all((tmp_path / name).exists() for name in others)
    cli.main(["cache"])
    assert capsys.readouterr().out == f"{tmp_path}: 0 files, 0 B\n"


@pytest.mark.parametrize(
    "count, text",
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (999_600, "1 MB"),
        (5.3e9, "5.3 GB"),
        (1e15, "1e+03 TB"),
    ],
)
def test_format_bytes_has_three_digits(count, text):
    assert cache.format_bytes(count) == text
