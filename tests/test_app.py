"""The web page, in a browser, and what it refuses."""

import asyncio
import base64
import io
import itertools
import json
import os
import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from app_models import (
    BAD,
    GOOD,
    ask,
    long_seed,
    make,
    sample,
    served,
    started_browser,
)
from classifiers import make_image
from PIL import Image

pytest.importorskip("gradio")

import genkit
import genkit.app
from genkit.app import (
    guard,
    images,
    model_index,
)
from genkit.vision import (
    latent,
    pipelines,
    sampling,
)

ENDED = re.compile("/gradio_api/queue/data")  # a stream, which the page ends itself


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def address(models):
    with served([str(models)]) as found:
        yield found


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory):
    named = os.environ.get("GENKIT_ARTEFACTS")
    folder = Path(named) if named else tmp_path_factory.mktemp("artefacts")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def chromium():
    with started_browser() as started:
        yield started


@pytest.fixture(scope="module")
def opened(chromium, address):
    """A page, opened once, and all that went wrong in it."""
    page = chromium.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(60_000)
    wrong: list[str] = []
    own = (address, "data:", "blob:")
    page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("requestfailed", lambda r: ENDED.search(r.url) or wrong.append(f"failed: {r.url}"))
    page.on("request", lambda r: r.url.startswith(own) or wrong.append(f"foreign: {r.url}"))
    page.on("response", lambda r: r.status < 400 or wrong.append(f"{r.status}: {r.url}"))
    page.goto(address)
    yield page, wrong
    page.close()


@pytest.fixture
def page(opened):
    page, wrong = opened
    yield page
    assert wrong == []


def show(page, tab: str) -> None:
    """Open a tab; a click is lost while the tabs move, after the page got another width."""
    choice = page.get_by_role("tab", name=tab, exact=True)
    while choice.get_attribute("aria-selected") != "true":
        choice.click()
        page.wait_for_timeout(100)


def photograph(page, artefacts: Path, name: str) -> None:
    """Keep pictures of the page at two widths, neither of which may scroll sideways."""
    for width in (1200, 390):
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_timeout(150)
        wide = page.evaluate("document.documentElement.scrollWidth")
        page.screenshot(path=artefacts / f"{name}-{width}.png", full_page=True)
        assert wide <= width, f"{name} is {wide} pixels wide"
    page.set_viewport_size({"width": 1200, "height": 900})


def slide(page, label: str, value: float) -> None:
    """Move a slider as a finger does."""
    page.get_by_label(f"range slider for {label}", exact=True).locator("visible=true").evaluate(
        "(e, v) => { e.value = v; e.dispatchEvent(new Event('input', {bubbles: true})); }", value
    )


def pixels(address: str) -> np.ndarray:
    data = base64.b64decode(address.removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(data)))


def levels(image: torch.Tensor) -> np.ndarray:
    """The pixels of an image in [-1, 1], (channels, height, width), in colour."""
    values = ((image.clamp(-1, 1) + 1) * 127.5).round().byte()
    return values.expand(3, -1, -1).permute(1, 2, 0).numpy()


# ---- write


def shares(page) -> list[str]:
    return page.locator("#bars .next > span:last-child").all_inner_texts()


def test_the_next_token_by_temperature(page, models):
    seen = []
    for temperature in (1.0, 0.25, 2.0):
        slide(page, "Temperature", temperature)
        wanted = genkit.next_tokens(
            "The ", model=models / "language", temperatures=[temperature], top=10
        )
        percents = [
            f"{100 * p:.1f} %" if p >= 0.0005 else "<0.1 %" for p in wanted.probabilities[0]
        ]
        page.locator("#bars .nexts p", has_text=f"{wanted.entropies[0]:.2f} bits").wait_for()
        assert shares(page) == percents
        assert page.locator("#bars bdi").all_inner_texts() == wanted.names
        seen.append(percents)
    assert len(set(map(tuple, seen))) == 3


