"""The flow of participants: a diagram after STARD 2015 (Bossuyt et al., BMJ 351:h5527, figure 1), drawn as SVG without a script.

It is as narrow as a phone, 328 units, so that its text is 12 px high there and larger where there is room.
"""

from __future__ import annotations

import html
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastretina.metrics.assessment import Assessment
from fastretina.metrics.flow import Flow
from fastretina.report.page import Section, remark, table
from fastretina.report.screening import decided_by, main_point

WIDTH = 328  # a phone's 360 px less the page's margins
LINE = 16  # from one line of text to the next, of 12 units each
PADDING = 8
GAP = 22  # between boxes: what an arrow is long
LETTER = 6.4  # units that a letter of usual words takes in the wider of common fonts
INDENT = 44  # of what is left out, beside the way that the others go


@dataclass(frozen=True)
class Outcome:
    """What became of the photographs that the index test decided so.

    text: the decision. ill, well: how many of them the reference standard calls referable, and not.
    """

    text: str
    ill: int
    well: int


def participants_svg(flow: Flow, rule: str = "", outcomes: Sequence[Outcome] = ()) -> str:
    """The diagram, with a title and a description for those who cannot see it. rule: who is referred, in words; outcomes: those
    referred, and those not; none where no class is referable."""
    drawing, said = _Drawing(), []

    def step(text: str, count: int | None) -> None:
        drawing.step([_counted(text, count)])
        said.append(_counted(text, count))

    def aside(title: str, count: int | None, parts: Mapping[str, int]) -> None:
        lines = [_counted(title, count), *(_counted(f"– {reason}", number) for reason, number in parts.items())]
        drawing.aside(lines)
        said.append("; ".join(lines))

    step("Rows of the label table", flow.rows)
    parts = dict(flow.left_out or {})
    left_out = None if flow.left_out is None else sum(parts.values())
    aside("Left out as it was packed", left_out, parts)
    if flow.rows is not None and left_out is not None and (others := flow.rows - left_out - flow.packed):
        aside("Not in this file, for another reason", others, {})
    step("Packed photographs", flow.packed)
    if others := flow.packed - flow.evaluated:
        aside("Not evaluated", others, {})
    step("Graded by the model", flow.evaluated)
    if outcomes:
        drawing.step([f"Index test: {rule}"])
        said.append(f"Index test: {rule}")
        columns = []
        for outcome in outcomes:
            head, total = outcome.text, outcome.ill + outcome.well
            columns.append([[_counted(head, total)], [_counted("referable", outcome.ill), _counted("not referable", outcome.well)]])
            said.append(f"{_counted(head, total)}: {_counted('referable', outcome.ill)}, {_counted('not', outcome.well)}")
        drawing.split(columns, "Reference standard")
    return drawing.svg("Flow of participants", ". ".join(said) + ".")


def _counted(text: str, count: int | None) -> str:
    number = "unknown" if count is None else f"=\N{NO-BREAK SPACE}{count:,}"
    return f"{text} (n\N{NO-BREAK SPACE}{number})"


class _Drawing:
    """Boxes one below the other; `_y` is where the next begins."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._y = 1.0
        self._spine = INDENT / 2  # where the way of those goes who stay
        self._bottoms: dict[float, float] = {}  # of the last row of columns, by their left edges

    def _box(self, x: float, y: float, width: float, texts: Sequence[str], kind: str = "") -> float:
        """A box with its texts, in lines of what fits; its lower edge."""
        letters = int((width - 2 * PADDING) / LETTER)
        lines = [line for text in texts for line in textwrap.wrap(text, letters, subsequent_indent="  ") or [""]]
        height = len(lines) * LINE + PADDING
        written = "".join(
            f'<tspan x="{x + PADDING + (8 if line.startswith("  ") else 0):g}" dy="{LINE}">{html.escape(line.strip())}</tspan>'
            for line in lines
        )
        self._parts.append(
            f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4"/>'
            f'<text x="{x + PADDING:g}" y="{y + 1:g}">{written}</text>'
        )
        return y + height

    def _arrow(self, x: float, y: float, to_x: float, to_y: float) -> None:
        self._parts.append(f'<path d="M{x:g} {y:g} L{to_x:g} {to_y:g}" marker-end="url(#flow-arrow)"/>')

    def step(self, texts: Sequence[str]) -> None:
        """A box over the whole width, which an arrow leads to from the one above."""
        if self._y > 1:
            self._arrow(self._spine, self._y, self._spine, self._y + GAP - 2)
            self._y += GAP
        self._y = self._box(1, self._y, WIDTH - 2, texts)

    def aside(self, texts: Sequence[str]) -> None:
        """A dashed box beside the way that the others go."""
        top = self._y + 10
        bottom = self._box(INDENT, top, WIDTH - INDENT - 1, texts, "aside")
        self._arrow(self._spine, top + 12, INDENT - 2, top + 12)
        self._parts.append(f'<path d="M{self._spine:g} {self._y:g} L{self._spine:g} {bottom:g}"/>')
        self._y = bottom

    def split(self, columns: Sequence[Sequence[Sequence[str]]], caption: str) -> None:
        """Columns of boxes side by side, of as many rows each; the caption stands above the second row."""
        width = (WIDTH - 2 - 10 * (len(columns) - 1)) / len(columns)
        lefts = [1 + number * (width + 10) for number in range(len(columns))]
        for row, boxes in enumerate(zip(*columns, strict=True)):
            top = self._y + GAP + (LINE if row else 0)
            for x in lefts:
                middle = x + width / 2
                self._arrow(middle, self._bottoms[x] if row else self._y, middle, top - 2)
            if row:
                self._parts.append(f'<text class="caption" x="{WIDTH / 2:g}" y="{top - 10:g}">{html.escape(caption)}</text>')
            self._bottoms = {x: self._box(x, top, width, texts) for x, texts in zip(lefts, boxes, strict=True)}
            self._y = max(self._bottoms.values())

    def svg(self, title: str, description: str) -> str:
        return (
            f'<svg class="flow" role="img" aria-labelledby="flow-title flow-text" viewBox="0 0 {WIDTH} {self._y + 1:g}">'
            f'<title id="flow-title">{html.escape(title)}</title><desc id="flow-text">{html.escape(description)}</desc>'
            '<defs><marker id="flow-arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            f'<path class="tip" d="M0 0 L8 4 L0 8 z"/></marker></defs>{"".join(self._parts)}</svg>'
        )


def participants_section(flow: Flow, assessment: Assessment) -> Section:
    """The diagram, how to read it, and the numbers of each of several packings."""
    point, outcomes = main_point(assessment), []
    rule = ""
    if point is not None:
        frozen = f"by {decided_by(point)}, {point.rule.removeprefix(f'{point.name}, ')}"
        rule = f"referred {f'where {point.rule}' if point.threshold is None else frozen}"
        outcomes = [Outcome("Referred", point.tp, point.fp), Outcome("Not referred", point.fn, point.tn)]
    text = (
        "Which photographs the numbers of this report are of: from top to bottom, dashed what was left out and why. The index "
        "test is the model, the reference standard what the photographs were labelled."
    )
    rows = []
    for path, part in flow.by_source.items():
        left_out = "unknown" if part.left_out is None else sum(part.left_out.values())
        rows.append([path, "unknown" if part.rows is None else part.rows, left_out, part.packed, part.evaluated])
    listed = table(["packing", "rows", "left out", "packed", "evaluated"], rows, "Each packing") if rows else ""
    return Section("Flow of participants", [remark(text), participants_svg(flow, rule, outcomes), listed])
