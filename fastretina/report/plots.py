"""The pictures of a run, as PNG bytes. Drawn without pyplot, which keeps pictures alive behind the scenes."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, FigureBase
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from fastretina.errors import printable
from fastretina.grading import Classes
from fastretina.loading.augment import IMAGENET_MEAN, IMAGENET_STD
from fastretina.metrics.table import METRICS
from fastretina.report.compared import ComparedRun
from fastretina.training.progress import EpochRecord

# Okabe and Ito's colours, told apart by colour-blind readers too, with a marker each for print in grey.
STYLES = {"train": ("#0072B2", "o"), "test": ("#D55E00", "s"), "val": ("#009E73", "^")}
# What curves.png may draw, with the titles and units of its axes.
PANELS = {
    "loss": ("Loss", "cross-entropy (nats)"),
    "accuracy": ("Accuracy", "images graded right (%)"),
    "qwk": ("Quadratic weighted kappa", "QWK (1 perfect, 0 chance)"),
    "macro_f1": ("Macro F1", "mean F1 (1 perfect)"),
    "balanced_accuracy": ("Balanced accuracy", "mean recall (%)"),
}
# Of the runs in a comparison, by number: Okabe and Ito's colours first, then the same dashed.
RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
RUN_LINES = ("-", "--", "-.", ":")
RUN_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DPI = 130
MAX_LABEL = 14  # characters in a line under a column of a confusion matrix
SLANTED: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}
MAX_SHOWN = 16
MAX_TITLE = 26  # characters above one of them
_PERCENT = {metric.name for metric in METRICS if metric.percent}


def panels_for(classes: Classes) -> tuple[str, ...]:
    """Those of PANELS that are drawn for these classes: without an order there is no kappa."""
    return tuple(panel for panel in PANELS if panel != ("macro_f1" if classes.ordinal else "qwk"))


def curves(
    history: Sequence[EpochRecord],
    best_epoch: int,
    majority: float,
    objective: str,
    classes: Classes,
    panels: Sequence[str] | None = None,
) -> bytes:
    """PNG of the named panels by epoch, two in a row; None: all of `panels_for`. majority: share of the test set's most frequent
    class, 0-1, a base line. objective: what the training loss is, in words."""
    panels = panels_for(classes) if panels is None else panels
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.7 * columns, 3.5 * rows), layout="constrained")
    for axis, panel in zip(figure.subplots(rows, columns, squeeze=False).flat, panels, strict=True):
        title, unit = PANELS[panel]
        scale = 100.0 if panel in _PERCENT else 1.0
        for name, (colour, marker) in STYLES.items():
            points = [(record.epoch, record.row().get(f"{name}_{panel}")) for record in history]
            drawn = [(epoch, value * scale) for epoch, value in points if value is not None]
            if drawn:
                size = 5 if len(drawn) <= 30 else 0
                label = f"train ({objective})" if (name, panel) == ("train", "loss") else name
                axis.plot(*zip(*drawn, strict=True), color=colour, marker=marker, markersize=size, linewidth=1.8, label=label)
        if panel == "accuracy":
            axis.axhline(100 * majority, color="0.45", linestyle=":", linewidth=1.4, label=f"always the same {classes.noun} (test)")
        axis.axvline(best_epoch, color="0.25", linestyle="--", linewidth=1.0, label="best epoch")
        _by_epoch(axis, title, len(history))
        axis.set_ylabel(unit)
        axis.legend(fontsize=8.5, frameon=False)
    return png(figure)


def _by_epoch(axis: Axes, title: str, epochs: int) -> None:
    axis.set_title(title, fontsize=12, fontweight="bold")
    axis.set_xlabel("epoch")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.set_xlim(0.7, epochs + 0.3)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def confusion(matrix: Sequence[Sequence[int]], title: str, classes: Classes) -> bytes:
    """PNG of a confusion matrix (rows true, columns predicted): counts, and per cent of the row, by which cells are coloured."""
    side = max(5.4, 0.95 * len(classes) + 0.65)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axis = figure.subplots()
    image = _matrix(axis, matrix, title, classes)
    bar = figure.colorbar(image, ax=axis, shrink=0.85, ticks=[0, 0.25, 0.5, 0.75, 1])
    bar.ax.set_yticklabels(["0", "25", "50", "75", "100"])
    bar.set_label(f"share of the true {classes.noun} (%)")
    bar.outline.set_visible(False)
    return png(figure)


def _matrix(axis: Axes, matrix: Sequence[Sequence[int]], title: str, classes: Classes) -> AxesImage:
    counts = np.asarray(matrix, dtype=np.int64)
    totals = counts.sum(axis=1, keepdims=True)
    share = counts / np.maximum(totals, 1)
    names = [_folded(classes.title(number)) for number in range(len(counts))]
    image = axis.imshow(share, cmap="Blues", vmin=0.0, vmax=1.0)
    for (row, column), count in np.ndenumerate(counts):
        colour = "white" if share[row, column] > 0.55 else "black"
        percent = f"{100 * share[row, column]:.0f} %" if totals[row, 0] else "–"
        axis.text(column, row - 0.12, f"{count:,}", ha="center", va="center", color=colour, fontsize=11)
        axis.text(column, row + 0.22, percent, ha="center", va="center", color=colour, fontsize=8.5)
    # Of many classes, or of long names, those along the lower edge would run into each other.
    longest = max(len(line) for name in names for line in name.split("\n"))
    slanted = longest > MAX_LABEL
    axis.set_xticks(range(len(names)), names, fontsize=9, **SLANTED if slanted else {})
    counted = [f"{name}\n(n = {total:,})" for name, total in zip(names, totals[:, 0], strict=True)]
    axis.set_yticks(range(len(names)), counted, fontsize=9)
    axis.set_xlabel(f"predicted {classes.noun}")
    axis.set_ylabel(f"true {classes.noun}")
    axis.set_title(printable(title, keep="\n"), fontsize=12, fontweight="bold")
    axis.set_xticks(np.arange(-0.5, len(names)), minor=True)
    axis.set_yticks(np.arange(-0.5, len(names)), minor=True)
    axis.grid(which="minor", color="white", linewidth=1.5)
    axis.tick_params(which="both", length=0)
    axis.spines[:].set_visible(False)
    return image


def _folded(name: str) -> str:
    """A class's title in lines of up to MAX_LABEL characters where its words allow, the first blank always being a break."""
    number, _, words = name.partition(" ")
    return "\n".join([number, *textwrap.wrap(words, MAX_LABEL, break_long_words=False)])


