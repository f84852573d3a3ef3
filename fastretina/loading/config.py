"""What a Loader can be told: each option once, with its unit and meaning."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec

import numpy as np
import torch

from fastretina.beton.reader import Beton
from fastretina.errors import UsageError
from fastretina.loading.augment import Augment
from fastretina.loading.sampler import Sampling
from fastretina.loading.shared_memory import Peers

if TYPE_CHECKING:
    from fastretina.beton.remote import Cache

# torch dtypes that a batch may have, and the numpy type under whose name the CPU warp writes them.
KERNEL_DTYPES = {torch.float32: np.float32, torch.bfloat16: np.uint16, torch.float16: np.int16, torch.uint8: np.uint8}


@dataclass(frozen=True)
class LoaderConfig:
    """The options of a Loader, which takes them as arguments. Raises UsageError for those that cannot work."""

    batch_size: int = 64  # images a step, over all ranks
    train: bool = True  # shuffled and augmented; False: file order, resized only; `sampling` and `augment` override either
    resolution: int = 512  # side R of the square images, px; files are decoded at 1/2, 1/4 or 1/8 where that still serves it
    device: str | torch.device = "cpu"  # that the batches are on
    seed: int = 0  # of sampling and augmentation
    # Threads; None takes every core that this process may use, which several ranks on one machine must share.
    workers: int | None = None
    # "auto" on a CUDA device leaves it to the CPU's threads where so many of them should give 1.5 times what the consumer takes,
    # and to the GPU otherwise (their pixels differ by a few grey levels: name one where a run must repeat exactly on another
    # machine); "gpu" raises LoaderError where that cannot be.
    decode: Literal["auto", "cpu", "gpu"] = "auto"
    # Keep the decoded data set in memory: "on" (LoaderError where it does not fit), "auto" (where it fits well).
    resident: Literal["auto", "on", "off"] = "off"
    # float32, bfloat16 or float16, normalised by ImageNet's mean and standard deviation; uint8: pixels as they are.
    dtype: torch.dtype = torch.float32
    drop_last: bool = False  # leave out a last batch that is not full
    _: KW_ONLY
    sampling: Sampling | None = None  # see sampler.epoch_order
    augment: Augment | None = None
    # "skip" leaves bad samples out, lists them in `Loader.skipped`, and stops with LoaderError when they are more than max_bad.
    on_bad: Literal["error", "skip"] = "error"
    max_bad: float = 0.005  # fraction of the file
    cache: Cache | None = None  # where shards from a server are kept
    decoder: str | None = None  # what decodes on the GPU, a key of decode.gpu.DECODERS; None: the first
    # Images per second that the consumer takes at most, for decode="auto"; None: what a ResNet18 on an H100 might.
    demand: float | None = None
    reserve: int | None = None  # bytes of memory that resident="auto" leaves to the model; see system.cuda.training_bytes
    # Make this rank's part of each batch, every world_size-th of its samples. The order is the same for every world size, every
    # rank gets the same number of batches, and each sample still comes once an epoch: in a last batch of fewer samples than ranks
    # some parts are empty, images (0, 3, R, R).
    rank: int = 0
    world_size: int = 1
    # The ranks of this machine, to keep the resident data set together: all of them must then make this loader and iterate over it.
    # None: each keeps its own.
    peers: Peers | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "resolution", "workers"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, not {value}")
        if not 0 <= self.rank < self.world_size <= self.batch_size:
            raise UsageError(
                f"rank {self.rank} of {self.world_size} with batch_size {self.batch_size}: each rank needs an image of every batch"
            )
        if self.dtype not in KERNEL_DTYPES:
            raise UsageError(f"dtype must be one of {', '.join(map(str, KERNEL_DTYPES))}, not {self.dtype}")

    @property
    def rows(self) -> int:
        """Images of a batch that a rank makes, at most."""
        return -(-self.batch_size // self.world_size)


P = ParamSpec("P")
Init = Callable[Concatenate[Any, str | os.PathLike[str] | Beton, P], None]


def options_of(config: Callable[P, LoaderConfig]) -> Callable[[Init[LoaderConfig]], Init[P]]:
    """Makes an `__init__(self, path, config)` one that takes the config's fields as arguments, to mypy and help() as well."""

    def decorate(init: Init[LoaderConfig]) -> Init[P]:
        def wrapped(self: Any, path: str | os.PathLike[str] | Beton, *args: P.args, **kwargs: P.kwargs) -> None:
            init(self, path, config(*args, **kwargs))

        signature = inspect.signature(init)
        parameters = [*list(signature.parameters.values())[:2], *inspect.signature(config).parameters.values()]
        functools.update_wrapper(wrapped, init).__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return wrapped  # type: ignore[return-value]  # that `path` may be named, Concatenate cannot say

    return decorate
