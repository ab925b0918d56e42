"""The documentation site: every page has its place, and what is built needs no network.

The gate reads the pages; the slow tests build the site, where what builds it is installed
(pip install -e '.[docs]').
"""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from builders import ROOT

from genkit import cli, recipes

DOCS = ROOT / "docs"
CHAPTERS = sorted((DOCS / "course").glob("[!i]*.md"))
SECTIONS = ["The idea", "The formula", "Run it", "Exercise", "Where the code is", "Read"]
LOADED = re.compile(  # what a browser would fetch from another host
    r"<(?:script|img|iframe|source)[^>]*\ssrc=[\"']?(?:https?:)?//"
    r"|<link[^>]*rel=[\"']?(?:stylesheet|preconnect|icon)[^>]*href=[\"']?(?:https?:)?//"
)
GENERATED = {f"reference/{name}.md" for name in ("verbs", "records", "commands", "recipes")}
TERMS = """
    accuracy under attack; adversarial; alignment; attention; autoencoder; beam search; bits per
    character; calibration; classifier-free guidance; collapse; completeness; contrastive; coverage;
    critic; cross-entropy; decoder; denoising; differential privacy; diffusion; discriminator; dpo;
    elbo; encoder; entropy; exact match; f1; fine-tuning; flow matching; frechet distance; gan;
    generator; gradient penalty; grad-cam; greedy; grpo; gumbel; inpainting; integrated gradients;
    interpolation; kl divergence; latent space; likelihood; lora; minimax; noise schedule; pca;
    perplexity; ppo; prior; reconstruction; reparametrisation trick; reward model; saliency; seed;
    softmax; spectral; speculative decoding; style; temperature; tokenizer; top-k; top-p;
    transformer; truncation; variational autoencoder; wasserstein; word model
"""


def leaves(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    for part in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from leaves(part)


def test_the_navigation_lists_every_page():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    listed = list(leaves(nav))
    assert len(listed) == len(set(listed))
    in_docs = {str(file.relative_to(DOCS)) for file in DOCS.rglob("*.md")}
    at_the_root = {file.name for file in ROOT.glob("*.md")}
    assert set(listed) == in_docs | at_the_root | GENERATED


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda file: file.stem)
def test_a_chapter_has_all_sections_in_their_order(chapter):
    heads = re.findall(r"^## ([^:\n]*)", chapter.read_text(encoding="utf-8"), re.M)
    assert list(dict.fromkeys(heads)) == SECTIONS
    assert f"({chapter.name})" in (DOCS / "course" / "index.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda file: file.stem)
def test_a_chapter_shows_what_its_blocks_printed(chapter):
    outputs = re.findall(r"<!-- output -->\n```\n(.*?)```", chapter.read_text("utf-8"), re.S)
    assert outputs and all(output.strip() for output in outputs)


def test_promises_name_tests_that_exist():
    page = (DOCS / "why" / "promises.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", page)
    assert len(named) > 15
    for file, function in named:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert any(isinstance(n, ast.FunctionDef) and n.name == function for n in tree.body)


@pytest.mark.parametrize("file", sorted(DOCS.rglob("*.md")), ids=lambda file: file.name)
def test_pictures_have_alternative_texts(file):
    texts = re.findall(r"!\[([^\]]*)\]\(", file.read_text(encoding="utf-8"))
    assert all(len(text) > 10 for text in texts)


# ---- the site


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("needs pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_the_site_loads_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        assert not LOADED.search(page.read_text(encoding="utf-8")), page
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)[\"' ]*https?:", style.read_text("utf-8")), style


@pytest.mark.slow
def test_formulas_are_mathml(site):
    page = (site / "course" / "vae.html").read_text(encoding="utf-8")
    assert page.count("<math ") > 10 and "arithmatex" not in page and "$" not in words(page)


def words(page: str) -> str:
    """Return the prose of a page: without code, scripts and tags."""
    page = re.sub(r"<(script|style|code|pre|math|head).*?</\1>", "", page, flags=re.S)
    return re.sub(r"<[^>]*>", "", page)


@pytest.mark.slow
def test_the_search_finds_every_term(site):
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    text = " ".join(f"{page['title']} {page['text']}" for page in index["docs"]).lower()
    text = " ".join(text.split()).replace("é", "e")
    terms = [" ".join(term.split()) for term in TERMS.split(";")]
    assert [term for term in terms if term not in text] == []


@pytest.mark.slow
def test_the_reference_has_every_command_and_recipe(site):
    commands = (site / "reference" / "commands.html").read_text(encoding="utf-8")
    assert all(f"genkit {name}" in commands for name in cli.COMMANDS)
    settings = (site / "reference" / "recipes.html").read_text(encoding="utf-8")
    assert all(path.name in settings for path in recipes.find_recipes().values())
    assert "--free_bits" in settings and "--max-new-tokens" in commands


@pytest.mark.slow
def test_notebooks_run_in_their_order(site, tmp_path, monkeypatch):
    """In one folder, as the course says; what needs the network is left out."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    chapters = [page for page in leaves(nav) if re.fullmatch(r"course/(?!index).*", page)]
    assert len(chapters) == len(CHAPTERS)
    for page in chapters:
        notebook = nbformat.read((site / page).with_suffix(".ipynb"), 4)
        notebook.cells = [cell for cell in notebook.cells if "course.txt" not in cell.source]
        where = {"metadata": {"path": str(tmp_path)}}
        nbclient.NotebookClient(notebook, timeout=900, resources=where).execute()
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert code and all("Traceback" not in str(cell.outputs) for cell in code), page
