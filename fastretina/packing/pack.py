"""A folder of images and a table of grades into a .beton: JPEGs of the right size byte for byte, the rest re-encoded."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import PIL
from PIL import features

from fastretina.beton.paths import parse_shard, shard_path, shard_rows
from fastretina.beton.writer import BetonWriter
from fastretina.errors import ConvertError, LabelError, UsageError
from fastretina.grading import CLASSES, NUM_CLASSES, patients_in_both
from fastretina.packing.config import PackConfig
from fastretina.packing.inspect import Source
from fastretina.packing.labels.registry import layout_of
from fastretina.packing.labels.table import LabelTable, Layout
from fastretina.packing.pipeline import packed_images
from fastretina.packing.reencode import QUALITY, SUBSAMPLING
from fastretina.system.files import AtomicFile, csv_line
from fastretina.system.progress import progress_bar
from fastretina.version import __version__


def skipped_path(out: Path) -> Path:
    """Where the rows that were left out of `out` are listed: row (1-based line of the label file), name, reason."""
    return out.with_name(out.name + ".skipped.csv")


@dataclass
class Tally:
    """What became of some rows; bytes: of their files; skipped: (line of the label file, name, reason)."""

    bytes: int = 0
    passed: int = 0
    reencoded: Counter[str] = field(default_factory=Counter)
    image_notes: Counter[str] = field(default_factory=Counter)
    grades: list[int] = field(default_factory=lambda: [0] * NUM_CLASSES)
    skipped: list[tuple[int, str, str]] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """What became of some more rows."""
        self.bytes += other.bytes
        self.passed += other.passed
        self.reencoded += other.reencoded
        self.image_notes += other.image_notes
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
    notes: tuple[str, ...]
    checked: bool = True  # what passed through was decoded, too
    image_notes: Mapping[str, int] = field(default_factory=dict)  # what there is to tell of images, counted

    @property
    def images(self) -> int:
        """Images in the file."""
        return self.passed + sum(self.reencoded.values())

    def __str__(self) -> str:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in self.reencoded.items())
        each = self.bytes / max(1, self.images) / 1e3
        lines = [
            f"{self.out}: {self.images:,} images, {self.bytes / 1e6:,.1f} MB ({each:.1f} KB each)",
            f"  passed through byte for byte: {self.passed:,} ({'decoded and looked at' if self.checked else 'not checked'})",
            f"  re-encoded at quality {QUALITY}, {SUBSAMPLING}: {sum(self.reencoded.values()):,}"
            + (f" ({reasons})" if reasons else ""),
            f"  skipped: {self.skipped:,}" + (f" (listed in {skipped_path(self.out)})" if self.skipped else ""),
            "  grades: " + ", ".join(f"{i}: {n:,} ({n / max(1, self.images):.1%})" for i, n in enumerate(self.grades)),
        ]
        if self.shared_patients is not None:
            lines.append(f"  patients in both train and test: {self.shared_patients:,}")
        lines += [f"  {note}: {count:,}" for note, count in self.image_notes.items()]
        lines += [f"  {note}" for note in self.notes]
        return "\n".join([*lines, f"  {self.seconds:.2f} s, {self.rows / max(self.seconds, 1e-9):,.0f} images/s"])


def write_beton(out: str | os.PathLike[str], *, progress: bool = False, **flags: Any) -> PackSummary:
    """Pack images and grades into `out`. `progress` reports on stderr.

    flags: fields of `PackConfig`: root="data", split="train"; or images="images", labels="labels.csv"; size=512, workers=None,
    on_bad="error", max_bad="0.5%", check=True, crop="none", contrast="none", shards=None, shard=None. Paths may be strings.

    Raises:
        UsageError: arguments that do not go together. LabelError: the label files, by file and line.
        ConvertError: a bad image (by label file, line and path), too many of them, a killed worker, a full disk.
    """
    paths = {name: Path(flags[name]) for name in ("root", "images", "labels") if flags.get(name) is not None}
    return pack(PackConfig(Path(out), **flags | paths), progress=progress)


def pack(config: PackConfig, *, progress: bool = False) -> PackSummary:
    """`write_beton` for a configuration that is already there. Raises the same."""
    started = time.perf_counter()
    config.validate()
    layout = layout_of(config)
    # A machine that packs one shard needs only the images of that one; those missing from its own rows stop it later.
    table = layout.read(config, config.on_bad == "skip" or config.shard is not None)
    allowed = config.allowed_bad(len(table))
    shared, notes = _shared_patients(config, layout, table)
    files = _files(config, len(table))
    rows = range(files[0].rows.start, files[-1].rows.stop)
    total = Tally()
    # closing: an error here must end the worker processes now, not when its traceback is forgotten.
    bar = progress_bar("packing", len(rows), unit="image", shown=progress, lines=True)
    with bar, closing(packed_images(config, table, rows)) as images:
        for file in files:
            total.add(_write(config, table, file, islice(images, len(file.rows)), allowed - len(total.skipped), bar))
    return PackSummary(
        out=files[0].path if len(files) == 1 else shard_path(config.out, "*", len(files)),
        rows=len(rows),
        passed=total.passed,
        reencoded=dict(sorted(total.reencoded.items())),
        skipped=len(total.skipped),
        grades=tuple(total.grades),
        shared_patients=shared,
        bytes=total.bytes,
        seconds=time.perf_counter() - started,
        notes=notes,
        checked=config.check,
        image_notes=dict(sorted(total.image_notes.items())),
    )


@dataclass(frozen=True)
class _File:
    """One file to write: some rows of the label table. shard: its number among how many; None for a whole."""

    path: Path
    rows: range
    shard: tuple[int, int] | None = None


def _files(config: PackConfig, rows: int) -> list[_File]:
    if config.shard is not None:
        shards = [parse_shard(config.shard)]
    elif config.shards is not None:
        shards = [(number, config.shards) for number in range(config.shards)]
    else:
        return [_File(config.out, range(rows))]
    if (of := shards[0][1]) > rows:
        raise UsageError(f"{of} shards of {rows} images: some would be empty; ask for fewer")
    return [_File(shard_path(config.out, *shard), shard_rows(rows, *shard), shard) for shard in shards]


def _write(config: PackConfig, table: LabelTable, file: _File, images: Iterable[Source], allowed: int, bar: Any) -> Tally:
    """Write one file from the images of its rows; what became of them."""
    tally = Tally()
    with BetonWriter(file.path, len(file.rows)) as writer:
        for row, image in zip(file.rows, images, strict=True):
            if image.payload is None:
                _bad(config, table, row, image.reason, tally.skipped, allowed)
            else:
                tally.reencoded[image.reason] += 1
                tally.image_notes.update(image.notes)
                name, grade = table.names[row], int(table.grades[row])
                tally.grades[grade] += 1
                writer.add(image.payload, image.crc, name=name, label=grade, id=row, width=config.size, height=config.size)
            bar.update()
        tally.passed = tally.reencoded.pop("", 0)
        provenance = _provenance(config, table, tally)
        if file.shard is not None:
            provenance["shard"] = {"number": file.shard[0], "of": file.shard[1]}
        with ExitStack() as stack:
            if tally.skipped:  # on the disk before the .beton appears, under its name only after that: a full disk leaves neither
                listed = stack.enter_context(AtomicFile(skipped_path(file.path), ConvertError))
                lines = map(csv_line, [("row", "name", "reason"), *tally.skipped])
                listed.write("".join(lines).encode("utf-8", "replace"), 0)
            tally.bytes = writer.finish(provenance)
            if tally.skipped:
                listed.publish()
    if not tally.skipped:
        skipped_path(file.path).unlink(missing_ok=True)  # of an earlier run: it would lie about this file
    return tally


def _shared_patients(config: PackConfig, layout: Layout, table: LabelTable) -> tuple[int | None, tuple[str, ...]]:
    """How many patients are in both splits, None where that is unknown; and why it is."""
    try:
        other = layout.other_names(config)
        return (None if other is None else len(patients_in_both(table.names, other))), ()
    except LabelError as error:
        return None, (f"patients in both train and test: unknown ({error})",)


def _bad(config: PackConfig, table: LabelTable, row: int, reason: str, skipped: list[tuple[int, str, str]], allowed: int) -> None:
    where = f"{table.where(row)}: {table.paths[row] or table.names[row]}: {reason}"
    if config.on_bad == "error":
        raise ConvertError(f"{where}. Mend or remove it, or leave such images out with --on-bad skip")
    skipped.append((int(table.lines[row]), table.names[row], reason))
    if len(skipped) > allowed:
        raise ConvertError(f"more than --max-bad {config.max_bad} of {len(table)} images are bad; the last one: {where}")


def _provenance(config: PackConfig, table: LabelTable, tally: Tally) -> dict[str, object]:
    """What the file says about its making. The same for the same input: no times, no paths."""
    made: dict[str, object] = {
        "fastretina": __version__,
        "layout": table.layout,
        "split": config.split,
        "labels": dict(table.digests),
        "size": config.size,
        "passed_through": tally.passed,
        "reencoded": dict(sorted(tally.reencoded.items())),
        "skipped": len(tally.skipped),
        "classes": list(CLASSES),
        "grades": tally.grades,
    }
    if config.preparation:
        made["preparation"] = asdict(config.preparation)
    if tally.reencoded:
        encoder = f"Pillow {PIL.__version__}, libjpeg-turbo {features.version_feature('libjpeg_turbo')}"
        made["encoder"] = {"quality": QUALITY, "subsampling": SUBSAMPLING, "library": encoder}
    return made
