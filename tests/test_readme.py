"""Every block of the README and of the other pages does what it says, on tiny models.

Ids on the Hub stand for tiny models in the Hub's cache, or on a Hub on loopback. In the gate the
recipes' flags are parsed; in the slow tests each line runs for two steps. Of benchmarks the flags
are checked.
"""

import argparse
import contextlib
import functools
import importlib
import io
import itertools
import json
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from builders import (
    ROOT,
    facts_file,
    recipe_module,
    run_here,
    stable_diffusion,
    table_rows,
    write_table,
)
from chat_models import save_chat_model
from classifiers import make_image
from hub_server import Hub, serve
from PIL import Image
from sklearn.datasets import load_digits
from text_victims import train_classifier

from genkit import cli
from genkit.data import characters, scenes
from genkit.models import lm
from genkit.recipes import find_recipes
from genkit.text import language_model
from genkit.training.settings import parse
from genkit.vision import text2image

FILES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in FILES}
HISTORY = "CHANGELOG.md"  # has names that are no more
BLOCKS = {
    name: re.findall(r"^```(\w*)\n(.*?)^```$", page, re.M | re.S) for name, page in PAGES.items()
}
PYTHON = {
    name: [code for kind, code in blocks if kind == "python"] for name, blocks in BLOCKS.items()
}
PYTHON = {name: codes for name, codes in PYTHON.items() if codes}


def commands(names: Iterable[str]) -> list[str]:
    """Return the lines of all shell blocks of some pages, each once, without comments."""
    blocks = [code for name in names for kind, code in BLOCKS[name] if kind == "bash"]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines = [re.sub(r"(^|\s+)#\s.*", "", line).strip() for line in lines]
    return list(dict.fromkeys(line for line in lines if line))


LINES = commands(BLOCKS)
RECIPES = [line for line in LINES if re.search(r"accelerate launch |^genkit train ", line)]
BENCHMARKS = [line for line in LINES if line.startswith("python benchmarks/")]
SETUP = [line for line in LINES if re.match(r"pip |make |python3 -m venv |source ", line)]
PROOFS = [line for line in LINES if line.startswith("pytest ")]
OTHERS = [line for line in LINES if line not in RECIPES + BENCHMARKS + SETUP + PROOFS]
LONG = ("genkit push", "genkit stylize", "genkit dream", "genkit visualize")
SHORT = ("--max_steps", "2", "--batch_size", "8", "--evaluations", "1", "--compile", "no")
OWN = {
    "train_gan": ("--eval_samples", "20"),
    "train_diffusion": ("--eval_samples", "20"),
    "train_vae": ("--nll_images", "8", "--nll_samples", "2"),
    "train_pixels": ("--eval_samples", "8"),
    "train_qa": ("--max_seq_len", "48"),
    "finetune_text2image": ("--sample_steps", "2"),
    "align": ("--max_new_tokens", "8"),
}
HERE = {
    "--initializer cat": "--initializer c",  # a letter is a token of the small model
    "rajpurkar/squad": "questions.json",
    "user/pictures": "pictures",
    "path/to/model": "mine",
    "my_recipe.py": "recipes/train_charlm.py",  # which it is a copy of
    "-m genkit.recipes.train_charlm": "recipes/train_charlm.py",
}
PICTURES = sorted((ROOT / "docs" / "images").iterdir())
LARGEST = {".png": 150 << 10, ".gif": 300 << 10}  # bytes of a picture in docs/

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy")


def test_all_kinds_of_blocks_are_known():
    kinds = {kind for blocks in BLOCKS.values() for kind, _ in blocks}
    assert kinds == {"python", "bash", ""}
    assert sum(map(len, PYTHON.values())) > 12 and len(RECIPES) > 25 and len(BENCHMARKS) > 20
    for line in OTHERS:
        shapes = r"genkit |python -c |python -m genkit\.data\.scenes |cat prompts\.txt \| genkit "
        assert re.match(shapes, line), line


def test_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 180


