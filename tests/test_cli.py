import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import app_models
import builders
import pytest
from classifiers import make_image
from PIL import Image
from readers import pointer

from genkit import cli
from genkit.commands import common
from genkit.engine import kernels

GENKIT = str(Path(sys.executable).parent / "genkit")


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([GENKIT, *words], capture_output=True, text=True)


def test_importing_and_asking_for_help_loads_no_torch():
    code = "import sys, json, genkit; genkit.__version__; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "numpy"} & set(json.loads(done.stdout))
    code = """
import contextlib, io, sys
from genkit import cli
for words in (["--help"], *([name, "--help"] for name in cli.COMMANDS)):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        cli.main(words)
print({"torch", "transformers", "diffusers", "numpy", "gradio"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_command_runs_in_a_notebook_of_another_environment(monkeypatch):
    """Whose kernel sets a backend for pictures that this one need not have."""
    monkeypatch.setenv("MPLBACKEND", "module://of_another_environment")
    code = "from genkit import cli; cli.main(['recipe', 'vae']); import matplotlib"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_generating_imports_nothing_that_its_model_does_not(tmp_path):
    """Beside Python's own packages: genkit, and what torch and the model's class import."""
    builders.text_model(tmp_path / "model")
    code = """
import sys, torch, transformers.models.llama.modeling_llama
def packages():
    return {name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names
bare = packages()
import genkit
genkit.generate("a", model=sys.argv[1], max_new_tokens=1)
print(packages() - bare)
print({"app", "metrics", "qa", "training", "vision"} & {n.partition(".")[2] for n in sys.modules})
print({"datasets", "diffusers", "evaluate", "gradio", "matplotlib", "pandas", "peft", "sklearn",
       "torch._inductor.compile_fx", "torchvision"} & set(sys.modules))
"""
    words = [sys.executable, "-c", code, str(tmp_path / "model")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["{'genkit'}", "set()", "set()"]


def test_help_shows_commands_options_and_examples(capsys):
    def told(*words):
        with pytest.raises(SystemExit) as stopped:
            cli.main([*words, "--help"])
        assert stopped.value.code == 0
        return capsys.readouterr().out

    for name, text in cli.COMMANDS.items():
        assert re.search(rf"^ +{name}\s+{text}", told(), re.M)
        assert f"examples:\n  genkit {name}" in told(name) and "--debug" in told(name)
    assert "--temperature" in told("generate") and "--context" in told("answer")


def test_version_module_and_verbs():
    import genkit

    command = [sys.executable, "-m", "genkit", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"genkit {genkit.__version__}\n"
    assert set(genkit.__all__) <= set(dir(genkit))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("trian", r"command: .*'trian'.*train"),
        ("generate a --temprature 1", r"--temprature: .*--temperature"),
        ("generate a --top_q 1", r"--top-q: .*--top-[kp]"),
        ("generate a --top_k x", r"--top-k: .*'x'"),
        ("generate a --xyzzy", r"--xyzzy: .*--help"),
        ("generate", r"prompt"),
        ("train", r"recipe"),
        ("train charm", r"recipe: .*'charm'.*charlm"),
        ("train charlm --processes 0", r"--processes must be 1 or more, got 0"),
        ("train charlm --dpeth 3", r"--dpeth: .*--depth"),
        ("train charlm --val-txt a", r"--val-txt: .*--val_text"),
        ("train charlm --depth x", r"--depth: .*'x'"),
        ("train charlm book.txt", r"'book.txt'"),
    ],
)
def test_a_misspelt_word_is_one_line(capsys, monkeypatch, words, message):
    monkeypatch.setattr(sys, "argv", ["genkit"])
    with pytest.raises(SystemExit) as stopped:
        cli.main(words.split())
    assert stopped.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == "" and re.fullmatch(f"error: .*{message}.*\n", shown.err)


def test_help_of_a_recipe_shows_its_flags_and_defaults(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["genkit"])
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "charlm", "--processes", "2", "--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert re.search(r"--depth \S+ layers.*?default: \d+\)", text)


def test_generate_prints_the_text(trained):
    words = ("generate", "the ", "rain", "--model", str(trained), "--max-new-tokens", "9")
    done = run(*words, "--temperature", "0.5", "--seed", "1")
    assert done.returncode == 0 and done.stderr == ""
    import genkit

    records = genkit.generate(
        ["the ", "rain"], model=trained, max_new_tokens=9, temperature=0.5, seed=1
    )
    assert done.stdout == f"{records[0]}\n\n{records[1]}\n"


@pytest.mark.slow
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
    )
    done = run(*words, "--max-new-tokens", "20", "--bad-words", "x")
    assert done.returncode == 0 and done.stderr == ""
    import genkit

    options = {"strategy": "beam", "stop": ["e"], "max_new_tokens": 20, "bad_words": ["x"]}
    assert done.stdout == f"{genkit.generate('the ', model=trained, **options)}\n"


@pytest.mark.slow
def test_without_a_model_or_a_network_the_error_says_what_would_do(tmp_path):
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    words = [GENKIT, "generate", "I am a"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith("error: model: cannot load 'gpt2'")
    assert "`genkit train charlm --output_dir NAME`" in done.stderr


@pytest.mark.slow
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


@pytest.mark.slow
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
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    cli.main([*words[:-2], "--max-answer-len", "1", "--no-handle-impossible", "Where?"])
    assert "\x1b[1;32m" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    cli.main([*words[:-2], "--no-handle-impossible", "Where?"])
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        (["--context", "no-such-file"], "context: cannot read no-such-file"),
        (["--context", "latin"], "context: latin is not UTF-8 at byte 3"),
        (["--context", "empty"], "context: empty is empty; give a text"),
        (["--context", "."], "context: cannot read .:"),
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


@pytest.mark.slow
def test_a_language_model_is_no_reader(trained, course):
    done = run("answer", "--context", str(course), "--model", str(trained), "Where?")
    assert done.returncode == 2 and "which genkit.generate takes" in done.stderr
    assert len(done.stderr.splitlines()) == 1


# ---- machines and pipes


def here(capsys, *words, given=None, monkeypatch=None):
    """Run a command in this process; return what it prints."""
    if given is not None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
    cli.main([str(word) for word in words])
    return capsys.readouterr().out


def test_prompts_by_a_pipe_are_lines_with_three_ends_and_no_byte_order_mark(monkeypatch):
    given = "\ufeffa\u2028b\r\n\r\nc\x0cd\re\x85f\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
    assert common.read_texts("prompt", ["-"]) == ["a\u2028b", "c\x0cd", "e\x85f"]


def test_prompts_come_by_a_pipe_and_records_go_as_json(trained, capsys, monkeypatch):
    import genkit

    words = ("generate", "-", "--model", trained, "--max-new-tokens", 8, "--seed", 3)
    lines = "the \n\nrain\n"
    out = here(capsys, *words, "--json", given=lines, monkeypatch=monkeypatch)
    rows = genkit.generate(["the ", "rain"], model=trained, max_new_tokens=8, seed=3)
    found = json.loads(out)
    assert [row["completion"] for row in found] == [row.completion for row in rows]
    assert [row["seed"] for row in found] == [3, 4]
    assert found[0]["log_probabilities"] == rows[0].log_probabilities
    assert found[1]["finish"] == rows[1].finish and found[1]["tokens"] == rows[1].tokens
    out = here(capsys, *words, given=lines, monkeypatch=monkeypatch)
    assert out == "\n\n".join(str(row) for row in rows) + "\n"


@pytest.mark.slow
def test_a_reader_that_has_had_enough_is_no_error(trained):
    command = f"{GENKIT} generate the rain --model {trained} --max-new-tokens 20 | head -c 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert done.stderr == "" and len(done.stdout) == 1


def test_answers_as_json(reader, course, capsys):
    out = here(
        capsys, "answer", "Where?", "--context", course, "--model", reader, "--top-k", 2, "--json"
    )
    (record,) = json.loads(out)
    text = course.read_bytes().decode()
    assert text[record["start"] : record["end"]] == record["answer"] == "Álpha\r\nis omega"
    assert len(record["alternatives"]) == 1 and "context" not in record


@pytest.fixture(scope="module")
def drawer(tmp_path_factory):
    """The folder of a GAN that is told three classes."""
    import torch

    from genkit.hub import vendoring
    from genkit.models import gan

    folder = tmp_path_factory.mktemp("models") / "gan"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        generator = gan.Generator((1, 8, 8), 3, widths=(8,), patch=4, labels=3).eval()
    vendoring.save_pipeline(gan.GANPipeline(generator), folder)
    return folder


def test_sample_writes_a_grid(drawer, tmp_path, capsys):
    import genkit

    grid, same = tmp_path / "grid.png", tmp_path / "same.png"
    words = ("sample", drawer, "-n", 4, "--seed", 5, "--label", 2, "--output", grid)
    assert here(capsys, *words).splitlines()[-1] == str(grid)
    samples = genkit.sample(drawer, 4, seed=5, label=2)
    samples.save_grid(same)
    assert grid.read_bytes() == same.read_bytes()
    found = json.loads(here(capsys, *words, "--json"))
    assert found["seeds"] == [5, 6, 7, 8] and found["labels"] == [2, 2, 2, 2]
    assert found["output"] == str(grid) and "images" not in found


def test_explain_prints_and_draws(trained, tmp_path, capsys):
    from genkit.text import explain

    words = ("explain", "the ", "--model", trained)
    likely = explain.next_tokens("the ", model=trained, top=3)
    assert here(capsys, *words, "--top", 3) == f"{likely}\n"
    picture = tmp_path / "next.png"
    assert here(capsys, *words, "--output", picture).endswith(f"{picture}\n")
    assert picture.read_bytes().startswith(b"\x89PNG")
    tree = explain.beam_tree("the ", model=trained, beams=2, max_new_tokens=4)
    asked = ("--show", "beams", "--beams", 2, "--max-new-tokens", 4)
    assert here(capsys, *words, *asked) == f"{tree}\n"
    series = here(capsys, *words, "--show", "temperatures", "--max-new-tokens", 6, "--json")
    assert {"temperature", "distinct_1"} <= set(json.loads(series)["texts"][0])
    page = tmp_path / "text.html"
    here(capsys, *words, "--show", "alternatives", "--output", page)
    assert "<html" in page.read_text()


def test_evaluate_tells_text_from_images(trained, drawer, text_file, tmp_path, capsys):
    import genkit

    out = here(capsys, "evaluate", trained, "--data", text_file, "--stride", 16)
    assert out == f"{genkit.perplexity(text_file.read_text(), model=trained, stride=16)}\n"
    for data in (text_file, [text_file.read_text()]):
        assert out == f"{genkit.evaluate(trained, data, stride=16)}\n"
    with pytest.raises(SystemExit):
        cli.main(["evaluate", str(drawer), "--data", "digits"])
    assert "extractor is required" in capsys.readouterr().err


@pytest.fixture(scope="module")
def painter(tmp_path_factory):
    """The folder of a text-to-image model."""
    import torch
    from builders import stable_diffusion

    folder = tmp_path_factory.mktemp("models") / "painter"
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stable_diffusion().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stylizer(tmp_path_factory):
    from builders import tiny_stylizer

    folder = tmp_path_factory.mktemp("models") / "stylizer"
    tiny_stylizer(folder)
    return folder


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """The folder of an encoder-decoder."""
    from builders import tiny_seq2seq

    folder = tmp_path_factory.mktemp("models") / "writer"
    tiny_seq2seq(folder)
    return folder


@pytest.fixture(scope="module")
def translator(tmp_path_factory):
    from builders import tiny_translator

    folder = tmp_path_factory.mktemp("models") / "translator"
    tiny_translator(folder)
    return folder


@pytest.fixture(scope="module")
def of_tables(tmp_path_factory):
    """The folder of a table model."""
    from genkit.tabular.model import save_table

    folder = tmp_path_factory.mktemp("models") / "of_tables"
    save_table(builders.tiny_table(), folder)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """The folder of an autoencoder of tables."""
    folder = tmp_path_factory.mktemp("models") / "encoder"
    builders.tiny_table_autoencoder(folder)
    return folder


RECORDS = {
    "generate": "generate the rain --model {trained} --max-new-tokens 2 --strategy beam --n-best 2",
    "answer": "answer Where? --context {course} --model {reader}",
    "sample": "sample {drawer} -n 2 --label 1 --output a.png",
    "imagine": "imagine fox --model {painter} --steps 2 --output a.png",
    "explain": "explain the --model {trained}",
    "explain temperatures": "explain the --model {trained} --show temperatures --max-new-tokens 2",
    "explain beams": "explain the --model {trained} --show beams --max-new-tokens 2",
    "explain alternatives": "explain the --model {trained} --show alternatives",
    "evaluate": "evaluate {trained} --data {text_file}",
    "compare": "compare {trained} {trained} --prompts {prompts} --reward length=3 "
    "--max-new-tokens 4",
    "search-errors": "search-errors {writer} --data {examples} --beams 1",
    "attribute": "attribute {picture} --model {classifier}",
    "attack": "attack {picture} --model {classifier} --steps 2",
    "dream": "dream {picture} --model {classifier} --octaves 1 --steps 1",
    "visualize": "visualize {classifier} --target 3 --steps 1",
    "stylize": "stylize {picture} --style {picture} --model {classifier} --steps 1 --scales 1",
    "stylize in one pass": "stylize {picture} --model {stylizer}",
    "sample rows": "sample {of_tables} -n 3 --where region=north --output rows.csv",
    "fill": "fill {rows} --model {of_tables} --draws 2",
    "fill by an autoencoder": "fill {rows} --model {encoder}",
    "features": "features {rows} --model {encoder}",
    "anomalies": "anomalies {rows} --model {of_tables} --count 2 --output surprises.csv",
    "evaluate rows": "evaluate {of_tables} --data {rows} --count 40 --output columns.png",
    "translate": "translate {picture} --model {translator} --steps 2 --seed 1 2",
}
if kernels.available():
    RECORDS["quantize"] = "quantize {trained} --to int8 --output-dir small"


@pytest.mark.parametrize("name", RECORDS)
def test_json_is_all_that_a_command_prints(
    trained,
    drawer,
    reader,
    painter,
    stylizer,
    writer,
    translator,
    of_tables,
    encoder,
    course,
    text_file,
    tmp_path,
    capsys,
    monkeypatch,
    name,
):
    classifier, picture = tmp_path / "classifier", tmp_path / "picture.png"
    app_models.classifier(classifier)
    levels = (127.5 * (make_image() + 1)).byte().permute(1, 2, 0).numpy()
    Image.fromarray(levels).save(picture)
    monkeypatch.chdir(tmp_path)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the \nrain \n")
    rows = builders.write_table(tmp_path / "rows.csv", builders.table_rows(60)[0])
    examples = tmp_path / "examples.jsonl"
    examples.write_text('{"source": "a b", "target": "b a"}\n')
    words = RECORDS[name].format(**locals()).split()
    found = json.loads(here(capsys, *words, "--json"), parse_constant=pytest.fail)
    assert found and isinstance(found, dict | list)


def test_json_is_taken_by_every_command_with_a_record(capsys):
    taken = set()
    for name in cli.COMMANDS:
        with pytest.raises(SystemExit):
            cli.main([name, "--help"])
        taken |= {name} if "--json" in capsys.readouterr().out else set()
    known = {name.split()[0] for name in RECORDS}
    assert taken == known | {"push", "quantize"}  # test_hub pushes; kernels quantise


def test_print_json_writes_null_for_numbers_that_json_does_not_have(capsys):
    common.print_json({"score": -math.inf, "all": [math.nan, 1.5]})
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found == {"score": None, "all": [None, 1.5]}


@pytest.mark.parametrize(
    "words, message",
    [
        ("sample {drawer} --label 3", "label must be 0 to 2, got 3"),
        ("sample {drawer} --label 1 --steps 3", "steps=3"),
        ("sample {drawer} --label 1 --output a.jpg", "--output must end in .png or .csv or"),
        ("sample {drawer} --where a=1 --output a.png", "--where is for models of tables"),
        ("sample {drawer} --label 1 --output no/a.png", "--output: the folder 'no'"),
        ("sample nowhere", "model: cannot load 'nowhere', neither from a folder nor"),
        ("imagine fox --size 3", "size must be width x height, such as 512x768, got '3'"),
        ("imagine fox --model nowhere", "model: cannot load 'nowhere'"),
        ("explain a --model {trained} --beams 3", "beams has no meaning for --show next"),
        ("explain a --show alternatives --output a.png", "--output must end in .html, got 'a.png'"),
        ("evaluate {trained} --data x --k 3", "k=3 is for image models"),
        ("evaluate {drawer} --data digits --stride 3", "stride=3 is for language models"),
        ("push {trained} a/b/c", "repository must be user/name, got 'a/b/c'"),
        ("push nowhere user/name", "folder: cannot load 'nowhere': there is no such folder"),
        ("generate - --model {trained}", "prompt: - is empty; give a text"),
    ],
)
def test_wrong_arguments_are_one_line(
    trained, drawer, tmp_path, capsys, monkeypatch, words, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    given = [word.format(drawer=drawer, trained=trained) for word in words.split()]
    with pytest.raises(SystemExit) as stopped:
        cli.main(given)
    shown = capsys.readouterr()
    assert stopped.value.code == 2 and shown.out == ""
    assert shown.err.startswith(f"error: {message}") and len(shown.err.splitlines()) == 1
    with pytest.raises(ValueError, match=re.escape(message)):
        cli.main([*given, "--debug"])


def test_what_nobody_foresaw_is_one_line_too(trained, capsys, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no such\nlayer")

    monkeypatch.setattr("genkit.text.language_model.load_language_model", broken)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["generate", "a", "--model", str(trained)])
    assert stopped.value.code == 1
    assert capsys.readouterr().err == "error: RuntimeError: no such layer; --debug shows where\n"
