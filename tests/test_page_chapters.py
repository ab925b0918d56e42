"""The chapters of the course as pages, and the links of the tabs to them."""

import re

import pytest
from app_models import served
from builders import ROOT

gr = pytest.importorskip("gradio")

import httpx  # noqa: E402

import genkit.app  # noqa: E402
from genkit.app import chapters, guard  # noqa: E402
from genkit.app.model_index import ModelIndex  # noqa: E402

TABS = ("Write", "Chat", "Answer", "Images", "Classify", "Runs")
LINKED = re.compile(r"\]\(([^)]+)\)")


@pytest.fixture(scope="module")
def page():
    return genkit.app.build(ModelIndex([]))


def test_every_tab_links_to_chapters_that_have_a_page(page):
    shown = [block for block in page.blocks.values() if isinstance(block, gr.HTML)]
    lines = {
        tab.label: [block.value for block in shown if block.parent is tab and "<a " in block.value]
        for tab in page.blocks.values()
        if isinstance(tab, gr.Tab)
    }
    assert tuple(lines) == TABS
    addresses = {address for address, *_ in page.pages}
    for label, (line,) in lines.items():
        linked = re.findall(r'href="([^"]+)"', line)
        assert linked and set(linked) <= addresses, label
        assert all(guard.NEEDED.fullmatch(f"/{address}") for address in linked)


def test_every_chapter_has_a_page_that_needs_no_other_file(page):
    titles = {name: words for name, words, _ in page.pages if name}
    files = {f"chapter-{file.stem}": file for file in (ROOT / "docs/course").glob("[!i]*.md")}
    assert titles.keys() == files.keys() and len(files) == 9
    pictures = 0
    for address, file in files.items():
        text = chapters.as_page(file)
        assert text.startswith(f"# {titles[address]}\n") and "<!--" not in text
        for target in LINKED.findall(text):
            pictures += target.startswith("data:image/png")
            known = target in files or target.startswith(("data:image/png;base64,", "https://"))
            assert known, (address, target[:80])
    assert pictures == sum(f.read_text("utf-8").count("![") for f in files.values())


def test_a_chapter_is_served(tmp_path):
    with served([]) as address:
        answer = httpx.get(f"{address}chapter-vae")
        assert answer.status_code == 200 and "evidence lower bound" in answer.text
        assert "negative bound" not in httpx.get(address).text  # the tabs stay small
        assert httpx.get(f"{address}chapter-none").status_code == 404
