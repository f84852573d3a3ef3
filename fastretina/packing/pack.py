"""A folder of images and a table of grades into a .beton: JPEGs of the right size byte for byte, the rest re-encoded."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import PIL
from PIL import features

from fastretina.beton.paths import parse_shard, shard_path, shard_rows
from fastretina.beton.writer import BetonWriter, mark_as_one
from fastretina.errors import ConvertError, LabelError, UsageError
from fastretina.grading import all_known, patients_in_both
from fastretina.packing.config import PackConfig
from fastretina.packing.inspect import Source
from fastretina.packing.labels.registry import layout_of
from fastretina.packing.labels.table import LabelTable, Layout
from fastretina.packing.pipeline import packed_images
from fastretina.packing.reencode import QUALITY, SUBSAMPLING
from fastretina.packing.splits import divided, divided_by, named, write_divided
from fastretina.packing.summary import PackSummary, Tally, skipped_path, twin_notes
from fastretina.system.csv_text import csv_line
from fastretina.system.files import AtomicFile
from fastretina.system.interrupts import HeldSignals
from fastretina.system.limits import allow_open_files
from fastretina.system.progress import progress_bar
from fastretina.version import __version__

_MISSING, _BAD = "missing image", "bad image"  # kinds of reasons to leave a row out, beside those of LeftOut


def write_beton(out: str | os.PathLike[str], *, progress: bool = False, **flags: Any) -> PackSummary:
    """Pack images and grades into `out`. `progress` reports on stderr.

    flags: fields of `PackConfig`: root="data", split="train"; or images="images", labels="labels.csv"; or class_folders="train";
    size=512, workers=None, on_bad="error", max_bad="0.5%", crop="none", contrast="none", shards=None, splits=None and so on, as
    on the command line. Paths may be strings.

    Raises:
        UsageError: arguments that do not go together. LabelError: the label files, by file and line.
        ConvertError: a bad image (by label file, line and path), too many of them, a killed worker, a full disk.
        KeyboardInterrupt, or what else a signal's handler raises: with no file, lock, thread or process left.
    """
    paths = {name: Path(flags[name]) for name in ("root", "images", "labels", "class_folders") if flags.get(name) is not None}
    return pack(PackConfig(Path(out), **flags | paths), progress=progress)


@dataclass(frozen=True)
class _File:
    """One file to write: `rows` of `table`. shard: its number among how many; None for a whole."""

    path: Path
    table: LabelTable
    rows: range
    split: str | None
    shard: tuple[int, int] | None = None


def pack(config: PackConfig, *, progress: bool = False) -> PackSummary:
    """`write_beton` for a configuration that is already there. Raises the same."""
    try:
        with HeldSignals() as signals:
            return _pack(config, progress, signals)
    except (OSError, MemoryError) as error:  # of the system, wherever it was met
        raise ConvertError(
            f"{config.out}: packing did not end well: {error or 'not enough memory; fewer --workers need less'}"
        ) from error


def _pack(config: PackConfig, progress: bool, signals: HeldSignals) -> PackSummary:
    started = time.perf_counter()
    config.validate()
    layout = layout_of(config)
    # A machine that packs one shard needs only the images of that one; those missing from its own rows stop it later.
    with signals.let_in():
        table = layout.read(config, config.on_bad == "skip" or config.shard is not None)
    patients, shared, told = _patients(config, layout, table)
    notes = [*table.notes, *told]
    if config.splits is None:
        sets = [_files(config, config.out, table, config.split)]
    else:
        parts, how = divided(config.splits, config.split_seed, table)
        notes.append(how)
        sets = [_files(config, named(config.out, name), part, name) for name, part in parts.items()]
    allowed, total, counted, waiting = config.allowed_bad(len(table)), Tally(), {}, []
    rows, files_open = sum(len(file.rows) for files in sets for file in files), sum(map(len, sets))
    if files_open > 1 and (limit := allow_open_files(4 * files_open)) is not None:  # with a skipped list, and folders
        raise UsageError(
            f"{files_open:,} files to write, and this system allows {limit:,} open ones (ulimit -n); ask for fewer shards"
        )
    with progress_bar("packing", rows, unit="image", shown=progress, lines=True) as bar, ExitStack() as stack:
        for number, files in enumerate(sets):
            before = total.grades.copy()
            span = range(files[0].rows.start, files[-1].rows.stop)
            # closing: an error here must end the worker processes now, not when its traceback is forgotten.
            with closing(packed_images(config, files[0].table, span, signals)) as images:
                shards = []
                for file in files:
                    tally, writer, publish = _write(config, file, islice(images, len(file.rows)), allowed - total.bad, bar, stack)
                    total.add(tally)
                    total.sets.extend([number] * len(tally.packed))
                    shards.append(writer)
                    waiting.append(publish)
            if config.shards is not None:
                mark_as_one(shards)
            if config.splits is not None:
                counted[str(files[0].split)] = tuple(total.grades[k] - before[k] for k in range(len(table.classes)))
        # All together: beside an old test set, a new training set might hold images of it; and the fewer shards of an older packing
        # have new ones beside them, the better, though their id tells them apart.
        for publish in waiting:
            publish()
    if config.splits is not None:
        write_divided(config.out, parts)
    return PackSummary(
        out=config.out if len(sets) > 1 or len(sets[0]) == 1 else shard_path(config.out, "*", len(sets[0])),
        rows=rows,
        passed=total.passed,
        reencoded=dict(sorted(total.reencoded.items())),
        skipped=len(total.skipped),
        bad=total.bad,
        classes=table.classes,
        grades=total.counts(table.classes),
        patients=patients,
        shared_patients=shared,
        splits=counted,
        bytes=total.bytes,
        seconds=time.perf_counter() - started,
        checked=config.check,
        image_notes=dict(sorted(total.notes.items())),
        notes=(*notes, *twin_notes(total, table)),
    )


def _files(config: PackConfig, out: Path, table: LabelTable, split: str | None) -> list[_File]:
    rows = len(table)
    if config.shard is not None:
        shards = [parse_shard(config.shard)]
    elif config.shards is not None:
        shards = [(number, config.shards) for number in range(config.shards)]
    else:
        return [_File(out, table, range(rows), split)]
    if (of := shards[0][1]) > rows:
        raise UsageError(f"{of} shards of {rows} images: some would be empty; ask for fewer")
    return [_File(shard_path(out, *shard), table, shard_rows(rows, *shard), split, shard) for shard in shards]


def _write(
    config: PackConfig, file: _File, images: Iterable[Source], allowed: int, bar: Any, stack: ExitStack
) -> tuple[Tally, BetonWriter, Callable[[], None]]:
    """Write one file from the images of its rows: what became of them, its writer, and what gives the file its name. stack: removes
    it else."""
    table, tally, size = file.table, Tally(), config.size
    part = slice(file.rows.start, file.rows.stop)
    texts = list(zip(*(column[part] for column in table.columns.values()), strict=True)) or [()] * len(file.rows)
    columns = zip(file.rows, images, table.grades[part].tolist(), table.ids[part].tolist(), texts, strict=True)
    writer = stack.enter_context(BetonWriter(file.path, len(file.rows), columns=list(table.columns)))
    for row, image, grade, number, text in columns:
        name, reason = table.names[row], table.left_out.get(row)
        if reason is not None or image.payload is None:
            tally.skipped.append((int(table.lines[row]), name, str(reason or image.reason)))
            tally.left_out[_MISSING if row in table.problems else _BAD if reason is None else reason.kind] += 1
            if reason is None:
                tally.bad += 1
                _check_bad(config, table, row, image.reason, tally.bad > allowed)
        else:
            tally.reencoded[image.reason] += 1
            tally.notes.update(image.notes)
            tally.grades[grade] += 1
            tally.packed.append(number)
            tally.bits.append(len(image.payload) << 32 | image.crc)
            writer.add(image.payload, image.crc, name=name, label=grade, id=number, width=size, height=size, text=text)
        bar.update()
    tally.passed = tally.reencoded.pop("", 0)
    provenance = _provenance(config, file, tally)
    if tally.skipped:  # on the disk before the .beton appears, under its name only after that: a full disk leaves neither
        listed = AtomicFile(skipped_path(file.path), ConvertError)
        stack.callback(listed.discard)
        lines = map(csv_line, [("row", "name", "reason"), *tally.skipped])
        listed.write("".join(lines).encode("utf-8", "replace"), 0)
    tally.bytes = writer.finish(provenance, publish=False)

    def publish() -> None:
        writer.publish()
        if tally.skipped:
            listed.publish()
        else:
            skipped_path(file.path).unlink(missing_ok=True)  # of an earlier run: it would lie about this file

    return tally, writer, publish


def _check_bad(config: PackConfig, table: LabelTable, row: int, reason: str, too_many: bool) -> None:
    where = f"{table.where(row)}: {table.paths[row] or table.names[row]}: {reason}"
    if config.on_bad == "error":
        raise ConvertError(f"{where}. Mend or remove it, or leave such images out with --on-bad skip")
    if too_many:
        raise ConvertError(f"more than --max-bad {config.max_bad} of {len(table)} images are bad; the last one: {where}")


def _patients(config: PackConfig, layout: Layout, table: LabelTable) -> tuple[int | None, int | None, list[str]]:
    """How many patients there are, and how many of them are in the other split too; None where unknown. And lines that say so."""
    patients = table.packed_patients
    known = all_known(patients)
    if known is None:
        names = [name for row, name in enumerate(table.names) if row not in table.left_out]
        notes = [
            f"patients: unknown for {patients.count(None):,} of {len(patients):,} images, like {names[patients.index(None)]!r}; "
            "--patient-column or --patient-pattern tells them"
        ]
    else:
        notes = [f"patients: {len(set(known)):,}"]
    both, reason = None, ""
    try:
        other = layout.other_patients(config)
    except LabelError as error:
        other, reason = (), f" ({error})"
    if other is not None:
        theirs = None if reason else all_known(other)
        both = patients_in_both(known, theirs)
        notes.append(f"patients in both train and test: {'unknown' if both is None else f'{both:,}'}{reason}")
    return None if known is None else len(set(known)), both, notes


def _provenance(config: PackConfig, file: _File, tally: Tally) -> dict[str, object]:
    """What the file says about its making. The same for the same input: no times, no paths."""
    table = file.table
    made: dict[str, object] = {
        "fastretina": __version__,
        "layout": table.layout,
        "split": file.split,
        "labels": dict(table.digests),
        "size": config.size,
        "passed_through": tally.passed,
        "reencoded": dict(sorted(tally.reencoded.items())),
        "skipped": len(tally.skipped),
        "rows": len(file.rows),
        "left_out": dict(sorted(tally.left_out.items())),
        "classes": table.classes.as_dict(),
        "grades": tally.counts(table.classes),
    }
    if config.splits is not None:
        made["division"] = {"shares": config.splits, "seed": config.split_seed, "by": divided_by(table)}
    if file.shard is not None:
        made["shard"] = {"number": file.shard[0], "of": file.shard[1]}
    if config.preparation:
        made["preparation"] = asdict(config.preparation)
    if tally.reencoded:
        encoder = f"Pillow {PIL.__version__}, libjpeg-turbo {features.version_feature('libjpeg_turbo')}"
        made["encoder"] = {"quality": QUALITY, "subsampling": SUBSAMPLING, "library": encoder}
    return made
