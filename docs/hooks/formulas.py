"""Formulas of the site: LaTeX becomes MathML while it is built, so that browsers need no script."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.S)
FUNCTION = re.compile(r"(<mi>(?:log|exp)</mi>)(?=<m(?:i|sub|sup|subsup)>)")  # log p, not logp
GAP = '<mspace width="0.17em"/>'


def on_page_content(content: str, **_: Any) -> str:
    """Write the formulas of a page, as arithmatex marks them, in MathML."""
    return FORMULA.sub(_write, content)


def _write(found: re.Match[str]) -> str:
    tag, bracket, escaped = found.groups()
    latex = html.unescape(escaped).strip()
    formula = convert(latex, display="block" if bracket == "[" else "inline")
    formula = formula.replace("<math ", f'<math alttext="{html.escape(latex)}" ', 1)
    formula = FUNCTION.sub(rf"\1{GAP}", formula)
    return f'<{tag} class="formula">{formula}</{tag}>'
