"""From what label files say to a table that can be packed: classes, images, people; the same for every layout."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fastretina.beton.reader import EYE, GROUP, PATIENT, QUALITY
from fastretina.errors import LabelError, UsageError
from fastretina.packing.config import PackConfig
from fastretina.packing.folder import in_words
from fastretina.packing.labels.classes import Labels, graded, unlabelled, whole
from fastretina.packing.labels.gradable import ungradable_rows
from fastretina.packing.labels.images import Found, ImageIndex, image_stem
from fastretina.packing.labels.people import by_header, by_name
from fastretina.packing.labels.table import LabelTable, LeftOut, fail


@dataclass(frozen=True)
class Listing:
    """What label files say of N images, before anyone looks for those.

    Attributes:
        source, lines, layout, digests: as of a LabelTable. names: as written. labels: None where there are no grades.
        patients, eyes, quality: N texts each, "" where unknown, of columns; None where there is no column. eyes: "left", "right".
        groups: N texts by name of the group.
        ungradable: row to reason, of the rows that the table itself calls ungradable; way_out: the flags that leave them out.
        hint: what to say where the first row's image is missing and its label a word: it may be a header; "" where it is none.
        encoding: of the table.
    """

    source: Path
    layout: str
    digests: Mapping[str, str]
    lines: Sequence[int]
    names: Sequence[str]
    labels: Labels | None
    patients: Sequence[str] | None = None
    eyes: Sequence[str] | None = None
    quality: Sequence[str] | None = None
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    ungradable: Mapping[int, LeftOut] = field(default_factory=dict)
    way_out: str = ""
    hint: str = ""
    encoding: str = "UTF-8"
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Located:
    """Where the N images are and what they are called; problems, notes: as of a LabelTable."""

    paths: list[str]
    names: list[str]
    problems: dict[int, str]
    notes: tuple[str, ...]


def build(
    listing: Listing, index: ImageIndex, config: PackConfig, missing_ok: bool, people: Sequence[str] | None = None
) -> LabelTable:
    """The table that a listing means.

    Args:
        missing_ok: a missing image is one of the table's `problems`, and no error.
        people: N names that tell whose photograph it is, where that is not what the image is called.

    Raises:
        LabelError: naming file and line: a label that is none, an image that is named twice, leaves the folder, or is missing.
        UsageError: flags that do not go together, or not with these labels.
    """
    left_out, ungradable_note = _left_out(listing, config)
    count = len(listing.names)
    result = unlabelled(count, config) if listing.labels is None else graded(listing.labels, config, left_out)
    left_out |= result.invalid
    if len(left_out) == count:
        fail(
            listing.source,
            0,
            f"no row is left to pack; the first is left out as {left_out[0]}; --grade-column none packs images without grades",
        )
    located = _locate(listing, index, missing_ok, left_out)
    columns, header_note = _columns(listing, located, people, config)
    said = (*listing.notes, *result.notes, ungradable_note, *located.notes, header_note, _beside(index))
    return LabelTable(
        names=tuple(located.names),
        paths=tuple(located.paths),
        grades=result.numbers,
        lines=np.asarray(listing.lines, dtype=np.int64),
        source=listing.source,
        layout=listing.layout,
        digests=listing.digests,
        problems=located.problems,
        classes=result.classes,
        columns=columns,
        left_out=left_out,
        ids=np.arange(count),
        notes=tuple(note for note in said if note),
    )


def _left_out(listing: Listing, config: PackConfig) -> tuple[dict[int, LeftOut], str]:
    """The rows whose image cannot be graded, and a note. LabelError where nobody said to leave out what the table calls so."""
    if listing.quality is not None and config.quality_column is None and config.ungradable is not None:
        raise UsageError(f"--ungradable {config.ungradable}: of the grades or of the quality? Say {listing.way_out}")
    cells = listing.labels.cells if listing.labels else None
    rows, note = ungradable_rows(config, cells, listing.quality)
    for row, reason in listing.ungradable.items():
        if row not in rows and config.on_bad != "skip":
            way_out = f"Leave such rows out with --on-bad skip or {listing.way_out}"
            fail(listing.source, listing.lines[row], f"{reason}. {way_out}")
    return {**listing.ungradable, **rows}, note


def _locate(listing: Listing, index: ImageIndex, missing_ok: bool, left_out: Collection[int]) -> _Located:
    found = _Located([], [], {}, ())
    seen: dict[str, int] = {}
    renamed: list[Found] = []
    for row, (line, name) in enumerate(zip(listing.lines, listing.names, strict=True)):
        try:
            image = index.find(name)
        except LabelError as error:
            fail(listing.source, line, str(error))
        except FileNotFoundError as error:
            reason = f"{error}{_garbled(listing, name)}"
            if row == 0 and listing.hint and not (listing.labels and whole(listing.labels.cells[0])):
                fail(listing.source, line, f"{reason}{listing.hint}")
            if not missing_ok and row not in left_out:
                fail(listing.source, line, f"{reason}. Add the file, remove the row, or leave such rows out with --on-bad skip")
            image = Found("", image_stem(name))
            if row not in left_out:
                found.problems[row] = reason
        # By path, so that 10_left and 10_left.jpeg are found to be the same image.
        key = image.path or image.name
        if key in seen:
            fail(listing.source, line, f"image {name!r} is named a second time (first in line {seen[key]})")
        seen[key] = line
        found.paths.append(image.path)
        found.names.append(image.name)
        if image.renamed:
            renamed.append(image)
    if not renamed:
        return found
    note = f"images found under another extension than the labels give: {len(renamed):,} (like {index.relative(renamed[0].path)})"
    return _Located(found.paths, found.names, found.problems, (note,))


def _garbled(listing: Listing, name: str) -> str:
    """A word on the encoding, where the name may have suffered from it."""
    return "" if name.isascii() else f" (the labels were read as {listing.encoding}; if that is wrong, save them as UTF-8)"


def _columns(
    listing: Listing, located: _Located, people: Sequence[str] | None, config: PackConfig
) -> tuple[dict[str, Sequence[str]], str]:
    """Text of each row by name of the column, without the columns in which nothing is known; and a note."""
    patients, eyes = listing.patients, listing.eyes
    told = 0
    if patients is None or eyes is None:
        named = by_name(people or [image_stem(name) for name in located.names], config)
        # A pattern and a column are asked for all images, and what they leave unknown stays so.
        told = 0 if config.patient_pattern else by_header(located.paths, *named)
        patients, eyes = named[0] if patients is None else patients, named[1] if eyes is None else eyes
    groups = {GROUP + name: text for name, text in listing.groups.items()}
    columns = {PATIENT: patients, EYE: eyes, QUALITY: listing.quality or (), **groups}
    note = f"patients or eyes from the headers of DICOM files: {told:,}" if told else ""
    return {name: tuple(text) for name, text in columns.items() if any(text)}, note


def _beside(index: ImageIndex) -> str:
    return f"beside images the folder holds {in_words(index.left_out)}" if index.left_out else ""
