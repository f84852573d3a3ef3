"""The report of an evaluation: each number is the assessment's, what is not known is said, and names are no markup."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from evaluation_cases import CHOSEN, NASTY, TESTED, TRAINED, answers, checkpoint, glaucoma, retinopathy

from fastretina.grading import RETINOPATHY, Classes
from fastretina.metrics.assessment import Assessment
from fastretina.metrics.bootstrap import Interval
from fastretina.metrics.flow import Flow
from fastretina.metrics.predictions import Scores
from fastretina.metrics.screening import RATES
from fastretina.report.assessment import lines
from fastretina.report.evaluation import Evaluation, evaluation_html, seen
from fastretina.report.participants import participants_svg


class Tables(HTMLParser):
    """The rows of each table by its title, a cell being its text and its small print; and all tags, as they nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: dict[str, list[list[tuple[str, str]]]] = {}
        self.few: dict[str, list[str]] = {}
        self._open: list[str] = []
        self._title = ""
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag not in ("meta", "link", "img", "br"):
            self._open.append(tag)
        if tag == "table":
            self._title = given["aria-label"]
            assert self._title not in self.found  # no two of one name: a reader of headings could not tell them apart
            self.found[self._title] = []
        elif tag == "tr":
            self.found[self._title].append([])
            self._small_row = given.get("class") == "few"
        elif tag in ("td", "th"):
            self.found[self._title][-1].append(("", ""))

    def handle_startendtag(self, tag, attrs):
        pass  # of the diagram

    def handle_endtag(self, tag):
        assert self._open.pop() == tag
        if tag == "tr" and self._small_row:
            self.few.setdefault(self._title, []).append(self.found[self._title][-1][0][0])

    def handle_data(self, data):
        cell = next((tag for tag in reversed(self._open) if tag in ("td", "th")), None)
        if cell is not None:
            text, small = self.found[self._title][-1][-1]
            data = data.replace("\N{NO-BREAK SPACE}", " ")
            self.found[self._title][-1][-1] = (text, small + data) if self._open[-1] == "small" else (text + data, small)

    def body(self, title: str) -> dict[str, list[tuple[str, str]]]:
        """The rows under the head, by the text of their first cell."""
        return {row[0][0]: row[1:] for row in self.found[title][1:]}


def percent(found: Interval) -> tuple[str, str]:
    assert found.value is not None
    return f"{100 * found.value:.1f} %", "" if found.low is None else f"{100 * found.low:.1f}–{100 * found.high:.1f}"


def number(found: Interval) -> tuple[str, str]:
    if found.value is None:
        return "–", ""
    return f"{found.value:.3f}", "" if found.low is None else f"{found.low:.3f}–{found.high:.3f}"


@pytest.fixture(scope="module")
def case() -> Evaluation:
    return retinopathy(400)


@pytest.fixture(scope="module")
def text(case) -> str:
    return evaluation_html(case)


@pytest.fixture(scope="module")
def tables(text) -> Tables:
    return Tables(text)


@pytest.fixture(scope="module")
def unknown() -> str:
    return evaluation_html(glaucoma(120))


@pytest.mark.parametrize("unit", ["image", "person"])
def test_rates_and_counts_of_each_rule_are_those_of_the_assessment(case, tables, unit):
    found = case.assessment.screening[unit]
    named = f"by {unit} ({found.number:,}, {found.referable:,} of them referable)"
    rates, counts = tables.body(f"Sensitivity, specificity and predictive values {named}"), tables.body(f"Counts {named}")
    assert list(rates) == list(counts) == [point.rule for point in found.points]
    assert len(rates) == 5
    for point in found.points:
        assert rates[point.rule] == [percent(getattr(point, rate)) for rate in RATES]
        assert [cell for cell, _ in counts[point.rule]] == [f"{count:,}" for count in (point.tp, point.fn, point.fp, point.tn)]


def test_what_is_counted_and_its_metrics_are_those_of_the_assessment(case, tables):
    [title] = [title for title in tables.found if title.startswith("What is counted")]
    rows = tables.body(title)
    assert list(rows) == ["by image", "by eye pair", "by person"]
    for unit, found in case.assessment.screening.items():
        areas = [number(found.intervals[name]) for name in ("auroc", "auprc")]
        graded = [percent(found.intervals["accuracy"]), number(found.intervals["qwk"])]
        assert rows[f"by {unit}"] == [(f"{found.number:,}", ""), (f"{found.referable:,}", ""), *areas, *graded]


