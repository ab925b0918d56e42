"""Curves of a run's log as an SVG that scales with the page."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 420, 230, 52, 24, 10
POINTS = 300  # of a curve: more cannot be seen
COLOURS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#84a30e")
Points = Sequence[tuple[float, float]]


def draw_curves(title: str, curves: Mapping[str, Points], log: bool = False) -> str:
    """Draw curves into one plot, with their names and last values below.

    Args:
        title: what the plot shows.
        curves: points by name, (step, value) each, in order of steps.
        log: use a logarithmic axis; ignored if a value is not above 0.
    """
    log = log and all(y > 0 for points in curves.values() for _, y in points)
    scaled = {
        name: [(x, math.log10(y) if log else y) for x, y in _thinned(points)]
        for name, points in curves.items()
    }
    xs = [x for points in scaled.values() for x, _ in points]
    ys = [y for points in scaled.values() for _, y in points]
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)
    right, high = max(right, left + 1), high if high > low else low + (abs(low) or 1) / 10

    def to_pixels(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - left) / (right - left) * (WIDTH - LEFT - 8)
        return across, TOP + (high - y) / (high - low) * (HEIGHT - BOTTOM - TOP)

    lines = [_axes(left, right, low, high, log)]
    for (name, points), colour in zip(scaled.items(), _colours(len(scaled)), strict=True):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (to_pixels(*point) for point in points))
        lines.append(
            f'<polyline points="{path}" stroke="{colour}" data-name="{html.escape(name)}"/>'
        )
        if len(points) < 40:  # evaluations, which may be few
            dots = (to_pixels(*point) for point in points)
            lines += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in dots
            ]
    legend = "".join(
        f'<span><i style="background: {colour}"></i>{html.escape(name)} {points[-1][1]:.4g}</span>'
        for (name, points), colour in zip(curves.items(), _colours(len(curves)), strict=True)
    )
    return (
        f'<figure class="curves"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{html.escape(title)}">{"".join(lines)}</svg>'
        f"<figcaption>{legend}</figcaption></figure>"
    )


def _axes(left: float, right: float, low: float, high: float, log: bool) -> str:
    base, parts = HEIGHT - BOTTOM, []
    for i in range(5):
        value, y = low + i / 4 * (high - low), base - i / 4 * (base - TOP)
        label = f"{10**value if log else value:.3g}"
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - 8}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for share, anchor in ((0, "start"), (0.5, "middle"), (1, "end")):
        x = LEFT + share * (WIDTH - LEFT - 8)
        step = f"{'step ' if not share else ''}{left + share * (right - left):,.0f}"
        parts.append(f'<text x="{x}" y="{HEIGHT - 6}" text-anchor="{anchor}">{step}</text>')
    return "".join(parts)


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _thinned(points: Points) -> Points:
    """Average over equal parts if there are too many points to see; keep the last as it is."""
    size = -(-len(points) // POINTS)
    if size == 1:
        return points
    blocks = [points[i : i + size] for i in range(0, len(points), size)]
    means = [(block[-1][0], sum(y for _, y in block) / len(block)) for block in blocks]
    return [*means[:-1], points[-1]]
