"""How soon the web page is ready with three small models, and how soon it redraws.

    python benchmarks/app.py [--repeats 60]

Ready is from the start of the process to the first page that is served. Redrawing is of the next
token's distribution, from a move of the temperature's slider to the new bars: in Chromium if there
is one, with all that the browser does, otherwise the request alone.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from app_models import (  # type: ignore[import-not-found]  # noqa: E402
    ARGUMENTS,
    MAKE,
    ask,
    browser,
    served,
)

MODELS = ("language", "reader", "two_latents")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=60, help="redrawings")
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            MAKE[name](Path(folder) / name)
        start = time.perf_counter()
        with served([str(Path(folder) / name) for name in MODELS]) as address:
            assert ask(address)[0] == 200, "the page does not answer"
            print(f"ready after {time.perf_counter() - start:.1f} s")
            redraw(address)  # the model is loaded
            print(f"all loaded after {time.perf_counter() - start:.1f} s")
            times = in_browser(address, repeats) or [timed(address, i) for i in range(repeats)]
    tell = 1000 * statistics.median(times), 1000 * sorted(times)[int(0.95 * len(times))]
    print(f"redrawn in {tell[0]:.0f} ms (median), {tell[1]:.0f} ms (95 %), {repeats} times")


def redraw(address: str, temperature: float = 1.0) -> None:
    """Ask for the distribution at a temperature, as the page does."""
    call = {"data": ["language", "The ", temperature]}
    status, text, _ = ask(f"{address}gradio_api/run/next_tokens", call)
    assert status == 200 and "nexts" in text, text


def timed(address: str, i: int) -> float:
    start = time.perf_counter()
    redraw(address, round(0.05 * (1 + i % 40), 2))
    return time.perf_counter() - start


REDRAW = """
(value) => new Promise((done) => {
  const bars = document.querySelector("#bars"), start = performance.now();
  const slider = document.querySelector("input[type=range][aria-label*='Temperature']");
  const seen = new MutationObserver(() => {
    seen.disconnect();
    requestAnimationFrame(() => done((performance.now() - start) / 1000));
  });
  const all = {subtree: true, childList: true, characterData: true, attributeFilter: ["style"]};
  seen.observe(bars.querySelector(".nexts"), all);
  slider.value = value;
  slider.dispatchEvent(new Event("input", {bubbles: true}));
})
"""


def in_browser(address: str, repeats: int) -> list[float]:
    """Move the slider in Chromium; nothing if there is none."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return []
    if browser() is None:
        return []
    with sync_playwright() as drive:
        chromium = drive.chromium.launch(executable_path=browser(), args=ARGUMENTS)
        page = chromium.new_page()
        page.goto(address)
        page.locator("#bars .next").first.wait_for()
        evaluate: Callable[..., Any] = page.evaluate
        times = [evaluate(REDRAW, round(0.05 * (1 + 7 * i % 40), 2)) for i in range(1, repeats + 1)]
        chromium.close()
    return times


if __name__ == "__main__":
    main()