def test_a_text_is_written_and_its_alternatives_shown(page, models, artefacts):
    slide(page, "Temperature", 1.5)
    page.get_by_label("Seed", exact=True).locator("visible=true").fill("7")
    page.get_by_label("number input for Tokens").locator("visible=true").fill("40")
    page.get_by_role("button", name="Write", exact=True).click()
    page.locator("#text .token").first.wait_for()
    page.locator("#text", has_text="seed 7").wait_for()
    options = {"temperature": 1.5, "top_p": 0.9, "max_new_tokens": 40, "seed": 7}
    record = genkit.generate("The ", model=models / "language", **options)
    assert written(page) == record.text
    seen = genkit.alternatives(record, model=models / "language")
    token = page.locator("#text .token").nth(3)
    assert not token.locator(".panel").is_visible()
    token.focus()
    assert token.locator(".panel").is_visible()
    first = seen.spans[3].choices[0]
    options = token.locator(".option bdi").all_inner_texts()
    assert options[:5] == [option.name for option in first.options]
    assert f"rank {first.rank}" in token.locator(".panel").inner_text()
    photograph(page, artefacts, "write")
    token.blur()
    page.get_by_role("button", name="New seed").click()
    page.wait_for_function("!document.querySelector('#text').innerText.includes('seed 7 ')")
    assert written(page) != record.text


def written(page) -> str:
    """The text of the page, without what stands in the panels."""
    return page.locator("#text .text").evaluate(
        "e => { const c = e.cloneNode(true);"
        "c.querySelectorAll('.panel').forEach(p => p.remove()); return c.textContent; }"
    )


def test_the_tree_of_beams(page, models, artefacts):
    page.get_by_label("number input for Tokens").locator("visible=true").fill("12")
    page.get_by_role("button", name="Beams").click()
    page.locator("#text .beams").wait_for()
    tree = genkit.beam_tree("The ", model=models / "language", max_new_tokens=12)
    winners = [names[i] for names, i in zip(tree.names, tree.winners(), strict=False)]
    assert page.locator("#text .won > bdi").all_inner_texts() == winners
    assert page.locator("#text bdi").count() == sum(map(len, tree.steps))
    photograph(page, artefacts, "beams")


def test_what_cannot_work_is_a_line(page):
    prompt = page.get_by_label("Prompt")
    prompt.fill("Zürich")
    page.locator("#bars .problem", has_text="has never seen 'Z', 'ü'").wait_for()
    page.get_by_role("button", name="Write", exact=True).click()
    page.locator("#text .problem", has_text="has never seen").wait_for()
    prompt.fill("The <b>${1+1}</b>")
    page.locator("#bars .problem").wait_for()  # of $
    prompt.fill("T<b>&amp<b>")
    page.locator("#bars .next").first.wait_for()
    page.get_by_role("button", name="Write", exact=True).click()
    page.locator("#text .token").first.wait_for()
    assert written(page).startswith("T<b>&amp<b>")
    prompt.fill("The ")


def test_bars_are_cleared_while_a_model_loads(page):
    page.locator("#bars .next").first.wait_for()
    seen = page.evaluate(
        "() => { window.seen = []; new MutationObserver(() => "
        "window.seen.push(document.querySelector('#bars').innerText)).observe("
        "document.querySelector('#bars'), {childList: true, subtree: true}); }"
    )
    choose(page, "Model", "talks")
    page.locator("#bars .next").first.wait_for()
    seen = page.evaluate("window.seen")
    assert any("Loading talks …" in text and "bits" not in text for text in seen)
    choose(page, "Model", "language")
    page.locator("#bars .next").first.wait_for()


def test_a_text_is_copied_and_saved(page, opened):
    page.get_by_role("button", name="Write", exact=True).click()
    page.locator("#text .token").first.wait_for()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    visible(page, "Copy").click()
    page.locator("button.done:visible").wait_for()
    text = written(page)
    assert page.evaluate("navigator.clipboard.readText()") == text
    with page.expect_download() as download:
        visible(page, "Download").click()
    assert download.value.path().read_text(encoding="utf-8") == text


def visible(page, name: str):
    """The button of this name in the tab that is shown."""
    return page.get_by_role("button", name=name, exact=True).locator("visible=true")


def test_results_are_in_view_on_a_phone(page):
    page.set_viewport_size({"width": 390, "height": 700})
    page.evaluate("scrollTo(0, 0)")
    visible(page, "Write").click()
    page.locator("#text .token").first.wait_for()
    page.wait_for_timeout(1000)  # it scrolls smoothly
    top = page.locator("#text").bounding_box()["y"]
    assert -1 <= top < 350
    page.set_viewport_size({"width": 1200, "height": 900})


