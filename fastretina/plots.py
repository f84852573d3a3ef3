"""The pictures of a run, as PNG bytes. Drawn without pyplot, which keeps figures alive behind the scenes."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from fastretina.augment import IMAGENET_MEAN, IMAGENET_STD
from fastretina.history import EpochRecord

GRADE_NAMES = ("no DR", "mild", "moderate", "severe", "proliferative")
# Okabe and Ito's colours, told apart by colour-blind readers too, with a marker each for print in grey.
STYLES = {"train": ("#0072B2", "o"), "test": ("#D55E00", "s"), "val": ("#009E73", "^")}
PANELS = {
    "loss": ("Loss", "cross-entropy (nats)"),
    "accuracy": ("Accuracy", "images graded right (%)"),
    "qwk": ("Quadratic weighted kappa", "QWK (1 perfect, 0 chance)"),
    "balanced_accuracy": ("Balanced accuracy", "mean recall of the grades (%)"),
}
DPI = 130
MAX_SHOWN = 16


def grade_title(grade: int) -> str:
    """`2 moderate`; the bare number past the five grades of diabetic retinopathy."""
    return f"{grade} {GRADE_NAMES[grade]}" if grade < len(GRADE_NAMES) else str(grade)


def curves(history: Sequence[EpochRecord], best_epoch: int, majority: float, panels: Sequence[str] = tuple(PANELS)) -> bytes:
    """PNG of the named panels by epoch, two in a row. majority: share of the test set's most frequent grade, 0-1, a base line."""
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.6 * columns, 3.9 * rows), layout="constrained")
    axes = np.atleast_1d(np.asarray(figure.subplots(rows, columns))).ravel()
    for axis, panel in zip(axes, panels, strict=True):
        _curve(axis, panel, history, best_epoch, majority)
    return _png(figure)


def _curve(axis: Axes, panel: str, history: Sequence[EpochRecord], best_epoch: int, majority: float) -> None:
    title, unit = PANELS[panel]
    scale = 100.0 if "accuracy" in panel else 1.0
    for name, (colour, marker) in STYLES.items():
        points = [(record.epoch, record.row().get(f"{name}_{panel}")) for record in history]
        drawn = [(epoch, value * scale) for epoch, value in points if value is not None]
        if drawn:
            size = 5 if len(drawn) <= 30 else 0
            axis.plot(*zip(*drawn, strict=True), color=colour, marker=marker, markersize=size, linewidth=1.8, label=name)
    if panel == "accuracy":
        axis.axhline(100 * majority, color="0.45", linestyle=":", linewidth=1.4, label="always the same grade (test)")
    axis.axvline(best_epoch, color="0.25", linestyle="--", linewidth=1.0, label="best epoch")
    axis.set_title(title, fontsize=12, fontweight="bold")
    axis.set_xlabel("epoch")
    axis.set_ylabel(unit)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.set_xlim(0.7, max(record.epoch for record in history) + 0.3)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8.5, frameon=False)


def confusion(matrix: Sequence[Sequence[int]], title: str) -> bytes:
    """PNG of a confusion matrix (rows true, columns predicted): counts, and per cent of the row, by which cells are coloured."""
    counts = np.asarray(matrix, dtype=np.int64)
    totals = counts.sum(axis=1, keepdims=True)
    share = counts / np.maximum(totals, 1)
    names = [grade_title(grade) for grade in range(len(counts))]
    figure = Figure(figsize=(6.4, 5.4), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(share, cmap="Blues", vmin=0.0, vmax=1.0)
    for (row, column), count in np.ndenumerate(counts):
        colour = "white" if share[row, column] > 0.55 else "black"
        percent = f"{100 * share[row, column]:.0f} %" if totals[row, 0] else "–"
        axis.text(column, row - 0.12, f"{count:,}", ha="center", va="center", color=colour, fontsize=11)
        axis.text(column, row + 0.22, percent, ha="center", va="center", color=colour, fontsize=8.5)
    axis.set_xticks(range(len(names)), [name.replace(" ", "\n", 1) for name in names], fontsize=9)
    axis.set_yticks(
        range(len(names)), [f"{name}\n(n = {total:,})" for name, total in zip(names, totals[:, 0], strict=True)], fontsize=9
    )
    axis.set_xlabel("predicted grade")
    axis.set_ylabel("true grade")
    axis.set_title(title, fontsize=12, fontweight="bold")
    axis.set_xticks(np.arange(-0.5, len(names)), minor=True)
    axis.set_yticks(np.arange(-0.5, len(names)), minor=True)
    axis.grid(which="minor", color="white", linewidth=1.5)
    axis.tick_params(which="both", length=0)
    axis.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axis, shrink=0.85, ticks=[0, 0.25, 0.5, 0.75, 1])
    bar.ax.set_yticklabels(["0", "25", "50", "75", "100"])
    bar.set_label("share of the true grade (%)")
    bar.outline.set_visible(False)
    return _png(figure)


def batch_grid(images: Tensor, grades: Tensor) -> bytes:
    """PNG of the first 16 of (B, 3, R, R) normalised images with their (B,) grades: what the network saw."""
    shown = min(MAX_SHOWN, len(images))
    columns = min(4, shown)
    rows = -(-shown // columns)
    figure = Figure(figsize=(2.1 * columns, 2.32 * rows + 0.35), layout="constrained")
    axes = np.atleast_1d(np.asarray(figure.subplots(rows, columns))).ravel()
    for axis in axes:
        axis.set_axis_off()
    pixels = denormalise(images[:shown])
    for axis, picture, grade in zip(axes, pixels, grades[:shown].tolist(), strict=False):
        axis.imshow(picture)
        axis.set_title(f"grade {grade_title(grade)}", fontsize=9)
    figure.suptitle(f"What the network saw: first training batch, {images.shape[-1]} × {images.shape[-2]} px", fontsize=11)
    return _png(figure)


def denormalise(images: Tensor) -> npt.NDArray[np.uint8]:
    """(B, 3, H, W) floats normalised by ImageNet's mean and deviation → (B, H, W, 3) uint8."""
    pixels = images.detach().float().cpu().permute(0, 2, 3, 1).numpy() * np.asarray(IMAGENET_STD) + np.asarray(IMAGENET_MEAN)
    levels: npt.NDArray[np.uint8] = np.rint(np.clip(pixels, 0.0, 1.0) * 255.0).astype(np.uint8)
    return levels


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=DPI, facecolor="white")
    return buffer.getvalue()
