"""The chapters of the course: pages of their own, to which the tabs link; no network is needed.

In a source tree they lie in docs/, in an installed package in genkit/docs/.
"""

from __future__ import annotations

import html
import re
from pathlib import Path

import gradio as gr

from genkit.app import parts

INSTALLED = Path(__file__).parents[1] / "docs"
FOLDER = INSTALLED if INSTALLED.is_dir() else Path(__file__).parents[2] / "docs"
ADDRESS = "chapter-"  # of a chapter's page, before the name of its file; see guard.NEEDED
BACK = '<a href="./">Back to the models</a>'
FORMULAS = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "$", "right": "$", "display": False},
]
# words and target, without the place in it; a picture has a mark before it
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)")


def find_chapters() -> dict[str, Path]:
    """Return the files of all chapters by name, such as vae."""
    return {path.stem: path for path in sorted((FOLDER / "course").glob("[!i]*.md"))}


def add_help(text: str, *names: str) -> None:
    """Build the line of help of a tab, with links to chapters.

    Args:
        text: what can be done there.
        names: of chapters.
    """
    found = find_chapters()
    links = ", ".join(
        f'<a href="{ADDRESS}{name}" target="_blank">{html.escape(read_title(found[name]))}</a>'
        for name in names
    )
    line = parts.hint(f"{html.escape(text)} Read on: {links}.")
    gr.HTML(line, apply_default_css=False, padding=False)


def add_pages(page: gr.Blocks) -> None:
    """Add a page for each chapter."""
    for name, path in find_chapters().items():
        with page.route(read_title(path), ADDRESS + name, show_in_navbar=False):
            gr.HTML(parts.hint(BACK), apply_default_css=False, padding=False)
            gr.Markdown(as_page(path), latex_delimiters=FORMULAS, elem_classes="chapter")


def read_title(path: Path) -> str:
    """Return the title of a chapter, with its number."""
    with path.open(encoding="utf-8") as file:
        return file.readline().removeprefix("# ").strip()


def as_page(path: Path) -> str:
    """Return the text of a chapter: with its pictures inside, and links to chapters alone."""

    def resolve(found: re.Match[str]) -> str:
        picture, words, target = found.groups()
        file = (path.parent / target).resolve()
        if picture:
            return f"![{words}]({parts.data_url(file.read_bytes())})"
        return f"[{words}]({ADDRESS}{file.stem})" if file in chapters else words

    chapters = {chapter.resolve() for chapter in find_chapters().values()}
    text = re.sub(r"<!--.*?-->\n?", "", path.read_text(encoding="utf-8"))
    return LINK.sub(resolve, text)
