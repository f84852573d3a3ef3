"""The training loop, and one pass over a data set without training."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Protocol, Self

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from fastretina.cli import Terminated
from fastretina.errors import RunError
from fastretina.heads import Decision, Head, Loss
from fastretina.history import EpochRecord, Outputs, Predictions, Progress, Scores, SelectionMetric, Tally, shown_ids
from fastretina.models import freeze_trunk
from fastretina.optim import ExponentialAverage
from fastretina.precision import Precision

if TYPE_CHECKING:
    from fastretina.loader import Batch, Loader

# Below this the scaler has shrunk the loss, not magnified it, and the gradients still overflowed: 17 steps skipped in a row.
SMALLEST_SCALE = 1.0
READ_EVERY = 25  # steps between two looks at the losses on CUDA, each of which waits for the device; on a CPU looking is free
MAX_VIEWS = 8


class StopAsked(Exception):
    """A signal arrived, or the steps of this call are done, and this is a good place to stop."""


class Signals:
    """While entered, SIGINT and SIGTERM only make a note, for `stop_if_asked`; a second one stops at once, as if not entered.

    In the middle of an optimizer step there is no state worth saving, so that a run must come to the end of one first.
    """

    def __init__(self) -> None:
        self.arrived: int | None = None

    def __enter__(self) -> Self:
        # Python lets only the main thread set handlers; a run elsewhere is its caller's to stop.
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        if self._main:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.arrived is not None:
            raise self.exception()
        self.arrived = number
        print("stopping after this step; once more to stop without saving", file=sys.stderr, flush=True)

    def exception(self) -> BaseException:
        """What the command should end with: Terminated (143) or KeyboardInterrupt (130)."""
        return Terminated() if self.arrived == signal.SIGTERM else KeyboardInterrupt()

    def stop_if_asked(self) -> None:
        """Raise StopAsked where a signal has arrived."""
        if self.arrived is not None:
            raise StopAsked


class Keeper(Protocol):
    """What `fit` does not do itself: keep things. `fastretina.train` writes them to the run folder."""

    def save(self) -> None:
        """Save the state of the run, in mid-epoch."""

    def end_epoch(self, improved: bool) -> None:
        """An epoch is over and noted; `improved`: the model is the best so far. Save the state, show the figures."""

    def load_best(self) -> None:
        """Load the best weights so far into the model."""

    def first_batch(self, images: Tensor, labels: Tensor) -> None:
        """(B, 3, R, R) images and (B,) grades of the run's first step."""


