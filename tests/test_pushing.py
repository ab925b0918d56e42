"""Pushes that the Hub refuses, and what a card says of the machine, in this process."""

import json
import time

import httpx2
import pytest
from builders import MAKE
from hub_server import Repository, serve
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

import genkit
from genkit.hub import card, hub_errors, pushing, staging
from genkit.training.background_push import Pusher

# ---- refused, each for its own reason, with nothing changed


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub of the test's own, which this process takes for the real one."""
    with serve() as running:
        running.connect(monkeypatch, tmp_path / "home")
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A language model that never trained."""
    made = tmp_path_factory.mktemp("saved") / "model"
    MAKE["text"](made)
    return made


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        (401, "log in by `hf auth login`"),
        (403, "use a token that may do this"),
        (404, "check the name"),
        (409, "somebody else has changed the repository"),
        (429, "wait a minute"),
        (500, "try again later"),
        (503, "try again later"),
    ],
)
@pytest.mark.parametrize("asked", [("GET", "/api/models/"), ("POST", "/api/repos/create")])
def test_push_says_what_each_refusal_asks_for(hub, status, advice, asked):
    """Only that of an unknown user is about logging in."""
    hub.refused = (*asked, status)
    with pytest.raises(ValueError, match=rf"user/new cannot be pushed to: .*{advice}") as e:
        pushing.prepare_repository("user/new")
    message = str(e.value)
    assert ("hf auth login" in message) == (status == 401)
    assert f"refused with {status} (status {status})" in message and "http" not in message
    assert len(message.splitlines()) == 1 and hub.repositories == {}


def test_push_says_that_the_hub_cannot_be_reached(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(
        ValueError, match=r"the Hub cannot be reached .*: check the connection; "
    ) as e:
        pushing.prepare_repository("user/new")
    assert time.monotonic() - start < 1 and "log in" not in str(e.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"HF_HUB_OFFLINE is set"):
        pushing.prepare_repository("user/new")


def test_push_without_a_token_says_how_to_log_in(hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"no token is saved .* log in by `hf auth login`"):
        pushing.prepare_repository("user/new")
    assert hub.repositories == {}


@pytest.mark.parametrize(
    ("repository", "options"),
    [
        ("user/public", {"private": True, "revision": "draft"}),
        ("user/public", {"revision": "refs/pr/1"}),
        ("user/new", {"revision": "refs/pr/1"}),
        ("user/new", {"revision": "../main"}),
        ("user/theirs", {}),
        ("user/theirs", {"revision": "draft"}),
    ],
)
def test_push_looks_before_it_creates(hub, repository, options):
    hub.repositories["user/public"] = Repository(private=False)
    hub.repositories["user/public"].commit("main", {})
    hub.repositories["user/theirs"] = Repository(private=False)
    hub.repositories["user/theirs"].commit("main", {"config.json": b"{}", "x.safetensors": b""})
    before = {name: dict(each.branches) for name, each in hub.repositories.items()}
    with pytest.raises(ValueError, match=r"private|revision|did not push"):
        pushing.check_branch(options.get("revision"))
        pushing.prepare_repository(repository, **options)
    assert {name: dict(each.branches) for name, each in hub.repositories.items()} == before
    assert not [path for method, path in hub.asked if method != "GET"]


CLIENT = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")  # the Hub's own


@pytest.mark.slow
@CLIENT
@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("revision", [None, "draft"])
@pytest.mark.parametrize("asked", [("PUT", "/lfs/"), ("POST", "/commit/"), ("POST", "/branch/")])
def test_a_commit_that_is_refused_leaves_nothing_new(hub, folder, exists, revision, asked):
    if exists:
        HfApi().create_repo("user/new")
    before = {name: dict(each.branches) for name, each in hub.repositories.items()}
    hub.refused = (*asked, 403)
    if asked[1] == "/branch/" and revision is None:
        pytest.skip("no branch is made")
    with (
        pytest.raises(ValueError, match="refused with 403"),
        pushing.prepare_repository("user/new", revision=revision),
    ):
        pushing._commit(folder, "user/new", revision)
    assert {name: dict(each.branches) for name, each in hub.repositories.items()} == before


def test_what_a_refused_push_has_created_stays_once_others_have_used_it(hub, folder):
    with pytest.raises(ValueError, match="refused"), pushing.prepare_repository("user/new"):
        HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="notes.txt", repo_id="user/new")
        raise ValueError("refused")
    assert hub.tree("user/new")["notes.txt"] == b"mine"


def test_a_run_whose_push_is_refused_leaves_nothing_new(hub, tmp_path):
    for end in (Pusher.stop, Pusher.finish):
        pusher = Pusher(tmp_path, "user/new", False, print)
        assert "user/new" in hub.repositories
        if end is Pusher.finish:
            with pytest.raises(ValueError, match="The run is complete"):  # and has no model
                end(pusher)
        else:
            end(pusher)
        assert "user/new" not in hub.repositories


# ---- the name in a card


CODE = 'model = "run"\n\nuse(model)\nmodel = "other"\n'


@CLIENT
def test_a_cards_code_loads_the_branch_that_it_was_pushed_to(hub, folder, tmp_path):
    """Run as it stands, whatever is on main."""
    text = card.renamed(CODE, "user/new", "draft")
    assert 'model = "user/new"' in text and 'revision="draft"' in text
    assert card.renamed(text, "user/new", "draft") == text
    assert card.renamed(text, "user/moved") == CODE.replace('"run"', '"user/moved"')
    (tmp_path / "staged").mkdir()
    (tmp_path / "run").mkdir()
    MAKE["text"](tmp_path / "run")
    (tmp_path / "run" / "README.md").write_text(f"# Card\n\n```python\n{CODE[:26]}```\n")
    staging.stage(tmp_path / "run", tmp_path / "staged", "user/new", "draft")
    pushing.prepare_repository("user/new", revision="draft")
    pushing._commit(tmp_path / "staged", "user/new", "draft")
    code = (tmp_path / "staged" / "README.md").read_text().split("```")[1].removeprefix("python\n")
    found: dict[str, object] = {"use": lambda folder: genkit.load(folder)}
    exec(code, found)
    assert str(found["model"]).startswith(str(tmp_path / "home"))


@pytest.mark.parametrize(
    "word",
    [
        "{}/zanzibar/it's here/book.txt",
        "--text={}/zanzibar/it's here/book.txt",
        "{}/zanzibar/it's here/book.txt/",
        "~/zanzibar/book.txt",
        "../zanzibar/book.txt",
    ],
)
def test_a_card_names_no_path_however_it_was_written(tmp_path, monkeypatch, word):
    run = tmp_path / "zanzibar" / "run"
    run.mkdir(parents=True)
    path = word.format(tmp_path)
    given = path.removeprefix("--text=")
    monkeypatch.setattr("sys.argv", ["/home/me/recipes/train_x.py", "--flag", path])
    options = {"title": "A title", "task": "text-generation", "usage": "print(model)"}
    options |= {"about": f"Trained on {given}.", "figures": {"loss": 1.5}}
    text = card.card(run, data=given, protocol=f"By {given}.", **options)
    assert "zanzibar" not in text and "/home/me" not in text
    assert 'model = "run"\n' in text and "book.txt" in text


def test_notes_of_where_a_model_came_from_are_base_names(tmp_path):
    """Those in settings that transformers and diffusers write and never read."""
    folder, staged = tmp_path / "model", tmp_path / "staged"
    MAKE["text"](folder)
    staged.mkdir()
    config = json.loads((folder / "config.json").read_text())
    inner = {"_name_or_path": str(folder), "tokenizer_file": "/elsewhere/zanzibar/tokenizer.json"}
    inner |= {"name_or_path": "user/name"}
    (folder / "config.json").write_text(json.dumps(config | inner | {"text_config": dict(inner)}))
    staging.stage(folder, staged, "user/name")
    found = json.loads((staged / "config.json").read_text())
    short = {
        "_name_or_path": "model",
        "tokenizer_file": "tokenizer.json",
        "name_or_path": "user/name",
    }
    assert short.items() <= found.items() and found["text_config"] == short
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    changed = {f.name for f in staged.iterdir() if before.get(f.name) != f.read_bytes()}
    assert changed == {"README.md", "config.json"}


def test_a_gated_model_is_not_missing():
    asked = httpx2.Request("GET", "https://huggingface.co/api/models/user/gated")
    refused = {status: httpx2.Response(status, request=asked) for status in (403, 404)}
    assert not hub_errors.is_missing(GatedRepoError("gated", response=refused[403]))
    assert hub_errors.is_missing(RepositoryNotFoundError("none", response=refused[404]))
