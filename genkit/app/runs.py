"""The tab of runs: curves while they grow, the newest samples, and what goes wrong."""

from __future__ import annotations

import contextlib
import functools
import html
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import gradio as gr

from genkit.app import curves, finding, parts
from genkit.app.finding import ModelIndex
from genkit.files import read_inside
from genkit.hub import gallery

SECONDS = 2.0  # between looks
APART = ("step", "seconds", "rate")  # of an entry: what is no curve of its own
VARIED = {"entropy": 1.0, "duplicates": 0.01, "spread": 1.0, "coverage": 1.0}  # as real images are
JUDGED = ("distance", *VARIED)  # what an evaluation of a game has
FILES = (*finding.OF_RUN, "baseline.json", "loss.png")
TEXT, PICTURE, LOG = 1 << 20, 1 << 24, 1 << 26  # bytes of a file, at most
LARGEST = 1e30  # a figure
SILENT = 0.1  # nats an image that latents say at least, unless they say nothing
HINT = (
    "No run was named. Train something, for example with "
    "<code>accelerate launch recipes/train_charlm.py</code>, and start the page with the folder of "
    "the run, or of all runs: <code>genkit app runs</code>."
)


def tab(shelf: ModelIndex, page: gr.Blocks) -> None:
    """Build the tab."""
    names = shelf.names(finding.RUNS)
    if not names:
        parts.canvas("no-runs", parts.hint(HINT))
        return
    with gr.Row():
        run = parts.chooser(names, "Run")
        axis = gr.Radio(["logarithmic", "linear"], value="logarithmic", label="Loss axis")
    view, seen = parts.canvas("run"), gr.State("")
    look = parts.event(_look, shelf, [""])  # after a problem, look anew
    options: dict[str, Any] = {"queue": False, "show_progress": "hidden"}
    gr.on(
        [page.load, run.input, axis.input, gr.Timer(SECONDS).tick],
        look, [run, axis, seen], [view, seen], api_name="look", **options,
    )  # fmt: skip


def _look(shelf: ModelIndex, name: str, axis: str, seen: str) -> tuple[Any, Any]:
    """Draw a run anew if it was written to."""
    folder = Path(shelf.resolve(finding.RUNS, name))
    times = [_stamp(file) for file in (*(folder / name for name in FILES), *_samples(folder)[:1])]
    stamp = json.dumps([name, axis, times])
    if stamp == seen:
        return gr.skip(), gr.skip()
    return _shown(folder, axis == "logarithmic", stamp), stamp


def _stamp(file: Path) -> tuple[str, int, int] | None:
    try:
        found = file.lstat()
    except OSError:
        return None
    return file.name, found.st_mtime_ns, found.st_size


@functools.lru_cache(maxsize=8)
def _shown(folder: Path, log_axis: bool, stamp: str) -> str:
    """Draw a run once for all who look at it."""
    return show(folder, log_axis)


def show(folder: Path, log_axis: bool) -> str:
    """Write all there is to see of a run."""
    log = read_log(folder)
    if not log:
        return parts.hint("This run has not made a step yet.") + _newest(folder)
    last = log[-1]
    head = f"step {last['step']:,} · {last.get('seconds') or 0:,.0f} s"
    return (
        f'<div class="run"><p class="head">{head}</p>{_warnings(folder, log)}'
        f'<div class="panels">{_panels(log, log_axis)}</div>{_newest(folder)}{_picture(folder)}'
        "</div>"
    )


