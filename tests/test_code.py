"""The code that the page shows beside a result: a command and Python that make it again."""

import html
import re
import shlex

import pytest
from app_models import MAKE

pytest.importorskip("gradio")

from genkit import cli
from genkit.app import code, images, model_index, write
from genkit.app.parts import picture
from genkit.arguments import Parser
from genkit.commands import generate

# strategy, temperature, tokens, seed, top-p, top-k, beams
SAMPLED = ("sample", 0.7, 30, 3, 0.9, 5, 4)
BEAM = ("beam", 1.0, 12, 0, 0.9, 0, 3)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name in ("language", "class_conditional", "two_latents"):
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


@pytest.mark.parametrize("prompt", ["--seed", "-1", "$(ls) `ls` \\ ' \""])
def test_command_of_any_prompt_is_read_as_that_prompt(prompt):
    words = shlex.split(code.command("generate", prompt, {"seed": 2}))
    parser = Parser()
    generate.add(parser)
    parsed = parser.parse_args(words[2:])
    assert parsed.prompt == [prompt] and parsed.seed == 2
