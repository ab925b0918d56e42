"""Formulas of the site: LaTeX becomes MathML while it is built, so that browsers need no script."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.S)


def on_page_content(content: str, **_: Any) -> str:
    """Write the formulas of a page, as arithmatex marks them, in MathML."""
    return FORMULA.sub(_write, content)


def _write(found: re.Match[str]) -> str:
    latex = html.unescape(found[3]).strip()
    display = "block" if found[2] == "[" else "inline"
    return convert(latex, display=display).replace(
        "<math ", f'<math alttext="{html.escape(latex)}" '
    )
