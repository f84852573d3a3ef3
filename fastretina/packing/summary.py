"""What became of the rows of a label table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fastretina.grading import NUM_CLASSES
from fastretina.packing.reencode import QUALITY, SUBSAMPLING


def skipped_path(out: Path) -> Path:
    """Where the rows that were left out of `out` are listed: row (1-based line of the label file), name, reason."""
    return out.with_name(out.name + ".skipped.csv")


@dataclass
class Tally:
    """What became of some rows; skipped: (line of the label file, name, reason)."""

    passed: int = 0
    reencoded: Counter[str] = field(default_factory=Counter)
    grades: list[int] = field(default_factory=lambda: [0] * NUM_CLASSES)
    skipped: list[tuple[int, str, str]] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """What became of some more rows."""
        self.passed += other.passed
        self.reencoded += other.reencoded
        self.grades = [a + b for a, b in zip(self.grades, other.grades, strict=True)]
        self.skipped += other.skipped


@dataclass(frozen=True)
class PackSummary:
    """What was packed. Sizes in bytes; `reencoded` counts by reason; `grades` are the counts by grade."""

    out: Path
    rows: int
    passed: int
    reencoded: Mapping[str, int]
    skipped: int
    grades: tuple[int, ...]
    shared_patients: int | None  # patients also in the other split; None where there is no other split to look at
    bytes: int
    seconds: float
    notes: tuple[str, ...] = field(default=())

    @property
    def images(self) -> int:
        """Images in the file."""
        return self.passed + sum(self.reencoded.values())

    def __str__(self) -> str:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in self.reencoded.items())
        each = self.bytes / max(1, self.images) / 1e3
        lines = [
            f"{self.out}: {self.images:,} images, {self.bytes / 1e6:,.1f} MB ({each:.1f} KB each)",
            f"  passed through byte for byte: {self.passed:,}",
            f"  re-encoded at quality {QUALITY}, {SUBSAMPLING}: {sum(self.reencoded.values()):,}"
            + (f" ({reasons})" if reasons else ""),
            f"  skipped: {self.skipped:,}" + (f" (listed in {skipped_path(self.out)})" if self.skipped else ""),
            "  grades: " + ", ".join(f"{i}: {n:,} ({n / max(1, self.images):.1%})" for i, n in enumerate(self.grades)),
        ]
        if self.shared_patients is not None:
            lines.append(f"  patients in both train and test: {self.shared_patients:,}")
        lines += [f"  {note}" for note in self.notes]
        return "\n".join([*lines, f"  {self.seconds:.2f} s, {self.rows / max(self.seconds, 1e-9):,.0f} images/s"])
