"""Chapters of the course as notebooks, beside their pages: blocks are cells, outputs are left out.

It comes after `repository_pages.py`, so that links lead to pages of the site.
"""

from __future__ import annotations

import re
from typing import Any

import jupytext
from mkdocs.structure.files import File, Files

CHAPTER = re.compile(r"course/(?!index)[\w-]+\.md")
OUTPUT = re.compile(r"\n<!-- output -->\n```\n.*?^```\n", re.M | re.S)
LINK = re.compile(r"(\]\([^)#\s:]+)\.md(?=[)#])")
HEAD = """---
jupyter:
  kernelspec: {display_name: Python 3, language: python, name: python3}
---

"""


def on_files(files: Files, config: Any) -> Files:
    """Add a file for the notebook of each chapter."""
    for page in [file.src_uri for file in files if CHAPTER.fullmatch(file.src_uri)]:
        files.append(File.generated(config, _beside(page), content=""))
    return files


def on_page_markdown(markdown: str, page: Any, files: Files, **_: Any) -> str:
    """Write the notebook of a chapter, and a link to it below the chapter's title."""
    address = page.file.src_uri
    if not CHAPTER.fullmatch(address):
        return markdown
    notebook = files.get_file_from_path(_beside(address))
    assert notebook is not None, "on_files adds it"
    notebook.content_string = write_notebook(markdown)
    title, rest = markdown.split("\n", 1)
    name = notebook.src_uri.rpartition("/")[2]
    return f"{title}\n\n[As a notebook]({name}){{ download }}\n{rest}"


def write_notebook(markdown: str) -> str:
    """Return a page as a notebook: Python and commands are cells, the rest is text between them."""
    text = LINK.sub(r"\1.html", OUTPUT.sub("", markdown))
    notebook = jupytext.reads(HEAD + text, "md")
    return str(jupytext.writes(notebook, "ipynb"))


def _beside(page: str) -> str:
    return f"{page.removesuffix('.md')}.ipynb"
