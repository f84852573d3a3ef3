"""The data sets of a run, and the loaders that feed it from them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from fastretina.beton.open import open_beton
from fastretina.beton.reader import Beton
from fastretina.errors import RunError
from fastretina.grading import NUM_CLASSES
from fastretina.loading.augment import Augment
from fastretina.loading.decode.choice import FASTEST_FLOPS
from fastretina.loading.loader import Loader
from fastretina.models.precision import Precision
from fastretina.training.compile import training_flops
from fastretina.training.config import AUGMENTATIONS, TrainConfig
from fastretina.training.distributed import World
from fastretina.training.split import validation_split


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
        config = self._config
        side = config.grow_from if config.grow_from is not None and epoch < config.epochs // 2 else config.resolution
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