# ---- a folder as a reader of the README would have


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    for seed, name in enumerate(("policies.csv", "claims.csv", "test.csv", "load.csv")):
        write_table(folder / name, table_rows(seed=seed)[0])
    text = PAGES["docs/text.md"]
    for name in ("mybook.txt", "sequel.txt", "books/one.md", "books/more/two.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text[:4000])
    (folder / "sequel.txt").write_text(text[4000:7000])
    (folder / "course.txt").write_text("It was written by Ada. The exam weighs 50 %.")
    (folder / "prompts.txt").write_text("The \nA \n")
    pair = {"prompt": "The ", "chosen": "a", "rejected": "b"}
    (folder / "pairs.jsonl").write_text(json.dumps(pair) + "\n" + json.dumps(pair) + "\n")
    answers = [{"prompt": "The ", "completion": "end"}, {"prompt": "A ", "completion": "text"}]
    for name in ("demos.jsonl", "demonstrations.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in answers))
    examples = [{"source": "3 May 2019", "target": "2019-05-03"}] * 2
    (folder / "dates.jsonl").write_text("".join(json.dumps(row) + "\n" for row in examples))
    every = "".join(map(chr, range(32, 127)))  # a model of characters knows them all
    (folder / "plays.txt").write_text(f"ANNE:\nGood morrow, sir.\n\nBEN:\n{every}\n\n" * 4)
    digits = load_digits()
    Image.fromarray(digits.images[3].astype(np.uint8) * 15).save(folder / "three.png")
    (folder / "beginnings.txt").write_text("The\nIf\n")
    pictures(folder, digits.images.astype(np.uint8) * 15, digits.target)
    for seed, name in enumerate(("cat.png", "harbour.png", "wave.png")):
        levels = 127.5 * (make_image(seed, side=96) + 1)
        Image.fromarray(levels.byte().permute(1, 2, 0).numpy()).save(folder / name)
    for kind, mode in {"photos": "RGB", "maps": "L"}.items():
        (folder / kind).mkdir()
        for seed in range(12):
            levels = 127.5 * (make_image(seed, side=32) + 1)
            picture = Image.fromarray(levels.byte().permute(1, 2, 0).numpy()).convert(mode)
            picture.save(folder / kind / f"{seed}.png")
    sentiment = train_classifier()
    sentiment.model.save_pretrained(folder / "sentiment")
    sentiment.tokenizer.save_pretrained(folder / "sentiment")
    for name in ("questions.json", "train-v2.0.json", "dev-v2.0.json"):
        facts_file(folder / name, 1, 12, own_words=True, impossible="v2" in name)
    scenes.write_scenes(folder / "scenes", count=40, test_count=4)
    with contextlib.chdir(folder):
        train()
    return folder


def pictures(folder: Path, shades: np.ndarray, labels: np.ndarray) -> None:
    """Write a folder of pictures, and tables of them."""
    for i in range(160):
        place = folder / "pictures" / str(labels[i]) / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(shades[i]).resize((64, 64)).save(place)
    for name, some in {"train": range(1000), "test": range(1000, 1600)}.items():
        cells = []
        for i in some:
            file = io.BytesIO()
            Image.fromarray(shades[i]).save(file, "png")
            cells.append({"bytes": file.getvalue(), "path": None})
        table = {"image": cells, "label": [int(labels[i]) for i in some]}
        pq.write_table(pa.table(table), folder / f"{name}.parquet")
    shutil.copytree(folder / "pictures" / "3", folder / "cats")
    captioned = {"image": cells[:40], "text": ["one", "two"] * 20}
    pq.write_table(pa.table(captioned), folder / "captioned.parquet")


def train() -> None:
    """Train what the README's Python has in runs/."""
    small = {
        "charlm": "train_charlm --depth 1 --width 32 --heads 2 --context 96 --text mybook.txt",
        "qa": "train_qa --from_scratch --data questions.json --depth 1 --width 32 --heads 2",
        "autoencoder": "train_autoencoder --widths 32 --latent_dim 2",
        "vae": "train_vae --network dense --widths 32 --latent_dim 2",
        "gan": "train_gan --widths 8 --discriminator_widths 8",
        "private": "train_private --widths 8 --critic_widths 4 8 --conditional",
        "diffusion": "train_diffusion --widths 8 16",
        "conditional": "train_diffusion --widths 8 16 --conditional",
        "classifier": "train_classifier --width 8 --depth 1",
        "translation": "train_translation --images photos --widths 8 16",
        "text2image": "train_text2image --images scenes/train.parquet --text_layers 1 "
        "--text_width 8 --widths 8 16",
    }
    for name, words in small.items():
        recipe, *given = words.split()
        given += [*SHORT, *OWN.get(recipe, ()), "--output_dir", f"runs/{name}"]
        run_here(recipe, *given)
    for name in ("mybook", "demo", "sft", "aligned"):
        shutil.copytree("runs/charlm", f"runs/{name}")
    rows = ("--depth", "1", "--width", "32", "--heads", "2", "--data", "policies.csv")
    run_here("train_table", *SHORT, *rows, "--output_dir", "runs/table")
    series = ("--window", "3", "--output_dir", "runs/series")
    run_here("train_table", *SHORT, *rows, *series)
    shape = ("--widths", "16", "--data", "policies.csv", "--output_dir", "runs/dae")
    run_here("train_table_autoencoder", *SHORT, *shape)
    shutil.copytree("runs/gan", "runs/collapsed")
    shutil.copytree("runs/classifier", "runs/large")
    replies = ("--depth", "1", "--width", "32", "--dialogue", "plays.txt", "--max_steps", "30")
    run_here("train_seq2seq", *SHORT, *replies, "--output_dir", "runs/seq2seq")
    shutil.copytree("runs/seq2seq", "runs/dates")
    reward = ("--init_from", "runs/sft", "--data", "pairs.jsonl", "--output_dir", "runs/reward")
    run_here("train_reward", *SHORT, *reward)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A Hub's cache with small models in place of the default ones."""
    folder = tmp_path_factory.mktemp("cache")
    with torch.random.fork_rng(), text2image.numpy_as_it_was():
        torch.manual_seed(0)
        tokenizer = characters.make_tokenizer("".join(map(chr, range(32, 127))) + "\n")
        place = snapshot(folder, language_model.DEFAULT, language_model.REVISION)
        lm.make_model("gpt2", len(tokenizer), 128, 1, 32, 2, 0.0).save_pretrained(place)
        lm.save_tokenizer(tokenizer, place)
        place = snapshot(folder, "HuggingFaceTB/SmolLM2-135M-Instruct", "0" * 40)
        save_chat_model(place)
        place = snapshot(folder, text2image.DEFAULT, text2image.REVISION)
        stable_diffusion().save_pretrained(place)
    return folder


def snapshot(cache: Path, name: str, commit: str) -> Path:
    home = cache / f"models--{name.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    return home / "snapshots" / commit


@pytest.fixture(autouse=True)
def there(request, monkeypatch):
    if "home" in request.fixturenames:
        monkeypatch.chdir(request.getfixturevalue("home"))
        cache = request.getfixturevalue("cache")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))


