"""Grade photographs of any size with a trained model.

    fastretina predict --checkpoint runs/x/best.safetensors photos/ more/10_left.jpeg --csv grades.csv --explain overlays

Each is prepared as the packer prepared the training images: upright, RGB, letterboxed to a square or cropped to the retina's
disc, scaled with Lanczos; with local contrast if they had it. The table has a row for every photograph: grade and probabilities,
and in `done` what was done to it; or in `error` why it could not be graded.
"""

from __future__ import annotations

import codecs
import sys
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, Literal

import tyro

from fastretina import cli
from fastretina.beton.paths import parts_of
from fastretina.errors import UsageError, printable
from fastretina.models.options import AmpChoice


@dataclass(frozen=True)
class PredictConfig:
    """Grade photographs of any size with a trained model; a CSV of grades and probabilities to --csv or standard output."""

    checkpoint: Path  # a run's best.safetensors, or a folder with one; several with commas between: the mean of their probabilities
    images: tyro.conf.Positional[tuple[Path, ...]] = ()  # image files, and folders that are searched with all below them
    follow_links: bool = False  # search folders that links in these folders lead to as well
    csv: Path | None = None  # where to write; none: standard output
    # refer where the probability of referable disease reaches this: high-sensitivity, high-specificity or youden, as the training
    # froze them on its validation data, or a number; none: where the grade is a referable one
    threshold: str | None = None
    tta: int = 1  # average over so many of the square's 8 symmetries (test-time augmentation)
    batch_size: int = 32  # images
    device: Literal["auto", "cpu", "cuda"] = "auto"
    amp: AmpChoice = "auto"  # auto: the number format of the training, where this device has it
    workers: int | None = None  # decoding threads; none: one for each core
    explain: Path | None = None  # a new folder for Grad-CAM overlays: where the model looked, a JPEG for each graded image


def main(config: PredictConfig) -> int:
    # What imports torch, OpenCV and matplotlib comes now: --help is there before them.
    from PIL import Image

    from fastretina.models.grader import Grader
    from fastretina.models.photographs import Tally, photographs
    from fastretina.packing.folder import in_words
    from fastretina.report.overlays import explainer_of
    from fastretina.system.csv_text import csv_line
    from fastretina.system.files import write_atomically
    from fastretina.system.malloc import keep_freed_memory
    from fastretina.system.progress import progress_bar

    if not config.images:
        raise UsageError("give at least one image or folder")
    if config.batch_size < 1 or (config.workers is not None and config.workers < 1):
        raise UsageError("--batch-size and --workers must be at least 1")
    grader = Grader.load(parts_of(config.checkpoint), device=config.device, amp=config.amp, tta=config.tta)
    if grader.device.type == "cpu":
        keep_freed_memory()
    threshold = None if config.threshold is None else grader.threshold(config.threshold)
    Image.MAX_IMAGE_PIXELS = None  # reencode.square has its own limit, which is an error rather than a warning
    explain = None
    if config.explain is not None:
        grader, explain = explainer_of(grader, config.explain, config.images, config.workers)
    shown = config.csv is None and sys.stdout.isatty()
    tally = Tally()
    given = photographs(config.images, tally, config.follow_links)
    columns = [*(f"p{number}" for number in range(len(grader.classes))), *(["uncertainty"] if len(grader.members) > 1 else [])]

    def write(file: BinaryIO) -> None:
        def row(cells: Iterable[object]) -> None:
            line = csv_line(cells)
            if shown:  # to people; whoever reads a pipe reads data
                line = printable(line, keep="\n")
            file.write(line.encode(errors="backslashreplace"))  # a file's name may hold bytes that are no text

        if config.csv is not None and not all(one.name.isascii() for one in given):
            file.write(codecs.BOM_UTF8)  # without it Excel shows other letters; but on standard output nobody expects it
        row(["path", "grade", "referable", *columns, "done", "error"])
        batches = grader.graded(given, config.batch_size, config.workers)
        with closing(batches), progress_bar("grading", len(given), 0, "image") as bar:
            for batch in batches:
                if explain is not None:
                    explain(batch)
                answers = grader.of_batch(batch, threshold)
                for one in batch.photographs:
                    if one.error:
                        tally.bad += 1
                        print(printable(f"error: {one.name}: {one.error}"), file=sys.stderr, flush=True)
                        row([one.name, None, None, *[None] * len(columns), None, one.error])
                    else:
                        tally.graded += 1
                        best, refers, probabilities, uncertainty = next(answers)
                        yes_or_no = {None: "", True: "yes", False: "no"}[refers]
                        unsure = [] if uncertainty is None else [uncertainty]
                        row([one.name, best, yes_or_no, *probabilities, *unsure, "; ".join(one.done), None])
                file.flush()
                bar.update(len(batch.photographs))

    if config.csv is not None:
        write_atomically(config.csv, write)
    else:
        try:
            write(sys.stdout.buffer)
        except OSError as error:
            raise OSError(error.errno, error.strerror, "standard output") from error
    if tally.left_out:
        print(f"left out: {printable(in_words(tally.left_out))}", file=sys.stderr)
    if threshold is not None:
        print(f"referable: where {grader.classes.referable_score} ≥ {threshold:.4g} ({config.threshold})", file=sys.stderr)
    print(f"{tally.graded:,} images graded, {tally.bad:,} could not be, {tally.throughput:,.0f} img/s", file=sys.stderr)
    return 1 if tally.bad else 0


run_command = partial(cli.run, PredictConfig, main)

if __name__ == "__main__":
    run_command()
