"""Pieces of a self-contained HTML page that needs no network: what all reports are made of."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from typing import NamedTuple

STYLE = """
:root { color-scheme: light; --ink: #1b1f24; --soft: #57606a; --line: #d8dee4; --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 24px 20px 48px; color: var(--ink); background: #fff;
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 4px; } h2 { font-size: 1.2rem; margin: 36px 0 10px; }
p { margin: 8px 0; } a { color: var(--accent); } .soft { color: var(--soft); } .small { font-size: .875rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 20px 0; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; }
.card b { display: block; font-size: 1.55rem; line-height: 1.2; } .card span { color: var(--soft); font-size: .875rem; }
.note { border-left: 4px solid #d55e00; background: #fdf3ec; padding: 10px 14px; border-radius: 0 6px 6px 0; }
.note.good { border-color: #009e73; background: #edf8f4; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 16px; align-items: start; }
img { max-width: 100%; height: auto; display: block; margin: 0 auto; }
.thumbs { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 16px 12px; }
figure { margin: 0; font-size: .8125rem; overflow-wrap: anywhere; } figcaption { margin-top: 4px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9375rem; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; } th:first-child, td:first-child { text-align: left; }
details { margin: 8px 0; } summary { cursor: pointer; }
@media (max-width: 640px) { th, td { padding: 6px 5px; font-size: .8125rem; } th { white-space: normal; vertical-align: bottom; }
  td:first-child { white-space: normal; min-width: 6.5em; } }
.settings td, .settings th { text-align: left; }
.settings td:last-child { white-space: normal; overflow-wrap: anywhere; width: 99%; }
"""


class Link(NamedTuple):
    """A table's cell that leads to another file, by its path from the page."""

    text: str
    target: str


def page(title: str, parts: Iterable[str]) -> str:
    """A whole page of HTML fragments."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{html.escape(title)}</title><style>{STYLE}</style></head><body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def cards(values: Iterable[tuple[str, str]]) -> str:
    """Boxes of (figure, what it is)."""
    boxes = "".join(
        f'<div class="card"><b>{html.escape(value)}</b><span>{html.escape(text)}</span></div>' for value, text in values
    )
    return f'<div class="cards">{boxes}</div>'


def note(text: str, good: bool = False) -> str:
    """A remark that must not be overlooked; `good`: one that reassures."""
    return f'<p class="note{" good" if good else ""}">{html.escape(text)}</p>'


def number(value: float | None) -> str:
    """Three decimals; a dash for what is undefined."""
    return "–" if value is None else f"{value:.3f}"


def percent(value: float | None) -> str:
    """A share of 0-1 as per cent; a dash for what is undefined."""
    return "–" if value is None else f"{100 * value:.1f} %"


def duration(seconds: float) -> str:
    """Seconds to one decimal, or minutes from one minute on."""
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min"


def image(data: bytes, text: str, kind: str = "png") -> str:
    """A picture (`kind`: png or jpeg) inside the page; `text` for who cannot see it."""
    return f'<img alt="{html.escape(text)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def table(header: Sequence[str], rows: Iterable[Sequence[object]], kind: str = "") -> str:
    """A table of plain values and Links; `kind` is its CSS class."""

    def cell(value: object) -> str:
        if isinstance(value, Link):
            return f'<a href="{html.escape(value.target)}">{html.escape(value.text)}</a>'
        return html.escape(f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value))

    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{cell(value)}</td>" for value in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