# ---- Python

# smaller pictures and fewer steps; and models that have learned nothing draw no threes
QUICKER = {
    "classes == 3": "latents[:, 0] > 0",
    "size=(512, 768)": "size=(16, 16)",
    "steps=30": "steps=2",
    "steps=100": "steps=5",
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "README.md")) for n in PYTHON]
)
def test_python(home, server, name):
    """The blocks of a page go on from one another."""
    names = {"__name__": "__main__"}
    for number, code in enumerate(PYTHON[name]):
        for slow, quick in QUICKER.items():
            code = code.replace(slow, quick)
        if "user/" in code:
            on_loopback([sys.executable, "-c", code], home, server)
            continue
        printed = io.StringIO()
        with torch.random.fork_rng(), contextlib.redirect_stdout(printed):
            exec(compile(code, f"{name}, Python block {number}", "exec"), names)
        assert bool(printed.getvalue().strip()) == ("print(" in code), code


@pytest.fixture(scope="module")
def server():
    with serve() as running:
        yield running


def on_loopback(command: list[str], home: Path, server: Hub) -> None:
    environment = os.environ | server.environment(home / "hub")
    done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- the command


@pytest.mark.parametrize(
    "line",
    [pytest.param(n, marks=[pytest.mark.slow] * n.startswith(LONG)) for n in OTHERS],
)
def test_commands(home, server, line, monkeypatch, capsys):
    line, _, output = line.partition(" > ")
    if " | " in line:
        start, line = line.split(" | ")
        given = Path(start.split()[1]).read_bytes()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
    words = shlex.split(line)
    if words[:2] == ["python", "-m"]:
        words += ["--count", "40", "--test_count", "4", "--output", "made"]
        monkeypatch.setattr(sys, "argv", words[2:])
        importlib.import_module(words[2]).main()
    elif words[0] == "python":
        exec(compile(words[2], line, "exec"), {})
    elif words[1] in ("app", "chat", "demo"):  # with tests of their own
        parser = argparse.ArgumentParser()
        importlib.import_module(f"genkit.commands.{words[1]}").add(parser)
        parser.parse_args(words[2:])
    elif words[1] == "push":
        on_loopback([sys.executable, "-m", "genkit.cli", *words[1:]], home, server)
    else:
        if "--model" not in words and words[1] == "answer":
            words += ["--model", "runs/qa"]  # the default reader is too large to be made up
        cli.main(words[1:])
        printed = capsys.readouterr().out
        assert printed.strip()
        if output:
            Path(output).write_text(printed, encoding="utf-8")
            compile(printed, output, "exec")


