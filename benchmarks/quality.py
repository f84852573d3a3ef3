"""What the recipes are worth, and where their models look: experiments on sample data sets, with fixed seeds.

    python benchmarks/quality.py --json out.json
    python benchmarks/quality.py --only search

`rotation`: 300 photographs seen 24 times, with and without it, tested on eyes rotated by any angle. `search-easy`, `search-hard`,
`recipes` and `painted`: see search.py. `heat`: how much denser that of Grad-CAM is on lesions, which a sample data set knows, than
on all of the retina. The epoch is chosen on validation images that share no patient with training; metrics are of the test set. On
another CPU models still differ, by what rounding makes of it, and their QWK by up to a tenth. A second call goes on where the first
one stopped.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch
from measure import save
from numpy.typing import NDArray
from samples import SEEDS, make_data, metrics, trained
from search import painted, recipes, search

from fastretina.cli import run
from fastretina.errors import UsageError
from fastretina.loading.augment import Augment
from fastretina.loading.loader import Loader
from fastretina.metrics.bootstrap import LEVEL, RESAMPLES, draws, patient_groups
from fastretina.metrics.table import Floats, qwk
from fastretina.models.checkpoint import load_checkpoint, open_checkpoint
from fastretina.models.gradcam import GradCam, gradcam_layer
from fastretina.models.inference import run_model
from fastretina.models.photographs import prepare
from fastretina.sample.camera import CameraSettings, Eye, render
from fastretina.sample.dataset import STAMP, plan_eyes
from fastretina.sample.lesions import LesionSettings
from fastretina.training.config import TrainConfig

ROTATED = Augment(flip_horizontal=0.0, flip_vertical=0.0)  # any angle, drawn by the sample's id

# What both experiments here have in common.
EASY = TrainConfig(
    epochs=7, resolution=96, lr=2e-3, schedule="onecycle", val_fraction=0.15, train=Path("easy-train.beton"),
    test=Path("easy-test.beton"),
)  # fmt: skip
# So few photographs, seen so often, are learnt by heart where nothing varies them.
FEW = replace(EASY, train=Path("few-train.beton"), test=Path("few-test.beton"), epochs=24)
COARSE = replace(EASY, train=Path("small-train.beton"), test=Path("small-test.beton"), epochs=5)
FINE = replace(COARSE, resolution=256, epochs=3)
VISIBLE = 12  # grey levels by which a lesion differs from the same eye's photograph without disease
DARK = 20  # grey levels, below which there is no retina


@dataclass(frozen=True)
class QualityBenchmark:
    """Rotation, the search for the recipes, what they reach, the heat of Grad-CAM."""

    out: Path = Path("runs/quality")  # data and run folders
    json: Path | None = None  # write the results here
    only: Literal["rotation", "search", "search-easy", "search-hard", "recipes", "painted", "heat"] | None = None


def main(config: QualityBenchmark) -> None:
    """Rotation, the search for the recipes, what they reach, the heat of Grad-CAM."""
    results: dict[str, Any] = {}
    experiments: dict[str, Callable[[Path], dict[str, Any]]] = {
        "rotation": rotation,
        "search-easy": partial(search, kind="easy"),
        "search-hard": partial(search, kind="hard"),
        "recipes": recipes,
        "painted": painted,
        "heat": heat,
    }
    for name, experiment in experiments.items():
        if config.only is None or name.startswith(config.only):
            started = time.perf_counter()
            results[name] = {**experiment(config.out), "seconds": time.perf_counter() - started}
            save(config.json, results)
            print(json.dumps({name: results[name]}, indent=2), flush=True)


def rotation(out: Path) -> dict[str, Any]:
    """QWK on rotated eyes of models trained with rotation and flips, with flips alone and without either, by seed; and the interval
    of the mean difference, by cluster bootstrap by patient."""
    make_data(out, "few")
    found: dict[str, list[Path]] = {}
    for augment in ("on", "flips", "off"):
        found[augment] = [trained(out, f"rotation-{augment}-{seed}", replace(FEW, augment=augment, seed=seed)) for seed in SEEDS]
    answers = {name: [rotated_answers(out / str(FEW.test), folder) for folder in folders] for name, folders in found.items()}
    kappas = {name: [float(qwk(matrices.sum(axis=0, keepdims=True))[0]) for matrices in runs] for name, runs in answers.items()}
    report: dict[str, Any] = {"qwk_on_rotated_eyes": kappas, "resamples": RESAMPLES, "level": LEVEL}
    for other in ("flips", "off"):
        low, high = difference_interval(answers["on"], answers[other])
        mean = statistics.mean(kappas["on"]) - statistics.mean(kappas[other])
        report[f"on_minus_{other}"] = {"mean": mean, "low": low, "high": high}
    return report


def rotated_answers(data: Path, folder: Path) -> Floats:
    """(patients, C, C) confusion matrices of the best checkpoint on the test set, each eye rotated by an angle of its own."""
    model, grader, device, precision = open_checkpoint(folder / "best.safetensors", "auto", "auto")
    with Loader(data, 32, train=False, resolution=grader.resolution, device=device, augment=ROTATED) as loader:
        answers = run_model(model, loader, precision, "rotated").answers(grader.grading, grader.decision)
        patients = loader.dataset.patients_of(answers.ids.numpy())
    if patients is None:
        raise UsageError(f"{data}: whose images these are is unknown; pack them with --patient-column or --patient-pattern")
    groups = patient_groups(patients)
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


def heat(out: Path) -> dict[str, Any]:
    """By the map's side in cells: the heat's mean on lesions by its mean on all of the retina, over the diseased test eyes."""
    make_data(out, "small")
    stamp = json.loads((out / "small" / STAMP).read_text())
    eyes = [eye for eye in plan_eyes(stamp["train"], stamp["test"], stamp["seed"])["test"] if eye.grade > 0]
    coarse = trained(out, "heat-coarse", COARSE)
    fine = trained(out, "heat-fine", replace(FINE, weights=str(coarse / "best.safetensors")))
    found = {}
    for folder in (coarse, fine):
        model, info = load_checkpoint(folder / "best.safetensors")
        side, size = info.resolution, info.size or info.resolution
        cam = GradCam(model, gradcam_layer(info.arch, side))
        ratios = []
        for eye in eyes:
            images, _ = prepare(out / "small" / "data" / f"{eye.name}.jpeg", size, info.preparation, (side,))
            outputs = cam(torch.from_numpy(images[side]).permute(2, 0, 1)[None])
            grades = info.grading.log_probabilities(outputs, info.decision).argmax(dim=1)
            (cells,) = cam.heat(partial(info.grading.target, grades=grades))
            lesions, retina = lesions_and_retina(eye)
            smooth = cv2.resize(cells[0].numpy(), lesions.shape, interpolation=cv2.INTER_LINEAR)
            if smooth[retina].any() and lesions.any():
                ratios.append(float(smooth[lesions].mean() / smooth[retina].mean()))
        quartiles = np.percentile(ratios, [25, 50, 75]).tolist()
        heat_on_lesions = {"eyes": len(ratios), "mean": statistics.mean(ratios), "quartiles": quartiles}
        found[f"{cells.shape[1]} cells a side"] = heat_on_lesions | metrics(folder)
    return found


def lesions_and_retina(eye: Eye) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Two (512, 512) masks."""
    ill, well = (render(each, LesionSettings(), CameraSettings()).astype(np.int16) for each in (eye, replace(eye, grade=0)))
    return np.abs(ill - well).max(axis=2) > VISIBLE, ill.max(axis=2) > DARK


if __name__ == "__main__":
    run(QualityBenchmark, main)
