"""Pieces of a self-contained HTML page that needs no network: what all reports are made of."""

from __future__ import annotations

import base64
import html
from collections.abc import Collection, Iterable, Sequence
from importlib import resources
from typing import NamedTuple

from fastretina.metrics.bootstrap import Interval
from fastretina.metrics.table import Metric

# Said to the browser as well: nothing from outside is ever fetched and no script runs, whatever stands in names and paths.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class Link(NamedTuple):
    """A table's cell that leads to another file, by its path from the page."""

    text: str
    target: str


class Ranged(NamedTuple):
    """A cell, of a table of the kind `many`, of a value and, smaller below it, its interval; `percent`: shares of 0-1."""

    value: float | None
    low: float | None
    high: float | None
    percent: bool = False

    @classmethod
    def of(cls, found: Interval, percent: bool = False) -> Ranged:
        """Of what the bootstrap found."""
        return cls(found.value, found.low, found.high, percent)

    def __str__(self) -> str:
        return percent(self.value) if self.percent else number(self.value)

    @property
    def bounds(self) -> str:
        """The interval: `0.780–0.840`, `78.0–84.0`; "" where undefined."""
        if self.low is None or self.high is None:
            return ""
        return f"{100 * self.low:.1f}–{100 * self.high:.1f}" if self.percent else f"{self.low:.3f}–{self.high:.3f}"


class Section(NamedTuple):
    """A part of a page under a heading of its own, of HTML fragments; empty ones are fine."""

    title: str
    parts: Sequence[str]


def page(title: str, head: Iterable[str], sections: Sequence[Section]) -> str:
    """A whole page: the title as its heading, the fragments of `head`, links to the sections, the sections."""
    style = resources.files("fastretina.report").joinpath("report.css").read_text("utf-8")
    links = "".join(f'<li><a href="#s{n}">{html.escape(section.title)}</a></li>' for n, section in enumerate(sections, start=1))
    body = []
    for n, section in enumerate(sections, start=1):
        parts = "\n".join(section.parts)
        body.append(f'<section aria-labelledby="s{n}"><h2 id="s{n}">{html.escape(section.title)}</h2>\n{parts}</section>')
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<link rel="icon" href="data:,"><title>{html.escape(title)}</title>',
            f"<style>\n{style}</style></head><body>",
            f"<header><h1>{html.escape(title)}</h1>",
            *head,
            f'<nav aria-label="Contents"><ul>{links}</ul></nav></header><main>',
            *body,
            "</main></body></html>\n",
        ]
    )


def _text(text: str) -> str:
    """Escaped, with no line break between a number and its per cent sign."""
    return html.escape(text).replace(" %", "&nbsp;%")


def cards(values: Iterable[tuple[str, str]]) -> str:
    """Boxes of (value, what it is)."""
    boxes = "".join(f'<div class="card"><b>{_text(value)}</b><span>{_text(text)}</span></div>' for value, text in values)
    return f'<div class="cards">{boxes}</div>'


def paragraph(text: str) -> str:
    """Running text."""
    return f"<p>{_text(text)}</p>"


def remark(text: str) -> str:
    """Small print: what a number or a table means."""
    return f'<p class="soft small">{_text(text)}</p>'


def note(text: str, good: bool = False) -> str:
    """A remark that must not be overlooked; `good`: one that reassures."""
    return f'<p class="note{" good" if good else ""}">{_text(text)}</p>'


def number(value: float | None) -> str:
    """Three decimals; a dash for what is undefined."""
    return "–" if value is None else f"{value:.3f}"


def percent(value: float | None) -> str:
    """A share of 0-1 as per cent; a dash for what is undefined."""
    return "–" if value is None else f"{100 * value:.1f} %"


def shown(metric: Metric, value: float | None) -> str:
    """The value of a metric as it is usually written."""
    return percent(value) if metric.percent else number(value)


def duration(seconds: float) -> str:
    """Seconds to one decimal, or minutes from one minute on."""
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min"


def bounds(low: float | None, high: float | None, percent: bool = False) -> str:
    """An interval, of shares of 0-1 as per cent; a dash for what is undefined."""
    if low is None or high is None:
        return "–"
    return f"{100 * low:.1f} to {100 * high:.1f} %" if percent else f"{low:.3f} to {high:.3f}"


def image(data: bytes, text: str, kind: str = "png") -> str:
    """A picture (`kind`: png or jpeg) inside the page; `text` says what it shows to those who cannot see it."""
    return f'<img alt="{html.escape(text)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def pair(parts: Iterable[str]) -> str:
    """Fragments side by side, where there is room."""
    return '<div class="pair">' + "".join(f"<div>{part}</div>" for part in parts) + "</div>"


def table(header: Sequence[str], rows: Iterable[Sequence[object]], title: str, kind: str = "", small: Collection[int] = ()) -> str:
    """A table of plain values, Links and Ranged under its title. The first cell of each row names the row.

    kind: its CSS class; `words` for text, left-aligned and broken into lines. small: numbers, from 0, of the rows whose metrics say
    little; they are grey, and their names end in "(small)".
    """

    def cell(value: object) -> str:
        if isinstance(value, Link):
            return f'<a href="{html.escape(value.target)}">{_text(value.text)}</a>'
        if isinstance(value, Ranged) and value.bounds:
            return f"{_text(str(value))}<small>{value.bounds}</small>"
        return _text(f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value))

    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in header)
    body = ""
    for at, (first, *others) in enumerate(rows):
        cells = "".join(f"<td>{cell(value)}</td>" for value in others)
        opened, mark = ('<tr class="few">', " (small)") if at in small else ("<tr>", "")
        body += f'{opened}<th scope="row">{cell(first)}{mark}</th>{cells}</tr>'
    label = html.escape(title)
    return titled(f'<table class="{kind}" aria-label="{label}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>', title)


def titled(content: str, title: str, kind: str = "") -> str:
    """Content under a title that may be wider than a phone: it scrolls by itself, by keyboard too, and the page does not."""
    region = f'<div class="scroll {kind}" role="region" tabindex="0" aria-label="{html.escape(title)}">{content}</div>'
    return f'<figure class="table"><figcaption>{_text(title)}</figcaption>{region}</figure>'
