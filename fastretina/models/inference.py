"""A model's outputs without training: one pass over a data set, and the views of an image that they are averaged over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastretina.errors import RunError, UsageError
from fastretina.metrics.predictions import Predictions
from fastretina.models.heads import Decision, Head
from fastretina.models.precision import Precision
from fastretina.system.cuda import Pace
from fastretina.system.progress import progress_bar

if TYPE_CHECKING:
    from fastretina.loading.loader import Loader


@dataclass(frozen=True)
class Outputs:
    """What the network's last layer gave for a data set, on the CPU, in the data set's order.

    Attributes:
        values: (V, N, outputs) float32, of V views of each image. labels: (N,) int64 true grades. ids: (N,) int64 sample ids.
    """

    values: Tensor
    labels: Tensor
    ids: Tensor

    def answers(self, head: Head, decision: Decision | None) -> Predictions:
        """The probabilities that this head and decision make of them."""
        return Predictions(head.answer(self.values, decision), self.labels, self.ids)


MAX_VIEWS = 8


@contextmanager
def no_cudnn_benchmark() -> Iterator[None]:
    """While entered, cuDNN takes the algorithms that its heuristics choose, for shapes that are too rare to try all on each.

    A trial costs more than the few batches of that shape gain, and empties torch's cache of device memory.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def run_model(
    model: nn.Module,
    loader: Loader,
    precision: Precision,
    title: str,
    views: int = 1,
    stop: Callable[[], None] = lambda: None,
    shown: bool = True,
) -> Outputs:
    """One pass in evaluation mode. views: 1 to 8 of each image, see `view_outputs`. `stop` is called between batches and may raise.
    shown: whether with a progress bar.

    RunError where the model gives anything but finite numbers, or the data set no sample.
    """
    model.eval()
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    pace = Pace(loader.device)
    with torch.no_grad(), no_cudnn_benchmark(), progress_bar(title, len(loader), 0, shown=shown) as bar:
        for batch in loader:
            # Views last, so that batches can be joined along the first dimension as labels and ids are.
            found.append((view_outputs(model, batch.images, precision, views).movedim(0, -1), batch.labels, batch.ids))
            pace.step()
            bar.update()
            stop()
    if not found:
        raise RunError(f"{loader.dataset.path}: gave no sample to evaluate on")
    values, labels, ids = (torch.cat(part).cpu() for part in zip(*found, strict=True))
    wrong = ~torch.isfinite(values).flatten(1).all(dim=1)
    if bool(wrong.any()):
        raise RunError(
            f"{loader.dataset.path}: the model's answer is not finite for sample id {int(ids[wrong][0])}: "
            "its weights contain NaN or Inf"
        )
    return Outputs(values.movedim(-1, 0), labels, ids)


def view_outputs(model: nn.Module, images: Tensor, precision: Precision, views: int = 1) -> Tensor:
    """(V, B, outputs) float32 of (B, 3, R, R) images seen in the first `views` of the square's 8 symmetries, the first of them as
    they are (test-time augmentation)."""
    found = []
    for view in range(views):
        with precision.autocast():
            outputs = model(rotate_flip(images, view).contiguous(memory_format=torch.channels_last))
        found.append(outputs.float())
    return torch.stack(found)


def rotate_flip(images: Tensor, view: int) -> Tensor:
    """(B, C, R, R) images in one of the square's 8 symmetries: rotated by `view` times 90 degrees, from 4 on flipped after that."""
    # No rotation is no copy, of which rot90 would make one, and in another memory format.
    rotated = torch.rot90(images, view % 4, dims=(2, 3)) if view % 4 else images
    return rotated.flip(3) if view >= 4 else rotated


def undo_rotate_flip(images: Tensor, view: int) -> Tensor:
    """The inverse of `rotate_flip`."""
    return torch.rot90(images.flip(3) if view >= 4 else images, -view % 4, dims=(2, 3))


def check_views(views: int) -> None:
    """UsageError where `--tta` asks for other than 1-8 views."""
    if not 1 <= views <= MAX_VIEWS:
        raise UsageError(f"--tta {views}: a square has {MAX_VIEWS} symmetries; give 1 (none) to {MAX_VIEWS}")