@pytest.mark.parametrize("line", SETUP)
def test_what_is_installed_exists(line):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    _, *words = shlex.split(line)
    if line.startswith("pip "):
        assert words[0] == "install"
        for word in words[1:]:
            name, _, extra = word.rstrip("]").partition("[")
            assert name in ("-e", ".", project["name"])
            assert not extra or extra in project["optional-dependencies"]
    elif line.startswith("make "):
        rules = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^{words[0]}:", rules, re.M)
    else:
        assert line == "python3 -m venv .venv && source .venv/bin/activate"


@pytest.mark.slow
def test_quick_start(tmp_path):
    """The quick start of the README runs from an empty folder, line by line."""
    start = PAGES["README.md"].split("## Quick start")[1].split("\n## ")[0]
    shell, python = re.findall(r"^```\w+\n(.*?)^```$", start, re.M | re.S)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in (["bash", "-e", "-c", shell], [sys.executable, "-c", python]):
        environment = os.environ | {"PATH": path}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


# ---- recipes


def split(line: str) -> tuple[list[str], str, list[str]]:
    """Return the launcher's words, the recipe, and its words."""
    for name, local in HERE.items():
        line = line.replace(name, local)
    words = list(itertools.dropwhile(re.compile(r"[A-Z_]+=").match, shlex.split(line)))
    if words[0] == "genkit":
        words, name = words[3:], find_recipes()[words[2]].stem
        if "--processes" in words:
            del words[words.index("--processes") : words.index("--processes") + 2]
        return [], name, words
    first = next(i for i, word in enumerate(words) if word.startswith("recipes/"))
    return words[2:first], Path(words[first]).stem, words[first + 1 :]


NAMING = (
    "--text",
    "--images",
    "--val_images",
    "--data",
    "--dialogue",
    "--val_data",
    "--extractor",
    "--init_from",
    "--latent",
    "--style",
    "--text_encoder",
)


@pytest.mark.parametrize("line", RECIPES)
def test_flags_of_recipes(line, tmp_path, monkeypatch):
    """The launcher and the recipe know all flags, and take their values as they are given.

    A run to resume has to be there.
    """
    from accelerate.commands.launch import launch_command_parser

    launcher, recipe, words = split(line)
    launch_command_parser().parse_args([*launcher, f"recipes/{recipe}.py"])
    monkeypatch.chdir(tmp_path)
    for flag, word in itertools.pairwise(words):
        if flag in NAMING:  # what it names must be there
            path = Path(word.strip("/"))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch() if path.suffix else path.mkdir(exist_ok=True)
    for word in words[words.index("--pairs") + 1 :][:2] if "--pairs" in words else ():
        Path(word).mkdir(exist_ok=True)
    words = [word for word in words if word != "--resume"]
    with recipe_module(recipe) as module:
        settings = parse(module.Settings, lambda *_: {}, words)
    for name, values in re.findall(r"--(\w+)((?: (?!--)\S+)*)", " ".join(words)):
        found = getattr(settings, name)
        each = found if isinstance(found, list | tuple) else [found]
        assert " ".join(map(spell, each)) == (values.strip() or "yes"), name


