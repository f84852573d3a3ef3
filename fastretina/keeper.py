"""What a run writes down, and how a later call takes it up again."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastretina import plots
from fastretina.checkpoint import (
    Grader,
    keep_best_twice,
    latest_state,
    promote_best,
    read_tensors,
    save_grader,
    save_state,
    settle,
    staged_best,
)
from fastretina.engine import Training
from fastretina.errors import CheckpointError, RunError
from fastretina.facts import RunFacts
from fastretina.history import EpochRecord, Predictions, Progress
from fastretina.models import load_trunk
from fastretina.report import report_html
from fastretina.runs import RunFolder, write_bytes, write_csv, write_json, write_predictions
from fastretina.summary import metrics_summary

# Settings that a resumed run may change: none of them has a part in what a step computes.
FREE_SETTINGS = frozenset({"epochs", "patience", "out", "resume", "stop_after_steps", "profile", "tensorboard", "workers"})
REDRAW_SECONDS = 30.0  # curves.png takes about half a second: too long for each epoch of a fast run


def resume_state(run: RunFolder, resume: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The training state to go on from, or None to begin. The folder must be locked.

    resume: `auto` (the folder's last.pt, if any), `never`, or a last.pt (or its folder), whose best checkpoint comes along.
    Where last.pt is damaged, the save before it counts, and a line on standard error says so.
    RunError where the folder is taken, or where `settings` differ from those of the state in more than FREE_SETTINGS.
    """
    if run.holds_comparison():
        raise RunError(f"{run.path}: is the folder of a comparison; give another --out")
    if resume == "never":
        if run.config.exists():
            raise RunError(f"{run.path}: holds a run already; give another --out, remove the folder, or go on with --resume auto")
        return None
    source = run
    if resume != "auto":
        given = Path(resume)
        source = RunFolder(given if given.is_dir() else given.parent)
        if not _has_state(source) or (given.is_file() and given.name != source.last.name):
            raise CheckpointError(f"--resume {resume}: no training state there; give a run's last.pt, or its folder, auto or never")
        if source.path.resolve() == run.path.resolve():
            source = run
        elif run.config.exists():
            raise RunError(f"{run.path}: holds a run already; give an empty --out to go on from {source.last}")
    if not _has_state(source):
        return None
    state, best, problem = latest_state(source)
    stored = state["settings"]
    differing = sorted(key for key in {*settings, *stored} - FREE_SETTINGS if settings.get(key) != stored.get(key))
    if differing:
        shown = ", ".join(f"{key} was {stored.get(key)}, now {settings.get(key)}" for key in differing)
        raise RunError(
            f"{source.path}: begun with other settings ({shown}); give the same ones to go on, or another --out to begin anew"
        )
    if source is run:
        settle(run, best, fell_back=problem is not None)
    elif best is not None:
        write_bytes(run.best, best.read_bytes())
    if problem is not None:
        at = state["progress"]
        print(f"{problem}. Going on from the save before it: epoch {at['epoch'] + 1}, after step {at['step']:,}", file=sys.stderr)
    return state


def _has_state(run: RunFolder) -> bool:
    return run.last.is_file() or run.previous.is_file()


def restore(training: Training, state: dict[str, Any], source: Path) -> None:
    """Put a state that `RunKeeper.save` wrote to `source` into the training. The number of ranks may be another."""
    try:
        training.progress.load_state_dict(state["progress"], training.world)
        training.model.load_state_dict(state["model"])
        if training.average is not None:
            training.average.load_state_dict(state["average"])
        training.optimizer.load_state_dict(state["optimizer"])
        training.schedule.load_state_dict(state["schedule"])
        training.scaler.load_state_dict(state["scaler"])
        training.train_loader(training.progress.epoch).load_state_dict(state["loader"])
        torch.set_rng_state(state["rng_cpu"])
        if state["rng_cuda"]:
            torch.cuda.set_rng_state(state["rng_cuda"][0])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{source}: does not fit this run: {error}; begin anew in another --out") from error


class NoKeeper:
    """The keeper of the ranks that do not lead: it keeps nothing."""

    def save(self) -> None: ...

    def end_epoch(self, improved: bool) -> None: ...

    def load_best(self) -> None: ...

    def first_batch(self, images: Tensor, labels: Tensor) -> None: ...


