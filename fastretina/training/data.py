"""The data sets of a run, test and validation sets out of the training set, and the loaders that feed the run from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fastretina.beton.open import open_beton
from fastretina.beton.reader import UNLABELLED, Beton
from fastretina.errors import RunError, UsageError
from fastretina.grading import Classes, all_known
from fastretina.loading.augment import Augment
from fastretina.loading.decode.choice import FASTEST_FLOPS, default_workers
from fastretina.loading.loader import Loader
from fastretina.models.precision import Precision
from fastretina.packing.splits import divide
from fastretina.training.compile import training_flops
from fastretina.training.config import AUGMENTATIONS, SplitBy, TrainConfig
from fastretina.training.distributed import World
from fastretina.training.run_info import SET_TITLES


def open_data(config: TrainConfig, stack: ExitStack) -> dict[str, Beton]:
    """The data sets by name: train, test and, if there is one, val; all labelled, and all of the same classes.

    UsageError where they are not, or where a part cannot be taken from the training set; RunError where a label is no class.
    """
    paths = {"train": config.train, "test": config.test_file, "val": config.val}
    data = {name: stack.enter_context(open_beton(path)) for name, path in paths.items() if path is not None}
    classes = common_classes(data)
    for beton in data.values():
        if unlabelled := int((beton.labels == UNLABELLED).sum()):
            raise UsageError(
                f"{beton.path}: {unlabelled:,} of {len(beton):,} images were packed without a {classes.noun}, and training needs "
                "one of each; pack them again with a label file that has them. fastretina evaluate writes a model's answers for "
                "such a file"
            )
        if int(beton.labels.min()) < 0 or int(beton.labels.max()) >= len(classes):
            raise RunError(
                f"{beton.path}: labels must be 0-{len(classes) - 1} ({', '.join(classes)}), found "
                f"{int(beton.labels.min())}-{int(beton.labels.max())}"
            )
    if config.test_fraction:
        data |= _parted(data["train"], "test", config.test_fraction, config.split_by)
    if share := config.validation_share:
        # Both are shares of the file, and this one is taken from what the other leaves.
        data |= _parted(data["train"], "val", share / (1 - config.test_fraction), config.split_by)
    if config.fold is not None:
        groups = split_groups(data["train"], config.split_by, "--folds")
        rest, part = fold_of(groups, data["train"].labels, config.folds, config.fold)
        data |= {"train": data["train"].select(rest), "val": data["train"].select(part)}
    return data


def common_classes(data: Mapping[str, Beton]) -> Classes:
    """The classes of all these files (by what they are for: train, test, val). UsageError naming two that differ."""
    (name, first), *others = data.items()
    for other, beton in others:
        if beton.classes != first.classes:
            raise UsageError(
                f"--{name} {first.path} and --{other} {beton.path} differ in their classes: {first.classes}, and {beton.classes}; "
                "pack one of them again with the --classes, --referable and --class-order of the other"
            )
    return first.classes


def require_same(data: Mapping[str, Beton], world: World) -> None:
    """RunError naming the rank and the file where a rank has other data than rank 0. To be called by all ranks."""
    parts = world.gather({name: (str(beton.path), beton.digest) for name, beton in data.items()})

    def compare() -> None:
        for rank, part in enumerate(parts):
            for name, (path, digest) in part.items():
                if digest != data[name].digest:
                    raise RunError(
                        f"{path}: rank {rank} has another {SET_TITLES[name]} set there than rank 0 in {data[name].path}; "
                        "give all ranks the same files"
                    )

    world.decided(compare)


def _parted(whole: Beton, name: str, fraction: float, by: SplitBy) -> dict[str, Beton]:
    """A training set without a part of it, and this part, under its name."""
    rest, part = split(split_groups(whole, by, f"--{name}-fraction"), whole.labels, fraction, f"--{name}-fraction")
    return {"train": whole.select(rest), name: whole.select(part)}


def split_groups(beton: Beton, by: SplitBy, flag: str) -> list[str]:
    """What must not be parted, for each image (N,): its patient, or the image itself.

    Where a patient is unknown, `auto` is by image for a validation set alone: eyes that part there choose a worse epoch, in a test
    set they would flatter the metrics. UsageError for the others.
    """
    if by == "image":
        return list(beton.names)
    patients = beton.patients or [None] * len(beton)
    if (known := all_known(patients)) is None:
        if by == "auto" and flag == "--val-fraction":
            return list(beton.names)
        raise UsageError(
            f"{flag} with --split-by {by}: {beton.path}: the patients of {patients.count(None):,} of {len(beton):,} images "
            "are unknown; pack it with --patient-column or --patient-pattern, or use --split-by image, which may part a "
            "person's two eyes"
        )
    return known


def split(
    groups: Sequence[str], labels: NDArray[np.int64], fraction: float, flag: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions, ascending, of the images that stay and of those that are taken out.

    The same for every seed, see `divide`, so that runs can be compared.

    Args:
        groups: N names of what must not be parted. labels: (N,). fraction: 0-1, of the groups of each stratum. flag: for messages.

    Raises UsageError where one side would be empty.
    """
    taken, rest = divide(groups, labels, {"taken": fraction, "rest": 1 - fraction}).values()
    if not 0 < len(taken) < len(labels):
        raise UsageError(
            f"{flag}: takes {len(taken)} of {len(labels)} images and leaves {len(labels) - len(taken)}; both sides need some"
            + ("; --val-fraction 0 takes none, and the best epoch is chosen on the test set" if flag == "--val-fraction" else "")
        )
    return rest, taken


def fold_of(groups: Sequence[str], labels: NDArray[np.int64], folds: int, fold: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions, ascending, of the images that fold `fold` of `folds`, from 1, trains on, and of those that it is validated on.

    The same for every seed, as `split`. groups: N names of what must not be parted. labels: (N,).

    Raises UsageError where a fold would be empty.
    """
    parts = list(divide(groups, labels, {str(number): 1 / folds for number in range(1, folds + 1)}).values())
    if not all(len(part) for part in parts):
        sizes = " + ".join(f"{len(part)}" for part in parts)
        raise UsageError(f"--folds {folds}: the {len(labels)} images of --train make folds of {sizes}; each needs some")
    part = parts[fold - 1]
    return np.setdiff1d(np.arange(len(labels)), part), part


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
    """The loader of the data set called `name`, of which only `train` is shuffled and augmented. options: more of `Loader`'s, or
    others than these."""
    train = name == "train"
    usual: dict[str, Any] = {
        "batch_size": config.batch_size,
        "train": train,
        "resolution": resolution,
        "device": str(world.device),
        "seed": config.seed,
        "workers": config.workers or default_workers(world.device, world.local_size),
        "resident": config.resident,
        "dtype": image_dtype(world, precision),
        "sampling": config.sampling if train else None,
        "augment": AUGMENTATIONS[config.augment] if train else Augment.none(),
        "rank": world.rank,
        "world_size": world.size,
        "peers": world.peers,
    }
    return Loader(beton, **{**usual, **options})


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
