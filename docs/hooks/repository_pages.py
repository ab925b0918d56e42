"""Pages of the site that lie beside docs/, and links between both.

The files are written to be read in the repository; the site has its own folders:

| file | page |
|---|---|
| README.md, BENCHMARKS.md, … | index.html, BENCHMARKS.html, … |
| docs/text.md | text.html |
| recipes/train_vae.py | reference/train_vae.html, by `reference_pages.py` |
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
BESIDE = ("README.md", "BENCHMARKS.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
LINK = re.compile(r"(\]\()([^)#\s:]+)(#[^)\s]*)?(\))")
CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.M | re.S)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie beside docs/; README.md is the first one."""
    for name in BESIDE:
        page = File.generated(config, name, content=(ROOT / name).read_text(encoding="utf-8"))
        files.append(page)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links lead to pages of the site."""
    here = page.file.src_uri
    pieces = CODE.split(markdown)  # every second one is code
    pieces[::2] = [LINK.sub(lambda found: _translate(found, here), piece) for piece in pieces[::2]]
    return "".join(pieces)


def _translate(found: re.Match[str], here: str) -> str:
    before, target, section, after = found.groups()
    place = here if here in BESIDE or here.startswith("recipes/") else f"docs/{here}"
    in_repository = posixpath.normpath(posixpath.join(posixpath.dirname(place), target))
    there = in_repository.removeprefix("docs/")
    if in_repository.startswith("recipes/"):
        there = f"reference/{Path(in_repository).stem}.md"
    address = posixpath.relpath(there, posixpath.dirname(here) or ".")
    return f"{before}{address}{section or ''}{after}"
