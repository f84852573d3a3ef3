"""A folder of images and a table of grades into a .beton: JPEGs of the right size byte for byte, the rest re-encoded.

Threads read the files and walk their headers, processes re-encode what cannot pass through, and one thread writes the
results in the order of the table, so that the output's bytes do not depend on how many of either there are.
"""

from __future__ import annotations

import os
import time
import zlib
from collections import Counter, deque
from collections.abc import Generator, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import PIL
from PIL import features

from fastretina import __version__
from fastretina.beton.jpeg import MAX_SIDE
from fastretina.beton.paths import MAX_SHARDS, parse_shard, shard_path, shard_rows
from fastretina.beton.writer import BetonWriter
from fastretina.errors import ConvertError, LabelError, UsageError
from fastretina.grading import patients_in_both
from fastretina.packing.inspect import Source, inspect
from fastretina.packing.labels import LabelTable, read_kaggle, read_lab, read_lab_names
from fastretina.packing.preprocessing import Contrast, Crop, Preparation
from fastretina.packing.reencode import QUALITY, SUBSAMPLING, ReencodePool, WorkerDied
from fastretina.system.files import AtomicFile, csv_line
from fastretina.system.progress import progress_bar

_CHUNK = 32  # images a thread reads at a time
_AHEAD = 4  # chunks in flight for each worker
WHOLE_FRAME = ", whole frame"  # the end of a reason for re-encoding: the disc's rim is out of sight, there was nothing to crop to
_OTHER_SPLIT = {"train": "test", "test": "train"}


@dataclass(frozen=True)
class PackConfig:
    """Pack a folder of fundus photographs and their grades into one .beton file.

    Give either --root and --split (the lab layout: SPLIT_img.csv and SPLIT_label.csv in ROOT) or --images and --labels
    (Kaggle's layout: one CSV of image,level).
    """

    out: Path
    """The .beton to write. It appears only when complete, and replaces an older one only then."""
    root: Path | None = None
    """Lab layout: the folder with the CSV files; images in it, in its data folder or in another folder below."""
    split: str | None = None
    """Lab layout: train or test."""
    images: Path | None = None
    """The folder with the images, if it is not ROOT."""
    labels: Path | None = None
    """Kaggle's layout: the CSV file."""
    size: int = 512
    """Pixels a side of the square images in the .beton."""
    workers: int | None = None
    """Threads that read and processes that re-encode; default: the usable CPU cores. The output does not depend on it."""
    on_bad: Literal["error", "skip"] = "error"
    """What an unusable image does: stop, or be left out and listed in OUT.skipped.csv."""
    max_bad: str = "0.5%"
    """With --on-bad skip: stop after all if more images than this are bad (a percentage of the rows, or a count)."""
    verify: bool = False
    """Also decode every JPEG that passes through. Off by default: packing takes several times as long, and few damages are found,
    because most flipped bits decode without complaint; the checksums that the .beton carries find all later ones."""
    crop: Crop = "none"
    """fundus: find the retina's disc and crop to its square, so that it fills every image whatever the camera. Re-encodes all."""
    contrast: Contrast = "none"
    """local: subtract the local average colour, so that no light or pigment but the detail is left. Re-encodes all."""
    shards: int | None = None
    """Pack into N files instead of one, named like train-00000-of-00064.beton for --out train.beton; each appears when complete."""
    shard: str | None = None
    """K/N: pack only shard K (0 to N - 1) of N, the same bytes as --shards N gives, so that many machines can share the work."""

    @property
    def preparation(self) -> Preparation:
        """What --crop and --contrast ask for."""
        return Preparation(self.crop, self.contrast)


@dataclass(frozen=True)
class PackSummary:
    """What was packed. Sizes in bytes; `reencoded` counts by reason; `grades` are the counts of grade 0 to 4."""

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


def skipped_path(out: Path) -> Path:
    """Where the rows that were left out of `out` are listed: row (1-based line of the label file), name, reason."""
    return out.with_name(out.name + ".skipped.csv")


def write_beton(
    out: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    split: str | None = None,
    images: str | os.PathLike[str] | None = None,
    labels: str | os.PathLike[str] | None = None,
    size: int = 512,
    workers: int | None = None,
    on_bad: Literal["error", "skip"] = "error",
    max_bad: str = "0.5%",
    verify: bool = False,
    crop: Crop = "none",
    contrast: Contrast = "none",
    shards: int | None = None,
    shard: str | None = None,
    progress: bool = False,
) -> PackSummary:
    """Pack images and grades into `out`; the arguments are the fields of `PackConfig`. `progress` reports on stderr.

    Raises:
        UsageError: arguments that do not go together. LabelError: the label files, by file and line.
        ConvertError: a bad image (by label file, line and path), too many of them, a killed worker, a full disk.
    """
    paths = (None if path is None else Path(path) for path in (root, images, labels))
    top, folder, table = paths
    config = PackConfig(Path(out), top, split, folder, table, size, workers, on_bad, max_bad, verify, crop, contrast, shards, shard)
    return pack(config, progress=progress)