def comparison(runs: Sequence[ComparedRun]) -> bytes:
    """PNG of several runs: accuracy by epoch, train and test, above all their confusion matrices on the test set."""
    columns = min(4, max(2, len(runs)))
    rows = -(-len(runs) // columns)
    figure = Figure(figsize=(5.2 * columns, 5.4 + 4.9 * rows), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    upper, lower = np.asarray(figure.subfigures(2, 1, height_ratios=[5.4, 4.9 * rows]))
    _accuracies(upper, runs, ("train", "test"))
    axes = list(lower.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[len(runs) :]:
        axis.set_axis_off()
    for axis, run in zip(axes, runs, strict=False):
        _matrix(axis, run.confusion, f"{run.name}\ntest set, best epoch ({run.best_epoch})", run.classes)
    return png(figure)


def accuracies(runs: Sequence[ComparedRun], name: str) -> bytes:
    """PNG of the accuracy curves of `comparison` alone, of the data set `train` or `test`."""
    figure = Figure(figsize=(5.0, 4.0), layout="constrained")
    _accuracies(figure, runs, (name,))
    return png(figure)


def _accuracies(figure: FigureBase, runs: Sequence[ComparedRun], sets: Sequence[str]) -> None:
    axes = figure.subplots(1, len(sets), sharey=True, squeeze=False)[0]
    majority = runs[0].majority
    # Of both sets, also where only one of them is drawn: two pictures side by side are read as one.
    drawn = [values for run in runs for values in run.accuracy.values()]
    shares = [*majority.values(), *chain.from_iterable(drawn)]
    lowest, highest = 100 * min(shares), 100 * max(shares)
    margin = max(1.0, 0.05 * (highest - lowest))
    for axis, name in zip(axes, sets, strict=True):
        axis.axhline(
            100 * majority[name], color="0.45", linestyle=":", linewidth=1.4, label=f"always the same {runs[0].classes.noun}"
        )
        for number, run in enumerate(runs):
            values = 100 * np.asarray(run.accuracy[name])
            colour, line = RUN_COLOURS[number % len(RUN_COLOURS)], RUN_LINES[number // len(RUN_COLOURS) % len(RUN_LINES)]
            # The marker, at the best epoch, is another for each run, for print in grey.
            axis.plot(
                range(1, len(values) + 1), values, color=colour, linestyle=line, linewidth=1.8, label=run.name,
                marker=RUN_MARKERS[number % len(RUN_MARKERS)], markevery=[run.best_epoch - 1], markersize=9,
            )  # fmt: skip
        _by_epoch(axis, f"Accuracy, {name} set (markers: best epochs)", max(map(len, drawn)))
        axis.set_ylim(lowest - margin, highest + margin)
    axes[0].set_ylabel("images graded right (%)")
    # Below the curves, so that it hides none of them, however many there are.
    handles, labels = axes[-1].get_legend_handles_labels()
    columns = min(3 if len(sets) > 1 else 2, len(labels))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)


def batch_grid(images: Tensor, labels: Tensor, classes: Classes) -> bytes:
    """PNG of the first 16 of (B, 3, R, R) normalised images with their (B,) labels: what the network saw."""
    shown = min(MAX_SHOWN, len(images))
    columns = min(4, shown)
    rows = -(-shown // columns)
    figure = Figure(figsize=(2.1 * columns, 2.32 * rows + 0.35), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.set_axis_off()
    for axis, picture, label in zip(axes, denormalise(images[:shown]), labels[:shown].tolist(), strict=False):
        axis.imshow(picture)
        title = f"grade {classes.title(label)}" if classes.ordinal else classes.title(label)
        axis.set_title(textwrap.shorten(title, MAX_TITLE, placeholder=" …"), fontsize=9)
    figure.suptitle(f"What the network saw: first training batch, {images.shape[-1]} × {images.shape[-2]} px", fontsize=11)
    return png(figure)


def denormalise(images: Tensor) -> npt.NDArray[np.uint8]:
    """(B, 3, H, W) floats normalised by ImageNet's mean and deviation → (B, H, W, 3) uint8."""
    pixels = images.detach().float().cpu().permute(0, 2, 3, 1).numpy() * IMAGENET_STD + IMAGENET_MEAN
    return np.rint(np.clip(pixels, 0.0, 1.0) * 255.0).astype(np.uint8)


def png(figure: Figure) -> bytes:
    """A picture's bytes, the same for the same picture."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=DPI, facecolor="white")
    return buffer.getvalue()
