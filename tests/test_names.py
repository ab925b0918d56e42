"""Names of models and data: folders here or ids on the Hub, and what is neither."""

import io
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from builders import MAKE, small_model
from hub_server import serve
from huggingface_hub import HfApi, constants
from readers import pointer

import genkit
from genkit import cli
from genkit.data import images, squad, text
from genkit.hub import download, names
from genkit.models import gan, lm
from genkit.qa import model as qa_model

LONG = "The exam was written by Ada. " * 400
VERBS = {
    "load": lambda model: genkit.load(model),
    "generate": lambda model: genkit.generate("ab", model=model),
    "draft": lambda model: genkit.generate("ab", model=small_model("gpt2"), draft=model),
    "stream": lambda model: next(genkit.stream("ab", model=model)),
    "next_tokens": lambda model: genkit.next_tokens("ab", model=model),
    "alternatives": lambda model: genkit.alternatives("ab", model=model),
    "perplexity": lambda model: genkit.perplexity("ab", model=model),
    "rescore": lambda model: genkit.rescore([("ab", -1.0)], model=model),
    "correct": lambda model: genkit.correct("ab", lexicon=["ab"], model=model),
    "answer": lambda model: genkit.answer("Who?", "Ada.", model=model),
    "sample": lambda model: genkit.sample(model),
    "imagine": lambda model: genkit.imagine("a fox", model=model),
    "evaluate": lambda model: genkit.evaluate("digits", extractor=model),
    "push": lambda model: genkit.push(model, "user/name"),
}
START = {"lm": lm.load_lm, "qa": qa_model.load_extractor}  # of --init_from


@pytest.fixture(scope="module")
def server():
    with serve() as running:
        yield running


@pytest.fixture
def hub(server, monkeypatch, tmp_path):
    """A Hub that counts requests, and a folder that holds runs/demo, runs/vae and no others."""
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "vae"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.json").write_text("{}")
    server.connect(monkeypatch, tmp_path / "home")
    download.forget_commits()
    server.asked.clear()
    return server


@pytest.mark.parametrize("name", ["gpt2", "user/name", "openai-community/gpt2", "User_1/a.b-c"])
def test_is_path_takes_ids_for_ids(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not names.is_path(name)


@pytest.mark.parametrize(
    "name",
    [
        *("runs", "runs/vae", "./vae", "../vae", "/vae", "~/vae", "a/b/c", "vae/", ".", "", "a b"),
        *("here/vae", "book.txt", "data/train.parquet", "a\\b", "🦉", LONG, "a\0b"),
    ],
)
def test_is_path_takes_what_looks_like_one_for_one(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert names.is_path(name)


@pytest.mark.parametrize("verb", VERBS)
def test_a_missing_folder_is_named_with_its_neighbours_and_the_hub_is_not_asked(hub, verb):
    for missing in ("runs/dmo", str(Path("runs/dmo").resolve())):
        with pytest.raises(
            ValueError, match=r"cannot load .*runs/dmo'.*runs/demo, .*runs/vae"
        ) as e:
            VERBS[verb](missing)
        argument = {"evaluate": "extractor", "push": "folder", "draft": "draft"}.get(verb, "model")
        assert str(e.value).startswith(f"{argument}: ") and len(str(e.value).splitlines()) == 1
    assert hub.asked == []


@pytest.mark.parametrize("recipe", START)
def test_a_missing_start_of_a_run_is_named_with_its_neighbours(hub, recipe):
    with pytest.raises(ValueError, match=r"init_from: cannot load 'runs/dmo'.*runs/demo"):
        START[recipe]("runs/dmo")
    assert hub.asked == []


@pytest.mark.parametrize(
    "words",
    [
        *("generate ab --model runs/dmo", "generate ab --model runs/demo --draft runs/dmo"),
        *("explain ab --model runs/dmo", "answer --context - --model runs/dmo Who?"),
        *("sample runs/dmo", "imagine fox --model runs/dmo", "push runs/dmo user/name"),
        "evaluate digits --data digits --extractor runs/dmo",
        "evaluate runs/dmo --data digits --extractor runs/demo",
        *("train gpt2 --init_from runs/dmo", "train charlm --init_from runs/dmo"),
        *("train qa --init_from runs/dmo", "train gan --extractor runs/dmo"),
        "train diffusion --extractor runs/dmo",
    ],
)
def test_a_missing_folder_is_one_line_on_the_command_line(hub, words, capsys, monkeypatch):
    if words.startswith("answer"):
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"Ada.")))
    if "draft" in words:
        MAKE["text"](Path("runs/demo"))
    monkeypatch.setattr("sys.argv", ["genkit"])
    with pytest.raises(SystemExit) as stopped:
        cli.main(words.split())
    shown = capsys.readouterr().err
    assert stopped.value.code == 2 and len(shown.splitlines()) == 1
    assert "cannot load 'runs/dmo'" in shown and "runs/demo" in shown
    assert hub.asked == []


@pytest.mark.parametrize("source", ["runs/pictures", "./pictures", "pictures.parquet"])
def test_missing_data_are_not_sought_on_the_hub(hub, source):
    for read in (
        images.load_images,
        lambda name: list(text.read_documents(name)),
        lambda name: squad.read_examples(name, 1024),
    ):
        with pytest.raises(ValueError, match=rf"{source}' is no f"):
            read(source)
    assert hub.asked == []


