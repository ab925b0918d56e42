"""Spaces: their folders, run as Hugging Face Spaces run them, and pushes to a Hub on loopback."""

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import httpx
import pytest
import yaml
from app_models import ARGUMENTS, BROWSERS, MAKE, ask, browser
from builders import tiny_translator
from hub_server import TOKEN, Repository, serve
from huggingface_hub import HfApi
from packaging.requirements import Requirement
from visitors import Visitor

pytest.importorskip("gradio")

import genkit.app
from genkit import cli
from genkit.hub import pushing, spaces

HOST = "user-demo.hf.space"
ADDRESS = f"https://{HOST}"
HUB = "https://huggingface.co"
CLIENT = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")  # the Hub's own
NEEDED = {"README.md", "app.py", "requirements.txt"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder of image models and one that the page has no tab for."""
    folder = tmp_path_factory.mktemp("zanzibar")
    MAKE["two_latents"](folder / "wür fel")  # a name that no repository can have
    for name in ("pixels", "training"):
        MAKE[name](folder / name)
    tiny_translator(folder / "translation")
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub of the test's own, which this process takes for the real one."""
    with serve() as running:
        running.connect(monkeypatch, tmp_path / "home")
        yield running


def branches(hub) -> dict[str, dict[str, str]]:
    """The commits that all branches name."""
    return {name: dict(each.branches) for name, each in hub.repositories.items()}


# ---- the page of a Space


@pytest.fixture
def guarded(models, monkeypatch):
    """What `serve` makes of options, without a server: its address and the guarded page."""
    made = []

    def run(server, sockets):
        server.ready()
        made.append(server.config.app)

    def start(**options):
        genkit.app.serve([str(models / "training")], port=0, ready=made.append, **options)
        return made[-2:]

    monkeypatch.setattr(genkit.app._Server, "run", run)
    return start


def answers(page, *requests: dict[str, str], host: str = HOST) -> list[httpx.Response]:
    """Ask a page for its settings, once with each set of headers."""

    async def knock() -> list[httpx.Response]:
        transport = httpx.ASGITransport(page)
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as client:
            return [await client.get("/config", headers=headers) for headers in requests]

    return asyncio.run(knock())


@pytest.mark.parametrize("names", [HOST, f"{HOST},own.example", HOST.title()])
def test_a_spaces_page_is_for_everybody_at_its_address_alone(guarded, names):
    address, page = guarded(host="0.0.0.0", space=names)
    assert re.fullmatch(r"http://0.0.0.0:\d+/", address)  # no token
    origins = [{}, {"Origin": ADDRESS}, {"Origin": HUB}, {"Origin": f"https://{HOST}:1"}]
    found = answers(page, *origins)
    assert [answer.status_code for answer in found] == [200, 200, 403, 403]
    assert found[0].json()["root"] == ADDRESS
    assert found[0].headers["content-security-policy"].endswith(f"frame-ancestors {HUB}")
    assert "set-cookie" not in found[0].headers


def test_no_other_page_is_for_everybody_nor_in_a_frame(guarded, monkeypatch):
    monkeypatch.setenv("SPACE_HOST", HOST)  # by itself it opens nothing
    for options in ({"host": "0.0.0.0"}, {"root_path": ADDRESS}):
        address, page = guarded(**options)
        token = address.partition("?token=")[2]
        assert len(token) > 40
        assert answers(page, {})[0].status_code == 401
        allowed = answers(page, {"Cookie": f"genkit={token}"})[0]
        assert allowed.headers["content-security-policy"].endswith("frame-ancestors 'none'")


@pytest.mark.parametrize(
    "options",
    [{"space": HOST, "token": "abc"}, {"space": HOST, "root_path": "/a"}]
    + [{"space": name} for name in ("", ",", "a b", "a/b", "https://a", "ä.hf.space")],
)
def test_serve_refuses_what_no_space_has(models, options):
    with pytest.raises(ValueError, match=r"^space "):
        genkit.app.serve([str(models)], port=0, **options)


# ---- the folder


def test_a_space_requires_what_is_installed_here():
    lines = [Requirement(line) for line in spaces.requirements().splitlines()]
    assert [str(lines[0]), lines[0].extras] == [f"hf-genkit[app]=={genkit.__version__}", {"app"}]
    for line in lines[1:]:
        assert version(line.name) in line.specifier and "+" not in str(line)


def test_the_head_of_a_space_is_what_spaces_read(tmp_path):
    spaces.write(tmp_path, "a: 'title'", "user/digits", "user/digits")
    _, head, text = (tmp_path / "README.md").read_text().split("---\n", 2)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert yaml.safe_load(head) == {
        "title": "a: 'title'",
        "sdk": "gradio",
        "sdk_version": version("gradio"),
        "python_version": python,
        "app_file": "app.py",
        "models": ["user/digits"],
        "tags": ["genkit"],
    }
    assert "user/digits" in text
    assert {file.name for file in tmp_path.iterdir()} == NEEDED


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{}/none", "--export", "{}/new"], r"models: cannot load .*there is no such folder"),
        (["{}", "--export", "{}/new"], r"models: .* holds no "),
        (["{}/translation", "--export", "{}/new"], r"models: the page has no tab .* translation"),
        (["{}/pixels", "--export", "{}/pixels"], r"--export: .*pixels' exists"),
        (["{}/pixels", "{}/training", "--export", "{}/new"], r"--export takes one model"),
        (["{}/pixels", "--export", "{}/new", "--port", "1"], r"--port is for a page"),
        (["{}/pixels", "--export", "{}/new", "--token-file", "x"], r"--token-file is for a page"),
    ],
)
def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(models, capsys, words, message):
    before = sorted(models.iterdir())
    with pytest.raises(SystemExit):
        cli.main(["app", *(word.format(models) for word in words)])
    error = capsys.readouterr().err
    assert re.search(message, error) and len(error.splitlines()) == 1
    assert sorted(models.iterdir()) == before


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("raise OSError('no page')", "OSError: no page"),
        ("", "no message"),
        ("print('genkit is at http://127.0.0.1:9/', flush=True); input()", "ConnectError"),
    ],
)
def test_a_page_that_does_not_start_is_told_by_its_last_line(tmp_path, program, message):
    (tmp_path / "app.py").write_text(program)
    with pytest.raises(ValueError, match=f"does not start in a fresh process: {message}"):
        spaces.check_start(tmp_path, "model")