# ---- chat


@pytest.mark.slow
def test_a_chat_streams_and_its_tokens_are_coloured(page, models, artefacts):
    options = {"max_new_tokens": 300, "temperature": 0.7, "top_p": 0.9}
    options["seed"] = long_seed(models / "talks", "the <b>fox", **options)
    chat = [{"role": "user", "content": "the <b>fox"}]
    record = genkit.generate(chat, model=models / "talks", **options)
    show(page, "Chat")
    page.get_by_label("Seed", exact=True).locator("visible=true").fill(str(options["seed"]))
    page.get_by_label("number input for Tokens").locator("visible=true").fill("300")
    page.get_by_label("Message", exact=True).fill("the <b>fox")
    page.get_by_label("Message", exact=True).press("Enter")
    reply = page.locator("#chat .message.assistant")
    reply.locator("p", has_text=f"{len(record.tokens)} tokens").wait_for()
    shown = reply.locator(".content").evaluate("e => e.textContent")
    assert shown == record.completion
    assert page.locator("#chat .message.user").inner_text() == "the <b>fox"
    assert page.get_by_label("Message", exact=True).input_value() == ""
    page.get_by_role("button", name="Tokens in colours").click()
    reply.locator(".token").nth(9).wait_for()
    reply.locator(".token").nth(3).focus()
    assert reply.locator(".token").nth(3).locator(".panel").is_visible()
    photograph(page, artefacts, "chat")
    reply.locator(".token").nth(3).blur()  # its panel covers the end of the page
    page.mouse.move(0, 0)  # and stays open below the mouse
    page.get_by_role("button", name="Plain text").click()
    page.get_by_role("button", name="Tokens in colours").wait_for()
    page.get_by_label("Seed", exact=True).locator("visible=true").fill("9")
    visible(page, "Regenerate").click()
    second = genkit.generate(chat, model=models / "talks", **options | {"seed": 9})
    page.locator("#chat p", has_text=f"seed 9 · {len(second.tokens)} tokens").wait_for()
    with page.expect_download() as download:
        visible(page, "Download").click()
    file = json.loads(download.value.path().read_text(encoding="utf-8"))
    assert file == [*chat, {**second.message, "seed": 9}]
    visible(page, "Undo").click()
    page.locator("#chat .hint").wait_for()
    assert page.get_by_label("Message", exact=True).input_value() == "the <b>fox"


@pytest.mark.slow
def test_stop_keeps_what_was_written(page, models):
    options = {"max_new_tokens": 900, "temperature": 0.7, "top_p": 0.9}
    seed = long_seed(models / "talks_slowly", "hello", **options)
    show(page, "Chat")
    choose(page, "Model", "talks_slowly")
    page.get_by_label("Seed", exact=True).locator("visible=true").fill(str(seed))
    page.get_by_label("number input for Tokens").locator("visible=true").fill("900")
    page.get_by_label("Message", exact=True).fill("hello")
    visible(page, "Send").click()
    page.locator("#chat .message.assistant p", has_text="unfinished").wait_for()
    visible(page, "Stop").click()
    page.locator("#chat .problem", has_text="stopped").wait_for()
    assert 0 < len(page.locator("#chat .assistant .content").inner_text()) < 900
    visible(page, "New chat").click()
    page.locator("#chat .hint").wait_for()
    choose(page, "Model", "talks")


# ---- answer


def test_an_answer_is_marked_in_its_place(page, models, artefacts):
    show(page, "Answer")
    context = "the fox <i>is</i> alpha dog omega . the lazy alef tav is where"
    page.get_by_label("Text", exact=True).fill(context)
    page.get_by_label("Question").fill("where is the dog?")
    page.get_by_role("button", name="Answer", exact=True).click()
    page.locator("#answer mark").wait_for()
    from genkit.qa import reader

    record = genkit.answer(
        "where is the dog?", context, model=reader.load_reader(models / "reader"), top_k=5
    )
    assert page.locator("#answer mark").inner_text() == record.answer == "alpha dog omega"
    assert page.locator("#answer .answered").inner_text() == context
    rows = page.locator("#answer tbody tr").all_inner_texts()
    assert len(rows) == 1 + len(record.alternatives)
    assert f"{record.score:.1%}" in rows[0] and "alef tav" in rows[1]
    photograph(page, artefacts, "answer")
    page.get_by_label("Question").fill(" ")
    page.get_by_role("button", name="Answer", exact=True).click()
    page.locator("#answer .problem", has_text="question is empty").wait_for()


