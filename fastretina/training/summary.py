"""metrics.json: what a run found out, for programs. Made from the run's history alone."""

from __future__ import annotations

from typing import Any

from fastretina.metrics.assessment import Assessment
from fastretina.training.progress import Progress
from fastretina.training.run_info import RunInfo, versions

BY_EPOCH = ("epoch_seconds", "train_seconds", "images_per_second", "data_wait_seconds")


def assess_best(info: RunInfo, progress: Progress) -> Assessment | None:
    """Of the best epoch's answers on the test set; None where these, or the images' file, are not at hand."""
    answers, beton = progress.best_test, info.test_set
    if answers is None or beton is None:
        return None
    return Assessment.of(answers, beton.names_of(answers.ids.numpy()))


def metrics_summary(info: RunInfo, progress: Progress, finished: bool) -> dict[str, Any]:
    """The content of metrics.json; at least one epoch must be done. Undefined metrics are None (null).

    Intervals, screening and calibration are there once the run is `finished`: they take some 0.2 s for 7,000 images.
    """
    best, last = progress.best, progress.history[-1]
    assert best is not None  # an epoch is done, so that one is the best
    assessment = assess_best(info, progress) if finished else None
    return {
        "selected_on": info.selected_on,
        "selection_metric": info.selection_metric,
        "best_epoch": best.epoch,
        "last_epoch": last.epoch,
        "finished": finished,
        "best": {"epoch": best.epoch, **best.test.as_dict(), **(assessment.as_dict() if assessment else {})},
        "last": {"epoch": last.epoch, **last.test.as_dict()},
        "train": {"best": best.train.as_dict(), "last": last.train.as_dict()},
        **({"val": {"best": best.val.as_dict(), "last": last.val.as_dict()}} if best.val and last.val else {}),
        **{name: [getattr(record, name) for record in progress.history] for name in BY_EPOCH},
        "data": info.data_dict(),
        "arch": info.settings["arch"],
        "parameters": info.parameters,
        "loader": info.loader,
        "device": info.device,
        "amp_dtype": info.amp_dtype,
        "versions": versions(),
    }
