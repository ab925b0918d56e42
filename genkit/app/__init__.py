"""The web page: generate text, answer, draw images, follow runs, with models named at its start."""

from __future__ import annotations

import contextlib
import functools
import re
import secrets
import socket
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from genkit.app import (
    answer,
    chapters,
    chat,
    classify,
    events,
    guard,
    images,
    model_index,
    runs,
    wire,
    write,
)
from genkit.app.model_index import ModelIndex, find_models
from genkit.app.root import HUB, LOCAL, TOP, Root, is_loopback, parse_root, space_root

try:
    import gradio as gr
except ImportError:
    raise ValueError("app: pip install 'hf-genkit[app]' first") from None

SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
TITLE = "genkit"
HERE = Path(__file__).parent


def serve(
    models: Sequence[str],
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    token: str | None = None,
    root_path: str = "",
    space: str | None = None,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serve the page until it is interrupted.

    Args:
        models: folders of saved models, of runs, or of such folders; or Hub ids. Nothing else can
            be chosen in the page.
        host: the address to listen at (default: reachable from this machine alone).
        port: the port to listen at; 0 for any that is free.
        token: what requests must bring. One is drawn if other machines can reach the page.
        root_path: where visitors find the page if a proxy passes their requests on: a path such as
            /genkit or, if the proxy changes scheme or host, the whole address, such as
            https://example.org/genkit.
        space: the variable SPACE_HOST of the Hugging Face Space that this process runs in. The page
            is then for everybody: it asks for no token, and huggingface.co shows it in a frame.
        ready: called with the page's address, token included, once it can be opened (default: the
            address is printed).

    Raises:
        ValueError: an argument is invalid; the message names it and its value.
    """
    if space is not None and (token is not None or root_path):
        raise ValueError("space takes no token and no root_path: it is public, at its own address")
    root = parse_root(root_path) if space is None else space_root(space)
    index = find_models(models)
    local = is_loopback(host)
    if token is not None and not re.fullmatch(r"[A-Za-z0-9._~-]+", token):
        raise ValueError(f"token must consist of letters, digits and -._~, got {token!r}")
    if token is None and space is None and not (local and root.is_local()):
        token = secrets.token_urlsafe()
    query = "" if token is None else f"?token={token}"
    with _listen(host, port) as listening:
        name = f"[{host}]" if ":" in host else host
        address = f"http://{name}:{listening.getsockname()[1]}{root.path}/{query}"
        public = f"{root}/{query}" if root.origin else ""
        hosts = {*LOCAL, host, root.host or host} if local else None
        framed_by = guard.NO_SITE if space is None else HUB
        app = guard.Guard(mounted(build(index), root), hosts, token, root, framed_by)
        announce = ready or functools.partial(_announce, public=public)
        server = _Server(app, lambda: announce(address), index)
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listening])


def _announce(address: str, public: str) -> None:
    through = f"{public}, by way of " if public else ""
    print(f"genkit is at {through}{address}", flush=True)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"host, port: cannot listen at {host}, port {port} ({error}); give another, or port 0 "
            "for any that is free"
        ) from None


class _Server(uvicorn.Server):
    """Calls `ready` when it listens, then loads a model of each kind ahead of its use."""

    def __init__(self, app: guard.Guard, ready: Callable[[], None], index: ModelIndex) -> None:
        # access logs would show tokens; a header may not claim where a request comes from
        options: dict[str, Any] = {"access_log": False, "proxy_headers": False, "ws": "none"}
        options |= {"log_level": "critical", "timeout_graceful_shutdown": 1}
        super().__init__(uvicorn.Config(app, http=wire.LimitedProtocol, **options))
        self.ready, self.index = ready, index

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen, call `ready`, and load models in the background."""
        await super().startup(sockets)
        self.ready()
        threading.Thread(target=warm_up, args=[self.index], daemon=True).start()


def warm_up(index: ModelIndex) -> None:
    """Load the first model of each kind; errors are shown when the model is used."""
    events.import_verbs()
    loaders: dict[str, Callable[[ModelIndex, str], object]] = {
        model_index.TEXT: write.load_language_model,
        model_index.ANSWERS: answer.load_reader,
        model_index.IMAGES: images.load_image_model,
        model_index.CLASSIFIER: classify.load_classifier,
    }
    for kind, load in loaders.items():
        for name in index.names(kind)[:1]:
            with contextlib.suppress(BaseException):  # a tokenizer's extension may panic
                load(index, name)


# ---------------------------------------------------------------------------------------------
# The page


def build(index: ModelIndex) -> gr.Blocks:
    """Build the page; the first tab that has a model is open."""
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.Markdown(f"# {TITLE}")
        with gr.Tabs(selected=_first_tab(index)):
            with gr.Tab("Write", id="write"):
                write.tab(index, page)
            with gr.Tab("Chat", id="chat"):
                chat.tab(index)
            with gr.Tab("Answer", id="answer"):
                answer.tab(index)
            with gr.Tab("Images", id="images") as shown:
                images.tab(index, shown)
            with gr.Tab("Classify", id="classify"):
                classify.tab(index)
            with gr.Tab("Runs", id="runs"):
                runs.tab(index, page)
    chapters.add_pages(page)
    # gradio hands on whatever comes: jobs.JobQueue queues, and tells places
    page.queue(api_open=False, max_size=512, default_concurrency_limit=None)
    return page


def _first_tab(index: ModelIndex) -> str:
    """Return the id of the first tab that has something to show."""
    uses = {
        "write": model_index.TEXT,
        "answer": model_index.ANSWERS,
        "images": model_index.IMAGES,
        "classify": model_index.CLASSIFIER,
        "runs": model_index.RUNS,
    }
    return next((tab for tab, use in uses.items() if index.names(use)), "write")


def make_theme() -> gr.themes.Base:
    """Make the theme: gradio's, with the contrasts that WCAG 2 asks for, light and dark."""
    theme = gr.themes.Base(font=list(SANS), font_mono=list(MONO), primary_hue="blue")
    for name, light, dark in (
        ("body_text_color_subdued", "*neutral_600", "*neutral_300"),
        ("block_info_text_color", "*neutral_600", "*neutral_300"),
        ("button_primary_background_fill", "*primary_600", "*primary_700"),
        ("button_primary_background_fill_hover", "*primary_700", "*primary_600"),
    ):
        theme.set(**{name: light, f"{name}_dark": dark})
    return theme


def mounted(page: gr.Blocks, root: Root = TOP) -> FastAPI:
    """Make a server of the page, without fonts of other sites, uploads and links to share."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    options: dict[str, Any] = {"ssr_mode": False, "pwa": False, "mcp_server": False}
    options |= {"run_history": False, "enable_monitoring": False, "footer_links": []}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="SSR mode")  # which is off anyway
        return gr.mount_gradio_app(
            app,
            page,
            path="/",
            root_path=str(root) or None,
            max_file_size="1kb",
            show_error=False,
            theme=make_theme(),
            css=(HERE / "style.css").read_text(encoding="utf-8"),
            js=(HERE / "page.js").read_text(encoding="utf-8"),
            **options,
        )
