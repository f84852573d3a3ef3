"""The pictures and the report of a training run, drawn into its folder as it goes."""

from __future__ import annotations

import time

from torch import Tensor

from fastretina.report import plots
from fastretina.report.run import Results, report_html
from fastretina.system.files import write_bytes
from fastretina.training.progress import EpochRecord, Progress
from fastretina.training.run_folder import RunFolder
from fastretina.training.run_info import RunInfo

REDRAW_SECONDS = 30.0  # curves.png takes about half a second: too long for each epoch of a fast run


class RunPictures:
    """Draws what a run folder shows of `progress`. objective: what training makes small, in words."""

    def __init__(self, run: RunFolder, info: RunInfo, progress: Progress, objective: str) -> None:
        self._run, self._info, self._progress, self._objective = run, info, progress, objective
        self._drawn = time.monotonic()

    def first_batch(self, images: Tensor, labels: Tensor) -> None:
        """Draw batch.png of (B, 3, R, R) images and (B,) grades."""
        write_bytes(self._run.batch, plots.batch_grid(images, labels))

    def after_epoch(self, record: EpochRecord) -> None:
        """Draw the curves anew, where that is worth its time."""
        if time.monotonic() - self._drawn > REDRAW_SECONDS:
            self._draw_curves()

    def _draw_curves(self) -> None:
        progress = self._progress
        assert progress.best_epoch is not None  # called after an epoch
        majority = self._info.data["test"].majority_share
        write_bytes(self._run.curves, plots.curves(progress.history, progress.best_epoch, majority, self._objective))
        self._drawn = time.monotonic()

    def finish(self) -> None:
        """Draw all pictures and write the report; where no epoch is done there is nothing to draw."""
        run, best = self._run, self._progress.best
        if best is None:
            return
        self._draw_curves()
        for path, title, scores in ((run.confusion_test, "Test", best.test), (run.confusion_train, "Train", best.train)):
            write_bytes(path, plots.confusion(scores.metrics.confusion, f"{title} set, best epoch ({best.epoch})"))
        batch = run.batch.read_bytes() if run.batch.is_file() else None
        write_bytes(run.report, report_html(Results.of_run(self._info, self._progress, batch)).encode())
