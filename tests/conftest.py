"""Fixtures that several test files use."""

from __future__ import annotations

import io
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from fastretina import write_beton

# A colour for each grade, so that a network can learn them from a few images.
GRADE_COLOURS = np.array([[200, 60, 40], [60, 200, 40], [40, 60, 200], [200, 200, 40], [40, 200, 200]])

# A minute or most of one each: begun last, one would leave the other processes without work.
LONGEST = frozenset(
    {"test_benchmarks.py", "test_readme.py", "test_kernel_code.py", "test_train.py", "test_distributed.py", "test_wheel.py"}
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)


class TinyBetons(NamedTuple):
    """Two small .beton files, 40 and 20 images of 64 × 64 px, and the folders of JPEGs that they were packed from."""

    train: Path
    test: Path
    train_images: Path
    test_images: Path


def write_tiny_folder(folder: Path, count: int, first_patient: int, seed: int) -> Path:
    """`count` JPEGs of coloured noise named `<patient>_<left|right>`, grade n % 5, and labels.csv in Kaggle's layout."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    rows = ["image,level"]
    for n in range(count):
        name, grade = f"{first_patient + n // 2}_{'left' if n % 2 == 0 else 'right'}", n % 5
        noise = rng.normal(0, 25, (64, 64, 3))
        pixels = np.clip(GRADE_COLOURS[grade] + noise, 0, 255).astype(np.uint8)
        (folder / f"{name}.jpeg").write_bytes(simplejpeg.encode_jpeg(pixels, quality=90))
        rows.append(f"{name},{grade}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="session")
def tiny_betons(tmp_path_factory: pytest.TempPathFactory) -> TinyBetons:
    """Train (patients 0-19) and test (patients 15-24): 5 patients stand in both."""
    root = tmp_path_factory.mktemp("tiny")
    folders = [write_tiny_folder(root / "train", 40, 0, seed=1), write_tiny_folder(root / "test", 20, 15, seed=2)]
    for folder in folders:
        write_beton(folder.with_suffix(".beton"), images=folder, labels=folder / "labels.csv", size=64, workers=1)
    return TinyBetons(*(folder.with_suffix(".beton") for folder in folders), *folders)


@pytest.fixture
def one_thread():
    """Networks this small are no faster on more threads, and much slower where other processes want the cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextmanager
def signals_kept() -> Iterator[None]:
    """A command sets handlers for the life of its process."""
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU)
    before = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def one_pixel_pictures() -> Iterator[None]:
    """What matplotlib draws is one pixel: nine of a run of three epochs take 2.2 of its 5.7 s."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    def draw(canvas: FigureCanvasAgg, file: io.BytesIO, **_: object) -> None:
        Image.new("RGB", (1, 1)).save(file, "PNG")

    with patch.object(FigureCanvasAgg, "print_figure", draw):
        yield


@pytest.fixture(scope="module")
def undrawn():
    """For modules whose runs nobody looks at; those of tests/report, and the README's, are drawn."""
    with one_pixel_pictures():
        yield
