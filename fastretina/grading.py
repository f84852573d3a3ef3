"""What the classes are, which of them are referable, and whose eye an image is: the one place that knows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, overload

Side = Literal["left", "right"]
_NO_TEXT = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # and a surrogate is a byte of a name that is not UTF-8


@dataclass(frozen=True)
class Classes(Sequence[str]):
    """What a data set tells apart; as a sequence, the names, a class's number being its place.

    Attributes:
        names: two or more, all different, in ascending order where they have one.
        referable: numbers of the classes that a screening programme refers to an ophthalmologist, ascending; may be none.
        ordinal: whether each class is worse than the one before, so that a distance between two of them means something.

    ValueError where these do not go together.
    """

    names: tuple[str, ...]
    referable: tuple[int, ...] = ()
    ordinal: bool = False

    def __post_init__(self) -> None:
        if len(self.names) < 2 or len(set(self.names)) != len(self.names) or not all(self.names):
            raise ValueError(f"classes {', '.join(map(repr, self.names))}: two or more different names are needed")
        if any(_NO_TEXT.search(name) for name in self.names):
            raise ValueError(
                f"classes {', '.join(map(repr, self.names))}: "
                "control characters, line ends and bytes that are not UTF-8 cannot be in a name"
            )
        if list(self.referable) != sorted(set(self.referable) & set(range(len(self.names)))):
            raise ValueError(f"referable classes {self.referable}: ascending numbers from 0 to {len(self.names) - 1}")

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        return self.names[index]

    def __str__(self) -> str:
        order = "ordinal" if self.ordinal else "without an order"
        return f"{', '.join(self.names)} ({order}; referable: {', '.join(self[number] for number in self.referable) or 'none'})"

    @classmethod
    def stored(cls, value: Any) -> Classes:
        """Out of JSON, the inverse of `as_dict`; a bare list of names is that of an older file. ValueError."""
        match value:
            case {"names": [*names], "referable": [*numbers], "ordinal": bool(ordinal)} if all(
                isinstance(name, str) for name in names
            ) and all(type(number) is int for number in numbers):
                return cls(tuple(names), tuple(numbers), ordinal)
            case [*names] if all(isinstance(name, str) for name in names):
                return RETINOPATHY if tuple(names) == RETINOPATHY.names else cls(tuple(names))
        raise ValueError(f"classes {value!r}")

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def title(self, number: int) -> str:
        """`2 moderate`; the name alone where that is a number itself; the bare number past the known classes."""
        if number >= len(self.names):
            return str(number)
        name = self.names[number]
        return name if name.isdecimal() else f"{number} {name}"

    @property
    def noun(self) -> Literal["grade", "class"]:
        """What one of them is called: a grade where they have an order."""
        return "grade" if self.ordinal else "class"

    @property
    def nouns(self) -> Literal["grades", "classes"]:
        """What several of them are called."""
        return "grades" if self.ordinal else "classes"

    @property
    def referable_title(self) -> str:
        """Which are referable, in words: `grade 2 or more`, `yes`, `AMD or glaucoma`; "" where none is."""
        first = len(self) - len(self.referable)
        if self.ordinal and self.referable and self.referable[0] == first:
            return f"grade {first}" + (" or more" if first < len(self) - 1 else "")
        return " or ".join(self[number] for number in self.referable)

    @property
    def referable_score(self) -> str:
        """The probability of referable disease, in the terms of predictions.csv: `p2 + p3 + p4`."""
        return " + ".join(f"p{number}" for number in self.referable)


# The International Clinical Diabetic Retinopathy scale (Wilkinson et al., Ophthalmology 110:1677, 2003).
RETINOPATHY = Classes(("no DR", "mild", "moderate", "severe", "proliferative"), referable=(2, 3, 4), ordinal=True)

_EYE = re.compile(r"(.+)_(left|right|l|r|od|os)", re.IGNORECASE | re.DOTALL)
_SIDES: dict[str, Side] = {"left": "left", "l": "left", "os": "left", "right": "right", "r": "right", "od": "right"}


def side_of(text: str) -> Side | None:
    """The side that left, right, L, R, OS (oculus sinister) or OD (dexter) mean, in any case; None for other words."""
    return _SIDES.get(text.strip().lower())


def eye_of(name: str) -> tuple[str, Side] | None:
    """Patient and side of an image called `<patient>_<side>`, see `side_of`; None for other names.

    The folder before a name is part of the patient: two sites both have a patient 10.
    """
    match = _EYE.fullmatch(name)
    if match is None or match[1].endswith("/"):
        return None
    return match[1], _SIDES[match[2].lower()]


def all_known(patients: Sequence[str | None] | None) -> list[str] | None:
    """The patients of N images where all of them are known; None, "unknown", where one is not: then nobody can say how many
    people there are, nor that two sets share none."""
    if patients is None:
        return None
    known = [patient for patient in patients if patient is not None]
    return known if len(known) == len(patients) else None


def patients_in_both(one: Iterable[str] | None, other: Iterable[str] | None) -> int | None:
    """How many patients have images in both lists: their eyes are not independent, so scores on one flatter the other. None,
    unknown, where the patients of one are."""
    return None if one is None or other is None else len(set(one) & set(other))
