"""The epochs' metrics for TensorBoard, beside results.csv, which is always written. Needs the `tensorboard` extra.

python -m fastretina.train --tensorboard ... ; tensorboard --logdir runs
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fastretina.errors import UsageError


def require_tensorboard() -> None:
    """UsageError naming the extra where TensorBoard is not installed: to be called before any work is done."""
    try:
        import torch.utils.tensorboard  # noqa: F401 - takes a second, so only where it is asked for
    except ImportError as error:
        raise UsageError(
            f"--tensorboard: {error}; install it with  pip install 'fastretina[tensorboard]'  or leave --tensorboard away: "
            "results.csv holds the same metrics"
        ) from error


class Tracker:
    """Writes scalars by epoch into the sub-folder `tensorboard` of a run folder.

    first_epoch: the next one that will be written, from 1. What an earlier call wrote of it or later ones, TensorBoard no longer
    shows: a run that was stopped and goes on has one point for each epoch.
    """

    def __init__(self, folder: Path, first_epoch: int) -> None:
        require_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_epoch)

    def epoch(self, row: Mapping[str, float | None]) -> None:
        """Write the row of results.csv, by column, that belongs to a finished epoch; undefined metrics are left out.

        Metrics of a data set are named `loss/train`, `qwk/test`, ..., so that TensorBoard draws the sets of a metric together; the
        others `run/lr`, `run/images_per_second`, ...
        """
        for column, value in row.items():
            name, _, metric = column.partition("_")
            tag = f"{metric}/{name}" if name in ("train", "test", "val") and metric != "seconds" else f"run/{column}"
            if value is not None and column != "epoch":
                self._writer.add_scalar(tag, value, row["epoch"])
        self._writer.flush()  # an epoch's metrics are on disk before the next one begins

    def close(self) -> None:
        """Write what is left, and end the writer's thread."""
        self._writer.close()
