"""Whether BatchNorm has more than one value a channel in every forward pass of a run: it cannot train on one, and says so only when
it meets it, at the end of the first epoch."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastretina.errors import UsageError
from fastretina.loading.sampler import rank_positions
from fastretina.training.config import TrainConfig


def refuse_single_values(config: TrainConfig, model: nn.Module, images: int, ranks: int = 1, begun: int = 0) -> None:
    """UsageError where an epoch still to come has a forward pass in which a BatchNorm that learns would see one image of one pixel.

    images: of the training set. begun: epochs that are over.
    """
    # Not of epochs with a frozen backbone, whose BatchNorm uses the statistics that it has.
    sides = {config.side(epoch) for epoch in range(max(begun, config.freeze_epochs), config.epochs)}
    if not sides or 1 not in _counts(config, images, ranks):
        return
    side = min(sides)
    layer = _first_of_one_pixel(model, side)
    if layer is None:
        return
    flag = "--resolution" if side == config.resolution else "--grow-from"
    parts = [f"{ranks} ranks"] * (ranks > 1) + [f"{config.accumulate} micro-batches (--accumulate)"] * (config.accumulate > 1)
    divided = f" over {' and '.join(parts)}" if parts else ""
    ways_out = [*_ways_out(config, images, ranks), f"a larger {flag}"]
    raise UsageError(
        f"{images} images in batches of {config.batch_size} (--batch-size){divided} leave one image for a forward pass, of which "
        f"{layer} sees a single pixel at {side} px ({flag}): BatchNorm cannot train on one value. Give {', or '.join(ways_out)}"
    )


def _counts(config: TrainConfig, images: int, ranks: int) -> set[int]:
    """How many images BatchNorm's statistics are of, in any forward pass of an epoch: of its full batches and of its last."""
    found: set[int] = set()
    for batch in {0, (images - 1) // config.batch_size}:
        parts = [len(rank_positions(batch, images, config.batch_size, rank, ranks)) for rank in range(ranks)]
        micro_batches = [[len(piece) for piece in torch.empty(part).tensor_split(config.accumulate)] for part in parts]
        if config.sync_batchnorm:
            found.update(map(sum, zip(*micro_batches, strict=True)))
        else:
            found.update(*micro_batches)
    return found


def _first_of_one_pixel(model: nn.Module, side: int) -> str | None:
    """The name of the first BatchNorm whose input has one pixel for an image of `side` px; None where none has.

    Asked of a copy without memory, so that nothing is computed.
    """
    found: list[str] = []
    twin = copy.deepcopy(model).to("meta").eval()
    for name, module in twin.named_modules():
        if isinstance(module, _BatchNorm):

            def look(_: nn.Module, given: tuple[Any, ...], name: str = name) -> None:
                images: Tensor = given[0]
                if images[0, 0].numel() == 1:
                    found.append(name)

            module.register_forward_pre_hook(look)
    twin(torch.zeros(1, 3, side, side, device="meta", dtype=next(twin.parameters()).dtype))
    return found[0] if found else None


def _ways_out(config: TrainConfig, images: int, ranks: int) -> Iterator[str]:
    """The flags that leave no image alone, each with the nearest value that does."""

    def works(**changes: Any) -> bool:
        return 1 not in _counts(replace(config, **changes), images, ranks)

    sizes = range(max(ranks, config.accumulate), 2 * config.batch_size + 2)
    if size := min(
        filter(lambda size: works(batch_size=size), sizes), key=lambda size: abs(size - config.batch_size), default=None
    ):
        yield f"--batch-size {size}"
    if parts := next((parts for parts in range(config.accumulate - 1, 0, -1) if works(accumulate=parts)), None):
        yield f"--accumulate {parts}"
    if ranks > 1 and works(sync_batchnorm=True):
        yield "--sync-batchnorm"
