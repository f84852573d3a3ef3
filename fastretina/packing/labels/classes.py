"""What the labels of a data set mean: its classes, and the class of each row. The one place, for every layout of labels."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastretina.beton.reader import UNLABELLED
from fastretina.errors import LabelError, UsageError
from fastretina.grading import RETINOPATHY, Classes
from fastretina.packing.config import PackConfig
from fastretina.packing.labels.table import LeftOut, fail
from fastretina.packing.labels.words import loose

MAX_CLASSES = 100  # with --classes auto; more different labels are a column of something else
_OTHER = "; if there are other classes, name them by --classes, or --classes auto"
_WHOLE = re.compile(r"(0|[1-9][0-9]*)(?:\.0*|,0+)?")
_NUMBERS = tuple(map(str, range(len(RETINOPATHY))))
_TWO = ("0", "1")
_NON = ("", "nonproliferative", "nonproliferate")
_DR = ("", "dr", "npdr", "retinopathy", "diabeticretinopathy")
# Names that public sets give to the grades. Not R0 to R3: the English programme's R2 is preproliferative, another scale.
_WORDS = {
    **dict.fromkeys(("nodr", "noretinopathy", "nodiabeticretinopathy", "noapparentretinopathy", "noapparentdr"), 0),
    **dict.fromkeys(("normal", "normalfundus", "healthy"), 0),
    **{word + non + dr: n for n, word in enumerate(("mild", "moderate", "severe"), 1) for non, dr in product(_NON, _DR)},
    **{word + dr: 4 for word, dr in product(("proliferative", "proliferate"), ("", "dr", "retinopathy", "diabeticretinopathy"))},
    "pdr": 4,
}


def whole(text: str) -> str | None:
    """A number without a sign or fraction, as its digits: "2" for 2, 2.0, 2. and 2,0; None for all else, like 02, +2 and 2e0."""
    match = _WHOLE.fullmatch(text)
    return match and match[1]


def known_grade(text: str) -> int | None:
    """The grade of retinopathy that a label means: 0 to 4, or a known word for it like `No DR` or `mild_NPDR`; else None."""
    number = whole(text)
    return _WORDS.get(loose(text)) if number is None else int(number) if number in _NUMBERS else None


@dataclass(frozen=True)
class Labels:
    """The labels of N rows, as they are written.

    Attributes:
        source: the file they stand in. lines: their lines in it, 1-based; 0 where it has none.
        cells: N labels. elsewhere: those of the data set's other half, which say what the classes are as well.
        folders: they are names of folders: there is no other word for the classes, so they may be any.
        hint: what to say where the first of them is a word and no class: that row may be a header; "" where it cannot be one.
    """

    source: Path
    lines: Sequence[int]
    cells: Sequence[str]
    elsewhere: Collection[str] = ()
    folders: bool = False
    hint: str = ""


@dataclass(frozen=True)
class Graded:
    """numbers: int64 (N,), of `classes`; UNLABELLED where the row is left out. invalid: row to reason, of the rows to leave out."""

    classes: Classes
    numbers: NDArray[np.int64]
    invalid: Mapping[int, LeftOut]
    notes: tuple[str, ...] = ()


def unlabelled(rows: int, config: PackConfig) -> Graded:
    """What is known of images without grades (--grade-column none). UsageError."""
    given = _given(config)
    classes = _described(_NUMBERS if given is None else given, config)
    return Graded(classes, np.full(rows, UNLABELLED), {})


def graded(labels: Labels, config: PackConfig, left_out: Collection[int]) -> Graded:
    """Classes and numbers of the rows; those `left_out` have no say and no number.

    Raises:
        LabelError: a label that is no class, with file and line, unless such rows are to be left out (--on-bad skip).
        UsageError: --classes, --referable, --class-order do not go together with each other or with the labels.
    """
    counted = {cell for row, cell in enumerate(labels.cells) if row not in left_out}
    classes, note = _classes(labels, counted, config)
    numbers = {cell: _number(cell, classes) for cell in counted}
    invalid = {row: cell for row, cell in enumerate(labels.cells) if row not in left_out and numbers[cell] is None}
    if invalid.get(0) and labels.hint and whole(invalid[0]) is None:
        fail(labels.source, labels.lines[0], f"{_must(invalid[0], classes)}{_OTHER}{labels.hint}")
    strangers = sum(1 for cell in invalid.values() if cell)
    # Where most are strange it is another column, or other classes: leaving them out would hide that.
    if invalid and (config.on_bad != "skip" or strangers > (len(labels.cells) - len(left_out)) / 2):
        row = next((row for row, cell in invalid.items() if cell), 0) if config.on_bad == "skip" else min(invalid)
        fail(labels.source, labels.lines[row], _refusal(invalid[row], classes, config))
    at = [UNLABELLED if row in left_out else numbers[cell] for row, cell in enumerate(labels.cells)]
    reasons = {row: LeftOut("no valid grade", repr(cell)) if cell else LeftOut("no grade") for row, cell in invalid.items()}
    return Graded(classes, np.array([UNLABELLED if n is None else n for n in at], dtype=np.int64), reasons, (note,) if note else ())


def _classes(labels: Labels, counted: Collection[str], config: PackConfig) -> tuple[Classes, str]:
    """The classes that the command line or the labels mean, and a note where that must be said."""
    if (given := _given(config)) is not None:
        return _described(given, config), ""
    found = {whole(cell) or cell for cell in {*counted, *labels.elsewhere} if cell}
    if config.classes is None:
        if {whole(cell) or cell for cell in {*labels.cells, *labels.elsewhere} if cell} == {*_TWO}:
            note = f"two classes, since all labels are 0 or 1; --classes {','.join(_NUMBERS)} if they are grades of retinopathy"
            return _described(_TWO, config), note
        if not labels.folders or all(known_grade(cell) is not None for cell in found):
            return _described(_NUMBERS, config), ""
    if not 2 <= len(found) <= MAX_CLASSES:
        shown = ", ".join(map(repr, sorted(found)[:3]))
        raise LabelError(
            f"{labels.source}: {len(found)} different labels ({shown}{', ...' * (len(found) > 3)}); classes are 2 to {MAX_CLASSES}"
        )
    ordered = sorted(found, key=int) if all(map(whole, found)) else sorted(found)
    note = "" if config.classes else "classes are called like their folders; --classes NAME,NAME gives them another order"
    return _described(tuple(ordered), config), note


def _given(config: PackConfig) -> tuple[str, ...] | None:
    """The names in --classes; None where the labels say. UsageError."""
    if config.classes is None or config.classes.strip().lower() == "auto":
        return None
    return tuple(name.strip() for name in config.classes.split(","))


def _described(names: tuple[str, ...], config: PackConfig) -> Classes:
    """Classes of these names, with what --referable and --class-order say of them. UsageError."""
    if names in (_NUMBERS, RETINOPATHY.names):
        classes = RETINOPATHY
    else:
        numbers = [int(name) for name in names] if all(whole(name) == name for name in names) else []
        ordinal = len(numbers) > 2 and numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        try:
            classes = Classes(names, (1,) if len(names) == 2 else (), ordinal)
        except ValueError as error:
            raise UsageError(f"--classes: {error}") from None
        if len({_key(name) for name in names}) != len(names):
            raise UsageError(f"--classes {','.join(names)}: two names are the same but for case, blanks, _ and -")
    if config.class_order != "auto":
        classes = replace(classes, ordinal=config.class_order == "ordinal")
    if config.referable is None:
        return classes
    wanted = [name.strip() for name in config.referable.split(",")]
    if wanted == ["none"] and _number("none", classes) is None:
        return replace(classes, referable=())
    chosen = {name: _number(name, classes) for name in wanted}
    for name, number in chosen.items():
        if number is None:
            raise UsageError(f"--referable {name}: no such class; they are {', '.join(classes)}; or none")
    return replace(classes, referable=tuple(sorted({number for number in chosen.values() if number is not None})))


def _key(name: str) -> str:
    return whole(name) or loose(name)


def _number(label: str, classes: Classes) -> int | None:
    """The class that a label means, by name or, where no name is a number, by its number from 0."""
    if not label:
        return None
    keys = [_key(name) for name in classes]
    if (key := _key(label)) in keys:
        return keys.index(key)
    if classes.names == RETINOPATHY.names:
        return known_grade(label)
    number = whole(label)
    if number is None or any(map(whole, classes)):
        return None
    return int(number) if int(number) < len(classes) else None


def _must(cell: str, classes: Classes) -> str:
    shown = repr(cell[:40]) if cell else "an empty cell"
    if classes.names == RETINOPATHY.names:
        return f"grade must be an integer from 0 to {len(classes) - 1} or a word for one, not {shown}"
    return f"label must be one of {', '.join(classes)[:200]}, not {shown}"


def _refusal(cell: str, classes: Classes, config: PackConfig) -> str:
    must = _must(cell, classes)
    if config.on_bad == "skip":
        return (
            f"{must}, and so are most rows. Choose the column with --grade-column, or the classes with --classes (auto: as found)"
        )
    value = f" or --ungradable {cell[:40]}" if cell else ""
    return f"{must}. Leave such rows out with --on-bad skip{value}{_OTHER if cell else ''}"