class RunKeeper:
    """Writes the run folder as `engine.fit` goes. `show` gets each epoch's record when it is on disk, for the terminal."""

    def __init__(
        self,
        run: RunFolder,
        facts: RunFacts,
        training: Training,
        grader: Callable[[Progress], Grader],
        names: Mapping[int, str],
        show: Callable[[EpochRecord], None],
    ) -> None:
        self.run, self.facts, self.training, self.show = run, facts, training, show
        self.grader, self.names = grader, names
        self._drawn = time.monotonic()

    def save(self) -> None:
        """Write last.pt, and keep the one before it. RunError where the weights are spoilt: nothing is written."""
        self._save()
        keep_best_twice(self.run, self.training.progress.best_epoch)

    def _save(self) -> None:
        training = self.training
        models = [training.model] if training.average is None else [training.model, training.average]
        if not all(bool(torch.isfinite(value).all()) for model in models for value in model.state_dict().values()):
            raise RunError(
                f"the weights are no longer finite after step {training.progress.step}: not saved, {self.run.last} stays as it was."
                " Lower --lr, leave --amp away, or look at the samples of that step"
            )
        state = {
            "settings": dict(self.facts.settings),
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
            self._write_tables(predictions=True)

    def first_batch(self, images: Tensor, labels: Tensor) -> None:
        """Draw batch.png."""
        write_bytes(self.run.batch, plots.batch_grid(images, labels))

    def end_epoch(self, improved: bool) -> None:
        """Save the state, and a new best checkpoint with it; then the files that are made from the state."""
        record = self.training.progress.history[-1]
        if improved:
            save_grader(staged_best(self.run), self.training.graded, self.grader(self.training.progress))
            self._save()
            promote_best(self.run)
        else:
            self.save()
        self._write_tables(predictions=improved)
        if time.monotonic() - self._drawn > REDRAW_SECONDS:
            self.draw_curves()
        self.show(record)

    def _write_tables(self, predictions: bool) -> None:
        progress = self.training.progress
        if predictions and progress.best_test is not None:
            self.write_predictions(progress.best_test)
        rows = [entry.row() for entry in progress.history]
        write_csv(self.run.results, list(rows[0]), [list(row.values()) for row in rows])
        write_json(self.run.metrics, metrics_summary(self.facts, progress, self.training.is_over))

    def load_best(self) -> None:
        """Load best.safetensors into the model; an average of the weights begins anew from it."""
        load_trunk(self.training.model, read_tensors(self.run.best), self.run.best)
        if self.training.average is not None:
            self.training.average.restart(self.training.model)

    def write_predictions(self, answers: Predictions) -> None:
        """Write predictions.csv of the test set."""
        names = [self.names[number] for number in answers.ids.tolist()]
        probabilities = answers.log_probabilities.exp().numpy().astype(np.float32)
        write_predictions(self.run.predictions, answers.ids.numpy(), names, answers.labels.numpy(), probabilities)

    def draw_curves(self) -> None:
        """Draw curves.png."""
        progress = self.training.progress
        assert progress.best_epoch is not None  # called after an epoch
        majority = self.facts.data["test"].majority_share
        write_bytes(self.run.curves, plots.curves(progress.history, progress.best_epoch, majority, self.training.head.objective))
        self._drawn = time.monotonic()

    def finish(self) -> None:
        """Write the pictures and the report; where no epoch is done there is nothing to draw."""
        progress = self.training.progress
        best = progress.best
        if best is None:
            return
        write_json(self.run.metrics, metrics_summary(self.facts, progress, self.training.is_over))
        self.draw_curves()
        for path, title, scores in ((self.run.confusion_test, "Test", best.test), (self.run.confusion_train, "Train", best.train)):
            write_bytes(path, plots.confusion(scores.metrics.confusion, f"{title} set, best epoch ({best.epoch})"))
        batch = self.run.batch.read_bytes() if self.run.batch.is_file() else None
        write_bytes(self.run.report, report_html(self.facts, progress, batch).encode())
