"""What a run writes down as it goes: its state, its best checkpoint, its tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastretina.errors import RunError
from fastretina.metrics.predictions import write_predictions
from fastretina.models.checkpoint import CheckpointInfo, read_tensors, save_checkpoint
from fastretina.models.weights import load_exactly
from fastretina.system.csv_text import write_csv
from fastretina.system.files import write_json
from fastretina.training.loop import Callbacks, Training
from fastretina.training.progress import EpochRecord, Progress
from fastretina.training.run_folder import RunFolder
from fastretina.training.run_info import RunInfo, versions
from fastretina.training.state import keep_best_twice, promote_best, save_state, state_digest

BY_EPOCH = ("epoch_seconds", "train_seconds", "images_per_second", "data_wait_seconds")


class Recorder(Callbacks):
    """Writes the run folder's state, checkpoints and tables as `loop.fit` goes; what is drawn of them is for others."""

    def __init__(
        self,
        run: RunFolder,
        info: RunInfo,
        training: Training,
        describe: Callable[[Progress], CheckpointInfo],
        first_batch: Callable[[Tensor, Tensor], None],
        after_epoch: Sequence[Callable[[EpochRecord], None]],
    ) -> None:
        """first_batch: gets (B, 3, R, R) images and (B,) grades of the run's first step. after_epoch: get each epoch's record when
        it is on disk."""
        self.run, self.info, self.training, self.describe = run, info, training, describe
        self._first_batch, self._after_epoch = first_batch, after_epoch

    def save(self) -> None:
        """Write last.pt, and keep the one before it. RunError where the weights contain NaN or Inf: nothing is written."""
        self._save()
        keep_best_twice(self.run, self.training.progress.best_epoch)

    def _save(self) -> None:
        training = self.training
        models = [training.model] if training.average is None else [training.model, training.average]
        if not all(bool(torch.isfinite(value).all()) for model in models for value in model.state_dict().values()):
            raise RunError(
                f"the weights contain NaN or Inf after step {training.progress.step}: not saved, {self.run.last} stays as it was."
                " Lower --lr, leave --amp away, or look at the samples of that step"
            )
        state = {
            "settings": dict(self.info.settings),
            "data": self.info.digests,
            "environment": dict(self.info.environment),
            "progress": training.progress.state_dict(),
            "model": training.model.state_dict(),
            "average": None if training.average is None else training.average.state_dict(),
            "optimizer": training.optimizer.state_dict(),
            "schedule": training.schedule.state_dict(),
            "scaler": training.scaler.state_dict(),
            "precision": training.precision.name,
            "decode": training.test_loader.decodes_on,
            "loader": training.train_loader(training.progress.epoch).state_dict(),
            "rng_cpu": torch.get_rng_state(),
            "rng_cuda": [torch.cuda.get_rng_state()] if training.world.device.type == "cuda" else [],
        }
        save_state(self.run.last, state, older=self.run.previous)

    def catch_up(self) -> None:
        """Write what a run may have left undone that was killed after it had saved the state that this one goes on from."""
        if self.training.progress.history:
            if not self.run.last.is_file():  # taken up from another folder
                self.save()
            self._write_tables(predictions=True)

    def first_batch(self, images: Tensor, labels: Tensor) -> None:
        """Hand the first batch on to be drawn."""
        self._first_batch(images, labels)

    def end_epoch(self, improved: bool) -> None:
        """Save the state, and a new best checkpoint with it; then the files that are made from the state."""
        record = self.training.progress.history[-1]
        if improved:
            save_checkpoint(self.run.staged_best, self.training.graded, self.describe(self.training.progress))
            self._save()
            promote_best(self.run)
        else:
            self.save()
        self._write_tables(predictions=improved)
        for follow in self._after_epoch:
            follow(record)

    def _write_tables(self, predictions: bool) -> None:
        progress = self.training.progress
        if predictions and (answers := progress.best_test) is not None:
            assert self.info.test_set is not None  # every run has one
            write_predictions(self.run.predictions, answers, self.info.test_set.names_of(answers.ids.numpy()))
        rows = [entry.row() for entry in progress.history]
        write_csv(self.run.results, list(rows[0]), [list(row.values()) for row in rows])
        summary = metrics_summary(self.info, progress, self.training.is_over)
        write_json(self.run.metrics, summary | {"state": state_digest(self.run.last)})

    def load_best(self) -> None:
        """Load best.safetensors into the model; an average of the weights begins anew from it."""
        load_exactly(self.training.model, read_tensors(self.run.best), self.run.best)
        if self.training.average is not None:
            self.training.average.restart(self.training.model)


def metrics_summary(info: RunInfo, progress: Progress, finished: bool) -> dict[str, Any]:
    """The content of metrics.json; at least one epoch must be done. Undefined metrics are None (null).

    Intervals, screening and calibration are there once the run is `finished`: they take some 1.7 s for 7,000 images.
    """
    best, last = progress.best, progress.history[-1]
    assert best is not None  # an epoch is done, so that one is the best
    assessment = info.assess(progress.best_test, progress.best_val, progress.decision) if finished else None
    return {
        "classes": info.classes.as_dict(),
        "selected_on": info.selected_on,
        "selection_metric": info.selection_metric,
        "best_epoch": best.epoch,
        "last_epoch": last.epoch,
        "finished": finished,
        "best": {"epoch": best.epoch, **best.test.as_dict(), **(assessment.as_dict() if assessment else {})},
        "last": {"epoch": last.epoch, **last.test.as_dict()},
        "sources": {name: [found.as_dict() for found in metrics] for name, metrics in info.sources(progress.best_answers).items()},
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
        "environment": dict(info.environment),
    }