@dataclass
class Training:
    """All parts of a run.

    Attributes:
        forward: `model`, or what torch.compile made of it. average: of its weights; what is evaluated and kept, if there is one.
        train_loader: gives the loader of an epoch, from 0; the same one until the resolution changes.
        epochs, patience: when the run is over, see `Progress.is_over`. stop_after: steps of this call, or None.
        second_phase: the epoch, from 0, that starts again from the best weights, or None. freeze_epochs: how many train the head
            alone. clip_norm: the largest norm of all gradients together, or None.
    """

    model: nn.Module
    forward: Callable[[Tensor], Tensor]
    head: Head
    loss: Loss
    average: ExponentialAverage | None
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    scaler: torch.amp.GradScaler
    precision: Precision
    device: torch.device
    train_loader: Callable[[int], Loader]
    test_loader: Loader
    val_loader: Loader | None
    epochs: int
    patience: int | None
    select_by: SelectionMetric
    second_phase: int | None
    freeze_epochs: int
    clip_norm: float | None
    stop_after: int | None
    progress: Progress

    @property
    def graded(self) -> nn.Module:
        """The model that is evaluated and kept."""
        return self.model if self.average is None else self.average.module

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to train."""
        return self.progress.is_over(self.epochs, self.patience, self.second_phase)


def fit(training: Training, keeper: Keeper) -> bool:
    """Train from `training.progress` until the run is over: True. Or stop after `stop_after` steps, state saved: False.

    SIGINT and SIGTERM save at the end of the step and leave with KeyboardInterrupt or cli.Terminated. RunError where the loss
    is not finite, or gradients stay infinite however small the scaler makes them; nothing is saved then.
    """
    at = training.progress
    optimizer, scaler, parameters = training.optimizer, training.scaler, list(training.model.parameters())
    read_every = 1 if training.device.type == "cpu" else READ_EVERY
    last_step = None if training.stop_after is None else at.step + training.stop_after
    with Signals() as signals:
        try:
            while not training.is_over:
                if at.epoch == training.second_phase and at.batch == 0 and at.best_epoch is not None:
                    keeper.load_best()
                    optimizer.state.clear()  # the moments belong to other weights

                loader = training.train_loader(at.epoch)
                training.model.train()
                if training.freeze_epochs:
                    freeze_trunk(training.model, at.epoch < training.freeze_epochs)
                tally, sample = at.tally, None
                with progress_bar(f"epoch {at.epoch + 1}/{training.epochs}", len(loader), at.batch) as bar:
                    for batch in _timed(loader, tally) if at.batch < len(loader) else ():
                        started = time.perf_counter()
                        if at.step == 0:
                            sample = batch.images, batch.labels
                        with training.precision.autocast():
                            outputs = training.forward(batch.images)
                        loss = training.loss(outputs, batch.labels)
                        optimizer.zero_grad(set_to_none=True)
                        torch.autograd.backward(scaler.scale(loss))
                        if training.clip_norm is not None:
                            scaler.unscale_(optimizer)
                            nn.utils.clip_grad_norm_(parameters, training.clip_norm)
                        scaler.step(optimizer)
                        scaler.update()
                        training.schedule.step()
                        if training.average is not None:
                            training.average.update_parameters(training.model)
                        at.step, at.batch = at.step + 1, at.batch + 1
                        predicted = training.head.log_probabilities(outputs.detach()).argmax(dim=1)
                        tally.add(at.step, loss, predicted, batch.labels, batch.ids)
                        if at.batch % read_every == 0 or at.batch == len(loader):
                            tally.read(at.epoch)
                            _check_scale(scaler, at, batch.ids)
                            bar.set_postfix_str(
                                f"loss {tally.loss:.3f}, {tally.images / max(1e-9, tally.seconds):.0f} img/s", refresh=False
                            )
                        tally.seconds += time.perf_counter() - started
                        bar.update()
                        # After the last batch the loader must be left to end its epoch first.
                        if at.batch < len(loader):
                            signals.stop_if_asked()
                            if at.step == last_step:
                                raise StopAsked
                tally.read(at.epoch)
                at.batch = len(loader)
                if sample is not None:
                    keeper.first_batch(*sample)
                signals.stop_if_asked()
                if at.step == last_step and at.epoch + 1 < training.epochs:
                    raise StopAsked

                keeper.end_epoch(_evaluate(training, signals.stop_if_asked))
                if not training.is_over:
                    signals.stop_if_asked()
        except StopAsked:
            tally.read(at.epoch)
            keeper.save()
            if signals.arrived is None:
                return False
            raise signals.exception() from None
    return True


def run_model(
    model: nn.Module,
    loader: Loader,
    precision: Precision,
    title: str,
    views: int = 1,
    stop: Callable[[], None] = lambda: None,
) -> Outputs:
    """One pass in evaluation mode. views: 1 to 8 of each image, see `view_outputs`. `stop` is called between batches and may raise.

    RunError where the model gives anything but finite numbers, or the data set no sample.
    """
    model.eval()
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    with torch.no_grad(), progress_bar(title, len(loader), 0) as bar:
        for batch in loader:
            # Views last, so that batches can be joined along the first dimension as labels and ids are.
            found.append((view_outputs(model, batch.images, precision, views).movedim(0, -1), batch.labels, batch.ids))
            bar.update()
            stop()
    if not found:
        raise RunError(f"{loader.beton.path}: gave no sample to evaluate on")
    values, labels, ids = (torch.cat(part).cpu() for part in zip(*found, strict=True))
    wrong = ~torch.isfinite(values).flatten(1).all(dim=1)
    if bool(wrong.any()):
        raise RunError(
            f"{loader.beton.path}: the model's answer is not finite for sample id {int(ids[wrong][0])}: its weights are spoilt"
        )
    return Outputs(values.movedim(-1, 0), labels, ids)


def view_outputs(model: nn.Module, images: Tensor, precision: Precision, views: int = 1) -> Tensor:
    """(V, B, outputs) float32 of (B, 3, R, R) images seen in the first `views` of the square's 8 symmetries, the first of them as
    they are (test-time augmentation)."""
    found = []
    for view in range(views):
        with precision.autocast():
            outputs = model(turn(images, view).contiguous(memory_format=torch.channels_last))
        found.append(outputs.float())
    return torch.stack(found)


def turn(images: Tensor, view: int) -> Tensor:
    """(B, C, R, R) images in one of the square's 8 symmetries: by `view` quarter turns, from 4 on mirrored after that."""
    turned = torch.rot90(images, view % 4, dims=(2, 3))
    return turned.flip(3) if view >= 4 else turned


