"""What the recipe is worth: rotation, every option, and a collapse with its cure, on sample data sets with fixed seeds.

    python benchmarks/quality.py --json out.json
    python benchmarks/quality.py --only collapse

Three experiments. `rotation`: 300 photographs seen 24 times, with and without it, tested on eyes turned by any angle. `options`:
each schedule, head and remedy for imbalance in turn. `collapse`: the hard sample, the recipe that answers one grade for all, and
one that does not. The epoch is chosen on validation images that share no patient with training; figures are of the test set. All
in float32; on another CPU models still differ, by what rounding makes of it, and their QWK by up to a tenth. A second call goes on
where the first one stopped: in all it trains on some 200,000 images of 96 to 224 px.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from measure import save

from fastretina import train
from fastretina.cli import run
from fastretina.loading.augment import Augment
from fastretina.loading.loader import Loader
from fastretina.metrics.bootstrap import LEVEL, RESAMPLES, draws, patient_groups
from fastretina.metrics.table import Floats, qwk
from fastretina.models.checkpoint import open_grader
from fastretina.models.inference import run_model
from fastretina.training.config import TrainConfig

ROOT = Path(__file__).parent.parent
SEEDS = (0, 1, 2)
TURNED = Augment(flip_horizontal=0.0, flip_vertical=0.0)  # any angle, drawn by the sample's id

# Arguments of tools/make_sample.py by name of the sample.
SAMPLES: dict[str, list[str]] = {"easy": [], "few": ["--train", "300"], "hard": ["--hard"]}
# As `make demo` trains, but choosing on validation images.
EASY = TrainConfig(
    epochs=7, resolution=96, lr=2e-3, schedule="onecycle", val_fraction=0.15, train=Path("easy-train.beton"),
    test=Path("easy-test.beton"),
)  # fmt: skip
# So few photographs, seen so often, are learnt by heart where nothing varies them.
FEW = replace(EASY, train=Path("few-train.beton"), test=Path("few-test.beton"), epochs=24)
OPTIONS: dict[str, dict[str, Any]] = {
    "as the demo": {},
    "schedule cosine": {"schedule": "cosine"},
    "schedule two-phase": {"schedule": "two-phase", "lr": 1e-3},
    "schedule constant": {"schedule": "constant", "lr": 1e-3},
    "head regression": {"head": "regression"},
    "head ordinal": {"head": "ordinal"},
    "class weights sqrt": {"class_weights": "sqrt"},
    "class weights balanced": {"class_weights": "balanced"},
    "logit adjustment 1": {"logit_adjustment": 1.0},
    "sampling sqrt": {"sampling": "sqrt"},
    "sampling balanced": {"sampling": "balanced"},
    "average of the weights": {"ema": 0.98},
    "growing from 64 px": {"grow_from": 64},
    "the old recipe": {"augment": "off", "schedule": "constant", "lr": 1e-3},
}
HARD = replace(EASY, train=Path("hard-train.beton"), test=Path("hard-test.beton"))
# What the four models of the report had in common: no augmentation, a constant rate.
OLD = replace(HARD, resolution=224, lr=1e-3, schedule="constant", augment="off", class_weights="sqrt")
# The cure: learn what lesions are where they are plain, then first the head anew, then all of it with care.
PLAIN = replace(EASY, resolution=128, head="regression")
CURE = replace(HARD, resolution=128, head="regression", epochs=5, lr=3e-3, schedule="cosine", freeze_epochs=1, backbone_lr=0.1)
CURED_SEEDS = (0, 1)


@dataclass(frozen=True)
class QualityBenchmark:
    """Rotation, every option of the recipe, a collapse and its cure."""

    out: Path = Path("runs/quality")  # data and run folders
    json: Path | None = None  # write the results here
    only: Literal["rotation", "options", "collapse"] | None = None


def main(config: QualityBenchmark) -> None:
    """Rotation, every option of the recipe, a collapse and its cure."""
    results: dict[str, Any] = {}
    for name, experiment in (("rotation", rotation), ("options", options), ("collapse", collapse)):
        if config.only in (None, name):
            started = time.perf_counter()
            results[name] = {**experiment(config.out), "seconds": time.perf_counter() - started}
            save(config.json, results)
            print(json.dumps({name: results[name]}, indent=2), flush=True)


def rotation(out: Path) -> dict[str, Any]:
    """QWK on turned eyes of models trained with rotation and flips, with flips alone and without either, by seed; and the interval
    of the mean difference, patients drawn whole."""
    make_data(out, "few")
    found: dict[str, list[Path]] = {}
    for augment in ("on", "flips", "off"):
        found[augment] = [trained(out, f"rotation-{augment}-{seed}", replace(FEW, augment=augment, seed=seed)) for seed in SEEDS]
    answers = {name: [turned_answers(out / FEW.test, folder) for folder in folders] for name, folders in found.items()}
    kappas = {name: [float(qwk(matrices.sum(axis=0, keepdims=True))[0]) for matrices in runs] for name, runs in answers.items()}
    report: dict[str, Any] = {"qwk_on_turned_eyes": kappas, "resamples": RESAMPLES, "level": LEVEL}
    for other in ("flips", "off"):
        low, high = difference_interval(answers["on"], answers[other])
        mean = statistics.mean(kappas["on"]) - statistics.mean(kappas[other])
        report[f"on_minus_{other}"] = {"mean": mean, "low": low, "high": high}
    return report


def turned_answers(data: Path, folder: Path) -> Floats:
    """(patients, C, C) confusion matrices of the best checkpoint on the test set, each eye turned by an angle of its own."""
    model, grader, device, precision = open_grader(folder / "best.safetensors", "auto", "auto")
    with Loader(data, 32, train=False, resolution=grader.resolution, device=device, augment=TURNED) as loader:
        answers = run_model(model, loader, precision, "turned").answers(grader.grading, grader.decision)
        groups = patient_groups(loader.dataset.names)
    classes, people = grader.num_classes, int(groups.max()) + 1
    cells = groups * classes**2 + answers.labels.numpy() * classes + answers.predicted.numpy()
    return np.bincount(cells, minlength=people * classes**2).reshape(people, classes, classes).astype(np.float64)


def difference_interval(one: Sequence[Floats], other: Sequence[Floats]) -> tuple[float, float]:
    """Percentile interval of the difference of the mean QWKs over the seeds, the same patients drawn for all."""
    people = len(one[0])
    weights = np.stack([np.bincount(drawn, minlength=people) for drawn in draws(people, RESAMPLES, 0)]).astype(np.float64)

    def mean(runs: Sequence[Floats]) -> Floats:
        kappas: Floats = np.stack([qwk(np.tensordot(weights, matrices, axes=1)) for matrices in runs]).mean(axis=0)
        return kappas

    low, high = np.percentile(mean(one) - mean(other), [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return float(low), float(high)


def options(out: Path) -> dict[str, Any]:
    """Test figures of one run with each option, at the demo's budget."""
    make_data(out, "easy")
    return {"runs": {name: figures(trained(out, f"option-{name}", replace(EASY, **changes))) for name, changes in OPTIONS.items()}}


