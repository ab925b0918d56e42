"""Who can use the page: axe-core finds nothing serious in any tab, light or dark; keys suffice."""

import re

import pytest
from app_models import make, served, started_browser
from classifiers import make_image
from PIL import Image

pytest.importorskip("gradio")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")

pytestmark = pytest.mark.slow

CONTEXT = "the fox is alpha dog omega . the lazy alef tav is where"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with served([str(make(tmp_path_factory.mktemp("models")))]) as found:
        yield found


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    file = tmp_path_factory.mktemp("picture") / "image.png"
    levels = (127.5 * (make_image(side=60) + 1)).byte().permute(1, 2, 0).numpy()
    Image.fromarray(levels).save(file)
    return file


@pytest.fixture(scope="module")
def browser():
    with started_browser() as started:
        yield started


@pytest.fixture(params=["light", "dark"])
def page(request, browser, address):
    found = browser.new_page(viewport={"width": 1200, "height": 900}, bypass_csp=True)
    found.set_default_timeout(60_000)
    found.goto(f"{address}?__theme={request.param}")
    found.locator("#bars .next").first.wait_for()
    yield found
    found.close()


def check(page) -> None:
    """Neither axe-core nor the width of a phone finds a fault in what is shown."""
    violations = axe.Axe().run(page).response["violations"]
    assert [
        (each["id"], [node["html"][:200] for node in each["nodes"]])
        for each in violations
        if each["impact"] in ("serious", "critical")
    ] == []
    page.set_viewport_size({"width": 390, "height": 900})
    page.wait_for_timeout(150)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.set_viewport_size({"width": 1200, "height": 900})
    page.wait_for_timeout(150)


def press(page, button: str, result: str) -> None:
    page.get_by_role("button", name=button, exact=True).locator("visible=true").click()
    page.locator(result).first.wait_for()


def show(page, tab: str) -> None:
    choice = page.get_by_role("tab", name=tab, exact=True)
    while choice.get_attribute("aria-selected") != "true":
        choice.click()
        page.wait_for_timeout(100)


def choose(page, value: str) -> None:
    page.get_by_label("Model", exact=True).locator("visible=true").click()
    page.get_by_role("option", name=value, exact=True).click()


def test_axe_finds_nothing_serious_in_texts(page):
    press(page, "Write", "#text .token")
    page.locator("#text summary").click()
    page.locator("#text .token").nth(3).focus()  # shows its panel
    check(page)
    press(page, "Beams", "#text .beams")
    check(page)
    page.get_by_label("Prompt").fill("Zürich")
    page.locator("#bars .problem").wait_for()
    check(page)
    show(page, "Chat")
    check(page)
    page.get_by_label("Message", exact=True).fill("the fox")
    page.get_by_label("Message", exact=True).press("Enter")
    press(page, "Tokens in colours", "#chat .token")
    check(page)
    show(page, "Answer")
    page.get_by_label("Text", exact=True).fill(CONTEXT)
    page.get_by_label("Question").fill("where is the dog?")
    press(page, "Answer", "#answer mark")
    check(page)


def test_axe_finds_nothing_serious_in_pictures_and_runs(page, picture):
    show(page, "Images")
    choose(page, "two_latents")
    page.locator("#about", has_text="unconditional").wait_for()
    press(page, "Draw", "#samples img")
    press(page, "Walk", "#between img")
    check(page)
    choose(page, "class_conditional")
    page.locator("#about", has_text="4 classes").wait_for()
    press(page, "Show how the image of this seed is denoised", "#denoising img")
    check(page)
    show(page, "Classify")
    check(page)
    with page.expect_file_chooser() as chooser:  # by keys alone
        page.locator("#drop .drop").focus()
        page.keyboard.press("Enter")
    chooser.value.set_files(picture)
    page.locator("#classified tr").first.wait_for()
    check(page)
    press(page, "Show what speaks for it", "#classified img.sheet")
    check(page)
    show(page, "Runs")
    page.locator("#run .problem").wait_for()
    check(page)


def test_axe_finds_nothing_serious_in_a_chapter(page):
    with page.context.expect_page() as opened:
        page.get_by_role("link", name=re.compile("Sampling strategies")).first.click()
    chapter = opened.value
    chapter.locator(".chapter h1", has_text="3. Sampling strategies").wait_for()
    chapter.locator(".katex").first.wait_for()
    check(chapter)
    chapter.close()