@contextlib.contextmanager
def running(folder: Path):
    """Run a Space's folder as Spaces do, on loopback; yield its address."""
    own = {"SPACE_HOST": HOST, "SPACE_ID": "user/demo", "SYSTEM": "spaces"}
    own |= {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": "0"}
    program = [sys.executable, "app.py"]
    with subprocess.Popen(
        program, cwd=folder, env=os.environ | own, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith(f"genkit is at {ADDRESS}/, by way of ")
            yield line.split()[-1]
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def exported(models, tmp_path_factory):
    """The folder of a Space, written by the command."""
    folder = tmp_path_factory.mktemp("exported") / "deep" / "demo"
    command = [sys.executable, "-m", "genkit", "app", str(models / "wür fel")]
    done = subprocess.run([*command, "--export", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.startswith(f"{folder}: 9 files, ")
    return folder


@pytest.mark.slow
def test_an_exported_space_is_self_contained_and_draws(exported, models, tmp_path):
    """From another place, where nothing of the model's own folder is found."""
    moved = tmp_path / "moved"
    exported.rename(moved)
    hidden = models / "wür fel"
    hidden.rename(models / "hidden")
    try:
        assert {file.name for file in moved.iterdir()} == {*NEEDED, "models"}
        for file in moved.rglob("*"):
            assert not file.is_symlink() and (file.is_dir() or file.stat().st_nlink == 1)
            assert file.is_dir() or b"zanzibar" not in file.read_bytes(), file
        with running(moved) as address:
            assert ask(f"{address}config", Origin=ADDRESS)[0] == 200
            assert ask(f"{address}config", Origin="https://own.example")[0] == 403
            visitor = Visitor(address, "one")
            visitor.choose("wür fel")
            drawn = visitor.ask("draw", ["wür fel", None, 0, 4, None, None, None])
        assert drawn.count("<img ") == 4
    finally:
        (models / "hidden").rename(hidden)
        moved.rename(exported)


FRAME = f'<iframe id="space" src="{ADDRESS}/?__theme=light" width="1000" height="800"></iframe>'


@pytest.mark.slow
def test_a_space_draws_in_the_frame_of_the_hub_and_in_no_other(exported):
    playwright = pytest.importorskip("playwright.sync_api")
    if browser() is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    with running(exported) as address, playwright.sync_playwright() as drive:
        chromium = drive.chromium.launch(executable_path=browser(), args=ARGUMENTS)
        page = chromium.new_page()
        page.set_default_timeout(60_000)

        def forward(route):
            """Do as the Hub's proxy, and end streams that are open when the page is left."""
            url = route.request.url.replace(f"{ADDRESS}/", address)
            headers = route.request.all_headers() | {"host": HOST}
            with contextlib.suppress(playwright.Error):
                route.fulfill(response=route.fetch(url=url, headers=headers))

        page.route(f"{ADDRESS}/**", forward)
        for site in (f"{HUB}/spaces/user/demo", "https://own.example/"):
            page.route(site, lambda route: route.fulfill(body=FRAME, content_type="text/html"))
        page.goto(f"{HUB}/spaces/user/demo")
        frame = page.frame_locator("#space")
        frame.locator("#about", has_text="model").wait_for()  # the tab of images is open
        frame.get_by_role("button", name="Draw").click()
        frame.locator("#samples img").nth(15).wait_for()
        with page.expect_event("requestfailed", lambda r: r.url.startswith(f"{ADDRESS}/?")) as lost:
            page.goto("https://own.example/")
        assert "BLOCKED_BY_RESPONSE" in lost.value.failure
        chromium.close()


# ---- pushes


def made_space(folder: Path, name: str = "digits") -> Path:
    """Write the folder of a Space whose model is a single file."""
    (spaces.model_folder(folder, name) / "config.json").write_text(f'{{"of": "{name}"}}')
    spaces.write(folder, name, f"user/{name}", f"user/{name}")
    return folder


THEIRS = {
    "an app": {"app.py": b"import gradio"},
    "a README and an app": {"README.md": b"---\ntags: [demo]\n---\n", "app.py": b""},
    "a docker file": {"README.md": b"# Mine", "Dockerfile": b""},
    "a folder": {"models/config.json": b"{}"},
}


@pytest.mark.parametrize("tree", THEIRS.values(), ids=THEIRS)
def test_a_space_of_others_stays(hub, tree):
    hub.repositories["spaces/user/demo"] = Repository(private=False)
    hub.repositories["spaces/user/demo"].commit("main", {".gitattributes": b"", **tree})
    before = branches(hub)
    with pytest.raises(ValueError, match=r"space: user/demo .* space that genkit did not push"):
        pushing.prepare_repository("user/demo", repo_type=pushing.SPACE)
    assert branches(hub) == before
    assert {method for method, _ in hub.asked} <= {"GET", "HEAD"}


@CLIENT
def test_a_space_takes_the_place_of_an_earlier_one_in_one_commit(hub, tmp_path):
    model = pushing.Pushed("user/digits", "0" * 40, "", [], 0)
    first = made_space(tmp_path / "first", "digits")
    pushed = pushing._push_space(first, "user/demo", True, model)
    assert pushed.url == f"{hub.address}/spaces/user/demo"
    space = hub.repositories["spaces/user/demo"]
    assert space.private and len(space.commits) == 2  # the first is that of a new Space
    assert set(hub.tree("spaces/user/demo")) == {
        *(".gitattributes", "models/digits/config.json", *NEEDED)
    }
    HfApi().upload_file(
        path_or_fileobj=b"mine", path_in_repo="notes.txt", repo_id="user/demo", repo_type="space"
    )
    second = made_space(tmp_path / "second", "faces")
    pushed = pushing._push_space(second, "user/demo", True, model)
    tree = hub.tree("spaces/user/demo")
    assert pushed.commit == space.branches["main"] and len(space.commits) == 4
    assert set(tree) == {*(".gitattributes", "notes.txt", "models/faces/config.json", *NEEDED)}
    assert b"user/faces" in tree["README.md"]
    with pytest.raises(ValueError, match="private: user/other exists and is public"):
        HfApi().create_repo("user/other", repo_type="space", space_sdk="gradio")
        pushing._push_space(second, "user/other", True, model)


@CLIENT
@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("asked", [("POST", "/spaces/.*/commit/"), ("POST", "/repos/create")])
def test_a_space_that_is_refused_leaves_nothing_new(hub, tmp_path, exists, asked):
    model = pushing.Pushed("user/digits", "0" * 40, "", [], 0)
    folder = made_space(tmp_path)
    if exists:
        pushing._push_space(folder, "user/demo", False, model)
        asked = ("POST", "/spaces/.*/commit/")
    before = branches(hub)
    hub.refused = (*asked, 403)
    with pytest.raises(ValueError, match=r"space: user/demo cannot .* The model was pushed: user/"):
        pushing._push_space(folder, "user/demo", False, model)
    assert branches(hub) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"space": "no name"}, "space must be user/name, got 'no name'"),
        ({"space": "user/demo"}, "space: the page has no tab for .* translation"),
    ],
)
def test_a_space_that_cannot_be_is_refused_before_anything(hub, models, options, message):
    with pytest.raises(ValueError, match=message):
        genkit.push(models / "translation", "user/model", **options)
    assert not hub.asked


