"""The tab of runs: curves while they grow, the newest samples, and what goes wrong."""

from __future__ import annotations

import html
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import gradio as gr

from genkit.app import curves, finding, parts
from genkit.app.finding import Shelf

SECONDS = 2.0  # between looks
APART = ("step", "seconds", "rate")  # of an entry: what is no curve of its own
VARIED = {"entropy": 1.0, "duplicates": 0.01, "spread": 1.0, "coverage": 1.0}  # as real images are
SILENT = 0.1  # nats an image that latents say at least, unless they say nothing
HINT = (
    "No run was named. Train something, for example with "
    "<code>accelerate launch recipes/train_charlm.py</code>, and start the page with the folder of "
    "the run, or of all runs: <code>genkit app runs</code>."
)


def tab(shelf: Shelf, page: gr.Blocks) -> None:
    """Build the tab."""
    names = shelf.names(finding.RUNS)
    if not names:
        parts.canvas("no-runs", parts.hint(HINT))
        return
    with gr.Row():
        run = parts.chooser(names, "Run")
        axis = gr.Radio(["logarithmic", "linear"], value="logarithmic", label="Loss axis")
    view, seen = parts.canvas("run"), gr.State("")
    look = parts.event(_look, shelf, 1)
    options: dict[str, Any] = {"queue": False, "show_progress": "hidden"}
    gr.on(
        [page.load, run.input, axis.input, gr.Timer(SECONDS).tick],
        look, [run, axis, seen], [view, seen], api_name="look", **options,
    )  # fmt: skip


def _look(shelf: Shelf, name: str, axis: str, seen: str) -> tuple[Any, Any]:
    """Draw a run anew if it was written to."""
    folder = Path(shelf.pick(finding.RUNS, name))
    files = [*(folder / name for name in (*finding.OF_RUN, "loss.png")), *folder.glob("samples/*")]
    times = [(file.name, *_stamp(file)) for file in files if file.exists()]
    stamp = json.dumps([name, axis, times])
    if stamp == seen:
        return gr.skip(), gr.skip()
    return show(folder, axis == "logarithmic"), stamp


def _stamp(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_mtime_ns, found.st_size


def show(folder: Path, log_axis: bool) -> str:
    """Write all there is to see of a run."""
    from genkit.folder import RunFolder

    log = RunFolder(folder).log()
    if not log:
        return parts.hint("This run has not made a step yet.") + _samples(folder)
    last = log[-1]
    head = f"step {last['step']:,} · {last.get('seconds', 0):,.0f} s"
    return (
        f'<div class="run"><p class="head">{head}</p>{_warnings(folder, log)}'
        f'<div class="panels">{_panels(log, log_axis)}</div>{_samples(folder)}{_picture(folder)}'
        "</div>"
    )


# ---------------------------------------------------------------------------------------------
# Curves


def _panels(log: list[dict[str, Any]], log_axis: bool) -> str:
    """Draw the losses together, and all other figures by themselves."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for entry in log:
        for name, value in entry.items():
            if name not in APART and isinstance(value, int | float):
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
    from genkit import monitor

    lost = [entry["step"] for entry in log if None in entry.values()]
    lines = [f"step {lost[-1]:,}: a figure is not finite; {len(lost)} such steps"] if lost else []
    divergences = [(entry["step"], entry["kl"]) for entry in log if entry.get("kl") is not None]
    if divergences and divergences[-1][1] < SILENT:
        step, value = divergences[-1]
        advice = "try kl_warmup, free_bits or a lower beta"
        lines.append(f"step {step:,}: collapse: the latents say {value:.3f} nats; {advice}")
    if any("coverage" in entry for entry in log):
        floor = VARIED | _read(folder / "floor.json")
        loss = _read(folder / "run.json").get("settings", {}).get("loss") or "wasserstein"
        lines += map(str, monitor.troubles(log, loss, floor))
    return lines


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


# ---------------------------------------------------------------------------------------------
# Samples


def _samples(folder: Path) -> str:
    """Show the newest samples."""
    files = [f for f in folder.glob("samples/step-*") if f.suffix in (".md", ".png")]
    if not files:
        return ""
    newest = max(files, key=lambda file: int(file.stem.removeprefix("step-")))
    head = f"<h3>Samples of step {int(newest.stem.removeprefix('step-')):,}</h3>"
    if newest.suffix == ".md":
        return f"{head}<pre>{html.escape(newest.read_text(encoding='utf-8'))}</pre>"
    address = parts.data_address(newest.read_bytes())
    return f'{head}<img class="sheet" alt="samples" src="{address}">'


def _picture(folder: Path) -> str:
    """Show the recipe's own picture of the run, on demand."""
    file = folder / "loss.png"
    if not file.exists():
        return ""
    address = parts.data_address(file.read_bytes())
    return f'<details><summary>loss.png</summary><img alt="loss" src="{address}"></details>'