def turn_back(images: Tensor, view: int) -> Tensor:
    """The inverse of `turn`."""
    return torch.rot90(images.flip(3) if view >= 4 else images, -view % 4, dims=(2, 3))


def progress_bar(title: str, total: int | None, done: int, unit: str = "batch") -> tqdm:
    """A bar on a terminal, nothing elsewhere."""
    return tqdm(total=total, initial=done, desc=title, unit=unit, leave=False, dynamic_ncols=True, disable=not sys.stderr.isatty())


def _check_scale(scaler: torch.amp.GradScaler, at: Progress, ids: Tensor) -> None:
    """Called where the losses are read: asking for the scale waits for the device."""
    if scaler.is_enabled() and scaler.get_scale() < SMALLEST_SCALE:
        raise RunError(
            f"the gradients are infinite in epoch {at.epoch + 1} up to step {at.step}, sample ids {shown_ids(ids)}, and stay so "
            "however small the loss is scaled. Lower --lr, leave --amp away, or look at these samples. "
            "The last state saved stays as it was"
        )


def _timed(batches: Iterable[Batch], tally: Tally) -> Iterator[Batch]:
    source = iter(batches)
    while True:
        started = time.perf_counter()
        try:
            batch = next(source)
        except StopIteration:
            return
        waited = time.perf_counter() - started
        tally.wait_seconds += waited
        tally.seconds += waited
        yield batch


def _evaluate(training: Training, stop: Callable[[], None]) -> bool:
    """End the epoch with its evaluation: validation first, from which alone the head's decision is fitted; then the test.
    Returns whether this epoch is the best so far."""
    # Without torch.compile: it would compile once more for a pass that takes a tenth of the time.
    started = time.perf_counter()
    val, decision = None, None
    if training.val_loader is not None:
        outputs = run_model(training.graded, training.val_loader, training.precision, "validating", stop=stop)
        decision = training.head.fit(outputs.values[0], outputs.labels)
        val = outputs.answers(training.head, decision)
    outputs = run_model(training.graded, training.test_loader, training.precision, "testing", stop=stop)
    test = outputs.answers(training.head, decision)
    return _note_epoch(training, test, val, decision, time.perf_counter() - started)


def _note_epoch(
    training: Training, test: Predictions, val: Predictions | None, decision: Decision | None, evaluation_seconds: float
) -> bool:
    at, tally = training.progress, training.progress.tally
    best_before = at.best
    record = EpochRecord(
        epoch=at.epoch + 1,
        lr=float(max(training.schedule.get_last_lr())),
        train=tally.scores(training.head.num_classes),
        test=Scores.of(test),
        val=None if val is None else Scores.of(val),
        train_seconds=tally.seconds,
        epoch_seconds=tally.seconds + evaluation_seconds,
        data_wait_seconds=tally.wait_seconds,
        images_per_second=tally.images / max(1e-9, tally.seconds),
    )
    at.history.append(record)
    metric = training.select_by
    improved = best_before is None or record.selection.rank(metric) > best_before.selection.rank(metric)
    if improved:
        at.best_epoch, at.best_test, at.decision = record.epoch, test, decision
    at.epoch, at.batch, at.tally = at.epoch + 1, 0, Tally()
    return improved
