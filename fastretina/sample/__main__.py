"""Make a sample data set in the lab layout out of one real photograph.

python -m fastretina.sample --out data/sample --train 1200 --test 300
python -m fastretina.sample --out data/hard --hard                       # 1,600 + 400 images, harder to grade
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fastretina import cli
from fastretina.sample.dataset import EASY, HARD, make_sample
from fastretina.system.progress import progress_bar


@dataclass(frozen=True)
class SampleConfig:
    """Make a sample data set in the lab layout: train_img.csv, train_label.csv, test_img.csv, test_label.csv, data/*.jpeg."""

    out: Path  # folder to make: four CSV files, and data/ with the images
    train: int | None = None  # images; none: 1200, with --hard 1600
    test: int | None = None  # images; none: 300, with --hard 400
    hard: bool = False  # fainter, blurred lesions, overlapping counts, and distractors in every grade
    seed: int = 0
    workers: int = os.cpu_count() or 1  # processes; the images do not depend on it


def main(config: SampleConfig) -> None:
    difficulty = HARD if config.hard else EASY
    train = difficulty.train if config.train is None else config.train
    test = difficulty.test if config.test is None else config.test
    if make_sample(config.out, train, test, config.seed, config.workers, show_progress, difficulty):
        print(f"{config.out}: {train} train and {test} test images")
    else:
        print(f"{config.out}: already there, complete and made with the same arguments; nothing to do")


def show_progress(sizes: Iterator[int], total: int) -> Iterator[int]:
    """A bar on a terminal, plain lines elsewhere, and a summary."""
    start, written = time.perf_counter(), 0
    with progress_bar("painting", total, unit="image", lines=True) as bar:
        for size in sizes:
            written += size
            bar.update()
            yield size
    seconds = time.perf_counter() - start
    print(f"{total} images, {written / 1e6:.1f} MB, mean {written / total / 1e3:.1f} KB, {total / seconds:.0f} img/s")


run_command = partial(cli.run, SampleConfig, main)

if __name__ == "__main__":
    run_command()