def test_thresholds_and_where_they_come_from_are_told(case, text, tables):
    rows = tables.body("The frozen thresholds, and what they reached on the validation data")
    assert list(rows) == ["high-sensitivity", "high-specificity", "youden"]
    for found in case.assessment.operating.thresholds:
        cells = [f"{found.value:.3f}", "–" if found.target is None else f"{100 * found.target:.1f} %"]
        cells += [f"{100 * found.sensitivity:.1f} %", f"{100 * found.specificity:.1f} %"]
        assert [cell for cell, _ in rows[found.name]] == cells
    known = case.assessment.operating
    assert f"on {known.images:,} validation photographs, {known.referable:,} of them referable" in text
    assert f"begins with {CHOSEN[:12]})" in text


def test_subgroups_are_those_of_the_assessment_and_small_ones_are_called_so(case, text, tables):
    assert [found.column for found in case.assessment.subgroups] == ["eye", "camera", "sex", "age"]
    for found in case.assessment.subgroups:
        if found.left_out:
            assert f"{found.column}: {found.count} values, more than 20" in text
            assert f"By {found.column}" not in tables.found
            continue
        rows = tables.body(f"By {found.column}")
        assert list(rows) == [part.name + (" (small)" if part.small else "") for part in found.parts]
        assert tables.few.get(f"By {found.column}", []) == [f"{part.name} (small)" for part in found.parts if part.small]
        for cells, part in zip(rows.values(), found.parts, strict=True):
            assert [cell for cell, _ in cells[:3]] == [f"{count:,}" for count in (part.images, part.people, part.referable)]
            shares = ("accuracy", "balanced_accuracy", "sensitivity", "specificity")
            assert cells[3:] == [(percent if name in shares else number)(value) for name, value in part.intervals.items()]
    assert tables.few["By camera"] == ["a hand-held one (small)", "unknown (small)"]


def test_calibration_decision_and_deferral_are_those_of_the_assessment(case, tables):
    found = case.assessment
    rows = tables.body("Calibration")
    for name, each in (("after the temperature", found.calibration), ("before the temperature", found.uncalibrated)):
        assert [cell for cell, _ in rows[name]] == [f"{100 * each.ece:.1f} %", f"{each.brier:.3f}"]
    rows = tables.body("Net benefit, in people found per 100 photographs")
    assert list(rows) == ["5.0 %", "10.0 %", "20.0 %", "30.0 %", "50.0 %"]
    for at, cells in zip((4, 9, 19, 29, 49), rows.values(), strict=True):
        curve = found.decision
        assert [cell for cell, _ in cells] == [f"{100 * curve.model[at]:.1f}", f"{100 * curve.everyone[at]:.1f}", "0.0"]
    for deferred in found.deferrals:
        rows = tables.body(f"The grades of the rest, most uncertain first by {deferred.by}")
        assert list(rows) == ["0.0 %", "5.0 %", "10.0 %", "20.0 %", "30.0 %", "50.0 %"]
        for at, cells in zip((0, 5, 10, 20, 30, 50), rows.values(), strict=True):
            expected = [
                f"{100 * deferred.accuracy[at]:.1f} %",
                f"{deferred.qwk[at]:.3f}",
                f"{100 * deferred.sensitivity[at]:.1f} %",
            ]
            assert [cell for cell, _ in cells] == expected


def numbers(svg: str) -> dict[str, int]:
    """What stands in the boxes, by its text."""
    said = re.search(r"<desc[^>]*>(.*)</desc>", svg)[1].replace("\N{NO-BREAK SPACE}", " ")
    written = " ".join(re.findall(r"<tspan[^>]*>([^<]*)</tspan>", svg)).replace("\N{NO-BREAK SPACE}", " ")
    drawn = re.findall(r"([^()]+?) \(n = ([\d,]+)\)", written)
    assert sorted(count for _, count in drawn) == sorted(re.findall(r"n = ([\d,]+)", said))
    return {text.strip(): int(count.replace(",", "")) for text, count in drawn}


def test_the_diagram_s_numbers_are_those_of_flow_and_assessment_and_add_up(case, text):
    svg = re.search(r"<svg.*?</svg>", text)[0]
    found, point = numbers(svg), case.assessment.screening["image"].point("high-sensitivity")
    assert found["Rows of the label table"] == found["Left out as it was packed"] + found["Packed photographs"] == 580
    assert found["– ungradable"] + found["– no valid grade"] + found["– bad image"] == found["Left out as it was packed"] == 180
    assert found["Packed photographs"] == found["Graded by the model"] == 400
    [referred] = [count for name, count in found.items() if name.endswith("Referred")]
    assert (referred, found["Not referred"]) == (point.tp + point.fp, point.fn + point.tn)
    assert referred + found["Not referred"] == found["Graded by the model"]
    said = re.search(r"<desc[^>]*>(.*)</desc>", svg)[1]
    assert [int(count) for count in re.findall(r"(?:not|referable) \(n.=.(\d+)\)", said)] == [
        point.tp,
        point.fp,
        point.fn,
        point.tn,
    ]
    assert "referred by the frozen high-sensitivity threshold, p2 + p3 + p4 ≥ " in said


