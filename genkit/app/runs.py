"""The tab of runs: curves while they grow, the newest samples, and signs of trouble."""

from __future__ import annotations

import contextlib
import functools
import html
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import gradio as gr

from genkit.app import chapters, curves, events, model_index, parts
from genkit.app.model_index import ModelIndex
from genkit.files import read_inside
from genkit.hub import gallery

SECONDS = 2.0  # between refreshes
NO_CURVES = ("step", "seconds", "rate")  # keys of an entry
# figures of real images, for a run that has not measured its own
BASELINE = {"entropy": 1.0, "duplicates": 0.01, "spread": 1.0, "coverage": 1.0}
EVALUATED = ("distance", *BASELINE)  # figures in an evaluation of a GAN
FILES = (*model_index.RUN_FILES, "baseline.json", "loss.png")
TEXT, PICTURE, LOG = 1 << 20, 1 << 24, 1 << 26  # bytes of a file, at most
LARGEST = 1e30  # a figure
MIN_KL = 0.1  # nats an image, below which the posterior has collapsed onto the prior
HINT = (
    "No run was named. Train something, for example with "
    "<code>genkit train charlm</code>, and start the page with the folder of "
    "the run, or of all runs: <code>genkit app runs</code>."
)


def tab(index: ModelIndex, page: gr.Blocks) -> None:
    """Build the tab."""
    chapters.add_help("Watch losses and samples while a model trains.", "gans", "vae", "privacy")
    names = index.names(model_index.RUNS)
    if not names:
        parts.canvas("no-runs", parts.hint(HINT))
        return
    with gr.Row():
        run = parts.chooser(names, "Run")
        axis = gr.Radio(["logarithmic", "linear"], value="logarithmic", label="Loss axis")
    view, seen = parts.canvas("run", parts.hint("Reading the run …")), gr.State("")
    refresh = events.make_event(_refresh, index, [""], verbs=False)  # after an error, from scratch
    gr.on(
        [page.load, run.input, axis.input, gr.Timer(SECONDS).tick],
        refresh, [run, axis, seen], [view, seen], api_name="refresh", queue=False, **events.EVENT,
    )  # fmt: skip


def _refresh(index: ModelIndex, name: str, axis: str, seen: str) -> tuple[Any, Any]:
    """Show a run anew if its files have changed; `seen` is their state when it was last shown."""
    folder = Path(index.resolve(model_index.RUNS, name))
    if not folder.is_dir():
        raise ValueError(f"Run: {name} is no longer there")
    files = (*(folder / name for name in FILES), *_list_samples(folder)[:1])
    state = json.dumps([name, axis, [_file_state(file) for file in files]])
    if state == seen:
        return gr.skip(), gr.skip()
    return _show_once(folder, axis == "logarithmic", state), state


def _file_state(file: Path) -> tuple[str, int, int] | None:
    """Return name, time of the last write and size of a file; None if there is none."""
    try:
        found = file.lstat()
    except OSError:
        return None
    return file.name, found.st_mtime_ns, found.st_size


@functools.lru_cache(maxsize=8)
def _show_once(folder: Path, log_axis: bool, state: str) -> str:
    """Show a run in this state; computed once for all visitors."""
    return show_run(folder, log_axis)


def show_run(folder: Path, log_axis: bool) -> str:
    """Return everything about a run, as HTML."""
    log = read_log(folder)
    if not log:
        return parts.hint("This run has not made a step yet.") + _show_samples(folder)
    last = log[-1]
    head = f"step {last['step']:,} · {last.get('seconds') or 0:,.0f} s"
    return (
        f'<div class="run"><p class="head">{head}</p>{_warnings(folder, log)}'
        f'<div class="panels">{_panels(log, log_axis)}</div>{_show_samples(folder)}'
        f"{_show_loss_picture(folder)}"
        "</div>"
    )


# ---------------------------------------------------------------------------------------------
# Files: regular ones alone


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Read the figures of a run, null where one is not finite; lines without a step are left out.

    Raises:
        ValueError: the file is not a regular one, or too large.
    """
    lines = []
    for line in _read_text(folder, "metrics.jsonl", LOG).splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            entry = json.loads(line)
            if isinstance(entry, dict) and type(entry.get("step")) is int:
                lines.append({k: v for k, v in entry.items() if v is None or _is_figure(v)})
    return [line for line in lines if line.get("step", -1) >= 0]


def _is_figure(value: Any) -> bool:
    return type(value) in (int, float) and -LARGEST < value < LARGEST


def _read_settings(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON object; empty if there is no such file."""
    try:
        found = json.loads(_read_text(folder, name, TEXT) or "{}")
    except RecursionError:
        found = None
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is damaged ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{name} is damaged (it is no JSON object)")
    return found


