"""What is known of a run before it begins: settings, data sets and their patients, machine."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy
import numpy.typing as npt
import torch
import torchvision

from fastretina.beton.reader import Beton
from fastretina.grading import Classes, all_known, patients_in_both
from fastretina.metrics.assessment import Assessment
from fastretina.metrics.data import assess
from fastretina.metrics.operating import Operating, fit_operating
from fastretina.metrics.predictions import Predictions
from fastretina.metrics.sources import by_source
from fastretina.metrics.subgroups import Subgroup
from fastretina.metrics.table import TITLES
from fastretina.models.heads import HEADS, Decision
from fastretina.version import __version__

SET_TITLES = {"train": "train", "val": "validation", "test": "test"}
PAIRS = (("train", "val"), ("train", "test"), ("val", "test"))


def selection_note(metric: str, selected_on: str) -> str:
    """What a reader must know about the choice of the best epoch: by which metric, and on which data (`val` or `test`)."""
    title = TITLES.get(metric, metric)
    if selected_on == "val":
        return f"Best epoch chosen by {title} on the validation set; the test set had no part in it."
    return (
        f"Best epoch chosen by {title} on the TEST set, as --val-fraction 0 says: its metrics are optimistic. "
        "Leave that flag away, or give --val FILE, for an honest choice."
    )


@dataclass(frozen=True)
class DataInfo:
    """One data set.

    Attributes:
        path: of its file. sources: the packings that it is made of. grades: images by class, from 0 on.
        patients: whose they are; None where that is not known of all, of `unknown` images. known_as: what they are called there,
            to look for the same people in another file.
        digest: of its `Beton`, which tells it from every other; None where that is unknown.
        contents: (N,) int64, a number for the bytes of each image, their crc32 and size; None for files without checksums.
    """

    path: str
    grades: list[int]
    patients: frozenset[str] | None
    known_as: frozenset[str] | None
    unknown: int = 0
    sources: tuple[str, ...] = ()
    contents: npt.NDArray[numpy.int64] | None = field(default=None, compare=False)
    digest: str | None = None

    @classmethod
    def of(cls, beton: Beton) -> DataInfo:
        """Of an open file, all of whose labels are classes."""
        counts = numpy.bincount(beton.labels, minlength=len(beton.classes))
        patients = beton.patients or [None] * len(beton)
        known = all_known(patients)
        sources = tuple(map(str, beton.sources))
        contents = None if beton.crcs is None else beton.sizes << 32 | beton.crcs
        people = None if known is None else frozenset(known)
        whose = people, beton.known_as, patients.count(None)
        return cls(str(beton.path), counts.tolist(), *whose, sources, contents, beton.digest)

    @property
    def images(self) -> int:
        """How many images."""
        return sum(self.grades)

    @property
    def majority_share(self) -> float:
        """The accuracy of always answering the most frequent class, 0-1."""
        return max(self.grades) / max(1, self.images)

    def as_dict(self) -> dict[str, Any]:
        """For metrics.json."""
        return {
            "path": self.path,
            "digest": self.digest,
            "images": self.images,
            "grades": self.grades,
            "majority_share": self.majority_share,
            "patients": None if self.patients is None else len(self.patients),
            "images_of_unknown_patients": self.unknown,
        }


@dataclass(frozen=True)
class RunInfo:
    """What is known of a run before it begins: settings, data sets (train, test and perhaps val), device and number format.

    test_set: the open file of the test set: it says whose eye an image is, and the report shows some of the images.
    selection_metric: the metric that the best epoch is chosen by, by its name in metrics.json.
    start: the weights that it begins with, and how their file was understood.
    environment: see `training.environment`.
    """

    settings: Mapping[str, Any]
    data: Mapping[str, DataInfo]
    device: str
    amp_dtype: str
    precision_note: str
    loader: str
    parameters: int
    classes: Classes
    selection_metric: str
    test_set: Beton | None = None
    start: str = "from scratch"
    environment: Mapping[str, str | int] = field(default_factory=dict)

    @property
    def digests(self) -> dict[str, str | None]:
        """Of the data sets, by name."""
        return {name: data.digest for name, data in self.data.items()}

    @property
    def selected_on(self) -> str:
        """The data that the best epoch is chosen on: `val` or `test`."""
        return "val" if "val" in self.data else "test"

    @property
    def selection_note(self) -> str:
        """What a reader must know about that choice."""
        return selection_note(self.selection_metric, self.selected_on)

    @property
    def split_note(self) -> str | None:
        """What a reader must know where `--split-by auto` knew no patients to take the validation set by; None elsewhere."""
        if self.settings.get("split_by") != "auto" or not self.settings.get("val_fraction"):
            return None
        parts = [self.data[name] for name in ("train", "val") if name in self.data]
        unknown, images = sum(part.unknown for part in parts), sum(part.images for part in parts)
        if not unknown:
            return None
        return (
            f"The validation set was taken from the training set by image, since the patients of {unknown:,} of {images:,} images "
            "are unknown: a person's two eyes may be on both sides."
        )

    def _shared(self, count: Callable[[DataInfo, DataInfo], int | None]) -> dict[str, int | None]:
        pairs = [(one, other) for one, other in PAIRS if one in self.data and other in self.data]
        return {f"{one}_{other}": count(self.data[one], self.data[other]) for one, other in pairs}

    @property
    def patients_shared(self) -> dict[str, int | None]:
        """How many patients have images in both of two sets, by their names (`train_test`); None where that is unknown."""

        def count(one: DataInfo, other: DataInfo) -> int | None:
            if one.path == other.path:  # parts of one set, in which people of different packings are kept apart
                return patients_in_both(one.patients, other.patients)
            return patients_in_both(one.known_as, other.known_as)

        return self._shared(count)

    @property
    def duplicates_shared(self) -> dict[str, int | None]:
        """How many images of the second of two sets stand in the first, too, byte for byte; None where a file has no checksums."""

        def count(one: DataInfo, other: DataInfo) -> int | None:
            if one.contents is None or other.contents is None:
                return None
            return int(numpy.isin(other.contents, one.contents).sum())

        return self._shared(count)

    def freeze(self, val: Predictions | None) -> Operating | None:
        """The thresholds for referring that answers on the validation set give; None without one, or without referable disease."""
        if val is None:
            return None
        probabilities = val.log_probabilities.double().exp().numpy()
        sensitivity, specificity = self.settings["target_sensitivity"], self.settings["target_specificity"]
        return fit_operating(val.labels.numpy(), probabilities, self.classes, sensitivity, specificity, self.digests.get("val"))

    def assess(
        self, answers: Predictions | None, val: Predictions | None = None, decision: Decision | None = None
    ) -> Assessment | None:
        """Of answers on the test set, at the thresholds that those on the validation set give; None where answers, or the images'
        file, are not at hand. decision: what made probabilities of the network's outputs, which a temperature may be a part of."""
        if answers is None or self.test_set is None:
            return None
        before = None
        if decision is not None:
            head = HEADS[self.settings["head"]](len(self.classes))
            before = replace(answers, log_probabilities=head.rescaled(answers.log_probabilities, decision))
        return assess(answers, self.test_set, self.classes, operating=self.freeze(val), uncalibrated=before)

    def sources(self, answers: Mapping[str, Predictions | None]) -> dict[str, list[Subgroup]]:
        """Of answers on data sets by their names: the metrics of each packing of those that are made of several. Whose the images
        are, and thresholds from other data, are at hand for the test set alone: the intervals of others are by image."""
        found = {}
        for name, given in answers.items():
            if given is not None and name in self.data:
                patients, frozen = None, None
                if name == "test" and self.test_set is not None:
                    patients, frozen = self.test_set.patients_of(given.ids.numpy()), self.freeze(answers.get("val"))
                found[name] = by_source(given, self.data[name].sources, self.classes, patients, frozen)
        return {name: metrics for name, metrics in found.items() if metrics}

    def data_dict(self) -> dict[str, Any]:
        """The data sets, and what each two of them share, for metrics.json; None stands for what is unknown."""
        return {
            **{name: data.as_dict() for name, data in self.data.items()},
            "patients_in_train_and_test": self.patients_shared.get("train_test"),
            "patients_shared": self.patients_shared,
            "split_note": self.split_note,
            "duplicates_shared": self.duplicates_shared,
        }


def versions() -> dict[str, str]:
    """Versions of what decides the results."""
    return {
        "fastretina": __version__,
        "python": platform.python_version(),
        **{library.__name__: str(library.__version__) for library in (torch, torchvision, numpy)},
    }