# by a process that starts and loads nothing first, as the push before it did
REFUSED = """
import sys
import genkit
from genkit.hub import spaces, staging
spaces.check_start = staging.validate = lambda *_: None
try:
    genkit.push(sys.argv[1], "user/pixels", space="user/theirs")
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_model_and_its_space_are_pushed_and_the_space_draws(models, tmp_path):
    with serve() as hub:
        environment = os.environ | hub.environment(tmp_path / "home")
        command = [sys.executable, "-m", "genkit", "push", str(models / "wür fel"), "user/vae"]
        command += ["--space", "user/demo", "--json"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        record = json.loads(done.stdout)
        space, tree = hub.repositories["spaces/user/demo"], hub.tree("spaces/user/demo")
        assert record["commit"] == hub.repositories["user/vae"].branches["main"]
        assert record["space"]["commit"] == space.branches["main"] and len(space.commits) == 2
        assert record["space"]["repository"] == "user/demo" and record["space"]["space"] is None
        model = {f"models/vae/{name}": data for name, data in hub.tree("user/vae").items()}
        del model["models/vae/.gitattributes"]
        assert {name: data for name, data in tree.items() if name.startswith("models/")} == model
        assert set(tree) - set(model) == {".gitattributes", *NEEDED}
        for name, data in tree.items():
            assert TOKEN.encode() not in data and b"zanzibar" not in data, name
        for name, data in tree.items():
            (tmp_path / "space" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "space" / name).write_bytes(data)
        hub.repositories["spaces/user/theirs"] = Repository(private=False)
        hub.repositories["spaces/user/theirs"].commit("main", {"app.py": b""})
        before = branches(hub)
        command = [sys.executable, "-c", REFUSED, str(models / "pixels")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert "space that genkit did not push" in done.stdout, done.stderr
        assert branches(hub) == before  # the model was not pushed, either
    with running(tmp_path / "space") as address:
        visitor = Visitor(address, "one")
        visitor.choose("vae")
        assert visitor.ask("draw", ["vae", None, 0, 2, None, None, None]).count("<img ") == 2
