"""What is known of a run before it begins: settings, data sets and their patients, machine."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import numpy.typing as npt
import torch
import torchvision

from fastretina.beton.reader import Beton
from fastretina.grading import patient_of
from fastretina.metrics.assessment import Assessment
from fastretina.metrics.predictions import Predictions
from fastretina.metrics.table import TITLES
from fastretina.version import __version__

SET_TITLES = {"train": "train", "val": "validation", "test": "test"}
PAIRS = (("train", "val"), ("train", "test"), ("val", "test"))


def selection_note(metric: str, selected_on: str) -> str:
    """What a reader must know about the choice of the best epoch: by which metric, and on which data (`val` or `test`)."""
    title = TITLES.get(metric, metric)
    if selected_on == "val":
        return f"Best epoch chosen by {title} on the validation set; the test set had no part in it."
    return (
        f"Best epoch chosen by {title} on the TEST set, since no validation set was given: its metrics are optimistic. "
        "Give --val FILE or --val-fraction for an honest choice."
    )


@dataclass(frozen=True)
class DataInfo:
    """One data set: its file, its images by grade, and the patients (`<patient>_<left|right>`) that its names tell of."""

    path: str
    grades: list[int]
    patients: frozenset[str]

    @classmethod
    def of(cls, path: str, labels: npt.ArrayLike, names: Iterable[str], num_classes: int) -> DataInfo:
        """From a file's path, grades and image names."""
        counts = numpy.bincount(numpy.asarray(labels, dtype=numpy.int64), minlength=num_classes)
        return cls(path, counts.tolist(), frozenset(filter(None, map(patient_of, names))))

    @property
    def images(self) -> int:
        """How many images."""
        return sum(self.grades)

    @property
    def majority_share(self) -> float:
        """The accuracy of always answering the most frequent grade, 0-1."""
        return max(self.grades) / max(1, self.images)

    def as_dict(self) -> dict[str, Any]:
        """For metrics.json."""
        return {
            "path": self.path,
            "images": self.images,
            "grades": self.grades,
            "majority_share": self.majority_share,
            "patients": len(self.patients),
        }


@dataclass(frozen=True)
class RunInfo:
    """What is known of a run before it begins: settings, data sets (train, test and perhaps val), device and number format.

    test_set: the open file of the test set: its names say whose eye an image is, and the report shows some of the images.
    selection_metric: the metric that the best epoch is chosen by, by its name in metrics.json.
    start: the weights that it begins with, and how their file was understood.
    """

    settings: Mapping[str, Any]
    data: Mapping[str, DataInfo]
    device: str
    amp_dtype: str
    precision_note: str
    loader: str
    parameters: int
    test_set: Beton | None = None
    selection_metric: str = "qwk"
    start: str = "from scratch"

    @property
    def selected_on(self) -> str:
        """The data that the best epoch is chosen on: `val` or `test`."""
        return "val" if "val" in self.data else "test"

    @property
    def selection_note(self) -> str:
        """What a reader must know about that choice."""
        return selection_note(self.selection_metric, self.selected_on)

    @property
    def shared_patients(self) -> int:
        """Patients with one eye in train and the other in test."""
        return len(self.data["train"].patients & self.data["test"].patients) if "train" in self.data else 0

    def assess(self, answers: Predictions | None) -> Assessment | None:
        """Of answers on the test set; None where these, or the images' file, are not at hand."""
        if answers is None or self.test_set is None:
            return None
        return Assessment.of(answers, self.test_set.names_of(answers.ids.numpy()))

    def data_dict(self) -> dict[str, Any]:
        """The data sets, and how many patients each two of them share (None: names tell of no patients), for metrics.json."""
        shared: dict[str, int | None] = {}
        for first, second in PAIRS:
            if first in self.data and second in self.data:
                one, other = self.data[first].patients, self.data[second].patients
                shared[f"{first}_{second}"] = len(one & other) if one and other else None
        return {
            **{name: data.as_dict() for name, data in self.data.items()},
            "patients_in_train_and_test": self.shared_patients,
            "patients_shared": shared,
        }


def versions() -> dict[str, str]:
    """Versions of what decides the results."""
    return {
        "fastretina": __version__,
        "python": platform.python_version(),
        **{library.__name__: str(library.__version__) for library in (torch, torchvision, numpy)},
    }
