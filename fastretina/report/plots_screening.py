"""The pictures of an evaluation, as PNG bytes: curves over thresholds, calibration, the use of a decision, deferral.

Small figures with large letters, for phones. Lines differ in their dashes too, and marks in their shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastretina.metrics.calibration import Calibration
from fastretina.report.plots import RUN_COLOURS, RUN_MARKERS, png

SIZE = 4.2  # inches, of a square picture: on a phone letters of 9 points are then 10 px high
SMALL = 9.0  # points, of a legend


class Mark(NamedTuple):
    """A labelled point on a curve, both 0-1."""

    label: str
    x: float
    y: float


def _axes(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(SIZE, SIZE), layout="constrained")
    axis = figure.subplots()
    axis.set_title(title, fontsize=12, fontweight="bold")
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def _marked(axis: Axes, marks: Sequence[Mark]) -> None:
    """Points of one shape and colour each; hollow, so that several in one place can be seen."""
    for number, mark in enumerate(marks):
        axis.plot(
            [100 * mark.x], [100 * mark.y], linestyle="none", marker=RUN_MARKERS[number % len(RUN_MARKERS)],
            markersize=11, markerfacecolor="none", markeredgecolor=RUN_COLOURS[(number + 1) % len(RUN_COLOURS)],
            markeredgewidth=2, label=mark.label, clip_on=False, zorder=3 + number,
        )  # fmt: skip


def _with_legend(figure: Figure) -> bytes:
    figure.legend(loc="outside lower center", fontsize=SMALL, frameon=False)
    return png(figure)


def roc(false_positive: Sequence[float], true_positive: Sequence[float], unit: str, area: str, marks: Sequence[Mark]) -> bytes:
    """PNG of a ROC curve, rates 0-1; unit: what is counted; area: its AUROC in words."""
    figure, axis = _axes(f"ROC curve by {unit}", "not ill, yet referred: 1 − specificity (%)", "ill and referred: sensitivity (%)")
    axis.plot([0, 100], [0, 100], color="0.45", linestyle=":", linewidth=1.4, label="chance")
    axis.plot(100 * np.asarray(false_positive), 100 * np.asarray(true_positive), color=RUN_COLOURS[0], linewidth=1.8, label=area)
    _marked(axis, marks)
    axis.set_xlim(-1, 101)
    axis.set_ylim(-1, 101)
    return _with_legend(figure)


def precision_recall(
    recall: Sequence[float], precision: Sequence[float], prevalence: float, unit: str, area: str, marks: Sequence[Mark]
) -> bytes:
    """PNG of a precision-recall curve, all 0-1; unit: what is counted; area: its AUPRC in words."""
    figure, axis = _axes(
        f"Precision-recall curve by {unit}", "ill and referred: sensitivity (%)", "of those referred, ill: PPV (%)"
    )
    axis.axhline(100 * prevalence, color="0.45", linestyle=":", linewidth=1.4, label="all referred: the share that is ill")
    axis.plot(100 * np.asarray(recall), 100 * np.asarray(precision), color=RUN_COLOURS[0], linewidth=1.8, label=area)
    _marked(axis, marks)
    axis.set_xlim(-1, 101)
    axis.set_ylim(-1, 101)
    return _with_legend(figure)


def reliability(found: Calibration, uncalibrated: Calibration | None = None) -> bytes:
    """PNG of reliability curves: how often answers of each confidence are right, above how many there are of them."""
    edges = np.linspace(0.0, 100.0, len(found.samples) + 1)
    figure = Figure(figsize=(SIZE, SIZE + 0.4), layout="constrained")
    upper, lower = np.asarray(figure.subplots(2, 1, sharex=True, height_ratios=[3, 1]))
    upper.plot([0, 100], [0, 100], color="0.45", linestyle=":", linewidth=1.4, label="perfectly calibrated")
    drawn = [] if uncalibrated is None else [(uncalibrated, f"before the temperature: ECE {100 * uncalibrated.ece:.1f} %")]
    told = f"{'after the temperature' if drawn else 'the model'}: ECE {100 * found.ece:.1f} %"
    for number, (curve, label) in enumerate([(found, told), *drawn]):
        means = zip(curve.confidence, curve.accuracy, curve.samples, strict=True)
        sure, right, counts = zip(*((100 * c, 100 * a, n) for c, a, n in means if c is not None and a is not None), strict=True)
        colour, line = RUN_COLOURS[number], ("-", "--")[number]
        upper.plot(sure, right, color=colour, linestyle=line, linewidth=1.2)
        # By area: a bin of one image, always at 0 or 100 %, should not shout.
        areas = [15 + 135 * count / max(counts) for count in counts]
        upper.scatter(sure, right, s=areas, color=colour, marker=RUN_MARKERS[number], label=label, zorder=3 - number)
        filled = {"color": colour, "edgecolor": "white"} if number == 0 else {"fill": False, "edgecolor": colour, "linestyle": line}
        lower.bar(edges[:-1], curve.samples, width=edges[1], align="edge", **filled)
    upper.set_ylim(-3, 103)
    upper.set_ylabel("right (%)")
    upper.set_title("Reliability (area: images)", fontsize=12, fontweight="bold")
    lower.set_ylabel("images")
    lower.set_xlabel("confidence: probability of the answer (%)")
    lower.set_xlim(0, 100)
    for axis in (upper, lower):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return _with_legend(figure)


def decision_curve(thresholds: Sequence[float], model: Sequence[float], everybody: Sequence[float]) -> bytes:
    """PNG of the net benefit (0-1) of three ways to refer, by threshold probability (0-1)."""
    figure, axis = _axes("Decision curve", "refer from this probability on (%)", "net benefit (found per 100)")
    at = 100 * np.asarray(thresholds)
    axis.plot(at, 100 * np.asarray(model), color=RUN_COLOURS[0], linewidth=1.8, label="refer by the model")
    axis.plot(at, 100 * np.asarray(everybody), color=RUN_COLOURS[1], linewidth=1.6, linestyle="--", label="refer all")
    axis.axhline(0, color="0.25", linewidth=1.4, linestyle=":", label="refer nobody")
    # To refer all costs without end: what lies far below zero is of no use to anybody.
    highest = 100 * max(0.01, max(model), everybody[0])
    axis.set_ylim(-0.35 * highest, 1.1 * highest)
    axis.set_xlim(0, 100)
    return _with_legend(figure)


def deferral(curves: Sequence[tuple[str, Sequence[float], Sequence[float | None]]], measure: str) -> bytes:
    """PNG of curves (label, shares deferred, accuracies of the rest; 0-1, None where undefined)."""
    figure, axis = _axes("Deferral curve", "referred to a human, most uncertain first (%)", f"{measure} of the rest (%)")
    for number, (label, deferred, kept) in enumerate(curves):
        points = [(100 * x, 100 * y) for x, y in zip(deferred, kept, strict=True) if y is not None]
        every = max(1, len(points) // 8)
        axis.plot(
            *zip(*points, strict=True), color=RUN_COLOURS[number], linestyle=("-", "--")[number % 2], linewidth=1.8, label=label,
            marker=RUN_MARKERS[number], markevery=every, markersize=6,
        )  # fmt: skip
    axis.set_xlim(0, 100)
    return _with_legend(figure)
