"""How soon the web page is ready with small models, redraws, and serves one visitor among many.

    python benchmarks/app.py [--repeats 60] [--greedy 21]

Ready is from the start of the process to the first page that is served. Redrawing is of the next
token's distribution, from a move of the temperature's slider to the new bars: in Chromium if there
is one, with all that the browser does, otherwise the request alone. Greedy visitors ask for 64
images of 1,000 steps each; another one then asks for 16 of 20 steps, and for the next token.
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
from visitors import DRAW, Visitor  # type: ignore[import-not-found]  # noqa: E402

MODELS = ("language", "reader", "two_latents")
SOME = ["class_conditional", "one after the other", 0, 16, "dpm++", 20, 1.0]  # images, and steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=60, help="redrawings")
    parser.add_argument("--greedy", type=int, default=21, help="visitors who ask for much")
    arguments = parser.parse_args()
    repeats = arguments.repeats
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
    middle, late = 1000 * statistics.median(times), 1000 * sorted(times)[int(0.95 * len(times))]
    print(f"redrawn in {middle:.0f} ms (median), {late:.0f} ms (95 %), {repeats} times")
    crowd(arguments.greedy)


def crowd(count: int, times: int = 10) -> None:
    """Measure how soon a visitor is served among so many greedy ones."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("language", "class_conditional"):
            MAKE[name](Path(folder) / name)
        with served([folder]) as address:
            redraw(address)
            greedy = [Visitor(address, f"greedy{i}") for i in range(count)]
            for each in greedy:
                each.choose("class_conditional")
                each.join("draw", DRAW)
                each.listen()
            took = [served_in(address, f"other{i}") for i in range(times)]
            done = sum(bool(each.done) for each in greedy)
            for each in greedy:
                each.leave()
    drawn, written = ([pair[i] for pair in took] for i in range(2))
    print(
        f"beside {count} greedy visitors, {done} of them done, another has its images after "
        f"{statistics.median(drawn):.2f} s (at most {max(drawn):.2f}) and the next token after "
        f"{statistics.median(written):.2f} s (at most {max(written):.2f})"
    )


def served_in(address: str, session: str) -> tuple[float, float]:
    """Return the seconds until a new visitor has some images, and the next token."""
    visitor = Visitor(address, session)
    visitor.choose("class_conditional")
    start = time.perf_counter()
    visitor.join("draw", SOME)
    visitor.listen()
    assert "16 of" in visitor.wait()[0]
    drawn = time.perf_counter()
    call = {"data": ["language", "The ", 1.0], "session_hash": session}
    assert "nexts" in ask(f"{address}gradio_api/run/next_tokens", call)[1]
    visitor.leave()
    return drawn - start, time.perf_counter() - drawn


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
