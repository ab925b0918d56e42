import argparse

import pytest

from genkit import cli
from genkit.commands import flags

VERB = """
def verb(text, *, width: float | int = 2, size: int | Sequence[int] | None = None,
         words: Sequence[str] = (), stop: bool | Literal["never"] | None = None,
         fast: bool = False, exact: bool = True, name: str | Path = DEFAULT, hidden: int = 0):
    '''Do it.

    Args:
        text: is no flag.
        width, size: of a
            box, 100% of it.
        words: to say: any.
        stop: early.
        fast: quick.
        exact: slow.
        name: of it.

    Returns:
        nothing: at all.
    '''
"""


@pytest.fixture
def parser(tmp_path, monkeypatch):
    (tmp_path / "made_up_verb.py").write_text(VERB)
    monkeypatch.syspath_prepend(tmp_path)
    found = flags.from_verb("made_up_verb", "verb", skip=("hidden",))
    assert [flag.name for flag in found] == [
        "width",
        "size",
        "words",
        "stop",
        "fast",
        "exact",
        "name",
    ]
    made = argparse.ArgumentParser()
    flags.add(made, found)
    return made


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("", {}),
        ("--width 3", {"width": 3.0}),
        ("--size 3", {"size": 3}),
        ("--size 3 --size 4 --size 5", {"size": [3, 4, 5]}),
        ("--words a", {"words": ["a"]}),
        ("--words a --words b", {"words": ["a", "b"]}),
        ("--stop yes", {"stop": True}),
        ("--stop no", {"stop": False}),
        ("--stop never", {"stop": "never"}),
        ("--fast --no-exact", {"fast": True, "exact": False}),
        ("--exact --name x", {"exact": True, "name": "x"}),
    ],
)
def test_a_signature_becomes_flags(parser, words, arguments):
    assert vars(parser.parse_args(words.split())) == arguments


def test_help_is_that_of_the_docstring(parser):
    text = " ".join(parser.format_help().split())
    assert "--width WIDTH of a box, 100% of it; default: 2" in text
    assert "--size SIZE of a box, 100% of it; may be repeated" in text
    assert "to say: any; may be repeated" in text and "--stop yes|no|never early" in text
    assert "nothing" not in text


def test_a_parameter_without_a_description_is_an_error(parser):
    with pytest.raises(ValueError, match="hidden"):
        flags.from_verb("made_up_verb", "verb")


def test_underscores_are_dashes_in_flags_only():
    words = ["a_b", "--top_k", "3", "--max_new_tokens=x_y", "-n_1", "--no_x y", "--", "--a_b"]
    expected = ["a_b", "--top-k", "3", "--max-new-tokens=x_y", "-n_1", "--no_x y", "--", "--a_b"]
    assert flags.with_dashes(words) == expected
    words = ["see --top_k", "--max_new-tokens", "3"]
    assert flags.with_dashes(words) == ["see --top_k", "--max-new-tokens", "3"]


def test_a_command_takes_its_flags_with_underscores(trained, capsys):
    words = ["generate", "the ", "--model", str(trained), "--strategy=greedy"]
    texts = []
    for flag in ("--max-new-tokens", "--max_new_tokens"):
        cli.main([*words, flag, "5"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and len(texts[0]) == len("the ") + 5 + 1
