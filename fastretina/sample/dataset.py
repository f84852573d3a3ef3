"""A sample data set in the lab layout, made of one real photograph, with the grades in the real proportions; easy or hard."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from fastretina.errors import FastretinaError, UsageError
from fastretina.sample.camera import CameraSettings, Eye, photograph
from fastretina.sample.distractors import NO_DISTRACTORS, DistractorSettings
from fastretina.sample.lesions import LesionSettings
from fastretina.system.files import write_bytes
from fastretina.system.interrupts import HeldSignals
from fastretina.system.json_text import read_json

STAMP = "sample.json"
# EyePACS' train labels of grade 0-4 in the copy that the lab uses.
REAL_COUNTS = (20_655, 1_954, 4_209, 698, 581)
# How alike the two eyes of a patient are: the standard deviation of an eye's severity about the patient's, whose own is 1.
_EYE_SPREAD = 0.5
_PATIENTS = 45_000  # to draw from
_CHUNK = 8  # images that a worker paints at a time
_MAX_IMAGES = 50_000  # EyePACS has 35,126; 50,000 files are 2 GB

# Wraps the sizes in bytes of the finished images, and how many there will be.
Progress = Callable[[Iterator[int], int], Iterable[int]]
Plan = dict[str, list[Eye]]  # the eyes of "train" and "test", in the order of the label files


@dataclass(frozen=True)
class Difficulty:
    """What is in the photographs of a sample, and how plain it is to see."""

    # Another one when the same arguments make other bytes: an older folder is then not taken for the same data set.
    recipe: int | str
    train: int  # images by default
    test: int
    first_patient: int  # no patient is in samples of both kinds: a model may be trained on one and tested on the other
    lesions: LesionSettings
    camera: CameraSettings
    distractors: DistractorSettings


EASY = Difficulty(1, 1200, 300, 10, LesionSettings(), CameraSettings(), NO_DISTRACTORS)
# Fainter, smaller, blurred lesions whose counts overlap between grades, and what is not to be graded in every eye.
HARD = Difficulty(
    "hard 1",
    1600,
    400,
    10 + _PATIENTS,
    LesionSettings(
        microaneurysms=((0, 0), (2, 8), (3, 14), (6, 22), (5, 20)),
        haemorrhages=((0, 0), (0, 0), (2, 9), (8, 26), (4, 20)),
        flames=((0, 0), (0, 0), (0, 3), (2, 9), (1, 7)),
        exudates=((0, 0), (0, 0), (0, 4), (0, 5), (0, 4)),
        cotton_wool=((0, 0), (0, 0), (0, 2), (1, 6), (0, 4)),
        tufts=((0, 0), (0, 0), (0, 0), (0, 0), (1, 5)),
        preretinal=((0, 0), (0, 0), (0, 0), (0, 0), (0, 1)),
        microaneurysm_radius=(2.0, 3.4),
        haemorrhage_radius=(3.5, 10.0),
        flame_length=(18.0, 42.0),
        exudate_flecks=(8.0, 24.0),
        exudate_radius=(1.2, 3.4),
        cotton_wool_radius=(8.0, 17.0),
        tuft_density=(0.3, 0.55),
        microaneurysm_density=(0.45, 0.8),
        preretinal_density=(0.5, 0.8),
        blood_density=(0.3, 0.65),
        exudate_alpha=(0.35, 0.7),
        cotton_wool_alpha=(0.25, 0.5),
        softness=1.9,
    ),
    CameraSettings(vignette=(0.15, 0.6), mottle=0.06, blur=(0.5, 2.0), noise=(2.0, 6.0)),
    DistractorSettings(drusen=(0, 40), pigment=(0, 8), naevi=(0, 1), dust=(0, 6), reflections=(0, 2)),
)


def apportion(total: int) -> list[int]:
    """Counts of grade 0-4 that add up to `total` and keep the real proportions, by largest remainder."""
    quotas = [total * count / sum(REAL_COUNTS) for count in REAL_COUNTS]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda grade: counts[grade] - quotas[grade])
    for grade in by_remainder[: total - sum(counts)]:
        counts[grade] += 1
    return counts


def plan_eyes(train: int, test: int, seed: int, first_patient: int = EASY.first_patient) -> Plan:
    """Whose eyes are in the data set: both of a patient, of like severity, split by eye and not by patient, as in EyePACS."""
    rng = np.random.default_rng((seed, train, test))
    patients = first_patient + rng.choice(_PATIENTS, size=(train + test + 1) // 2, replace=False)
    severity = (rng.normal(size=(len(patients), 1)) + rng.normal(0, _EYE_SPREAD, (len(patients), 2))).ravel()
    order = rng.permutation(2 * len(patients))
    plan: Plan = {}
    for split, eyes in (("train", order[:train]), ("test", order[train : train + test])):
        grades = np.empty(len(eyes), np.int64)
        # The healthiest eyes get grade 0, and so on: exact counts, and still the eyes of a patient agree.
        grades[np.argsort(severity[eyes])] = np.repeat(np.arange(len(REAL_COUNTS)), apportion(len(eyes)))
        plan[split] = [
            Eye(seed, int(patients[eye // 2]), ("left", "right")[eye % 2], int(grade))
            for eye, grade in zip(eyes, grades, strict=True)
        ]
    return plan


def make_sample(
    out: Path, train: int, test: int, seed: int, workers: int, progress: Progress, difficulty: Difficulty = EASY
) -> bool:
    """Make the data set in `out`, or find it there already, complete and made with the same arguments: then returns False.

    The bytes do not depend on `workers`. The CSV files appear last, so a folder with all four holds a complete data set.

    Raises:
        UsageError: an argument is out of range, or `out` holds something else.
        FastretinaError: a file could not be written, or a worker process died.
    """
    _check_arguments(train, test, seed, workers)
    arguments: dict[str, object] = {"train": train, "test": test, "seed": seed}
    stamp = {"made_by": "tools/make_sample.py", "recipe": difficulty.recipe} | arguments
    _check_folder(out, stamp)
    plan = plan_eyes(train, test, seed, difficulty.first_patient)
    tables = {
        f"{split}_{column}.csv": "".join(f"{row}\n" for row in rows)
        for split, eyes in plan.items()
        for column, rows in (("img", [eye.name for eye in eyes]), ("label", [str(eye.grade) for eye in eyes]))
    }
    eyes = [eye for split in plan.values() for eye in split]
    try:
        with HeldSignals() as signals:
            if _is_complete(out, tables, eyes):
                return False
            images = out / "data"
            images.mkdir(parents=True, exist_ok=True)
            # First of all, so that a call that was interrupted can be repeated in this folder.
            write_bytes(out / STAMP, (json.dumps(stamp, indent=1) + "\n").encode(), FastretinaError)
            for name in tables:
                (out / name).unlink(missing_ok=True)
            with closing(_write_images(images, eyes, workers, difficulty, signals)) as sizes:
                for _ in progress(sizes, len(eyes)):
                    pass
            for name, table in tables.items():
                write_bytes(out / name, table.encode(), FastretinaError)
    except OSError as error:
        raise FastretinaError(f"cannot write the sample data set to {out}: {error}") from error
    except BrokenProcessPool as error:
        raise FastretinaError(f"a worker process died while making {out}; call it again, with a smaller --workers") from error
    return True


def _check_arguments(train: int, test: int, seed: int, workers: int) -> None:
    if train < 1 or test < 1 or train + test > _MAX_IMAGES:
        raise UsageError(f"--train {train} --test {test}: each must be at least 1, both together at most {_MAX_IMAGES:,}")
    if seed < 0:
        raise UsageError(f"--seed {seed}: must be 0 or more")
    if workers < 1:
        raise UsageError(f"--workers {workers}: must be at least 1")


def _check_folder(out: Path, stamp: dict[str, object]) -> None:
    """Refuse a folder that was not made by a call like this one."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file; name a folder that does not exist yet")
    if not out.exists() or not any(out.iterdir()):
        return
    try:
        found = read_json(out / STAMP)
    except (OSError, ValueError):
        raise UsageError(
            f"--out {out} holds other files than a sample data set; name a folder that is empty or does not exist"
        ) from None
    if found != stamp:
        raise UsageError(f"--out {out} holds a sample made otherwise ({found}, wanted {stamp}); delete it or name another folder")