def spell(value) -> str:
    """Write the value of a setting as a command line does."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


@pytest.mark.parametrize("name", PAGES)
def test_no_two_lines_of_a_page_train_into_one_folder(name):
    """A folder holds one run, so that the second line would be refused."""
    folders = []
    for line in commands([name]):
        if line.startswith("genkit train ") and "--resume" not in line:
            words = shlex.split(line)
            given = "--output_dir" in words
            tuned = "-tuned" if "--init_from" in words else ""
            folders.append(words[words.index("--output_dir") + 1] if given else words[2] + tuned)
    assert len(folders) == len(set(folders))


@pytest.mark.slow
def test_recipes_run(home, monkeypatch):
    """In the order of the pages, each for two steps."""
    shutil.copytree("runs/charlm", "mine", ignore=shutil.ignore_patterns("checkpoints"))
    shutil.rmtree("runs/mybook")
    for number, line in enumerate(RECIPES):
        launcher, recipe, words = split(line)
        if "--push_to_hub" in words or "--num_machines" in launcher:
            continue  # in test_hub; there is one machine
        words = [word.replace("/shared/", "") for word in words]
        if "--output_dir" not in words:
            words += ["--output_dir", f"runs/{number}"]
        elif "--resume" not in words:
            shutil.rmtree(words[words.index("--output_dir") + 1], ignore_errors=True)
        if recipe == "train_qa" and "--from_scratch" not in words:
            words += ["--from_scratch"]  # the default encoder is too large to be made up
        context = ("--context", "32") if recipe == "train_wordlm" else ()
        print(f"{recipe} {' '.join(words)}")
        run_here(recipe, *words, *SHORT, *OWN.get(recipe, ()), *context)
        if "--dry_run" not in words:
            log = Path(words[words.index("--output_dir") + 1], "metrics.jsonl")
            assert json.loads(log.read_text().splitlines()[-1])["step"] == 2


# ---- benchmarks


@pytest.mark.parametrize("line", BENCHMARKS)
def test_flags_of_benchmarks(line):
    words = shlex.split(line)
    own = words[2 : words.index("--")] if "--" in words else words[2:]
    source = (ROOT / words[1]).read_text(encoding="utf-8")
    for flag in (word for word in own if word.startswith("--")):
        assert f'"{flag}"' in source, f"{words[1]} has no {flag}"


# ---- what pages name


def anchors(name: str) -> set[str]:
    """Return the anchors of a page's sections, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", PAGES[name], re.M)
    return {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    prose = re.sub(r"^```.*?^```$", "", PAGES[name], flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        target, _, section = link.partition("#")
        if target.startswith("https://"):
            continue
        file = ((ROOT / name).parent / target).resolve() if target else ROOT / name
        assert file.is_file(), link
        if section:
            assert section in anchors(str(file.relative_to(ROOT))), link


@pytest.mark.parametrize("file", PICTURES, ids=lambda file: file.name)
def test_pictures_are_small_and_shown(file):
    assert file.stat().st_size <= LARGEST[file.suffix]
    assert f"images/{file.name})" in "".join(PAGES.values())


def quoted(name: str) -> list[str]:
    """Return what a page has in single backquotes."""
    prose = re.sub(r"^```.*?^```$", "", PAGES[name], flags=re.M | re.S)
    return [] if name == HISTORY else re.findall(r"`([^`]+)`", prose)


@pytest.mark.parametrize("name", PAGES)
def test_what_is_named_exists(name):
    """Files, modules, functions and flags."""
    for words in quoted(name):
        if re.fullmatch(r"(?:recipes|genkit|benchmarks|tests)/[\w/.]+", words):
            assert (ROOT / words).exists(), words
        elif re.fullmatch(r"genkit(\.\w+)+", words):
            pkgutil.resolve_name(words)
        for flag in re.findall(r"(?<!\w)--([a-z][\w-]+)", words):
            name = flag.removeprefix("no-").replace("-", "_")
            assert re.search(rf"\b{name}\b", all_code()), flag


@functools.cache
def all_code() -> str:
    """Return the text of what takes flags, dashes as underscores; and flags of others."""
    folders = ("genkit", "recipes", "benchmarks")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    code = "\n".join(file.read_text(encoding="utf-8") for file in files)
    others = "config_file num_processes num_machines machine_rank help extra_index_url"
    return f"{code.replace('-', '_')} {others}"
