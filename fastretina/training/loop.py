"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from fastretina.errors import RunError
from fastretina.grading import Classes
from fastretina.metrics.predictions import Predictions, Scores
from fastretina.models.heads import Decision, Head, Loss
from fastretina.models.inference import Outputs, no_cudnn_benchmark, run_model
from fastretina.models.precision import Precision
from fastretina.models.resnet import freeze_backbone
from fastretina.system.cuda import Pace, current_stream
from fastretina.system.progress import progress_bar
from fastretina.system.tracing import span
from fastretina.training.config import TrainConfig
from fastretina.training.distributed import World, without_sum
from fastretina.training.optim import ExponentialAverage
from fastretina.training.profiler import StepProfiler
from fastretina.training.progress import EpochRecord, Progress, Tally, shown_ids
from fastretina.training.signals import Signals, StopAsked

if TYPE_CHECKING:
    from fastretina.loading.batches import Batch
    from fastretina.loading.loader import Loader

# Below this the scaler has shrunk the loss, not magnified it, and the gradients still overflowed: 17 steps skipped in a row.
SMALLEST_SCALE = 1.0
READ_EVERY = 25  # steps between two looks at the losses on CUDA, at those of the 25 before; on a CPU looking is free


class Callbacks:
    """What `fit` does not do itself, and rank 0 alone: record things, as `recorder.Recorder` does. These do nothing.

    They may take as long as they like: see `World.decided`.
    """

    def save(self) -> None:
        """Save the state of the run, in mid-epoch."""

    def end_epoch(self, improved: bool) -> None:
        """An epoch is over and noted; `improved`: the model is the best so far. Save the state, show the metrics."""

    def load_best(self) -> None:
        """Load the best weights so far into the model."""

    def first_batch(self, images: Tensor, labels: Tensor) -> None:
        """(B, 3, R, R) images and (B,) grades of the run's first step."""