# ---- classify


def test_an_image_is_chosen_and_explained(page, artefacts, tmp_path):
    levels = (127.5 * (make_image(side=600) + 1)).byte().permute(1, 2, 0).numpy()
    Image.fromarray(levels).save(tmp_path / "photo.png")
    show(page, "Classify")
    with page.expect_file_chooser() as chooser:
        page.locator("#drop .drop").click()
    chooser.value.set_files(tmp_path / "photo.png")
    page.locator("#classified tr").first.wait_for()
    assert page.locator("#drop img").evaluate("image => image.naturalWidth") == 512
    page.get_by_role("button", name="Show what speaks for it").click()
    page.locator("#classified img.sheet").wait_for()
    assert "grad_cam for class" in page.locator("#classified figcaption").inner_text()
    page.get_by_role("button", name="Fool the model").click()
    page.locator("#classified figcaption", has_text="pgd").wait_for()
    photograph(page, artefacts, "classify")


# ---- images


def choose(page, label: str, value: str) -> None:
    page.get_by_label(label, exact=True).locator("visible=true").click()
    page.get_by_role("option", name=value, exact=True).click()


def place(page, across: float, up: float) -> tuple[float, float]:
    box = page.locator("#pad .pad").bounding_box()
    return box["x"] + across * box["width"], box["y"] + (1 - up) * box["height"]


def here(page) -> np.ndarray:
    return pixels(page.locator("#here img").get_attribute("src"))


@pytest.mark.slow
def test_samples_and_a_drag_across_the_plane(page, models, artefacts):
    show(page, "Images")
    choose(page, "Model", "two_latents")
    page.locator("#about", has_text="unconditional").wait_for()
    page.get_by_role("button", name="Draw").click()
    page.locator("#samples img").first.wait_for()
    shown = page.locator("#samples img").evaluate_all("all => all.map(e => e.src)")
    wanted = genkit.sample(models / "two_latents", 16, seed=0)
    assert len(shown) == 16
    for address, image in zip(shown, wanted.images, strict=True):
        assert np.abs(pixels(address).astype(int) - levels(image)).max() <= 1
    pad = page.locator("#pad .pad")
    pad.scroll_into_view_if_needed()
    page.mouse.move(*place(page, 0.3, 0.3))
    page.mouse.down()
    page.locator("#here img").wait_for()
    before = here(page)
    page.mouse.move(*place(page, 0.9, 0.8), steps=8)
    page.mouse.up()
    settled = page.get_by_label("number input for Across")
    page.wait_for_function("e => Math.abs(e.value - 0.9) < 0.02", arg=settled.element_handle())
    across, up = (float(n) for n in page.locator("#pad span").evaluate(PLACE).split(" "))
    assert (across, up) == (pytest.approx(0.9, abs=0.02), pytest.approx(0.8, abs=0.02))
    pipeline = sampling.load_image_model(str(models / "two_latents"))
    quantiles = torch.special.ndtri(torch.tensor([[across, up]], dtype=torch.float64)).float()
    latents = latent.noise_to_latent(pipeline, quantiles)
    wanted = levels(pipelines.decode(pipeline, latents)[0])
    assert np.abs(here(page).astype(int) - wanted).max() <= 1
    assert np.abs(before.astype(int) - wanted).max() > 10
    slide(page, "Up", 0.2)
    moved = images.plane_latents(pipeline, 0, across, 0.2)
    wanted = levels(pipelines.decode(pipeline, moved)[0])
    page.wait_for_function("document.querySelector('#pad span').style.bottom == '20%'")
    page.get_by_role("button", name="Walk").click()
    page.locator("#between img").nth(7).wait_for()
    ends = page.locator("#between img").evaluate_all("all => [all[0].src, all.at(-1).src]")
    for seed, address in enumerate(ends):
        image = genkit.sample(models / "two_latents", 1, seed=seed).images[0]
        assert np.abs(pixels(address).astype(int) - levels(image)).max() <= 1
    photograph(page, artefacts, "images")