def _is_complete(out: Path, tables: dict[str, str], eyes: list[Eye]) -> bool:
    if any(not (out / name).is_file() or (out / name).read_text() != table for name, table in tables.items()):
        return False
    return {path.name for path in (out / "data").glob("*.jpeg")} >= {f"{eye.name}.jpeg" for eye in eyes}


def _write_images(
    folder: Path, eyes: list[Eye], workers: int, difficulty: Difficulty, signals: HeldSignals
) -> Generator[int, None, None]:
    """Write all images; yields the size of each, in order. Lets signals in while it waits for them."""
    # Spawned, not forked: a fork of a process with threads (tqdm, torch) may deadlock, and Python 3.12 warns of it.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    try:
        # A Ctrl-C reaches the whole group, and these start in it: they must not know of it even before they can say so.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            chunks = [
                pool.submit(_write_chunk, folder, difficulty, eyes[start : start + _CHUNK]) for start in range(0, len(eyes), _CHUNK)
            ]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for chunk in chunks:
            yield from signals.result(chunk)
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    cv2.setNumThreads(1)
    # The pool's workers wait for work for ever when their parent is killed.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _write_chunk(folder: Path, difficulty: Difficulty, eyes: list[Eye]) -> list[int]:
    return [
        (folder / f"{eye.name}.jpeg").write_bytes(photograph(eye, difficulty.lesions, difficulty.camera, difficulty.distractors))
        for eye in eyes
    ]
