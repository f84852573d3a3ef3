"""The throughput results as a bar chart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

OURS, PEERS = "#0072b2", "#9a9a9a"  # blue and grey: told apart by everyone, and in print


def draw_chart(result: dict[str, Any], path: Path) -> None:
    """One panel for each comparison, one bar for each side: images per second, median and interval. Writes a PNG."""
    comparisons = result["comparisons"]
    bars = [len(c["sides"]) for c in comparisons]
    figure = Figure(figsize=(9, 0.9 * len(bars) + 0.42 * sum(bars) + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(bars), 1, squeeze=False, height_ratios=[n + 0.6 for n in bars])[:, 0]
    for axis, comparison in zip(axes, comparisons, strict=True):
        sides = sorted(comparison["sides"].items(), key=lambda item: item[1]["per_second"]["median"])
        names = [name.replace("_", " ") for name, _ in sides]
        if "augment" in comparison["name"]:
            names = [f"{name} (no rotation)" if name == "ffcv" else name for name in names]
        rates = [side["per_second"] for _, side in sides]
        medians = [rate["median"] for rate in rates]
        spread = [[r["median"] - r["low"] for r in rates], [r["high"] - r["median"] for r in rates]]
        colours = [OURS if "fastretina" in name else PEERS for name in names]
        axis.barh(names, medians, xerr=spread, color=colours, error_kw={"capsize": 3, "lw": 1})
        for place, (rate, high) in enumerate(zip(medians, (r["high"] for r in rates), strict=True)):
            axis.text(high, place, f"  {rate:,.0f}", va="center", fontsize=9)
        axis.set_title(f"{comparison['name']} ({comparison['resolution']} px)", loc="left", fontsize=10)
        axis.set_xlim(0, max(r["high"] for r in rates) * 1.14)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes[-1].set_xlabel("images per second (median and interval; more is better)")
    hard = result["hardware"]
    figure.suptitle(f"{hard['cpu']}, {hard['cores']} cores, {result['workers']} workers a side", fontsize=10)
    figure.savefig(path, dpi=120)