@pytest.mark.slow
def test_draw_works_after_any_other_family(page, artefacts):
    show(page, "Images")
    families = ("autoencoder", "class_conditional", "gan", "pixels", "two_latents")
    page.get_by_label("number input for Images").first.fill("2")
    drawn = "before => document.querySelectorAll('#samples img')[1]?.src !== before"
    before, last = "", ""
    for pair in itertools.permutations(families, 2):
        for name in (own for own in pair if own != last):
            choose(page, "Model", name)
            page.locator("#about", has_text="model").wait_for()
            page.locator("#about", has_text="Loading").wait_for(state="detached")
            visible(page, "Draw").click()
            page.locator("#samples img").nth(1).wait_for()
            page.wait_for_function(drawn, arg=before)  # the images are no longer the last model's
            before, last = page.locator("#samples img").nth(1).get_attribute("src"), name
            assert not page.locator("#samples .problem, .toast-body").count(), pair
    with page.expect_download() as download:
        visible(page, "Download").click()
    with Image.open(download.value.path()) as image:
        assert image.size == (8, 3)  # two images of 4 x 3
    page.get_by_label("Seed", exact=True).locator("visible=true").fill("-5")
    visible(page, "Draw").click()
    page.locator("#samples .problem", has_text="Seed must be").wait_for()
    page.get_by_label("Seed", exact=True).locator("visible=true").fill("0")


PLACE = "e => `${parseFloat(e.style.left) / 100} ${parseFloat(e.style.bottom) / 100}`"


@pytest.mark.slow
def test_a_diffusion_model_of_classes(page, models, artefacts):
    show(page, "Images")
    choose(page, "Model", "class_conditional")
    page.locator("#about", has_text="4 classes").wait_for()
    page.get_by_label("Steps").fill("3")
    choose(page, "Class", "2")
    page.get_by_label("number input for Images").first.fill("2")
    page.get_by_role("button", name="Draw").click()
    page.locator("#samples .hint", has_text="3 steps of dpm++").wait_for()
    shown = page.locator("#samples img").evaluate_all("all => all.map(e => e.src)")
    wanted = genkit.sample(models / "class_conditional", 2, label=2, seed=0, steps=3).images
    for address, image in zip(shown, wanted, strict=True):
        assert np.abs(pixels(address).astype(int) - levels(image)).max() <= 1
    page.get_by_role("button", name="Show how").click()
    page.locator("#denoising img").nth(5).wait_for()
    assert page.locator("#denoising img").count() == 6
    photograph(page, artefacts, "diffusion")
    page.get_by_label("Steps").fill("5000")
    page.get_by_role("button", name="Draw").click()
    page.locator("#samples .problem", has_text="steps must be").wait_for()


# ---- runs