def _read_text(folder: Path, name: str, limit: int) -> str:
    try:
        return _read_bytes(folder, name, limit).decode(errors="replace")
    except FileNotFoundError:
        return ""


def _read_bytes(folder: Path, name: str, limit: int) -> bytes:
    """Read a file of a run; errors name the run alone, not the folder where runs lie."""
    try:
        return read_inside(folder / name, folder, limit)
    except ValueError as error:
        raise ValueError(str(error).replace(str(folder), folder.name)) from None


def _list_samples(folder: Path) -> list[Path]:
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
            if name not in NO_CURVES and value is not None:
                found[name].append((entry["step"], value))
    losses = {name: found.pop(name) for name in list(found) if name.endswith("loss")}
    panels = [curves.draw_curves("loss", losses, log_axis)] if losses else []
    return "".join(panels + [curves.draw_curves(name, {name: found[name]}) for name in found])


# ---------------------------------------------------------------------------------------------
# Signs of trouble


def _warnings(folder: Path, log: list[dict[str, Any]]) -> str:
    """List signs of trouble, or state that there are none."""
    lines = find_troubles(folder, log)
    if not lines:
        return '<p class="fine">No sign of trouble.</p>'
    return "".join(map(parts.problem, lines))


def find_troubles(folder: Path, log: list[dict[str, Any]]) -> list[str]:
    """List signs of trouble in a run: of a GAN, of a variational autoencoder, or of any."""
    steps = [entry["step"] for entry in log if None in entry.values()]
    lines = (
        [f"step {steps[-1]:,}: a figure is not finite; {len(steps)} such steps"] if steps else []
    )
    divergences = [(entry["step"], entry["kl"]) for entry in log if entry.get("kl") is not None]
    if divergences and divergences[-1][1] < MIN_KL:
        step, value = divergences[-1]
        advice = "try kl_warmup, free_bits or a lower beta"
        lines.append(f"step {step:,}: posterior collapse: a KL of {value:.3f} nats; {advice}")
    whole = [e for e in log if "coverage" not in e or all(map(_is_figure, map(e.get, EVALUATED)))]
    if any("coverage" in entry for entry in whole):
        from genkit.metrics import collapse

        try:
            lines += map(str, collapse.find_troubles(whole, _loss_name(folder), _baseline(folder)))
        except ValueError as error:
            lines.append(str(error))
    return lines


def _loss_name(folder: Path) -> str:
    """Return the loss that a GAN is trained with."""
    from genkit.models.gan_losses import LOSSES

    settings = _read_settings(folder, "run.json").get("settings")
    found = settings.get("loss") if isinstance(settings, dict) else None
    return found if found in LOSSES else "wasserstein"


def _baseline(folder: Path) -> dict[str, float]:
    """Return the figures of real images; defaults for those that were not measured."""
    found = _read_settings(folder, "baseline.json").items()
    return BASELINE | {name: value for name, value in found if _is_figure(value)}


# ---------------------------------------------------------------------------------------------
# Samples


def _show_samples(folder: Path) -> str:
    """Show the newest samples."""
    for sample in _list_samples(folder)[:1]:
        head = f"<h2>Samples of step {gallery.step_of(sample):,}</h2>"
        name = f"samples/{sample.name}"
        if sample.suffix == ".md":
            return f"{head}<pre>{html.escape(_read_text(folder, name, TEXT))}</pre>"
        address = parts.data_url(_read_bytes(folder, name, PICTURE))
        return f'{head}<img class="sheet" alt="samples" src="{address}">'
    return ""


def _show_loss_picture(folder: Path) -> str:
    """Show the recipe's own picture of the run, folded."""
    try:
        address = parts.data_url(_read_bytes(folder, "loss.png", PICTURE))
    except FileNotFoundError:
        return ""
    return f'<details><summary>loss.png</summary><img alt="loss" src="{address}"></details>'
