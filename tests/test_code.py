"""The code that the page shows beside a result: a command and Python that make it again."""

import html
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from app_models import MAKE
from builders import ROOT
from PIL import Image

pytest.importorskip("gradio")

from genkit import cli
from genkit.app import answer, chat, classify, code, images, model_index, parts, write
from genkit.app.parts import picture
from genkit.arguments import Parser
from genkit.commands import generate

# strategy, temperature, tokens, seed, top-p, top-k, beams
SAMPLED = ("sample", 0.7, 30, 3, 0.9, 5, 4)
BEAM = ("beam", 1.0, 12, 0, 0.9, 0, 3)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name in ("language", "talks", "reader", "classifier", "class_conditional", "two_latents"):
        MAKE[name](folder / name)
    return model_index.find_models([str(folder)])


@pytest.fixture(autouse=True)
def here(index, monkeypatch):
    """Where the models have the names that they have in the page."""
    folder = index.resolve(model_index.TEXT, "language").rpartition("/")[0]
    monkeypatch.chdir(folder)


def shown(page: str) -> tuple[list[str], str]:
    """The words of the command that a page shows, and its Python."""
    command, python = map(html.unescape, re.findall(r"<pre>(.*?)</pre>", page, re.S))
    return shlex.split(command), python


def run(python: str) -> list:
    """Run Python; return what it prints, before it becomes text."""
    printed: list = []
    exec(python, {"print": printed.append})
    return printed


@pytest.mark.parametrize("options", [SAMPLED, BEAM], ids=["sample", "beam"])
@pytest.mark.parametrize("prompt", ["The ", "the <b>\nfox"])
def test_format_code_makes_a_text_again(index, capsys, prompt, options):
    *_, written, page = write._write(index, "language", prompt, *options)
    command, python = shown(page)
    (record,) = run(python)
    assert f'<div class="text">{html.escape(record.text)}</div>' in written
    cli.main(command[1:])
    assert capsys.readouterr().out == f"{record.text}\n"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("two_latents", (None, 7, 3, None, None, None)),
        ("class_conditional", ("2", 1, 2, "ddim", 4, 1.5)),
        ("class_conditional", (images.EVERY, 0, 5, "dpm++", 2, 1)),
    ],
)
def test_format_code_makes_images_again(index, tmp_path, name, options):
    page = images._draw_samples(index, name, *options)
    command, python = shown(page)
    (record,) = run(python)
    assert re.findall(r'src="(.*?)"', page) == [
        source for image in record.images for source in re.findall(r'src="(.*?)"', picture(image))
    ]
    cli.main([*command[1:], "--output", str(tmp_path / "command.png")])
    record.save_grid(tmp_path / "python.png")
    assert (tmp_path / "command.png").read_bytes() == (tmp_path / "python.png").read_bytes()


def test_format_code_makes_a_tree_of_beams_again(index, capsys):
    command, python = shown(write._beams(index, "language", "The ", "beam", 6, 3))
    (record,) = run(python)
    assert len(record.steps) == 6 and sum(c.fate == "kept" for c in record.steps[0]) == 3
    cli.main(command[1:])
    assert capsys.readouterr().out == f"{record}\n"


def test_code_makes_an_answer_again(index):
    context = "the fox <i>is</i>\nalpha dog omega . the 'lazy' alef tav is where"
    page = answer._answer(index, "reader", "where is the dog?", context)
    found, python = map(html.unescape, re.findall(r"<pre>(.*?)</pre>", page, re.S))
    (record,) = run(python)
    assert answer.format_answer(record) == page.partition("<details")[0]
    piped = found.replace("genkit", f"{shlex.quote(sys.executable)} -m genkit.cli", 1)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(piped, shell=True, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and record.answer in done.stdout, done.stderr


def test_code_makes_a_reply_again(index):
    options = ("be", 3, 12, 0.7, 0.9)
    *_, (page, turns, _) = chat._send(index, "the <b>fox", "talks", [], *options)
    (python,) = map(html.unescape, re.findall(r"<pre>(.*?)</pre>", page, re.S))
    (record,) = run(python)
    assert record.completion == turns[-1].record.completion and len(turns) == 3
    stopped = [*turns[:2], chat.Turn({**turns[2].entry, "stopped": True})]
    assert "<details" not in chat.format_chat(stopped)


@pytest.mark.parametrize("do", [classify._explain, classify._fool])
def test_format_code_explains_and_attacks_again(index, tmp_path, monkeypatch, do):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    picture.save(tmp_path / "image.png")
    url = parts.data_url((tmp_path / "image.png").read_bytes())
    last = "saliency" if do is classify._explain else 9
    page = do(index, "classifier", url, "class 3", last)
    command, python = shown(page)
    (tmp_path / "classifier").symlink_to(Path("classifier").resolve())
    monkeypatch.chdir(tmp_path)
    (record,) = run(python)
    assert f"<figcaption>{html.escape(str(record))}</figcaption>" in page
    cli.main([*command[1:], "--output", "command.png"])
    record.save("python.png")
    assert Path("command.png").read_bytes() == Path("python.png").read_bytes()


def test_code_walks_and_denoises_again(index):
    walk = images._walk(index, "two_latents", None, 3, 5, 4)
    denoised = images._denoise(index, "class_conditional", "2", 1, "dpm++", 3, 1.5)
    folder = Path.cwd()
    given = ("(3, 5)", "4, None"), ("model, 1, 2", "'dpm++'", "'steps': 3", "'guidance': 1.5")
    files = ("walk.png", "denoising.png")
    for page, words, file in zip((walk, denoised), given, files, strict=True):
        (python,) = map(html.unescape, re.findall(r"<pre>(.*?)</pre>", page, re.S))
        assert all(word in python for word in words)
        run(python)
        with Image.open(folder / file) as image:
            assert image.width > image.height > 0


@pytest.mark.parametrize("prompt", ["--seed", "-1", "$(ls) `ls` \\ ' \""])
def test_command_of_any_prompt_is_read_as_that_prompt(prompt):
    words = shlex.split(code.command("generate", prompt, {"seed": 2}))
    parser = Parser()
    generate.add(parser)
    parsed = parser.parse_args(words[2:])
    assert parsed.prompt == [prompt] and parsed.seed == 2
