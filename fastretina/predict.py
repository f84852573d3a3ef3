"""Grade photographs of any size with a trained model.

    python -m fastretina.predict --checkpoint runs/x/best.safetensors photos/ more/10_left.jpeg --csv grades.csv --explain overlays

Each is prepared as the packer prepared the training images: upright, RGB, letterboxed to a square or cropped to the retina's
disc, scaled with Lanczos; with local contrast if they had it.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import numpy.typing as npt
import torch
import tyro
from PIL import Image
from torch import Tensor

from fastretina import cli
from fastretina.beton.jpeg import read_header, verdict
from fastretina.errors import JpegError, RunError, UsageError
from fastretina.grading import REFERABLE_FROM, grade_title
from fastretina.models.checkpoint import Grader, open_grader
from fastretina.models.inference import check_views, view_outputs
from fastretina.models.precision import AmpChoice
from fastretina.packing.inspect import read_file
from fastretina.packing.labels.images import EXTENSIONS
from fastretina.packing.preprocessing import UNPREPARED, Preparation
from fastretina.packing.reencode import square
from fastretina.report.overlays import Explainer, OverlayFolder
from fastretina.report.page import percent
from fastretina.system.files import csv_line, write_atomically
from fastretina.system.progress import progress_bar

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class PredictConfig:
    """Grade photographs of any size with a trained model; a CSV of grades and probabilities to --csv or standard output."""

    checkpoint: Path  # a run's best.safetensors
    images: tyro.conf.Positional[tuple[Path, ...]] = ()  # image files, and folders that are searched with all below them
    csv: Path | None = None  # where to write; none: standard output
    tta: int = 1  # average over so many of the square's 8 symmetries (test-time augmentation)
    batch_size: int = 32  # images
    device: Literal["auto", "cpu", "cuda"] = "auto"
    amp: AmpChoice = "auto"  # auto: the number format of the training, where this device has it
    workers: int | None = None  # decoding threads; none: one for each core
    explain: Path | None = None  # a new folder for Grad-CAM overlays: where the model looked, a JPEG for each graded image


@dataclass
class Tally:
    """How many images were graded, and how many could not be."""

    graded: int = 0
    bad: int = 0
    started: float = field(default_factory=time.perf_counter)

    def reject(self, path: Path, reason: str) -> None:
        """Count and report a bad image."""
        self.bad += 1
        print(f"error: {path}: {reason}", file=sys.stderr, flush=True)


def main(config: PredictConfig) -> int:
    """Grade photographs of any size with a trained model; a CSV of grades and probabilities to --csv or standard output."""
    check_views(config.tta)
    if not config.images:
        raise UsageError("give at least one image or folder")
    if config.batch_size < 1 or (config.workers is not None and config.workers < 1):
        raise UsageError("--batch-size and --workers must be at least 1")
    model, grader, device, precision = open_grader(config.checkpoint, config.device, config.amp)
    Image.MAX_IMAGE_PIXELS = None  # reencode.square has its own limit, which is an error rather than a warning
    workers = config.workers or len(os.sched_getaffinity(0))
    explainer = None
    if config.explain is not None:
        explainer = Explainer(model, OverlayFolder(config.explain, config.images), workers)
        model = explainer.model
    tally = Tally()

    def grade(images: Tensor) -> Tensor:
        outputs = view_outputs(model, images.to(device), precision, config.tta)
        if not bool(torch.isfinite(outputs).all()):
            raise RunError(f"{config.checkpoint}: the model's answer is not finite: its weights are spoilt")
        return grader.grading.answer(outputs, grader.decision).exp().cpu()

    def write(file: BinaryIO) -> None:
        header = ["path", "grade", "referable", *(f"p{number}" for number in range(grader.num_classes))]
        file.write(csv_line(header).encode())
        ahead = config.batch_size + 2 * workers
        prepared = _prepared(_files(config.images, tally), grader.resolution, workers, ahead, tally, grader.preparation)
        with torch.no_grad(), progress_bar("grading", None, 0, "image") as bar:
            for paths, images, probabilities in _graded(prepared, grader, config.batch_size, grade):
                grades = probabilities.argmax(dim=1)
                for path, best, row in zip(paths, grades.tolist(), probabilities.tolist(), strict=True):
                    line = csv_line([str(path), best, "yes" if best >= REFERABLE_FROM else "no", *row])
                    file.write(line.encode(errors="backslashreplace"))  # a file's name may hold bytes that are no text
                file.flush()
                if explainer is not None:
                    found = zip(grades.tolist(), probabilities.amax(dim=1).tolist(), strict=True)
                    answers = [f"{grade_title(best)}, {percent(probability)}" for best, probability in found]
                    explainer.write(paths, images, answers, partial(grader.grading.target, grades=grades.to(device)))
                tally.graded += len(paths)
                bar.update(len(paths))

    if config.csv is not None:
        write_atomically(config.csv, write)
    else:
        try:
            write(sys.stdout.buffer)
        except BrokenPipeError:
            # Whoever read has seen enough (`| head`); without this Python complains once more as it exits.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
    rate = tally.graded / max(1e-9, time.perf_counter() - tally.started)
    print(f"{tally.graded:,} images graded, {tally.bad:,} could not be, {rate:,.0f} img/s", file=sys.stderr)
    return 1 if tally.bad else 0


def _files(given: Iterable[Path], tally: Tally) -> Iterator[Path]:
    """The images to grade, folder by folder in the order of names; hidden files and folders are left out."""
    for path in given:
        if not path.is_dir():
            yield path  # whatever it is called; reading it will tell
            continue
        found = False
        walk = os.walk(path, onerror=lambda error: tally.reject(Path(error.filename), error.strerror or "cannot be listed"))
        for folder, folders, names in walk:
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                    found = True
                    yield Path(folder, name)
        if not found:
            tally.reject(path, f"no image in this folder (looked for {', '.join(EXTENSIONS)})")


def _prepared(
    files: Iterable[Path], size: int, workers: int, ahead: int, tally: Tally, preparation: Preparation = UNPREPARED
) -> Iterator[tuple[Path, Pixels]]:
    """(size, size, 3) pixels of each good image, in order, at most `ahead` in memory. Bad ones are reported and left out."""
    waiting: deque[tuple[Path, Future[Pixels]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for path in files:
                waiting.append((path, pool.submit(prepare, path, size, preparation)))
                if len(waiting) >= ahead:
                    yield from _first(waiting, tally)
            while waiting:
                yield from _first(waiting, tally)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _first(waiting: deque[tuple[Path, Future[Pixels]]], tally: Tally) -> Iterator[tuple[Path, Pixels]]:
    path, future = waiting.popleft()
    try:
        yield path, future.result()
    except (JpegError, OSError, MemoryError) as error:
        tally.reject(path, str(error) or "not enough memory to decode it")


def prepare(path: Path, size: int, preparation: Preparation = UNPREPARED) -> Pixels:
    """(size, size, 3) RGB pixels of an image file, as the packer would make them. JpegError for undecodable and hostile ones."""
    data = read_file(str(path))
    if data[:2] == b"\xff\xd8":
        found = verdict(read_header(data), size)
        if found.action == "reject":
            raise JpegError(found.reason)
    return np.asarray(square(data, size, preparation))


def _graded(
    prepared: Iterable[tuple[Path, Pixels]], grader: Grader, batch_size: int, grade: Callable[[Tensor], Tensor]
) -> Iterator[tuple[list[Path], Tensor, Tensor]]:
    """Paths, (B, 3, R, R) normalised images and (B, C) probabilities, batch by batch."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (grader.mean, grader.std))
    paths: list[Path] = []
    pixels: list[Pixels] = []

    def batch() -> tuple[list[Path], Tensor, Tensor]:
        images = (torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255.0 - mean) / std
        answer = paths.copy(), images, grade(images)
        paths.clear()
        pixels.clear()
        return answer

    for path, image in prepared:
        paths.append(path)
        pixels.append(image)
        if len(paths) == batch_size:
            yield batch()
    if paths:
        yield batch()


def run_command(argv: Sequence[str] | None = None) -> None:
    """The command line of this module; exits."""
    cli.run(PredictConfig, main, argv)


if __name__ == "__main__":
    run_command()