@dataclass
class Training:
    """All parts of a run.

    Attributes:
        config: with the metric that the best epoch is chosen by, never `auto`. classes: what is told apart.
        wrap: makes of `model` what is called in training: itself, of several ranks a DistributedDataParallel, or what torch.compile
            makes of either. average: of its weights; what is evaluated and kept, if there is one.
        train_loader: gives the loader of an epoch, from 0; the same one until the resolution changes. full_batch: images that this
            rank has of every batch but the last. estimate_statistics: those of the model's BatchNorms, anew, in an epoch,
            from 0; calls the function it is given between batches, which may raise.
    """

    config: TrainConfig
    classes: Classes
    model: nn.Module
    wrap: Callable[[nn.Module], Callable[[Tensor], Tensor]]
    head: Head
    loss: Loss
    average: ExponentialAverage | None
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    scaler: torch.amp.GradScaler
    precision: Precision
    world: World
    train_loader: Callable[[int], Loader]
    full_batch: int
    estimate_statistics: Callable[[nn.Module, int, Callable[[], None]], None]
    test_loader: Loader
    val_loader: Loader | None
    profiler: StepProfiler
    progress: Progress

    @property
    def graded(self) -> nn.Module:
        """The model that is evaluated and kept."""
        return self.model if self.average is None else self.average.module

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to train."""
        return self.progress.is_over(self.config)


def fit(training: Training, callbacks: Callbacks) -> bool:
    """Train from `training.progress` until the run is over: True. Or stop after `config.stop_after_steps`, state saved: False.

    SIGINT and SIGTERM save at the end of the step and leave with KeyboardInterrupt or errors.Terminated. RunError where the loss
    is not finite, or gradients stay infinite however small the scaler makes them; nothing is saved then.
    """
    config, at, world = training.config, training.progress, training.world
    optimizer, scaler, parameters = training.optimizer, training.scaler, list(training.model.parameters())
    read_every = 1 if world.device.type == "cpu" else READ_EVERY
    last_step = None if config.stop_after_steps is None else at.step + config.stop_after_steps
    forward, wrapped_frozen, pace = None, False, Pace(world.device)
    with Signals(world) as signals, training.profiler:
        try:
            while not training.is_over:
                if at.epoch == config.second_phase and at.batch == 0 and at.best_epoch is not None:
                    world.decided(callbacks.load_best)
                    for module in (training.model, training.average):
                        if module is not None:
                            world.share(module)
                    optimizer.state.clear()  # the moments belong to other weights

                loader = training.train_loader(at.epoch)
                training.model.train()
                frozen = at.epoch < config.freeze_epochs
                if config.freeze_epochs:
                    freeze_backbone(training.model, frozen)
                if forward is None or frozen != wrapped_frozen:  # DistributedDataParallel sums what needs gradients as it is made
                    forward, wrapped_frozen = training.wrap(training.model), frozen
                tally, sample = at.tally, None
                with progress_bar(f"epoch {at.epoch + 1}/{config.epochs}", len(loader), at.batch, shown=world.is_main) as bar:
                    for batch in _timed(loader, tally) if at.batch < len(loader) else ():
                        started = time.perf_counter()
                        if at.step == 0:
                            sample = batch.images, batch.labels
                        optimizer.zero_grad(set_to_none=True)
                        with nullcontext() if len(batch.ids) == training.full_batch else no_cudnn_benchmark():
                            loss, outputs = _backward(training, forward, batch)
                        if config.clip_norm is not None:
                            scaler.unscale_(optimizer)
                            nn.utils.clip_grad_norm_(parameters, config.clip_norm)
                        with span("optimizer"):
                            scaler.step(optimizer)
                            scaler.update()
                        training.schedule.step()
                        if training.average is not None:
                            training.average.update_parameters(training.model)
                        at.step, at.batch = at.step + 1, at.batch + 1
                        predicted = training.head.log_probabilities(outputs).argmax(dim=1)
                        tally.add(at.step, loss, predicted, batch.labels, batch.ids)
                        time_to_read = at.batch % read_every == 0 or at.batch == len(loader)
                        if time_to_read:
                            tally.read(at.epoch, world, late=read_every > 1 and at.batch < len(loader))
                            _check_scale(training, batch.ids)
                            throughput = tally.noted(world) / max(1e-9, tally.seconds)
                            bar.set_postfix_str(f"loss {tally.loss:.3f}, {throughput:.0f} img/s", refresh=False)
                        pace.step()
                        tally.seconds += time.perf_counter() - started
                        training.profiler.step()
                        bar.update()
                        # After the last batch the loader must be left to end its epoch first.
                        if at.batch < len(loader):
                            if time_to_read or world.size == 1:  # several ranks must wait for each other to agree
                                signals.stop_if_asked()
                            if at.step == last_step:
                                raise StopAsked
                tally.read(at.epoch, world)
                tally.gather(world)
                at.batch = len(loader)
                if sample is not None:
                    world.decided(partial(callbacks.first_batch, *sample))
                signals.stop_if_asked()
                if at.step == last_step and at.epoch + 1 < config.epochs:
                    raise StopAsked

                world.decided(partial(callbacks.end_epoch, _evaluate(training, signals.stop_if_asked)))
                if not training.is_over:
                    signals.stop_if_asked()
        except StopAsked:
            tally.read(at.epoch, world)
            tally.gather(world)
            world.decided(callbacks.save)
            if not signals.agreed:
                return False
            raise signals.exception() from None
    return True


def _backward(training: Training, forward: Callable[[Tensor], Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
    """Add a batch's gradients up, micro-batch by micro-batch; between ranks they are summed with the last.

    The loss is the mean over the global batch, however it is divided: each part counts with its share of the whole weight.
    DistributedDataParallel takes the mean of the ranks' gradients where their sum is wanted: hence `size` times as much of each.

    Returns the scalar loss, to be averaged over the ranks, and (B, outputs) of the last layer, both without gradients.
    """
    world, accumulate = training.world, training.config.accumulate
    weight = world.sum(training.loss.weight(batch.labels))
    losses, outputs = [], []
    images, labels = (part.tensor_split(accumulate) for part in (batch.images, batch.labels))
    for number in range(accumulate):
        with nullcontext() if number + 1 == accumulate else without_sum(forward):
            with span("forward"):
                with training.precision.autocast():
                    found = forward(images[number])
                loss = training.loss(found, labels[number], weight() / world.size)
            with span("backward"):
                torch.autograd.backward(training.scaler.scale(loss))
        losses.append(loss.detach())
        outputs.append(found.detach())
    return torch.stack(losses).sum(), torch.cat(outputs)


def _check_scale(training: Training, ids: Tensor) -> None:
    """Called where the losses are read: asking for the scale waits for the device. All ranks have the same, as the gradients."""
    at, scaler = training.progress, training.scaler
    if scaler.is_enabled() and scaler.get_scale() < SMALLEST_SCALE:
        shown = shown_ids(ids, training.world)
        raise RunError(
            f"the gradients are infinite in epoch {at.epoch + 1} up to step {at.step}, sample ids {shown}, and stay so "
            "however small the loss is scaled. Lower --lr, leave --amp away, or look at these samples. "
            "The last state saved stays as it was"
        )


def _timed(loader: Loader, tally: Tally) -> Iterator[Batch]:
    batches = iter(loader)
    while True:
        started = time.perf_counter()
        tally.data_wait.begin(current_stream(loader.device))
        try:
            with span("wait"):
                batch = next(batches)
        except StopIteration:
            return
        tally.data_wait.end()
        tally.seconds += time.perf_counter() - started
        yield batch


def _evaluate(training: Training, stop: Callable[[], None]) -> bool:
    """End the epoch with its evaluation: validation first, from which alone the head's decision is fitted; then the test.
    Returns whether this epoch is the best so far. All ranks run the model; rank 0 judges, and the others take it over."""
    started = time.perf_counter()
    at, world, config = training.progress, training.world, training.config
    if at.epoch >= config.freeze_epochs:  # until then they are those that the backbone came with
        # From what the next epoch begins with: a file on a server is read in one order then, and none of it for this alone.
        training.estimate_statistics(training.graded, at.epoch + 1, stop)
    world.share(training.graded)  # BatchNorm's statistics, unless synchronised, are of each rank's own images
    validation = None if training.val_loader is None else _outputs(training, training.val_loader, "validating", stop)
    tested = _outputs(training, training.test_loader, "testing", stop)

    def judge() -> tuple[EpochRecord, int | None, Decision | None, bool]:
        val, decision = None, None
        if validation is not None:
            decision = training.head.fit(validation.values[0], validation.labels)
            val = validation.answers(training.head, decision)
        test = tested.answers(training.head, decision)
        improved = _note_epoch(training, test, val, decision, time.perf_counter() - started)
        return at.history[-1], at.best_epoch, at.decision, improved

    record, best_epoch, decision, improved = world.decided(judge)
    if not world.is_main:
        at.history.append(record)
        at.best_epoch, at.decision = best_epoch, decision
        at.epoch, at.batch, at.tally = at.epoch + 1, 0, Tally()
    return improved


def _outputs(training: Training, loader: Loader, title: str, stop: Callable[[], None]) -> Outputs:
    """The evaluated model's outputs for a data set: on rank 0 for all of it, in the file's order; on the others for their part."""
    # Without torch.compile: it would compile once more for a pass that takes a tenth of the time.
    outputs = run_model(training.graded, loader, training.precision, title, stop=stop, shown=training.world.is_main)
    parts = training.world.gather((outputs, loader.positions))
    if len(parts) < 2:
        return outputs
    order = torch.from_numpy(np.concatenate([positions for _, positions in parts]).argsort())
    values, labels, ids = zip(*((part.values, part.labels, part.ids) for part, _ in parts), strict=True)
    return Outputs(torch.cat(values, dim=1)[:, order], torch.cat(labels)[order], torch.cat(ids)[order])


def _note_epoch(
    training: Training, test: Predictions, val: Predictions | None, decision: Decision | None, evaluation_seconds: float
) -> bool:
    at, tally = training.progress, training.progress.tally
    best_before = at.best
    record = EpochRecord(
        epoch=at.epoch + 1,
        lr=float(max(training.schedule.get_last_lr())),
        train=tally.scores(training.classes),
        test=Scores.of(test, training.classes),
        val=None if val is None else Scores.of(val, training.classes),
        train_seconds=tally.seconds,
        epoch_seconds=tally.seconds + evaluation_seconds,
        data_wait_seconds=tally.wait_seconds,
        images_per_second=tally.images / max(1e-9, tally.seconds),
    )
    at.history.append(record)
    metric = training.config.select_by
    improved = best_before is None or record.selection.rank(metric) > best_before.selection.rank(metric)
    if improved:
        at.best_epoch, at.best_test, at.best_val, at.decision = record.epoch, test, val, decision
    at.epoch, at.batch, at.tally = at.epoch + 1, 0, Tally()
    return improved
