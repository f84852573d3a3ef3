"""What became of the rows of a table, counted while it is packed and told in the end."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fastretina.errors import printable
from fastretina.grading import Classes
from fastretina.packing.labels.table import LabelTable
from fastretina.packing.reencode import QUALITY, SUBSAMPLING

_NAMED = 5  # images of other grades than their twins that the summary names


def skipped_path(out: Path) -> Path:
    """Where the rows that were left out of `out` are listed: row (1-based line of the label file), name, reason."""
    return out.with_name(out.name + ".skipped.csv")


@dataclass
class Tally:
    """What became of some rows.

    bytes: of their files. skipped: (line of the label file, name, reason), `bad` of them bad images; left_out: how many by the
    kind of the reason. packed: the others' ids; bits: checksum and size of the bytes of each, as one number; sets: the number of
    the set that each is in.
    """

    bytes: int = 0
    passed: int = 0
    reencoded: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)  # of images
    grades: Counter[int] = field(default_factory=Counter)
    skipped: list[tuple[int, str, str]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    bad: int = 0
    packed: array[int] = field(default_factory=lambda: array("q"))
    bits: array[int] = field(default_factory=lambda: array("Q"))
    sets: array[int] = field(default_factory=lambda: array("H"))

    def add(self, other: Tally) -> None:
        """What became of some more rows."""
        self.bytes += other.bytes
        self.passed += other.passed
        self.reencoded += other.reencoded
        self.notes += other.notes
        self.grades += other.grades
        self.skipped += other.skipped
        self.left_out += other.left_out
        self.bad += other.bad
        self.packed += other.packed
        self.bits += other.bits
        self.sets += other.sets

    def counts(self, classes: Classes) -> tuple[int, ...]:
        """Images of each class."""
        return tuple(self.grades[number] for number in range(len(classes)))


def twin_notes(tally: Tally, table: LabelTable) -> list[str]:
    """How many images are the same as another to the bit (by checksum and size), in one set and across; and, by name, those whose
    class differs from their twin's."""
    bits, packed, sets = np.array(tally.bits), np.array(tally.packed), np.array(tally.sets)
    order = np.argsort(bits, kind="stable")
    starts = np.flatnonzero(np.diff(bits[order], prepend=bits[order[:1]] + np.uint64(1)))
    groups = [group for group in np.split(order, starts[1:]) if len(group) > 1]
    if not groups:
        return []
    across = sum(len(np.unique(sets[group])) > 1 for group in groups)
    notes = [
        f"identical images: {sum(map(len, groups)):,}, in {len(groups):,} groups"
        + (f", {across:,} of these in more than one set" if across else "")
    ]
    rows = [np.searchsorted(table.ids, packed[group]).tolist() for group in groups]
    differing = [group for group in rows if len({int(table.grades[row]) for row in group}) > 1]
    if differing:

        def told(row: int) -> str:
            return f"{table.names[row]} (line {table.lines[row]}) {table.classes.title(int(table.grades[row]))}"

        listed = "; ".join(" = ".join(map(told, group)) for group in differing[:_NAMED])
        more = f"; and {len(differing) - _NAMED:,} more groups" if len(differing) > _NAMED else ""
        notes.append(f"identical images of different {table.classes.noun}: {listed}{more}")
    return notes


@dataclass(frozen=True)
class PackSummary:
    """What was packed. Sizes in bytes; `reencoded` counts by reason, `image_notes` what else there is to tell of images.

    checked: what passed through was decoded and looked at, too. grades: the counts by class.

    patients: how many people, None where unknown for some image. shared_patients: those also in the lab layout's other split, None
    where that is unknown, or there is none.
    """

    out: Path
    rows: int
    passed: int
    reencoded: Mapping[str, int]
    skipped: int
    bad: int  # of those skipped, the bad images; the others were left out as asked
    classes: Classes
    grades: tuple[int, ...]
    patients: int | None
    shared_patients: int | None
    splits: Mapping[str, tuple[int, ...]]  # the counts by class of each, where the table was divided
    bytes: int
    seconds: float
    checked: bool
    image_notes: Mapping[str, int]
    notes: tuple[str, ...]

    @property
    def images(self) -> int:
        """Images in the file."""
        return self.passed + sum(self.reencoded.values())

    def __str__(self) -> str:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in self.reencoded.items())
        each = self.bytes / max(1, self.images) / 1e3
        lines = [
            f"{self.out}: {self.images:,} images, {self.bytes / 1e6:,.1f} MB ({each:.1f} KB each)",
            f"  passed through byte for byte: {self.passed:,}"
            + (f" ({'decoded and looked at' if self.checked else 'not checked'})" if self.passed else ""),
            f"  re-encoded at quality {QUALITY}, {SUBSAMPLING}: {sum(self.reencoded.values()):,}"
            + (f" ({reasons})" if reasons else ""),
            f"  skipped: {self.skipped:,}" + self._skipped(),
            f"  classes: {self.classes}",
            f"  images by {self.classes.noun}: {self._shares(self.grades)}",
            *(f"  {name}: {sum(counts):,} images; {self._shares(counts)}" for name, counts in self.splits.items()),
            *(f"  {note}: {count:,}" for note, count in self.image_notes.items()),
            *(f"  {note}" for note in self.notes),
        ]
        return "\n".join([*map(printable, lines), f"  {self.seconds:.2f} s, {self.rows / max(self.seconds, 1e-9):,.0f} images/s"])

    def _skipped(self) -> str:
        if not self.skipped:
            return ""
        asked = self.skipped - self.bad
        parts = [f"{count:,} {what}" for count, what in ((asked, "left out as asked"), (self.bad, "bad")) if count]
        return f" ({', '.join(parts)}; listed in {skipped_path(self.out)})"

    def _shares(self, counts: tuple[int, ...]) -> str:
        total = sum(counts)
        if not total:
            return "none, packed for prediction"
        return ", ".join(f"{self.classes.title(i)}: {n:,} ({n / total:.1%})" for i, n in enumerate(counts))
