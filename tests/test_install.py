"""The wheel: what is in it, and that it works where nothing else of this tree is."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from builders import ACCELERATE, ROOT, TWO

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
SOURCES = ("genkit", "recipes", "docs", "LICENSE", "README.md", "pyproject.toml", "setup.py")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built from a copy of the tree: setuptools writes beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source, copy = ROOT / name, folder / "tree" / name
        copy.parent.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(source, copy)
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir")
    subprocess.run([*PIP, "wheel", *options, folder, folder / "tree"], check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow  # compiles the kernels
def test_wheel_holds_every_file_of_the_package(wheel):
    assert wheel.name.startswith("hf_genkit-")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        head = archive.read(metadata).decode()
    left = {"__pycache__", "native"}  # the sources of the kernels
    package = (path for path in (ROOT / "genkit").rglob("*") if left.isdisjoint(path.parts))
    expected = {path.relative_to(ROOT).as_posix() for path in package if path.is_file()}
    expected |= {f"genkit/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.py")}
    course = [*(ROOT / "docs/course").glob("[!i]*.md"), *(ROOT / "docs/images").glob("course_*")]
    expected |= {f"genkit/{path.relative_to(ROOT).as_posix()}" for path in course}
    assert names == expected
    assert {"genkit/py.typed", "genkit/app/style.css", "genkit/app/pad.js"} <= names
    assert re.search(r"^Name: hf-genkit$", head, re.M) and "License-File: LICENSE" in head


def test_recipes_are_found_in_a_source_tree():
    from genkit import recipes

    files = recipes.find_recipes()
    assert set(files.values()) == set((ROOT / "recipes").glob("*.py"))
    assert {"align", "charlm", "gpt2", "finetune_text2image"} <= set(files)
    code = "import importlib.util as u; print(u.find_spec('genkit.recipes.train_vae').origin)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(files["vae"])


# ---- installed


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder in which the wheel alone is installed; its dependencies are those of the tests."""
    folder = tmp_path_factory.mktemp("installed")
    options = ("--no-deps", "--no-index", "--no-warn-script-location", "--target")
    subprocess.run([*PIP, "install", *options, folder, wheel], check=True)
    return folder


def run(installed: Path, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command where the installed package comes first, in a folder of its own."""
    environment = os.environ | {"PYTHONPATH": str(installed), "ACCELERATE_USE_CPU": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


TRAIN = ("train", "vae", "--max_steps", "10", "--compile", "no")


@pytest.mark.slow
def test_installed_package_trains_and_samples(installed, tmp_path):
    genkit = str(installed / "bin" / "genkit")
    where = run(installed, tmp_path, sys.executable, "-c", "import genkit; print(genkit.__file__)")
    assert where.stdout.strip() == str(installed / "genkit" / "__init__.py")
    done = run(installed, tmp_path, genkit, *TRAIN)
    assert done.returncode == 0, done.stderr
    card = (tmp_path / "runs" / "vae" / "README.md").read_text()
    assert "recipes/train_vae.py --max_steps 10 --compile no" in card
    done = run(installed, tmp_path, genkit, "sample", "runs/vae")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")


MISTAKES = {
    "--dpeth 3": "--dpeth: unknown flag; the most similar is --depth",
    "--text nowhere.txt": "text.*'nowhere.txt'",
    "--resume --output-dir nowhere": "output_dir.*nowhere",
}


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line(installed, tmp_path, words, processes):
    command = [sys.executable, "-m", "genkit", "train", "charlm", "--processes", processes]
    done = run(installed, tmp_path, *command, *words.split())
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(f"error: .*{MISTAKES[words]}.*\n", done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [(), TWO])
@pytest.mark.parametrize("words", MISTAKES)
def test_accelerate_launch_reports_a_mistake_once(installed, tmp_path, words, launcher):
    """The exit code, and what follows the line, are those of accelerate's launcher."""
    command = [*ACCELERATE, *launcher, "-m", "genkit.recipes.train_charlm"]
    done = run(installed, tmp_path, *command, *words.split())
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(errors) == 1
    assert re.search(MISTAKES[words], errors[0])
    assert "Traceback" not in done.stderr.partition(errors[0])[0]


def test_recipe_prints_its_file(capsys):
    from genkit import cli

    cli.main(["recipe", "charlm"])
    assert capsys.readouterr().out == (ROOT / "recipes" / "train_charlm.py").read_text()
