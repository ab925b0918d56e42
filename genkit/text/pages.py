"""The page of alternatives: a text in colours, and bars for the token under the pointer."""

from __future__ import annotations

import colorsys
import html
from typing import TYPE_CHECKING

from genkit.text import token_names

if TYPE_CHECKING:
    from genkit.text.alternatives import Alternatives, Choice, TokenSpan


PAGE = """<!doctype html>
<html>
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ margin: 2rem auto 18rem; max-width: 50rem; padding: 0 1rem;
  font: 16px/1.5 system-ui, sans-serif; color: #111; background: #fff; }}
header {{ color: #555; margin-bottom: 1.5rem; }}
.scale {{ display: inline-block; width: 8rem; height: .8rem; margin: 0 .4rem;
  background: linear-gradient(to right, {scale}); }}
.text {{ font: 18px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  unicode-bidi: plaintext; }}
.prompt {{ color: #777; }}
.token {{ cursor: pointer; outline: 0 solid #111; }}
.token:hover, .token:focus {{ outline-width: 2px; }}
.token[data-name]::before {{ content: attr(data-name); font-style: italic; }}
.break::before {{ content: "↵"; color: #777; }}
.panel {{ display: none; position: fixed; inset: auto 0 0; max-height: 45vh; overflow: auto;
  padding: 1rem; background: #fff; border-top: 2px solid #111;
  font: 15px/1.5 ui-monospace, monospace; white-space: normal; direction: ltr;
  text-align: left; cursor: default; }}
.token:hover .panel, .token:focus .panel {{ display: flex; flex-wrap: wrap; gap: 2rem; }}
.token:hover .panel {{ z-index: 1; }}
.choice, .option {{ display: block; }}
.option {{ display: grid; grid-template-columns: 10em 10em 5em; gap: .8em; }}
.option.taken {{ font-weight: bold; }}
.bar {{ align-self: center; height: .8em; }}
.share {{ text-align: right; }}
</style>
</head>
<body>
<header>{summary}<br>
unlikely<span class="scale"></span>likely. Point at a token, or click on it, for the others.
</header>
<div class="text">{text}</div>
</body>
</html>
"""


def alternatives(record: Alternatives) -> str:
    """Return a page of a text, coloured by probability, with the alternatives of each token."""
    return PAGE.format(
        title=html.escape(token_names.one_line(record.text[:60])),
        summary=html.escape(record.summary),
        scale=", ".join(_css(i / 8) for i in range(9)),
        text=fragment(record),
    )


def fragment(record: Alternatives) -> str:
    """Return the coloured text alone, for a page of another style."""
    prompt = f'<span class="prompt">{_marked_up(record.prompt)}</span>'
    return prompt + "".join(map(_span, record.spans))


def _span(span: TokenSpan) -> str:
    name = "" if span.text else f' data-name="{html.escape(span.name)}"'
    panel = "".join(map(_choice, span.choices))
    return (
        f'<span class="token" tabindex="0" style="background: {_css(span.probability)}"'
        f'{name}>{_marked_up(span.text)}<span class="panel">{panel}</span></span>'
    )


def _choice(choice: Choice) -> str:
    options = [(o.token, o.name, o.probability) for o in choice.options]
    if choice.token not in [token for token, _, _ in options]:
        options.append((choice.token, choice.name, choice.probability))
    rows = "".join(
        f'<span class="option{" taken" if token == choice.token else ""}">'
        f"<bdi>{html.escape(name)}</bdi>"
        f'<span class="bar" style="width: {probability:.1%}; '
        f'background: {_css(probability)}"></span>'
        f'<span class="share">{token_names.percent(probability)}</span></span>'
        for token, name, probability in options
    )
    head = f"<bdi>{html.escape(choice.name)}</bdi> · rank {choice.rank}"
    return f'<span class="choice">{head}{rows}</span>'


def _marked_up(text: str) -> str:
    """Escape a text so that a browser shows it exactly; NUL, which HTML cannot hold, becomes ␀."""
    escaped = html.escape(text).replace("\0", "␀").replace("\r", "&#13;")
    return escaped.replace("\n", '<span class="break"></span>\n')


def colour(probability: float) -> tuple[int, int, int]:
    """Return a colour from red by yellow to green, light enough for black text."""
    red, green, blue = colorsys.hls_to_rgb(probability / 3, 0.78, 0.75)
    return round(255 * red), round(255 * green), round(255 * blue)


def _css(probability: float) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour(probability))
