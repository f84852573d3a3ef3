"""What a screening programme counts: photographs, pairs of eyes, or people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import numpy.typing as npt

from fastretina.grading import Classes, Side
from fastretina.metrics.operating import referable_scores
from fastretina.metrics.table import Floats, Ints

Unit = Literal["image", "eye pair", "person"]


@dataclass(frozen=True)
class Cases:
    """N images, pairs of eyes or persons, and a model's answers for them.

    Attributes:
        labels, predicted: (N,) classes; of several images the worst, which means something only where the classes have an order.
        ill, called: (N,) whether at least one of the images is referable, and whether the model's answer is for at least one.
        scores: (N,) float64 probability of referable disease; of several images the highest.
        owner: (N,) int64 number of the person, 0, 1, ..., or of the image where nobody knows the persons.
    """

    labels: Ints
    predicted: Ints
    ill: npt.NDArray[np.bool_]
    called: npt.NDArray[np.bool_]
    scores: Floats
    owner: Ints

    @classmethod
    def images(cls, labels: Ints, probabilities: Floats, owner: Ints, classes: Classes) -> Self:
        """Of (N,) true classes and (N, C) probabilities."""
        predicted = probabilities.argmax(axis=1)
        ill, called = (np.isin(values, classes.referable) for values in (labels, predicted))
        return cls(labels, predicted, ill, called, referable_scores(probabilities, classes), owner)

    def __len__(self) -> int:
        return len(self.labels)

    def chosen(self, where: npt.NDArray[np.bool_]) -> Cases:
        """Those for which `where`, (N,), is true."""
        return Cases(**{name: column[where] for name, column in vars(self).items()})

    def people(self, where: npt.NDArray[np.bool_]) -> int:
        """How many persons have a case for which `where`, (N,), is true."""
        return len(np.unique(self.owner[where]))

    def persons(self) -> Cases:
        """One for each person that has an image here."""
        people, number = np.unique(self.owner, return_inverse=True)
        worst = {name: np.zeros(len(people), column.dtype) for name, column in vars(self).items()}
        for name, column in vars(self).items():
            np.maximum.at(worst[name], number, column)
        return Cases(**worst)

    def pairs(self, eyes: Sequence[Side | None]) -> Cases:
        """One for each person of whom there are two images here, of the left and of the right eye. eyes: (N,), None for unknown."""
        left, right = (np.bincount(self.owner, [eye == side for eye in eyes]) for side in ("left", "right"))
        paired = (left == 1) & (right == 1) & (np.bincount(self.owner) == 2)
        return self.chosen(paired[self.owner]).persons()
