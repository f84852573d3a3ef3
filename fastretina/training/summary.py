"""metrics.json: what a run found out, for programs. Made from the run's history alone."""

from __future__ import annotations

from typing import Any

from fastretina.metrics.assessment import Assessment
from fastretina.metrics.predictions import Scores
from fastretina.training.progress import Progress
from fastretina.training.run_info import RunInfo, versions


def assess_best(facts: RunInfo, progress: Progress) -> Assessment | None:
    """Of the best epoch's answers on the test set; None where these, or the images' file, are not at hand."""
    answers, beton = progress.best_test, facts.test_set
    if answers is None or beton is None:
        return None
    names = dict(zip((int(number) for number in beton.ids), beton.names, strict=True))
    return Assessment.of(answers, [names[number] for number in answers.ids.tolist()])


def metrics_summary(facts: RunInfo, progress: Progress, finished: bool) -> dict[str, Any]:
    """The content of metrics.json; at least one epoch must be done. Undefined figures are None (null).

    Intervals, screening and calibration are there once the run is `finished`: they take some 0.2 s for 7,000 images.
    """
    best, last = progress.best, progress.history[-1]
    assert best is not None  # an epoch is done, so that one is the best

    def figures(scores: Scores) -> dict[str, Any]:
        return {"loss": scores.loss, **scores.metrics.as_dict()}

    assessment = assess_best(facts, progress) if finished else None
    summary: dict[str, Any] = {
        "selected_on": facts.selected_on,
        "selection_metric": facts.selection_metric,
        "best_epoch": best.epoch,
        "last_epoch": last.epoch,
        "finished": finished,
        "best": {"epoch": best.epoch, **figures(best.test), **(assessment.as_dict() if assessment else {})},
        "last": {"epoch": last.epoch, **figures(last.test)},
        "train": {"best": figures(best.train), "last": figures(last.train)},
    }
    if best.val is not None and last.val is not None:
        summary["val"] = {"best": figures(best.val), "last": figures(last.val)}
    return {
        **summary,
        "epoch_seconds": [record.epoch_seconds for record in progress.history],
        "train_seconds": [record.train_seconds for record in progress.history],
        "images_per_second": [record.images_per_second for record in progress.history],
        "data_wait_seconds": [record.data_wait_seconds for record in progress.history],
        "data": facts.data_dict(),
        "arch": facts.settings["arch"],
        "parameters": facts.parameters,
        "loader": facts.loader,
        "device": facts.device,
        "amp_dtype": facts.amp_dtype,
        "versions": versions(),
    }