def test_a_run_is_followed(page, models, artefacts):
    show(page, "Runs")
    choose(page, "Run", "training")
    page.locator("#run .head", has_text="step 40").wait_for()
    page.locator("#run .fine").wait_for()
    assert "the first text" in page.locator("#run pre").inner_text()
    assert page.locator("#run [data-name=val_loss]").count() == 1
    before = page.locator("#run [data-name=loss]").get_attribute("points")
    with (models / "training/metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 41, "seconds": 4.1, "loss": 9.0}) + '\n{"step": 42, "lo')
    sample(models / "training", 41, "the second <b>text</b>")
    page.locator("#run .head", has_text="step 41").wait_for()
    page.locator("#run pre", has_text="the second <b>text</b>").wait_for()
    assert page.locator("#run [data-name=loss]").get_attribute("points") != before
    photograph(page, artefacts, "runs")


def test_a_collapse_is_named(page, artefacts):
    show(page, "Runs")
    choose(page, "Run", "game")
    page.locator("#run .problem", has_text="step 300: collapse").wait_for()
    photograph(page, artefacts, "collapse")


# ---- what is refused


def test_strangers_are_refused(address, models):
    assert ask(address)[0] == 200
    status, _, headers = ask(f"{address}config")
    assert status == 200
    assert "default-src 'self'" in headers["content-security-policy"]
    for host in ("rebound.example", "127.0.0.1.example", "[", ""):
        assert ask(f"{address}config", Host=host)[0] == 400
    call = {"data": ["language", "The ", 1.0]}
    assert ask(f"{address}gradio_api/run/next_tokens", call)[0] == 200
    assert ask(f"{address}gradio_api/run/next_tokens", call, Origin="http://x.example")[0] == 403
    for name in ("gone", str(models / "language"), "gpt2", "http://x.example", "../language"):
        call = {"data": [name, "The ", 1.0]}
        text = ask(f"{address}gradio_api/run/next_tokens", call)[1]
        assert "nexts" not in text, name
    for path in (
        *("upload", f"file={models / 'language/config.json'}", "file=../../../../etc/passwd"),
        *("file=/etc/passwd", "proxy=http://127.0.0.1:1/", "component_server", "vibe-edit"),
        *("%66ile=/etc/passwd", "run/../file=/etc/passwd", "call/next_tokens", "deep_link"),
    ):
        assert ask(f"{address}gradio_api/{path}")[0] in (404, 405), path
        assert ask(f"{address}gradio_api/{path}", b"{}")[0] in (404, 405), path
    for path in ("static/../../../routes.py", "assets/%2e%2e/%2e%2e/%2e%2e/routes.py"):
        assert ask(address + path)[0] in (403, 404), path


def test_too_much_is_refused(address):
    long = {"Content_Length": str(guard.LARGEST + 1)}
    assert ask(f"{address}gradio_api/run/next_tokens", b" ", **long)[0] == 413
    call = {"data": ["language", "a" * 30_000, 1.0]}
    text = ask(f"{address}gradio_api/run/next_tokens", call)[1]
    assert "Prompt has 30,000 characters; the most is 20,000" in text
    call = {"data": ["language", "The ", 0.33]}
    assert (
        "Temperature must be a multiple of 0.05"
        in ask(f"{address}gradio_api/run/next_tokens", call)[1]
    )
    for count in (65, 10**9, -1):
        call = {"data": ["two_latents", None, 0, count, None, None, None], "fn_index": 0}
        assert ask(f"{address}gradio_api/run/draw", call)[0] in (404, 422, 500)


class Canary(BaseHTTPRequestHandler):
    asked: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_) -> None:
        pass


