"""The page by its requests: fields, families one after the other, streams, proxies, paths."""

import asyncio
import base64
import html
import io
import itertools
import json
import time
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest
import torch
from app_models import MAKE, ask, language, long_seed, served
from classifiers import make_image
from PIL import Image
from visitors import Visitor

pytest.importorskip("gradio")

import genkit
import genkit.app
from genkit.app import events, guard, model_index, root
from genkit.app.model_index import ModelEntry, ModelIndex

# gradio leaves event loops open
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
FAMILIES = ("autoencoder", "class_conditional", "gan", "pixels", "two_latents")
EVERY = "one after the other"
LIMITS = (1.0, 0, 4)  # top-p, top-k, beams


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name in (*FAMILIES, "language", "talks", "training", "classifier"):
        MAKE[name](folder / name)
    return folder


@pytest.fixture(scope="module")
def address(models):
    with served([str(models)]) as found:
        yield found


class Text(HTMLParser):
    """The text of a piece of HTML, without the panels of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.panels = "", 0  # depth inside a panel

    def handle_starttag(self, tag, attrs) -> None:
        if tag == "span" and (self.panels or ("class", "panel") in attrs):
            self.panels += 1

    def handle_endtag(self, tag) -> None:
        self.panels -= tag == "span" and self.panels > 0

    def handle_data(self, data) -> None:
        self.text += "" if self.panels else data


def text_of(shown: str) -> str:
    parser = Text()
    parser.feed(shown)
    return parser.text


# ---- images


def as_data_url(image: torch.Tensor, kind: str = "png") -> str:
    levels = (127.5 * (image + 1)).byte().permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(levels).save(file, kind)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


@pytest.mark.slow
def test_an_image_is_classified_explained_and_attacked(address, models):
    visitor, image = Visitor(address, "classify"), make_image(side=40)
    fine = ["classifier", as_data_url(image)]
    record = genkit.attribute(image, model=models / "classifier", method="saliency")
    found = visitor.ask("classify", fine)
    assert found.count("<tr>") == 5 and f"{record.target}</td><td>{record.probability:.1%}" in found
    found = visitor.ask("attribute", [*fine, "the most probable", "saliency"])
    assert "data:image/png;base64," in found and html.escape(str(record)) in found
    found = visitor.ask("attack", [*fine, "class 3", 32])
    assert "data:image/png;base64," in found and "class 3" in found
    for name, given, words in (
        ("attribute", [fine[0], "", "", "saliency"], "drop an image"),
        ("attribute", [fine[0], "data:image/png;base64,x", "", "saliency"], "Image must be"),
        ("attribute", [fine[0], "http://localhost/a.png", "", "saliency"], "Image must be"),
        ("attribute", [fine[0], f"{fine[1][:82]}AAAA", "", "saliency"], "the image"),
        ("attribute", [*fine, "cat", "saliency"], "Class: "),
        ("attribute", [*fine, "", "lime"], "Method must be"),
        ("attack", [*fine, "", 33], "Epsilon"),
        ("classify", ["language", fine[1]], "model: "),
    ):
        found = visitor.ask(name, given)
        assert 'class="problem"' in found and words in text_of(found), found


@pytest.mark.slow
def test_draw_works_after_any_other_family(address):
    """The fields of the family before stay as they were in the browser."""
    visitor = Visitor(address, "families")
    for old, new in itertools.permutations(FAMILIES, 2):
        visitor.choose(old)
        scheduler = "dpm++" if old == "class_conditional" else None
        visitor.choose(new)
        if new == "class_conditional":
            scheduler = "ddim"
        found = visitor.ask("draw", [new, EVERY, 0, 2, scheduler, 4, 1.0])
        assert found.count("<img") == 2, (old, new, found)


def test_errors_of_fields_name_their_labels(address):
    visitor = Visitor(address, "labels")
    fine = ["class_conditional", EVERY, 0, 2, "dpm++", 3, 1.0]
    for place, value, label in (
        *((1, value, "Class") for value in ("4", "x", "-1", 2, {})),
        *((2, value, "Seed") for value in (-5, 1.5, None, "x", 2**53 + 1)),
        *((3, value, "Images") for value in (0, 65, 10**9, -1, None)),
        (4, "x", "Scheduler"),
        *((5, value, "Steps") for value in (0, 5000, None)),
        *((6, value, "Guidance") for value in (-1, 9, "1")),
    ):
        found = visitor.ask("draw", [*fine[:place], value, *fine[place + 1 :]])
        assert 'class="problem"' in found and text_of(found).startswith(label), found
    fine = ["language", "The ", "sample", 1.0, 5, 0, *LIMITS]
    for place, value, label in (
        (1, 5, "Prompt"),
        (2, "x", "Strategy"),
        (3, 0, "Temperature"),
        (4, 401, "Tokens"),
        (5, None, "Seed"),
        (6, 0, "Top-p"),
        (7, -1, "Top-k"),
    ):
        found = visitor.ask("write", [*fine[:place], value, *fine[place + 1 :]])
        assert 'class="problem"' in found and text_of(found).startswith(label), found
    found = visitor.ask("write", [*fine[:2], "beam", *fine[3:8], 17])
    assert text_of(found).startswith("Beams")
    assert text_of(visitor.ask("chat", [" ", *TALK])).endswith("Message is empty")


# ---- texts


@pytest.mark.parametrize(
    ("strategy", "limits", "options"),
    [
        ("sample", (0.5, 0, 4), {"temperature": 1.0, "top_p": 0.5, "seed": 3}),
        ("sample", (1.0, 3, 4), {"temperature": 1.0, "top_p": 1.0, "top_k": 3, "seed": 3}),
        ("contrastive", (1.0, 3, 4), {"top_k": 3}),
        ("beam", (1.0, 0, 3), {"beams": 3}),
        ("diverse_beam", (1.0, 0, 6), {"beams": 6}),
    ],
)
def test_write_takes_the_limits_of_its_strategy(address, models, strategy, limits, options):
    found = Visitor(address, f"{strategy}{limits[1]}").ask(
        "write", ["language", "The ", strategy, 1.0, 20, 3, *limits]
    )
    wanted = genkit.generate(
        "The ", model=models / "language", strategy=strategy, max_new_tokens=20, **options
    )
    assert wanted.text in text_of(found).replace("␀", "\0")


def test_beams_take_length_and_number(address):
    visitor = Visitor(address, "beams")
    for beams, tokens in ((2, 3), (5, 30)):
        found = visitor.ask("beams", ["language", "The ", "beam", tokens, beams])
        assert f"keeps {beams} texts, for {tokens} tokens" in found
        assert found.count("class=won") == tokens
    found = visitor.ask("beams", ["language", "The ", "diverse_beam", 5, 4])
    assert text_of(found).startswith("Strategy")


# ---- chats

TALK = ["talks", [], "", 3, 12, 0.7, 0.9]  # model, turns, system message, seed, tokens, ...


def test_a_reply_is_that_of_generate(address, models):
    visitor = Visitor(address, "talks")
    found = visitor.ask("chat", ["the <b>fox", *TALK])
    chat = [{"role": "user", "content": "the <b>fox"}]
    options = {"seed": 3, "max_new_tokens": 12, "temperature": 0.7, "top_p": 0.9}
    first = genkit.generate(chat, model=models / "talks", **options)
    assert history_of(found) == [*chat, {**first.message, "seed": 3}]
    assert "&lt;b&gt;fox" in found and "<b>fox" not in found  # content is text
    again = visitor.ask("regenerate", [*TALK[:3], 4, *TALK[4:]])
    second = genkit.generate(chat, model=models / "talks", **options | {"seed": 4})
    assert history_of(again) == [*chat, {**second.message, "seed": 4}]
    more = visitor.ask("chat", ["and", TALK[0], [], "be", *TALK[3:]])
    chat = [
        {"role": "system", "content": "be"},
        *second.messages,
        {"role": "user", "content": "and"},
    ]
    third = genkit.generate(chat, model=models / "talks", **options)
    roles = [entry["role"] for entry in history_of(more)]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert history_of(more)[-1]["content"] == third.completion


def history_of(shown: str) -> list[dict]:
    """The conversation that the page offers as a file."""
    return json.loads(
        html.unescape(shown.partition('<pre class="json" hidden>')[2].partition("</pre>")[0])
    )


@pytest.mark.slow
def test_two_visitors_chat_at_once(address, models):
    visitors = [Visitor(address, f"talker{i}") for i in range(2)]
    for i, visitor in enumerate(visitors):
        assert visitor.join("chat", ["hello", *TALK[:3], i, 300, 0.7, 0.9]) == 200
        visitor.listen()
    for i, visitor in enumerate(visitors):
        (found,) = visitor.wait()
        wanted = genkit.generate(
            [{"role": "user", "content": "hello"}],
            model=models / "talks", seed=i, max_new_tokens=300, temperature=0.7, top_p=0.9,
        )  # fmt: skip
        assert history_of(found)[-1]["content"] == wanted.completion
        visitor.leave()


@pytest.mark.slow
def test_a_stopped_reply_is_kept(address, models):
    seed = long_seed(models / "talks", "hello", max_new_tokens=900, temperature=0.7, top_p=0.9)
    visitor = Visitor(address, "stops")
    visitor.join("chat", ["hello", *TALK[:3], seed, 900, 0.7, 0.9])
    visitor.listen()
    assert visitor.begun.wait(60)
    visitor.call("stop_send")
    (found,) = visitor.wait()
    visitor.leave()
    reply = history_of(found)[-1]
    assert reply["role"] == "user" or reply["stopped"] is True  # before its first token, or after
    assert len(reply["content"]) < 900 and text_of(found).endswith("stopped")


def test_a_model_without_a_template_cannot_chat(address):
    config = ask(f"{address}config")[1]
    assert "Models without a chat template are in the tab Write: language." in config
    found = Visitor(address, "no-template").ask("chat", ["hi", "language", *TALK[1:]])
    assert "Model: language has no chat template" in text_of(found)


# ---- runs


def test_a_run_is_shown_while_models_load(tmp_path):
    MAKE["training"](tmp_path / "run")
    index = model_index.find_models([str(tmp_path)])
    with events._loading:  # somebody loads a model
        shown = events.make_event(genkit.app.runs._refresh, index, [""], verbs=False)
        line, _ = shown(_request(), "run", "linear", "")
    assert "step 40" in line


def _request():
    import fastapi
    import gradio as gr

    scope = {"type": "http", "path": "/gradio_api/run/x", "client": ("1.2.3.4", 5)}
    return gr.Request(request=fastapi.Request(scope | {guard.HEARD: lambda: True}))


def test_an_error_before_the_first_state_fills_every_output():
    def fails(_index):
        raise ValueError("no such thing")
        yield

    shown = events.make_stream(fails, ModelIndex([]), ["second", "third"])
    *_, (line, *others) = states_of(shown)
    assert "no such thing" in line and others == ["second", "third"]


def states_of(event, *inputs) -> list:
    """All states of an event that is queued."""

    async def collect() -> list:
        return [state async for state in event(_request(), *inputs)]

    return asyncio.run(collect())


def test_a_model_is_named_while_it_loads_with_the_seconds_of_last_time(monkeypatch):
    monkeypatch.setattr(events, "SOON", 0.05)
    monkeypatch.setattr(events, "import_verbs", lambda: None)
    monkeypatch.setattr(events, "_seconds", {})
    index = ModelIndex([ModelEntry("charlm", str(Path(__file__).parent), frozenset({"text"}))])
    slow = [0.3, 0.0, 0.3]

    def use(index):
        events.load_once(lambda _: time.sleep(slow.pop(0)), index.resolve("text", "charlm"))
        return "<p>done</p>"

    shown = events.make_job(use, index)
    first, end = states_of(shown)
    assert "Loading charlm …" in first and 'role="status"' in first and end == "<p>done</p>"
    assert states_of(shown) == ["<p>done</p>"]  # it was kept
    again, _ = states_of(shown)
    assert "Loading charlm, which took 0.3 s last time …" in again


# ---- behind a proxy


@pytest.mark.parametrize(
    ("text", "origin", "path"),
    [
        ("", "", ""),
        ("/", "", ""),
        ("/genkit", "", "/genkit"),
        ("/a/b-c.d~e/", "", "/a/b-c.d~e"),
        ("https://Example.org", "https://example.org", ""),
        ("https://example.org:8443/genkit/", "https://example.org:8443", "/genkit"),
        ("http://[::1]:80/x", "http://[::1]", "/x"),
        ("https://example.org:443", "https://example.org", ""),
        ("https://example.org:80", "https://example.org:80", ""),
    ],
)
def test_parse_root(text, origin, path):
    assert root.parse_root(text) == root.Root(origin, path)


@pytest.mark.parametrize(
    "text", ["genkit", "//x", "/a b", "/a?b", "/a;b", "ftp://x", "https://", "/..", "https://u@x/"]
)
def test_parse_root_names_what_is_no_root(text):
    with pytest.raises(ValueError, match=r"root_path must be .*/genkit") as raised:
        root.parse_root(text)
    assert repr(text) in str(raised.value)


@pytest.fixture(autouse=True)
def closed_loops(monkeypatch):
    """Close the event loops that gradio begins while a page is built, and leaves open."""
    policy, made = asyncio.get_event_loop_policy(), []
    begin = policy.new_event_loop
    monkeypatch.setattr(policy, "new_event_loop", lambda: made.append(begin()) or made[-1])
    yield
    for loop in made:
        if not loop.is_running():
            loop.close()


def guarded(where: str, token: str | None = None) -> guard.Guard:
    """A page without models, behind a proxy."""
    public = root.parse_root(where)
    hosts = {*root.LOCAL, public.host or "localhost"}
    page = genkit.app.mounted(genkit.app.build(ModelIndex([])), public)
    return guard.Guard(page, hosts, token, public)


def request(app: guard.Guard, method: str, path: str, **headers: str) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://127.0.0.1:7860"
        ) as client:
            return await client.request(method, path, headers=headers, content=b"{}")

    return asyncio.run(send())


RESET = "/gradio_api/reset"


def test_the_page_works_below_a_path():
    app = guarded("/genkit", token="secret")
    for prefix in ("", "/genkit"):  # removed by the proxy, or not
        found = request(app, "GET", f"{prefix}/config?token=secret")
        assert found.status_code == 200
        assert found.json()["root"] == "http://127.0.0.1:7860/genkit"
        assert "Path=/genkit" in found.headers["set-cookie"]
    moved = request(app, "GET", "/genkit?token=secret")
    assert moved.status_code == 307 and moved.headers["location"] == "/genkit/?token=secret"
    assert request(app, "GET", "/genkitx/config?token=secret").status_code == 404


def test_the_page_works_at_another_origin():
    app = guarded("https://example.org/genkit")
    for host in ("example.org", "127.0.0.1:7860"):  # passed on by the proxy, or not
        found = request(app, "GET", "/config", Host=host)
        assert found.json()["root"] == "https://example.org/genkit"
        for origin in ("https://example.org", f"http://{host}"):
            assert request(app, "POST", RESET, Host=host, Origin=origin).status_code != 403
        for origin in ("http://example.org.x", "https://x.example", "null"):
            assert request(app, "POST", RESET, Host=host, Origin=origin).status_code == 403


def test_refusals_say_what_would_do():
    app = guarded("")
    for status, path, headers in (
        (400, "/config", {"Host": "example.org"}),
        (403, "/config", {"Origin": "https://example.org"}),
        (404, "/genkit/config", {}),
    ):
        found = request(app, "GET", path, **headers)
        assert found.status_code == status and "--root-path" in found.text
        assert "/genkit" in found.text
    assert "'example.org'" in request(app, "GET", "/config", Host="example.org").text


@pytest.mark.slow
@pytest.mark.parametrize("where", ["https://example.org", "https://example.org/genkit"])
def test_a_page_that_a_proxy_shows_to_others_has_a_token(models, monkeypatch, where):
    addresses: list[str] = []
    monkeypatch.setattr(genkit.app._Server, "run", lambda server, sockets: server.ready())
    for root_path in ("", "/genkit", "http://localhost:9000/genkit", where):
        genkit.app.serve(
            [str(models / "training")], port=0, root_path=root_path, ready=addresses.append
        )
    assert ["token=" in address for address in addresses] == [False, False, False, True]
    assert addresses[1].endswith("/genkit/")


# ---- paths of this machine


def test_errors_name_no_local_path(tmp_path):
    home = tmp_path / "my models"
    folder = home / "talker"
    folder.mkdir(parents=True)
    index = ModelIndex([ModelEntry("talker", str(folder), frozenset({"text"}))])
    for text, wanted in {
        f"{folder} has gone": "talker has gone",
        f"model: '{folder}/config.json' is damaged": "model: 'talker/config.json' is damaged",
        "cannot open '/home/me/my files/a.txt'": "cannot open 'a.txt'",
        "no such file: /home/me/.cache/x.json; try": "no such file: x.json; try",
        "see https://huggingface.co/docs/hub": "see https://huggingface.co/docs/hub",
        "half/half and 1/2": "half/half and 1/2",
    }.items():
        assert events.hide_paths(text, index) == wanted


def test_a_model_that_has_gone_is_named_without_its_folder(tmp_path):
    language(tmp_path / "goes")
    index = model_index.find_models([str(tmp_path)])
    (tmp_path / "goes").rename(tmp_path / "gone")
    shown = events.make_event(genkit.app.write._redraw, index)(_request(), "goes", "The ", 1.0)
    assert "problem" in shown and "goes" in shown and str(tmp_path) not in shown


def test_names_of_models_are_as_short_as_can_be(tmp_path, monkeypatch):
    for name in ("a/run", "b/run", "b/other"):
        MAKE["training"](tmp_path / name)
    index = model_index.find_models([str(tmp_path / "a"), str(tmp_path / "b")])
    assert index.names(model_index.RUNS) == ["a/run", "other", "b/run"]
    monkeypatch.chdir(tmp_path / "a/run")
    index = model_index.find_models([".", str(tmp_path / "a/run")])
    assert index.names(model_index.RUNS) == ["run"]