def collapse(out: Path) -> dict[str, Any]:
    """The old recipe and the shipped one on the hard sample, by seed; the cure's seconds hold its training on the easy sample."""
    make_data(out, "easy")
    make_data(out, "hard")
    found: dict[str, Any] = {"old": [], "cure": []}
    for seed in CURED_SEEDS:
        plain = trained(out, f"hard-plain-{seed}", replace(PLAIN, seed=seed))
        weights = str(plain / "best.safetensors")
        cured = figures(trained(out, f"hard-cure-{seed}", replace(CURE, seed=seed, weights=weights)))
        found["cure"].append(cured | {"seconds": cured["seconds"] + figures(plain)["seconds"]})
        found["old"].append(figures(trained(out, f"hard-old-{seed}", replace(OLD, seed=seed))))
    return found


def make_data(out: Path, kind: str) -> None:
    """The sample data set of a kind and its two .beton files, where they are not there yet."""
    out.mkdir(parents=True, exist_ok=True)
    tool(["make_sample.py", "--out", str(out / kind), *SAMPLES[kind]])
    for split in ("train", "test"):
        target = out / f"{kind}-{split}.beton"
        if not target.exists():
            tool(["write_beton.py", "--root", str(out / kind), "--split", split, "--out", str(target)])


def tool(arguments: list[str]) -> None:
    """One of tools/, as a user calls it."""
    subprocess.run([sys.executable, str(ROOT / "tools" / arguments[0]), *arguments[1:]], check=True, stdout=subprocess.DEVNULL)


def trained(out: Path, name: str, config: TrainConfig) -> Path:
    """Train where that is not done yet; the run folder."""
    folder = out / name.replace(" ", "-")
    settings = replace(config, train=out / config.train, test=out / config.test, out=folder)
    print(f"\n{name}", flush=True)
    train.main(settings)
    return folder


def figures(folder: Path) -> dict[str, Any]:
    """What a finished run's folder says of its test set, at the best epoch and at the last, and of its cost."""
    metrics = json.loads((folder / "metrics.json").read_text())
    return {
        **outcome(metrics["best"]),
        "best_epoch": metrics["best_epoch"],
        "last_epoch": outcome(metrics["last"]),
        "seconds": sum(metrics["epoch_seconds"]),
        "images_per_second": statistics.median(metrics["images_per_second"]),
    }


def outcome(epoch: dict[str, Any]) -> dict[str, Any]:
    """An epoch's figures of the test set, as metrics.json has them."""
    return {
        "test_qwk": epoch["qwk"],
        "test_accuracy": epoch["accuracy"],
        "test_balanced_accuracy": epoch["balanced_accuracy"],
        "answers_by_grade": [sum(column) for column in zip(*epoch["confusion"], strict=True)],
    }


if __name__ == "__main__":
    run(QualityBenchmark, main)