@pytest.mark.slow
def test_no_address_is_fetched(address):
    with HTTPServer(("127.0.0.1", 0), Canary) as canary:
        threading.Thread(target=canary.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{canary.server_port}/x"
        file = {"url": url, "path": url, "orig_name": "x.png", "meta": {"_type": "gradio.FileData"}}
        config = json.loads(ask(f"{address}config")[1])
        for event in config["dependencies"]:
            for given in (file, [file]):
                call = {"data": [given] * len(event["inputs"]), "fn_index": event["id"]}
                ask(f"{address}gradio_api/run/predict", call)
                ask(f"{address}gradio_api/queue/join", call | {"session_hash": "canary"})
        for way in ("proxy", "file"):
            ask(f"{address}gradio_api/{way}={url}")
        canary.shutdown()
    assert Canary.asked == []


def test_a_page_for_others_asks_for_its_token(models, monkeypatch):
    served = []

    def run(server, sockets):
        server.ready()
        served.append(server.config.app)

    monkeypatch.setattr(genkit.app._Server, "run", run)
    genkit.app.serve([str(models / "training")], host="0.0.0.0", port=0, ready=served.append)
    address, guarded = served
    token = address.split("?token=")[1]
    assert address.startswith("http://0.0.0.0:") and len(token) > 40
    with ThreadPoolExecutor() as thread:  # the browser's driver has a loop in this one
        thread.submit(asyncio.run, knock(guarded, token)).result()
    genkit.app.serve([], port=0, ready=served.append)  # this machine alone may ask
    assert re.fullmatch(r"http://127.0.0.1:\d+/", served[2])


async def knock(guarded, token: str) -> None:
    """Ask with and without the token, wherever there may be an answer."""
    transport = httpx.ASGITransport(guarded)
    async with httpx.AsyncClient(transport=transport, base_url="http://page.example") as client:
        paths = ["", "config", "gradio_api/info", "gradio_api/startup-events", "theme.css"]
        paths += [
            "gradio_api/upload",
            "gradio_api/file=/etc/passwd",
            "gradio_api/run/refresh",
            "no",
        ]
        for path in paths:
            for wrong in ("", "?token=", "?token=wrong", f"?token={token[:-1]}", f"?x={token}"):
                assert (await client.get(f"/{path}{wrong}")).status_code == 401, path
            assert (await client.post(f"/{path}", json={})).status_code == 401, path
        bad = {"Cookie": "genkit=wrong; a=b"}
        assert (await client.get("/config", headers=bad)).status_code == 401
        right = await client.get(f"/?token={token}")
        assert right.status_code == 200
        cookie = right.headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
        assert (await client.get("/config")).status_code == 200  # by the cookie


# ---- what cannot be served


def test_models_are_distinguished_by_their_files(models):
    index = model_index.find_models([str(models)])
    assert index.names(model_index.TEXT) == ["language", "talks", "talks_slowly"]
    assert index.names(model_index.CHAT) == ["talks", "talks_slowly"]
    assert index.names(model_index.ANSWERS) == ["reader"]
    assert index.names(model_index.IMAGES) == [
        "autoencoder",
        "class_conditional",
        "gan",
        "pixels",
        "two_latents",
    ]
    assert index.names(model_index.RUNS) == ["game", "training"]
    assert index.resolve(model_index.RUNS, "game") == str(models / "game")
    with pytest.raises(ValueError, match="model: 'game'"):
        index.resolve(model_index.TEXT, "game")
    assert model_index.find_models([]).entries == []
    twice = model_index.find_models([str(models / "game"), str(models)])
    assert twice.names(model_index.RUNS) == ["game", "training"]


def test_the_page_without_runs_does_not_ask_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("runs", "runs/vae"):
        with pytest.raises(ValueError, match=rf"cannot load '{name}': there is no such folder"):
            model_index.find_models([name])


def test_what_is_no_model_is_refused(models, tmp_path):
    with pytest.raises(ValueError, match=r"models: cannot load 'no/such', neither from a folder"):
        model_index.find_models(["no/such"])
    with pytest.raises(ValueError, match=r"models: .* holds no model and no run; give"):
        model_index.find_models([str(tmp_path)])
    config = tmp_path / "config.json"
    for text, words in {
        "{": "no model that can be read (model: ",
        "[]": "holds no settings of a model",
        '{"architectures": ["BertForSequenceClassification"]}': "which the page does not support",
        '{"architectures": ["LlamaForCausalLM"]}': "holds no weights in safetensors",
    }.items():
        config.write_text(text)
        with pytest.raises(ValueError, match=re.escape(words)):
            model_index.find_models([str(tmp_path)])


def test_a_port_in_use_is_refused(models):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} .*give another, or port 0"):
            genkit.app.serve([str(models / "game")], port=port)


def test_a_token_that_is_no_part_of_an_address_is_refused(models):
    for token in ("", "a b", "a&b", "ä", "a;b"):
        with pytest.raises(ValueError, match="token must"):
            genkit.app.serve([str(models / "game")], port=0, token=token)


def test_troubles_of_other_runs(tmp_path):
    from genkit.app import runs

    log = [{"step": i, "loss": 1.0, "kl": 5.0} for i in range(1, 5)]
    assert runs.find_troubles(tmp_path, log) == []
    (line,) = runs.find_troubles(tmp_path, [*log, {"step": 5, "kl": 0.01}])
    assert re.search(r"step 5: .*collapse.* 0\.010 nats", line)
    (line,) = runs.find_troubles(tmp_path, [*log, {"step": 5, "loss": None}])
    assert "step 5: a figure is not finite" in line
    baseline = GOOD | {"coverage": 0.001, "entropy": 0.1, "spread": 0.04, "duplicates": 0.9}
    (tmp_path / "baseline.json").write_text(json.dumps(baseline))
    log = [{"step": 1} | GOOD, {"step": 2} | BAD]
    assert runs.find_troubles(tmp_path, log) == []  # real images are no better
