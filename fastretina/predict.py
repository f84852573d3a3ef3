"""Grade photographs of any size with a trained model.

    fastretina predict --checkpoint runs/x/best.safetensors photos/ more/10_left.jpeg --csv grades.csv --explain overlays

Each is prepared as the packer prepared the training images: upright, RGB, letterboxed to a square or cropped to the retina's
disc, scaled with Lanczos; with local contrast if they had it. The table has a row for every photograph: grade and probabilities,
and in `done` what was done to it; or in `error` why it could not be graded.
"""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

import tyro

from fastretina import cli
from fastretina.errors import RunError, UsageError, printable
from fastretina.models.options import AmpChoice

if TYPE_CHECKING:
    from fastretina.models.photographs import Photograph


@dataclass(frozen=True)
class PredictConfig:
    """Grade photographs of any size with a trained model; a CSV of grades and probabilities to --csv or standard output."""

    checkpoint: Path  # a run's best.safetensors
    images: tyro.conf.Positional[tuple[Path, ...]] = ()  # image files, and folders that are searched with all below them
    follow_links: bool = False  # search folders that links in these folders lead to as well
    csv: Path | None = None  # where to write; none: standard output
    tta: int = 1  # average over so many of the square's 8 symmetries (test-time augmentation)
    batch_size: int = 32  # images
    device: Literal["auto", "cpu", "cuda"] = "auto"
    amp: AmpChoice = "auto"  # auto: the number format of the training, where this device has it
    workers: int | None = None  # decoding threads; none: one for each core
    explain: Path | None = None  # a new folder for Grad-CAM overlays: where the model looked, a JPEG for each graded image


def main(config: PredictConfig) -> int:
    # What imports torch, OpenCV and matplotlib comes now: --help is there before them.
    import torch
    from PIL import Image

    from fastretina.models.checkpoint import open_checkpoint
    from fastretina.models.gradcam import gradcam_layer
    from fastretina.models.inference import check_views, view_outputs
    from fastretina.models.photographs import Tally, normalised, photographs, prepared
    from fastretina.packing.folder import in_words
    from fastretina.report.overlays import Explainer, OverlayFolder
    from fastretina.report.page import percent
    from fastretina.system.csv_text import csv_line
    from fastretina.system.files import write_atomically
    from fastretina.system.progress import progress_bar

    check_views(config.tta)
    if not config.images:
        raise UsageError("give at least one image or folder")
    if config.batch_size < 1 or (config.workers is not None and config.workers < 1):
        raise UsageError("--batch-size and --workers must be at least 1")
    model, info, device, precision = open_checkpoint(config.checkpoint, config.device, config.amp)
    Image.MAX_IMAGE_PIXELS = None  # reencode.square has its own limit, which is an error rather than a warning
    workers = config.workers or len(os.sched_getaffinity(0))
    explainer = None
    if config.explain is not None:
        layer = gradcam_layer(info.arch, info.resolution)
        explainer = Explainer(model, layer, OverlayFolder(config.explain, config.images), workers)
        model = explainer.model
    shown = config.csv is None and sys.stdout.isatty()
    tally = Tally()
    given = photographs(config.images, tally, config.follow_links)
    columns = [f"p{number}" for number in range(info.num_classes)]

    def referable(grade: int) -> str:
        """Empty where no class is."""
        return "" if not info.classes.referable else "yes" if grade in info.classes.referable else "no"

    def write(file: BinaryIO) -> None:
        def row(cells: Iterable[object]) -> None:
            line = csv_line(cells)
            if shown:  # to people; whoever reads a pipe reads data
                line = printable(line, keep="\n")
            file.write(line.encode(errors="backslashreplace"))  # a file's name may hold bytes that are no text

        if config.csv is not None and not all(str(one.path).isascii() for one in given):
            file.write(codecs.BOM_UTF8)  # without it Excel shows other letters; but on standard output nobody expects it
        row(["path", "grade", "referable", *columns, "done", "error"])
        ahead = config.batch_size + 2 * workers
        ready = prepared(given, info.resolution, workers, ahead, tally, info.preparation)
        with torch.no_grad(), closing(ready), progress_bar("grading", len(given), 0, "image") as bar:
            while batch := list(islice(ready, config.batch_size)):
                good = [one for one in batch if one.pixels is not None]
                answers = iter(answered(good) if good else ())
                for one in batch:
                    if one.pixels is None:
                        row([str(one.path), None, None, *[None] * len(columns), None, one.error])
                    else:
                        best, probabilities = next(answers)
                        row([str(one.path), best, referable(best), *probabilities, "; ".join(one.done), None])
                file.flush()
                tally.graded += len(good)
                bar.update(len(batch))

    def answered(batch: Sequence[Photograph]) -> list[tuple[int, list[float]]]:
        """Grade and probabilities of each photograph, which has pixels."""
        images = normalised([one.pixels for one in batch if one.pixels is not None], info)
        outputs = view_outputs(model, images.to(device), precision, config.tta)
        if not bool(torch.isfinite(outputs).all()):
            raise RunError(f"{config.checkpoint}: the model's answer is not finite: its weights contain NaN or Inf")
        probabilities = info.grading.answer(outputs, info.decision).exp().cpu()
        grades = probabilities.argmax(dim=1)
        if explainer is not None:
            found = zip(grades.tolist(), probabilities.amax(dim=1).tolist(), strict=True)
            titles = [f"{info.classes.title(best)}, {percent(probability)}" for best, probability in found]
            paths = [one.path for one in batch]
            explainer.write(paths, images, titles, partial(info.grading.target, grades=grades.to(device)))
        return list(zip(grades.tolist(), probabilities.tolist(), strict=True))

    if config.csv is not None:
        write_atomically(config.csv, write)
    else:
        try:
            write(sys.stdout.buffer)
        except OSError as error:
            raise OSError(error.errno, error.strerror, "standard output") from error
    if tally.left_out:
        print(f"left out: {printable(in_words(tally.left_out))}", file=sys.stderr)
    print(f"{tally.graded:,} images graded, {tally.bad:,} could not be, {tally.throughput:,.0f} img/s", file=sys.stderr)
    return 1 if tally.bad else 0


run_command = partial(cli.run, PredictConfig, main)

if __name__ == "__main__":
    run_command()
