"""The data sets of a run, a validation set out of the training set, and the loaders that feed the run from them."""

from __future__ import annotations

import hashlib
import math
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fastretina.beton.open import open_beton
from fastretina.beton.reader import Beton
from fastretina.errors import RunError, UsageError
from fastretina.grading import NUM_CLASSES, patient_of
from fastretina.loading.augment import Augment
from fastretina.loading.decode.choice import FASTEST_FLOPS
from fastretina.loading.loader import Loader
from fastretina.models.precision import Precision
from fastretina.training.compile import training_flops
from fastretina.training.config import AUGMENTATIONS, SplitBy, TrainConfig
from fastretina.training.distributed import World


def open_data(config: TrainConfig, stack: ExitStack) -> dict[str, Beton]:
    """The data sets by name: train, test and, if there is one, val."""
    paths = {"train": config.train, "test": config.test} | ({"val": config.val} if config.val else {})
    data = {name: stack.enter_context(open_beton(path)) for name, path in paths.items()}
    for beton in data.values():
        if int(beton.labels.min()) < 0 or int(beton.labels.max()) >= NUM_CLASSES:
            raise RunError(
                f"{beton.path}: grades must be 0-{NUM_CLASSES - 1}, found {int(beton.labels.min())}-{int(beton.labels.max())}"
            )
    if config.val_fraction:
        whole = data["train"]
        training, validation = validation_split(whole.names, whole.labels, config.val_fraction, config.split_by)
        data |= {"train": whole.select(training), "val": whole.select(validation)}
    return data


def validation_split(
    names: Sequence[str], labels: NDArray[np.int64], fraction: float, by: SplitBy
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions, ascending, of (training, validation) images.

    A pure function of names and grades: the same for every seed and every order of the images, so that runs can be compared and
    a patient never changes sides. Patients (or images) are stratified by their highest grade, and those of each stratum whose
    names have the lowest SHA-256 go to the validation set: `fraction` of the stratum, rounded, so that rare grades come too.

    Args:
        names: N image names. labels: (N,) grades. fraction: 0-1, of the patients of each stratum. by: "patient" keeps the images
            of a patient (`<patient>_<left|right>`) together.

    Raises UsageError where names tell of no patients, or where one side would be empty.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for position, name in enumerate(names):
        patient = patient_of(name) if by == "patient" else name
        if patient is None:
            raise UsageError(
                f"--split-by patient: the name {name!r} tells of no patient (such as 10_left); use --split-by image, or --val FILE"
            )
        groups[str(patient)].append(position)
    strata: dict[int, list[str]] = defaultdict(list)
    for group, positions in groups.items():
        strata[int(labels[positions].max())].append(group)
    chosen: list[int] = []
    for members in strata.values():
        ranked = sorted(members, key=lambda group: hashlib.sha256(group.encode()).digest())
        for group in ranked[: round(fraction * len(members))]:
            chosen += groups[group]
    validation = np.array(sorted(chosen), dtype=np.int64)
    if not 0 < len(validation) < len(labels):
        raise UsageError(
            f"--val-fraction {fraction:g}: leaves {len(labels) - len(validation)} of {len(labels)} images for training and "
            f"{len(validation)} for validation; both need some"
        )
    return np.setdiff1d(np.arange(len(labels)), validation), validation


def image_dtype(world: World, precision: Precision) -> torch.dtype:
    """Of the images that the loader makes. On a GPU half the bytes to write and read, where autocast would convert them anyway."""
    return precision.dtype or torch.float32 if world.device.type == "cuda" else torch.float32


def decoding(config: TrainConfig, model: nn.Module, world: World, state: dict[str, Any] | None) -> dict[str, Any]:
    """What the loaders are told of decoding: the same for all, and as the run began, on a machine with other cores too."""
    if config.decode != "auto" or world.device.type == "cpu":
        return {"decode": config.decode}
    began = None if state is None else state.get("decode")
    if began == "cpu":
        return {"decode": "cpu"}
    return {"demand": math.inf if began == "gpu" else FASTEST_FLOPS / training_flops(model, config.resolution)}


def make_loader(
    config: TrainConfig, name: str, beton: Beton, resolution: int, world: World, precision: Precision, **options: Any
) -> Loader:
    """The loader of the data set called `name`, of which only `train` is shuffled and augmented. options: more of `Loader`'s."""
    train = name == "train"
    return Loader(
        beton,
        batch_size=config.batch_size,
        train=train,
        resolution=resolution,
        device=str(world.device),
        seed=config.seed,
        workers=config.workers or max(1, len(os.sched_getaffinity(0)) // world.local_size),
        resident=config.resident,
        dtype=image_dtype(world, precision),
        sampling=config.sampling if train else None,
        augment=AUGMENTATIONS[config.augment] if train else Augment.none(),
        rank=world.rank,
        world_size=world.size,
        peers=world.peers,
        **options,
    )


class Growth:
    """The training loader of each epoch: at `--grow-from` px for the first half of them, then at full resolution. Another
    resolution is another loader, which goes on with the very next sample. side: the resolution of now, px."""

    def __init__(self, config: TrainConfig, make: Callable[[int], Loader]) -> None:
        self._config, self._make = config, make
        self.side = 0
        self._loader: Loader | None = None

    def __call__(self, epoch: int) -> Loader:
        side = self._config.side(epoch)
        if self._loader is None or side != self.side:
            before, self.side, self._loader = self._loader, side, self._make(side)
            if before is not None:
                self._loader.load_state_dict(before.state_dict())
                before.close()
        return self._loader

    def close(self) -> None:
        """Close the loader of now."""
        if self._loader is not None:
            self._loader.close()