# ---------------------------------------------------------------------------------------------
# Files: regular ones, whatever else lies in the folder


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Read the figures of a run, null where one is not finite; lines without a step are left out.

    Raises:
        ValueError: the file is not such as can be read.
    """
    lines = []
    for line in _text(folder, "metrics.jsonl", LOG).splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            entry = json.loads(line)
            if isinstance(entry, dict) and type(entry.get("step")) is int:
                lines.append({k: v for k, v in entry.items() if v is None or _is_figure(v)})
    return [line for line in lines if line.get("step", -1) >= 0]


def _is_figure(value: Any) -> bool:
    return type(value) in (int, float) and -LARGEST < value < LARGEST


def _read(folder: Path, name: str) -> dict[str, Any]:
    """Read what is set out by name; empty if there is no such file."""
    try:
        found = json.loads(_text(folder, name, TEXT) or "{}")
    except RecursionError:
        found = None
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is damaged ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{name} is damaged (no names)")
    return found


def _text(folder: Path, name: str, limit: int) -> str:
    try:
        return _bytes(folder, name, limit).decode(errors="replace")
    except FileNotFoundError:
        return ""


def _bytes(folder: Path, name: str, limit: int) -> bytes:
    """Read a file of a run; what is wrong with it is said without telling where runs lie."""
    try:
        return read_inside(folder / name, folder, limit)
    except ValueError as error:
        raise ValueError(str(error).replace(str(folder), folder.name)) from None


def _samples(folder: Path) -> list[Path]:
    """List the samples, the newest first."""
    try:
        return gallery.list_samples(folder)[::-1]
    except OSError:
        return []


# ---------------------------------------------------------------------------------------------
# Curves


def _panels(log: list[dict[str, Any]], log_axis: bool) -> str:
    """Draw the losses together, and all other figures by themselves."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for entry in log:
        for name, value in entry.items():
            if name not in APART and value is not None:
                found[name].append((entry["step"], value))
    losses = {name: found.pop(name) for name in list(found) if name.endswith("loss")}
    panels = [curves.draw("loss", losses, log_axis)] if losses else []
    return "".join(panels + [curves.draw(name, {name: found[name]}) for name in found])


# ---------------------------------------------------------------------------------------------
# Troubles


def _warnings(folder: Path, log: list[dict[str, Any]]) -> str:
    """Name what goes wrong, or say that nothing is seen to."""
    lines = troubles(folder, log)
    if not lines:
        return '<p class="fine">No trouble is seen.</p>'
    return "".join(map(parts.problem, lines))


def troubles(folder: Path, log: list[dict[str, Any]]) -> list[str]:
    """Name what goes wrong in a run: of a game, a variational autoencoder, or any."""
    from genkit.metrics import collapse

    lost = [entry["step"] for entry in log if None in entry.values()]
    lines = [f"step {lost[-1]:,}: a figure is not finite; {len(lost)} such steps"] if lost else []
    divergences = [(entry["step"], entry["kl"]) for entry in log if entry.get("kl") is not None]
    if divergences and divergences[-1][1] < SILENT:
        step, value = divergences[-1]
        advice = "try kl_warmup, free_bits or a lower beta"
        lines.append(f"step {step:,}: collapse: the latents say {value:.3f} nats; {advice}")
    judged = [e for e in log if "coverage" not in e or all(map(_is_figure, map(e.get, JUDGED)))]
    if any("coverage" in entry for entry in judged):
        try:
            lines += map(str, collapse.find_troubles(judged, _loss(folder), _floor(folder)))
        except ValueError as error:
            lines.append(str(error))
    return lines


def _loss(folder: Path) -> str:
    """Return the loss that a game was started with."""
    from genkit.models.gan_losses import LOSSES

    settings = _read(folder, "run.json").get("settings")
    found = settings.get("loss") if isinstance(settings, dict) else None
    return found if found in LOSSES else "wasserstein"


def _floor(folder: Path) -> dict[str, float]:
    """Return the figures of real images, as far as they are known."""
    found = _read(folder, "baseline.json").items()
    return VARIED | {name: value for name, value in found if _is_figure(value)}


# ---------------------------------------------------------------------------------------------
# Samples


def _newest(folder: Path) -> str:
    """Show the newest samples."""
    for sample in _samples(folder)[:1]:
        head = f"<h3>Samples of step {gallery.step_of(sample):,}</h3>"
        name = f"samples/{sample.name}"
        if sample.suffix == ".md":
            return f"{head}<pre>{html.escape(_text(folder, name, TEXT))}</pre>"
        address = parts.data_address(_bytes(folder, name, PICTURE))
        return f'{head}<img class="sheet" alt="samples" src="{address}">'
    return ""


def _picture(folder: Path) -> str:
    """Show the recipe's own picture of the run, on demand."""
    try:
        address = parts.data_address(_bytes(folder, "loss.png", PICTURE))
    except FileNotFoundError:
        return ""
    return f'<details><summary>loss.png</summary><img alt="loss" src="{address}"></details>'