def test_what_a_file_does_not_say_of_its_flow_is_unknown_and_what_is_missing_is_counted(unknown):
    svg = re.search(r"<svg.*?</svg>", unknown)[0].replace("\N{NO-BREAK SPACE}", " ")
    assert "Rows of the label table (n unknown)" in svg
    assert "Left out as it was packed (n unknown)" in svg
    assert "Not evaluated (n = 9)" in svg
    torn = numbers(participants_svg(Flow(100, {"<b>ungradable</b>": 10}, 80, 80, {})))
    assert torn["Not in this file, for another reason"] == 10
    assert "<b>" not in participants_svg(Flow(100, {"<b>ungradable</b>": 10}, 80, 80, {}))


def test_what_is_undefined_or_unknown_is_said(unknown):
    for part in (
        "No thresholds were frozen",
        "Not counted by person: of 120 of 120 images it is unknown whose they are",
        "The intervals may be too narrow",
        "unknown whether it has seen these data",
        '<th scope="row">people</th><td>unknown</td>',
    ):
        assert part in unknown
    assert "before the temperature" not in unknown
    assert "by disagreement" not in unknown


def test_without_anybody_ill_or_anything_referable_the_page_says_so_or_leaves_out():
    well = torch.zeros(40, dtype=torch.int64)
    found = answers(well, RETINOPATHY, 1)
    case = replace(
        glaucoma(40), scores=Scores.of(found, RETINOPATHY), answers=found, assessment=Assessment.of(found, RETINOPATHY, None)
    )
    text = evaluation_html(case)
    assert "No photograph here is referable" in text
    assert "All thresholds" not in text
    assert "Of 1,000 people screened" not in text
    classes = Classes(("a", "b", "c"))
    found = answers(torch.arange(40) % 3, classes, 1)
    case = replace(case, scores=Scores.of(found, classes), answers=found, assessment=Assessment.of(found, classes, None))
    text = evaluation_html(case)
    for part in ("As a screening test", "No thresholds were frozen", "Decision curve", "Index test:", "NPV"):
        assert part not in text
    assert "Deferral: what the model leaves to a human" in text


def test_names_are_no_markup(unknown):
    Tables(unknown)
    assert "<script" not in unknown
    assert unknown.count("&lt;script&gt;") >= 5


@pytest.mark.parametrize(
    ("known", "said"),
    [
        ({"train": TESTED, "val": CHOSEN}, "trained on these very data"),
        ({"train": TRAINED, "val": CHOSEN, "whole": TESTED}, "trained on a part of these very data"),
        ({"train": TRAINED, "val": TESTED}, "its epoch chosen on these very data"),
        ({"train": TRAINED, "val": CHOSEN}, "neither trained nor chosen on these data"),
        ({"train": None, "val": CHOSEN}, "unknown whether it has seen these data"),
        (None, "unknown whether it has seen these data"),
    ],
)
def test_a_model_that_has_seen_the_data_is_called_so(known, said):
    assert seen(checkpoint(RETINOPATHY, data=known), TESTED) == said


def test_thresholds_that_were_frozen_on_these_very_data_are_warned_of_as_all_else_is(case, text):
    info = replace(checkpoint(RETINOPATHY), operating=replace(case.assessment.operating, data=TESTED))
    warned = evaluation_html(glaucoma(40, members=[(Path("a"), info)], warnings=[f"mind {NASTY}"]))
    assert '<p class="note">The thresholds were frozen on these very data' in warned
    assert '<p class="note">mind &lt;script' in warned
    assert "frozen on these very data" not in text


def test_the_terminal_tells_the_same_rates(case):
    told = lines(case.assessment)
    for found in case.assessment.screening.values():
        for point in found.points:
            rates = [percent(getattr(point, rate))[0] for rate in RATES]
            assert any(re.split(r"  +", line) == [point.rule, *rates] for line in told)
    assert "400 images, " in "\n".join(told)
    assert "200 people, " in "\n".join(told)
    assert not any("no thresholds" in line for line in told)
    assert any("no thresholds were frozen" in line for line in lines(glaucoma(40).assessment))
