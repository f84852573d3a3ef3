"""The search behind `--recipe`, and what its presets reach over three seeds: a part of quality.py, which says how runs are kept.

python benchmarks/quality.py --only search --json search.json
python benchmarks/quality.py --only recipes --json recipes.json
python benchmarks/quality.py --only painted --json painted.json
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from samples import SEEDS, make_data, metrics, packed, trained, trained_side_by_side

from fastretina.training.config import TrainConfig
from fastretina.training.presets import PRESETS, RecipeName

# What is tried, one at a time: the settings of the preset `fast` that are changed.
TRIALS: dict[str, dict[str, Any]] = {
    "fast": {},
    "sampling shuffle": {"sampling": "shuffle"},
    "sampling balanced": {"sampling": "balanced"},
    "class weights sqrt": {"sampling": "shuffle", "class_weights": "sqrt"},
    "logit adjustment 1": {"sampling": "shuffle", "logit_adjustment": 1.0},
    "head ordinal": {"head": "ordinal"},
    "head regression": {"head": "regression"},
    "average of the weights": {"ema": 0.98},
    "augment flips": {"augment": "flips"},
    "augment full": {"augment": "full"},
    "schedule cosine": {"schedule": "cosine"},
    "weight decay 0.1": {"weight_decay": 0.1},
    "BatchNorm's own averages": {"batchnorm_images": 0},
}
# Packed as they are: what of all this is owed to --contrast local.
AS_THEY_ARE = "contrast none"


def preset(name: RecipeName, kind: str, contrast: str = "local", **more: Any) -> TrainConfig:
    """A recipe on a sample."""
    files: dict[str, Any] = {split: packed(kind, split, contrast) for split in ("train", "test")}
    return TrainConfig(**{**PRESETS[name].settings, **files, "recipe": name, **more})


def search(out: Path, kind: str) -> dict[str, Any]:
    """Test metrics of one run with each change, on a sample."""
    make_data(out, kind)
    make_data(out, kind, "local")
    runs = {name: preset("fast", kind, **changes) for name, changes in TRIALS.items()}
    runs[AS_THEY_ARE] = preset("fast", kind, "none")
    return {"runs": {name: metrics(folder) for name, folder in trained_side_by_side(out, runs, f"search-{kind}-").items()}}


def recipes(out: Path) -> dict[str, Any]:
    """What the presets reach on the samples, three seeds: medians and values. `tune` starts from `best` on the other sample. Not
    `baseline`, which at 224 px in float32 would take longer than all of them."""
    for kind in ("easy", "large", "hard"):
        make_data(out, kind, "local")
    rows: tuple[tuple[RecipeName, str], ...] = (("best", "hard"), ("best", "large"), ("fast", "hard"), ("fast", "easy"))
    runs = {f"{name} {kind} {seed}": preset(name, kind, seed=seed) for name, kind in rows for seed in SEEDS}
    folders = trained_side_by_side(out, runs)
    starts = {"hard": "large", "large": "hard"}
    tuned = {
        f"tune {kind} {seed}": preset("tune", kind, seed=seed, weights=str(folders[f"best {start} {seed}"] / "best.safetensors"))
        for kind, start in starts.items()
        for seed in SEEDS
    }
    folders |= trained_side_by_side(out, tuned)
    rows += tuple(("tune", kind) for kind in starts)
    return {f"{name}, {kind}": summary([folders[f"{name} {kind} {seed}"] for seed in SEEDS]) for name, kind in rows}


def painted(out: Path) -> dict[str, Any]:
    """What `tune` reaches on the hard sample from a network that has seen 10,000 photographs of the easy kind, four times each."""
    for kind in ("painted", "hard"):
        make_data(out, kind, "local")
    start = trained(out, "best painted", replace(preset("best", "painted", seed=0), epochs=4))
    weights = str(start / "best.safetensors")
    runs = {f"tune from painted {seed}": preset("tune", "hard", seed=seed, weights=weights) for seed in SEEDS}
    return {"best, painted": metrics(start), "tune, hard": summary(list(trained_side_by_side(out, runs).values()))}


def summary(folders: Sequence[Path]) -> dict[str, Any]:
    """Of runs that differ in their seed alone."""
    runs = [metrics(folder) for folder in folders]
    numbers = {
        "qwk": [run["test_qwk"] for run in runs],
        "balanced_accuracy": [run["test_balanced_accuracy"] for run in runs],
        "lowest_qwk_from_epoch_2": [min(run["test_qwk_by_epoch"][1:]) for run in runs],
        "largest_fall_of_qwk_from_epoch_2": [fall(run["test_qwk_by_epoch"][1:]) for run in runs],
        "grades_answered": [sum(count > 0 for count in run["answers_by_grade"]) for run in runs],
        "seconds": [run["seconds"] for run in runs],
    }
    found: dict[str, Any] = {name: {"median": statistics.median(values), "values": values} for name, values in numbers.items()}
    for name in ("qwk", "balanced_accuracy"):  # by bootstrap of the test set's patients, of each seed's model
        found[name]["intervals"] = [run["test_intervals"][name] for run in runs]
    recalls = zip(*(run["test_recalls"] for run in runs), strict=True)
    return {**found, "recalls": [{"median": statistics.median(values), "values": values} for values in recalls], "runs": runs}


def fall(kappas: Sequence[float]) -> float:
    """By how much QWK fell from one epoch to the next, at most."""
    return max((before - after for before, after in pairwise(kappas)), default=0.0)