def pack(config: PackConfig, *, progress: bool = False) -> PackSummary:
    """`write_beton` for a configuration that is already there. Raises the same."""
    started = time.perf_counter()
    _check(config)
    table = _labels(config)
    allowed = _allowed_bad(config.max_bad, len(table))
    shared, notes = _overlap(config, table)
    files = _files(config, len(table))
    rows = range(files[0].rows.start, files[-1].rows.stop)
    total, size = _Tally(), 0
    # closing: an error here must end the worker processes now, not when its traceback is forgotten.
    bar = progress_bar("packing", len(rows), unit="image", shown=progress, lines=True)
    with bar, closing(_images(config, table, rows)) as images:
        for file in files:
            tally, written = _write(config, table, file, islice(images, len(file.rows)), allowed - len(total.skipped), bar)
            total.add(tally)
            size += written
    return PackSummary(
        out=files[0].path if len(files) == 1 else shard_path(config.out, "*", len(files)),
        rows=len(rows),
        passed=total.passed,
        reencoded=dict(sorted(total.reencoded.items())),
        skipped=len(total.skipped),
        grades=tuple(total.grades),
        shared_patients=shared,
        bytes=size,
        seconds=time.perf_counter() - started,
        notes=notes,
    )


@dataclass(frozen=True)
class _File:
    """One file to write: some rows of the label table. place: its number among how many shards; None for a whole."""

    path: Path
    rows: range
    place: tuple[int, int] | None = None


@dataclass
class _Tally:
    """What became of some rows; skipped: (line of the label file, name, reason)."""

    passed: int = 0
    reencoded: Counter[str] = field(default_factory=Counter)
    grades: list[int] = field(default_factory=lambda: [0] * 5)
    skipped: list[tuple[int, str, str]] = field(default_factory=list)

    def add(self, other: _Tally) -> None:
        self.passed += other.passed
        self.reencoded += other.reencoded
        self.grades = [a + b for a, b in zip(self.grades, other.grades, strict=True)]
        self.skipped += other.skipped


def _files(config: PackConfig, rows: int) -> list[_File]:
    if config.shard is not None:
        places = [parse_shard(config.shard)]
    elif config.shards is not None:
        places = [(number, config.shards) for number in range(config.shards)]
    else:
        return [_File(config.out, range(rows))]
    if places[0][1] > rows:
        raise UsageError(f"{places[0][1]} shards of {rows} images: some would be empty; ask for fewer")
    return [_File(shard_path(config.out, *place), shard_rows(rows, *place), place) for place in places]


def _write(
    config: PackConfig,
    table: LabelTable,
    file: _File,
    images: Iterable[tuple[bytes | None, int, str]],
    allowed: int,
    bar: Any,
) -> tuple[_Tally, int]:
    """Write one file from the images of its rows; what became of them, and its size in bytes."""
    tally = _Tally()
    with BetonWriter(file.path, len(file.rows)) as writer:
        for row, (payload, crc, reason) in zip(file.rows, images, strict=True):
            if payload is None:
                _bad(config, table, row, reason, tally.skipped, allowed)
            else:
                tally.reencoded[reason] += 1
                grade = int(table.grades[row])
                tally.grades[grade] += 1
                writer.add(payload, crc, name=table.names[row], label=grade, id=row, width=config.size, height=config.size)
            bar.update()
        tally.passed = tally.reencoded.pop("", 0)
        provenance = _provenance(config, table, tally)
        if file.place is not None:
            provenance["shard"] = {"number": file.place[0], "of": file.place[1]}
        with ExitStack() as stack:
            if tally.skipped:  # on the disk before the .beton appears, under its name only after that: a full disk leaves neither
                listed = stack.enter_context(AtomicFile(skipped_path(file.path), ConvertError))
                lines = map(csv_line, [("row", "name", "reason"), *tally.skipped])
                listed.write("".join(lines).encode("utf-8", "replace"), 0)
            size = writer.finish(provenance)
            if tally.skipped:
                listed.publish()
    if not tally.skipped:
        skipped_path(file.path).unlink(missing_ok=True)  # of an earlier run: it would lie about this file
    return tally, size


def _check(config: PackConfig) -> None:
    lab, kaggle = config.root is not None, config.labels is not None
    if lab == kaggle:
        raise UsageError("give either --root DIR --split train, or --images DIR --labels CSV")
    if lab and config.split is None:
        raise UsageError("--root needs --split: train, test, or whatever stands before _img.csv")
    if kaggle and (config.images is None or config.split is not None):
        raise UsageError("--labels needs --images DIR, and takes no --split")
    if config.split is not None and (not config.split or os.sep in config.split or "\0" in config.split):
        raise UsageError(f"--split {config.split!r}: give what stands before _img.csv, like train")
    if not 16 <= config.size <= MAX_SIDE:
        raise UsageError(f"--size {config.size}: from 16 to {MAX_SIDE} pixels")
    if config.workers is not None and not 1 <= config.workers <= 1024:
        raise UsageError(f"--workers {config.workers}: from 1 to 1024")
    if config.on_bad not in ("error", "skip"):
        raise UsageError(f"--on-bad {config.on_bad}: error or skip")
    if config.shards is not None and (config.shard is not None or not 1 <= config.shards <= MAX_SHARDS):
        raise UsageError(f"--shards {config.shards}: from 1 to {MAX_SHARDS}, and not together with --shard")
    if config.shard is not None:
        parse_shard(config.shard)
    _allowed_bad(config.max_bad, 1)
    try:
        _ = config.preparation
    except ValueError as error:
        raise UsageError(f"--{error}") from None