def test_a_hub_that_cannot_be_reached_is_tried_once(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for verb in ("load", "generate", "answer", "sample", "imagine"):
        start = time.monotonic()
        with pytest.raises(
            ValueError, match=r"'user/name'.* the Hub cannot be reached .*runs/demo"
        ):
            VERBS[verb]("user/name")
        assert time.monotonic() - start < 1
    with pytest.raises(ValueError, match=r"'user/name'.* the Hub cannot be reached"):
        genkit.evaluate("user/name", extractor="runs/demo")


def test_a_model_that_the_hub_lacks_is_one_line(hub):
    with pytest.raises(ValueError, match=r"'user/none', neither .*: the Hub has no such repo") as e:
        genkit.load("user/none")
    assert "http" not in str(e.value) and "hf auth login" not in str(e.value)
    assert {path for _, path in hub.asked} == {"/api/models/user/none/revision/main"}


def test_a_repository_without_a_model_is_named_with_its_revision(hub):
    HfApi().create_repo("user/empty", exist_ok=True)
    for verb in ("load", "generate", "answer", "sample"):
        with pytest.raises(ValueError, match=r"'user/empty' holds no model at .* 'main'") as e:
            VERBS[verb]("user/empty")
        assert "snapshots" not in str(e.value)


def test_a_damaged_model_of_the_hub_is_named_by_its_repository(hub):
    HfApi().create_repo("user/damaged", exist_ok=True)
    for content in (b"{", b'{"_class_name": "Other"}'):
        at = HfApi().upload_file(
            path_or_fileobj=content, path_in_repo="model_index.json", repo_id="user/damaged"
        )
        download.forget_commits()
        with pytest.raises(ValueError, match=rf"'user/damaged at {at.oid[:7]}'") as e:
            genkit.load("user/damaged")
        assert "snapshots" not in str(e.value)


# ---- what is no name


@pytest.mark.parametrize("verb", VERBS)
def test_a_long_text_is_no_name_of_a_model(verb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"The exam was written") as e:
        VERBS[verb](LONG)
    assert "too long" not in str(e.value) and len(str(e.value)) < 500


def test_a_long_text_is_no_name_of_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for read in (
        images.load_images,
        lambda name: list(text.read_documents(name)),
        lambda name: squad.read_examples(name, 1024),
        lambda name: genkit.evaluate(small_model("gpt2"), name),
        lambda name: genkit.evaluate(name, extractor="inception"),
    ):
        with pytest.raises(ValueError, match=r"The exam was written") as e:
            read(LONG)
        assert "too long" not in str(e.value) and len(str(e.value)) < 500


def loaded() -> dict[str, object]:
    """A loaded model of each kind that a verb may be given by mistake."""
    generator = gan.Generator((1, 8, 8), 3, widths=(8,), patch=4).eval()
    return {"text": small_model("gpt2"), "answers": pointer(), "gan": gan.GANPipeline(generator)}


@pytest.mark.parametrize(
    ("verb", "kind", "message"),
    [
        ("answer", "text", "model: .* genkit.generate takes"),
        ("sample", "text", "model: .* genkit.generate takes"),
        ("evaluate", "text", "extractor: .* genkit.generate takes"),
        ("push", "text", "folder: .* genkit.generate takes"),
        ("load", "text", "model: .* genkit.generate takes"),
        ("generate", "answers", "model: .* genkit.answer takes"),
        ("draft", "answers", "draft: .* genkit.answer takes"),
        ("perplexity", "answers", "model: .* genkit.answer takes"),
        ("imagine", "answers", "model: .* genkit.answer takes"),
        ("sample", "gan", "model: .* draws when it is called"),
        ("generate", "gan", "model: .* draws when it is called"),
        ("answer", "gan", "model: .* draws when it is called"),
    ],
)
def test_a_loaded_model_of_another_kind_is_refused_by_its_verb(verb, kind, message):
    with pytest.raises(ValueError, match=message):
        VERBS[verb](loaded()[kind])


def test_evaluate_refuses_loaded_models_that_it_cannot_measure():
    with pytest.raises(ValueError, match=r"model: .* genkit.answer takes"):
        genkit.evaluate(pointer(), extractor="inception")


@pytest.mark.parametrize("verb", ["generate", "answer", "sample", "load", "push"])
def test_what_is_no_name_is_refused(verb):
    with pytest.raises(ValueError, match=r"must be a folder or a Hub id, got a Linear"):
        VERBS[verb](torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("verb", "kind", "message"),
    [
        ("answer", "text", "genkit.generate takes"),
        ("sample", "text", "genkit.generate takes"),
        ("evaluate", "text", "genkit.generate takes"),
        ("generate", "answers", "genkit.answer takes"),
        ("generate", "gan", "genkit.sample takes"),
        ("draft", "gan", "genkit.sample takes"),
        ("answer", "gan", "genkit.sample takes"),
    ],
)
def test_a_saved_model_of_another_kind_is_refused_by_its_verb(verb, kind, message, tmp_path):
    MAKE[kind](tmp_path)
    with pytest.raises(ValueError, match=message):
        VERBS[verb](str(tmp_path))


# ---- texts and files


def test_the_name_of_a_file_is_no_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("ab ab")
    model, reader = small_model("gpt2"), pointer()
    for use in (
        lambda given: genkit.perplexity(given, model=model),
        lambda given: genkit.perplexity([given], model=model),
        lambda given: genkit.alternatives(given, model=model),
        lambda given: genkit.correct(given, lexicon=["ab"], model=model),
        lambda given: genkit.answer("Who?", given, model=reader),
    ):
        with pytest.raises(ValueError, match=r"'README.md' is the name of a file"):
            use("README.md")
    monkeypatch.chdir("/")
    assert genkit.perplexity("ab.md", model=model).characters == 5


def test_evaluate_refuses_a_text_where_a_file_is_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"data must be a text file or a list of texts, got 'The "):
        genkit.evaluate(small_model("gpt2"), "The exam was written by Ada.")
