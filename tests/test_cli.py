import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from readers import pointer

from genkit import cli

GENKIT = str(Path(sys.executable).parent / "genkit")


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([GENKIT, *words], capture_output=True, text=True)


def test_importing_and_asking_for_help_loads_no_torch():
    code = "import sys, json, genkit; genkit.__version__; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "numpy"} & set(json.loads(done.stdout))
    code = (
        "import sys, genkit.cli\ntry:\n    genkit.cli.main(['--help'])\nexcept SystemExit:\n"
        "    print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False"


def test_help_shows_the_commands():
    assert "generate" in run("--help").stdout
    assert "answer" in run("--help").stdout
    assert "--temperature" in run("generate", "--help").stdout
    assert "--context" in run("answer", "--help").stdout


def test_generate_prints_the_text(trained):
    words = ("generate", "the ", "rain", "--model", str(trained), "--max-new-tokens", "9")
    done = run(*words, "--temperature", "0.5", "--seed", "1")
    assert done.returncode == 0 and done.stderr == ""
    import genkit

    records = genkit.generate(
        ["the ", "rain"], model=trained, max_new_tokens=9, temperature=0.5, seed=1
    )
    assert done.stdout == f"{records[0]}\n\n{records[1]}\n"


def test_one_text_is_printed_while_it_is_written(trained):
    words = (
        "generate",
        "the ",
        "--model",
        str(trained),
        "--strategy",
        "beam",
        "--stop",
        "e",
        "--eager",
    )
    done = run(*words, "--max-new-tokens", "20", "--bad-words", "x")
    assert done.returncode == 0 and done.stderr == ""
    import genkit

    options = {"strategy": "beam", "stop": ["e"], "max_new_tokens": 20, "bad_words": ["x"]}
    assert done.stdout == f"{genkit.generate('the ', model=trained, **options)}\n"


def test_without_a_model_or_a_network_the_error_says_what_would_do(tmp_path):
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    words = [GENKIT, "generate", "I am a"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith("error: model: cannot load 'gpt2'")
    assert "recipes/train_charlm.py --output_dir NAME" in done.stderr


def test_errors_are_one_line(trained):
    done = run("generate", "the ", "--model", str(trained), "--temperature", "0")
    assert done.returncode == 2
    assert done.stderr.startswith("error: temperature must be above 0, got 0")
    assert len(done.stderr.splitlines()) == 1
    assert run("generate").returncode == 2


# ---- answer


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """The folder of a model whose answers run from "alpha" to "omega"."""
    folder = tmp_path_factory.mktemp("models") / "pointer"
    made = pointer()
    made.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def course(tmp_path):
    path = tmp_path / "course.txt"
    path.write_bytes("One.\r\nThe Álpha\r\nis omega! The alef fox tav.\r\n".encode())
    return path


def test_answer_prints_the_sentence_and_the_score(reader, course, capsys, monkeypatch):
    import genkit

    context = course.read_bytes().decode()
    record = genkit.answer("Where?", context, model=reader)
    assert context[record.start : record.end] == "Álpha\r\nis omega"
    words = ("answer", "--context", str(course), "--model", str(reader))
    done = subprocess.run([GENKIT, *words, "Where?"], capture_output=True)
    assert done.returncode == 0 and done.stderr == b""
    shown = f"The «Álpha\r\nis omega»!  score {record.score:.3f}\n"
    assert done.stdout.decode() == shown
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(course.read_bytes())))
    cli.main(["answer", "--context", "-", "--model", str(reader), "Where?"])
    assert capsys.readouterr().out == shown


def test_answer_prints_alternatives_of_several_questions(reader, course, capsys, monkeypatch):
    path = reader.parent / "calibrated"
    shutil.copytree(reader, path)
    config = json.loads((path / "config.json").read_text())
    config["calibration"] = {"temperature": 2.0, "threshold": 9.0, "impossible": True}
    (path / "config.json").write_text(json.dumps(config))
    words = ["answer", "--context", str(course), "--model", str(path), "--top-k", "2"]
    cli.main([*words, "Where?", "Where is the fox?"])
    lines = capsys.readouterr().out.replace("\r\n", " ").splitlines()
    assert lines[0] == "Where?" and lines[3] == "Where is the fox?" and len(lines) == 6
    assert re.fullmatch(r"The «Álpha is omega»!  score 0\.\d{3}, confidence 0\.\d{3}", lines[1])
    assert lines[2].startswith("The «alef fox tav».  score 0.0")
    assert lines[1:3] == lines[4:]
    cli.main([*words[:-2], "--threshold", "-99", "Where?"])
    none = capsys.readouterr().out
    assert none.startswith("(no answer in this text)  score 0.")
    cli.main([*words[:-2], "--threshold", "-99", "--handle-impossible", "Where?"])
    assert capsys.readouterr().out == none
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    cli.main([*words[:-2], "--max-answer-len", "1", "--no-handle-impossible", "Where?"])
    assert "\x1b[1;32m" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        (["--context", "no-such-file"], "No such file or directory: 'no-such-file'"),
        (["--context", "latin"], "context: latin is not UTF-8 at byte 3"),
        (["--context", "empty"], "context: empty is empty; give a text"),
        (["--context", "."], "Is a directory: '.'"),
        (["", "--context", "text"], "question[1] is empty; give a text"),
        (["--context", "text", "--top-k", "0"], "top_k must be a whole number, 1 or more, got 0"),
        (["--context", "text", "--doc-stride", "99"], "more than doc_stride=99"),
        (["--context", "text", "--model", "nowhere/x/y"], "model: cannot load 'nowhere/x/y'"),
        (["--context", "text", "--threshold", "nan"], "threshold must be a number"),
    ],
)
def test_what_is_wrong_with_an_answer_is_one_line(
    reader, tmp_path, capsys, monkeypatch, options, message
):
    monkeypatch.chdir(tmp_path)
    Path("latin").write_bytes("caf\u00e9".encode("latin-1"))
    Path("empty").write_text(" \n")
    Path("text").write_text("the fox is lazy")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["answer", "--model", str(reader), "Where?", *options])
    assert stopped.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("error: ") and message in shown.err
    assert len(shown.err.splitlines()) == 1


def test_a_language_model_is_no_reader(trained, course):
    done = run("answer", "--context", str(course), "--model", str(trained), "Where?")
    assert done.returncode == 2 and "has no trained span head" in done.stderr
    assert len(done.stderr.splitlines()) == 1
