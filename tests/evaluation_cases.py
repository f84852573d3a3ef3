"""Evaluations that never were, for tests of their reports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastretina.grading import RETINOPATHY, Classes, Side
from fastretina.metrics.assessment import Assessment
from fastretina.metrics.flow import Flow
from fastretina.metrics.operating import fit_operating
from fastretina.metrics.predictions import Predictions, Scores
from fastretina.models.checkpoint import CheckpointInfo
from fastretina.report.evaluation import Evaluation

TWO = Classes(("no glaucoma", "glaucoma"), (1,))
NASTY = '<script>alert("x")</script>&'
TRAINED, CHOSEN, TESTED = 32 * "a", 32 * "b", 32 * "c"
SHARES = np.array([0.62, 0.12, 0.16, 0.06, 0.04])


def grades(count: int, seed: int) -> torch.Tensor:
    """(N,) of retinopathy, as frequent as in a screening programme."""
    return torch.from_numpy(np.random.default_rng(seed).choice(5, count, p=SHARES))


def answers(labels: torch.Tensor, classes: Classes, seed: int, sharp: float = 0.8) -> Predictions:
    """Of a model that is usually right or one off, and often wrong where others are, too; sharp: how sure of itself it is."""
    common, own = (
        torch.randn(len(labels), generator=torch.Generator().manual_seed(number), dtype=torch.float64) for number in (99, seed)
    )
    logits = -sharp * ((labels + 0.8 * common + 0.3 * own)[:, None] - torch.arange(len(classes))).square()
    return Predictions(logits.log_softmax(1).float(), labels, torch.arange(len(labels)))


def mean(members: Sequence[Predictions]) -> Predictions:
    probabilities = torch.stack([member.log_probabilities.double().exp() for member in members]).mean(0)
    return Predictions(probabilities.log().float(), members[0].labels, members[0].ids)


def checkpoint(classes: Classes, **changes: Any) -> CheckpointInfo:
    head, known = ("softmax", {"train": TRAINED, "val": CHOSEN})
    plain = {
        "epoch": 12,
        "amp_dtype": "float32",
        "metric": "qwk",
        "selected_on": "val",
        "head": head,
        "classes": classes,
        "data": known,
    }
    return CheckpointInfo("resnet18", len(classes), 224, (0.485,) * 3, (0.229,) * 3, **{**plain, **changes})


def retinopathy(images: int = 1000, name: str = "clinic", **changes: Any) -> Evaluation:
    """An ensemble of three on both eyes of each patient, with three columns for subgroups and frozen thresholds."""
    labels, random = grades(images, 1), np.random.default_rng(2)
    labels[1::2] = torch.where(torch.rand(images // 2, generator=torch.Generator().manual_seed(3)) < 0.6, labels[::2], labels[1::2])
    members, before = ([answers(labels, RETINOPATHY, seed, sharp) for seed in (4, 5, 6)] for sharp in (0.8, 2.0))
    validated = grades(1200, 7)
    val = mean([answers(validated, RETINOPATHY, seed) for seed in (8, 9, 10)])
    operating = fit_operating(validated.numpy(), val.log_probabilities.double().exp().numpy(), RETINOPATHY, data=CHOSEN)
    people = np.arange(images) // 2
    cameras = random.choice(["Topcon NW400", "Canon CR-2", "a hand-held one", ""], images // 2, p=[0.55, 0.4, 0.02, 0.03])
    sexes, ages = random.choice(["f", "m"], images // 2), random.integers(18, 90, images // 2)
    groups = {
        name: [str(column[person]) for person in people] for name, column in (("camera", cameras), ("sex", sexes), ("age", ages))
    }
    eyes: list[Side] = ["left" if n % 2 == 0 else "right" for n in range(images)]
    found = mean(members)
    assessment = Assessment.of(
        found, RETINOPATHY, [f"patient {n}" for n in people], eyes=eyes, groups=groups, operating=operating,
        uncalibrated=mean(before), members=members,
    )  # fmt: skip
    paths = [Path(f"runs/fold{n}/best.safetensors") for n in range(3)]
    left_out = {"ungradable": 143, "no valid grade": 31, "bad image": 6}
    flow = Flow(images + 180, left_out, images, images, {})
    plain = {
        "title": f"{name}: an ensemble of 3", "members": [(path, checkpoint(RETINOPATHY, operating=operating)) for path in paths],
        "data": f"data/{name}.beton", "digest": TESTED, "scores": Scores.of(found, RETINOPATHY), "answers": found,
        "assessment": assessment, "device": "a CPU, 2 threads", "amp_dtype": "float32", "flow": flow,
        "settings": {"tta": 8, "fuse_eyes": 0.0},
    }  # fmt: skip
    return Evaluation(**{**plain, **changes})


def glaucoma(images: int = 300, **changes: Any) -> Evaluation:
    """One model of two classes on photographs of unknown people, without thresholds, and with hostile names."""
    labels = (torch.arange(images) % 7 == 0).long()
    found = answers(labels, TWO, 1)
    site = [NASTY if n % 3 else "elsewhere" for n in range(images)]
    assessment = Assessment.of(found, TWO, None, groups={NASTY: site})
    plain = {
        "title": f"{NASTY}.beton", "members": [(Path(f"{NASTY}.safetensors"), checkpoint(TWO, data=None, selected_on="test"))],
        "data": f"{NASTY}.beton", "digest": TESTED, "scores": Scores.of(found, TWO), "answers": found,
        "assessment": assessment, "device": "a CPU", "amp_dtype": "float32", "flow": Flow(None, None, images + 9, images, {}),
        "warnings": [f"{NASTY} is odd"], "settings": {"data": NASTY},
    }  # fmt: skip
    return Evaluation(**{**plain, **changes})