def _allowed_bad(text: str, rows: int) -> int:
    """How many of `rows` may be bad: "12" or "0.5%"."""
    try:
        limit = float(text.removesuffix("%")) / 100 * rows if text.endswith("%") else int(text)
    except ValueError:
        limit = -1
    if not 0 <= limit < float("inf"):
        raise UsageError(f"--max-bad {text}: a percentage like 0.5% or a count like 12")
    return int(limit)


def _labels(config: PackConfig) -> LabelTable:
    # A machine that packs one shard needs only the images of that one; those missing from its own rows stop it later.
    missing_ok = config.on_bad == "skip" or config.shard is not None
    if config.root is not None and config.split is not None:
        return read_lab(config.root, config.split, config.images, missing_ok=missing_ok)
    if config.labels is not None and config.images is not None:
        return read_kaggle(config.labels, config.images, missing_ok=missing_ok)
    raise UsageError("give either --root DIR --split train, or --images DIR --labels CSV")


def _overlap(config: PackConfig, table: LabelTable) -> tuple[int | None, tuple[str, ...]]:
    other = _OTHER_SPLIT.get(config.split or "")
    if config.root is None or other is None or not (config.root / f"{other}_img.csv").exists():
        return None, ()
    try:
        return len(patients_in_both(table.names, read_lab_names(config.root, other))), ()
    except LabelError as error:
        return None, (f"patients in both train and test: unknown ({error})",)


def _images(config: PackConfig, table: LabelTable, rows: range) -> Generator[tuple[bytes | None, int, str]]:
    """For each of these rows in order: payload, its CRC-32, and "" or why it was re-encoded; or None, 0 and what is wrong."""
    workers = config.workers or len(os.sched_getaffinity(0))

    def read(start: int) -> list[Source]:
        return [
            Source(None, 0, table.problems[row], bad=True)
            if row in table.problems
            else inspect(table.paths[row], config.size, config.verify, config.preparation)
            for row in rows[start - rows.start :][:_CHUNK]
        ]

    starts = iter(rows[::_CHUNK])
    pending: deque[tuple[int, Future[list[Source]]]] = deque()
    submitted = 0  # rows whose re-encoding, if needed, has been asked for
    threads = ThreadPoolExecutor(workers, thread_name_prefix="fastretina-pack")
    try:
        with ReencodePool(workers, config.size, config.preparation) as pool:
            while True:
                while len(pending) < _AHEAD * workers and (start := next(starts, None)) is not None:
                    pending.append((start, threads.submit(read, start)))
                if not pending:
                    return
                pending[0][1].result()
                for start, future in pending:
                    if not future.done():
                        break
                    if start >= submitted:
                        for row, source in enumerate(future.result(), start):
                            if source.payload is None and not source.bad:
                                pool.submit(row, table.paths[row])
                        submitted = start + _CHUNK
                start, future = pending.popleft()
                for row, source in enumerate(future.result(), start):
                    yield _finished(row, source, pool, table)
                pool.poll()
    finally:
        threads.shutdown(wait=True, cancel_futures=True)


def _finished(row: int, source: Source, pool: ReencodePool, table: LabelTable) -> tuple[bytes | None, int, str]:
    if source.payload is not None or source.bad:
        return source.payload, source.crc, source.reason
    try:
        answer = pool.result(row)
    except WorkerDied as error:
        at = error.key if isinstance(error.key, int) else row
        raise ConvertError(f"{table.where(at)}: {table.paths[at]}: {error}") from None
    if isinstance(answer, str):
        return None, 0, answer
    return answer.jpeg, zlib.crc32(answer.jpeg), source.reason + (WHOLE_FRAME if answer.whole_frame else "")


def _bad(config: PackConfig, table: LabelTable, row: int, reason: str, skipped: list[tuple[int, str, str]], allowed: int) -> None:
    where = f"{table.where(row)}: {table.paths[row] or table.names[row]}: {reason}"
    if config.on_bad == "error":
        raise ConvertError(f"{where}. Mend or remove it, or leave such images out with --on-bad skip")
    skipped.append((int(table.lines[row]), table.names[row], reason))
    if len(skipped) > allowed:
        raise ConvertError(f"more than --max-bad {config.max_bad} of {len(table)} images are bad; the last one: {where}")


def _provenance(config: PackConfig, table: LabelTable, tally: _Tally) -> dict[str, object]:
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
        "grades": tally.grades,
    }
    if config.preparation:
        made["preparation"] = asdict(config.preparation)
    if tally.reencoded:
        encoder = f"Pillow {PIL.__version__}, libjpeg-turbo {features.version_feature('libjpeg_turbo')}"
        made["encoder"] = {"quality": QUALITY, "subsampling": SUBSAMPLING, "library": encoder}
    return made
