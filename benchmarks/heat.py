"""Does the heat of Grad-CAM lie on the lesions? On a sample data set, whose lesions are known, eye by eye.

    python benchmarks/heat.py --checkpoint runs/demo/best.safetensors --sample data/sample

A lesion is where the photograph differs from the same eye's without disease by more than 12 grey levels.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import torch

from fastretina.cli import run
from fastretina.errors import RunError
from fastretina.models.backbones import BACKBONES
from fastretina.models.checkpoint import load_grader
from fastretina.models.gradcam import GradCam
from fastretina.models.photographs import prepare
from fastretina.sample.camera import CameraSettings, Eye, render
from fastretina.sample.dataset import STAMP, plan_eyes
from fastretina.sample.lesions import LesionSettings

VISIBLE = 12  # grey levels
DARK = 20  # grey levels, below which there is no retina


@dataclass(frozen=True)
class HeatBenchmark:
    """How much denser the heat of Grad-CAM is on lesions than on all of the retina."""

    checkpoint: Path
    """A run's best.safetensors."""
    sample: Path
    """A folder of tools/make_sample.py; its test images are used."""


def lesions_and_retina(eye: Eye) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Two (512, 512) masks."""
    ill, well = (render(each, LesionSettings(), CameraSettings()).astype(np.int16) for each in (eye, replace(eye, grade=0)))
    return np.abs(ill - well).max(axis=2) > VISIBLE, ill.max(axis=2) > DARK


def main(config: HeatBenchmark) -> None:
    """How much denser the heat of Grad-CAM is on lesions than on all of the retina."""
    try:
        stamp = json.loads((config.sample / STAMP).read_text())
    except OSError as error:
        raise RunError(f"{config.sample}: not a folder of tools/make_sample.py: {error.strerror}") from error
    model, grader = load_grader(config.checkpoint)
    cam = GradCam(model, BACKBONES[grader.arch].gradcam)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (grader.mean, grader.std))
    ratios = []
    for eye in plan_eyes(stamp["train"], stamp["test"], stamp["seed"])["test"]:
        if eye.grade == 0:
            continue
        pixels = prepare(config.sample / "data" / f"{eye.name}.jpeg", grader.resolution)
        outputs = cam(((torch.tensor(pixels).permute(2, 0, 1) / 255.0 - mean) / std)[None])
        grades = grader.grading.log_probabilities(outputs, grader.decision).argmax(dim=1)
        (heat,) = cam.heat(partial(grader.grading.target, grades=grades))
        lesions, retina = lesions_and_retina(eye)
        smooth = cv2.resize(heat[0].numpy(), lesions.shape, interpolation=cv2.INTER_LINEAR)
        if smooth[retina].any() and lesions.any():
            ratios.append(float(smooth[lesions].mean() / smooth[retina].mean()))
    quartiles = ", ".join(f"{value:.2f}" for value in np.percentile(ratios, [25, 50, 75]))
    cells = f"maps of {heat.shape[1]} x {heat.shape[2]}"
    print(f"heat on lesions by heat on the retina: mean {np.mean(ratios):.2f}, quartiles {quartiles} ({len(ratios)} eyes, {cells})")


if __name__ == "__main__":
    run(HeatBenchmark, main)
