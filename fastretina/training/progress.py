"""Where a run stands: its epochs' metrics, the best of them, and what is done of the current epoch. All of it goes into last.pt."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastretina.errors import RunError
from fastretina.grading import Classes
from fastretina.metrics.predictions import GradeMetrics, Predictions, Scores, grade_metrics
from fastretina.models.heads import Decision
from fastretina.system.cuda import DataWait, current_stream, mark
from fastretina.training.config import TrainConfig
from fastretina.training.distributed import ALONE, World

SHOWN_IDS = 64


def shown_ids(ids: Tensor, world: World = ALONE) -> str:
    """A step's sample ids for an error message, of all ranks' (B,) together the first 64."""
    parts = world.gather(ids.tolist())
    found = world.decided(lambda: [number for part in parts for number in part])
    return ", ".join(str(number) for number in found[:SHOWN_IDS]) + (", ..." if len(found) > SHOWN_IDS else "")


@dataclass(frozen=True)
class EpochRecord:
    """One finished epoch.

    Attributes:
        epoch: from 1. lr: the learning rate at its end. train: scores of the augmented images as they were trained on, while
            the weights moved. test, val: scores after it, without augmentation; val is None without a validation set.
        train_seconds: the training pass. epoch_seconds: with the evaluation. data_wait_seconds: the part of train_seconds in
            which training had no batch to work on: on CUDA the device, by its own clock, however long the host blocked; on a CPU
            the host, in the loader. Of several ranks, rank 0's. images_per_second: training images by train_seconds.
    """

    epoch: int
    lr: float
    train: Scores
    test: Scores
    val: Scores | None
    train_seconds: float
    epoch_seconds: float
    data_wait_seconds: float
    images_per_second: float

    @property
    def data_wait_share(self) -> float:
        """Waiting for data by training time, 0-1."""
        return self.data_wait_seconds / self.train_seconds if self.train_seconds > 0 else 0.0

    @property
    def selection(self) -> Scores:
        """What the best epoch is chosen by: the scores of the validation set where there is one, else of the test set."""
        return self.val or self.test

    def row(self) -> dict[str, float | None]:
        """The row of results.csv, by column."""
        row: dict[str, float | None] = {"epoch": self.epoch, "lr": self.lr}
        for name, scores in (("train", self.train), ("test", self.test), ("val", self.val)):
            if scores is not None:
                row |= {f"{name}_{metric}": value for metric, value in scores.values.items()}
        row["images_per_second"] = self.images_per_second
        row["data_wait_seconds"] = self.data_wait_seconds
        row["train_seconds"], row["epoch_seconds"] = self.train_seconds, self.epoch_seconds
        return row

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> EpochRecord:
        """The inverse of dataclasses.asdict."""

        def scores(value: dict[str, Any]) -> Scores:
            # One of an older last.pt held each metric by itself too, and nothing of an order, which all classes had.
            return Scores(
                value["loss"],
                GradeMetrics(**{key: value["metrics"][key] for key in ("confusion", "ordinal") if key in value["metrics"]}),
            )

        val = scores(data["val"]) if data["val"] is not None else None
        record = cls(**{**data, "train": scores(data["train"]), "test": scores(data["test"]), "val": val})
        if not all(value is None or isinstance(value, int | float) for value in record.row().values()):
            raise ValueError(f"epoch {record.epoch} has a metric that is no number")
        return record


_Step = tuple[int, Tensor, Tensor]  # its number, scalar loss, (B,) sample ids


class _Coming:
    """The losses of some steps on their way to the host."""

    def __init__(self, steps: list[_Step]) -> None:
        self.steps = steps
        losses = torch.stack([loss for _, loss, _ in steps]).double()
        if losses.is_cuda:
            losses = torch.empty_like(losses, device="cpu", pin_memory=True).copy_(losses, non_blocking=True)
        self._losses, self._arrived = losses, mark(current_stream(steps[0][1].device))

    def losses(self) -> Tensor:
        """(steps,) float64 on the CPU. Waits for them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._losses


class Tally:
    """What the current epoch's training pass has given so far. `add` leaves tensors on their device; `read` fetches them.

    Of several ranks each notes its part of every step. What is read is of all of them; the grades come together in `gather`.
    """

    def __init__(self) -> None:
        self.loss_sum = 0.0
        self.images = 0  # those read
        self.seconds = 0.0
        self.wait_seconds = 0.0  # those read
        self.data_wait = DataWait()
        self._predicted: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._unread: list[_Step] = []
        self._coming: _Coming | None = None

    def add(self, step: int, loss: Tensor, predicted: Tensor, labels: Tensor, ids: Tensor) -> None:
        """Note one step: its number, scalar mean loss (of several ranks: the mean of theirs is the step's), (B,) predicted and true
        grades and sample ids, all on the device."""
        self._unread.append((step, loss.detach(), ids))
        self._predicted.append(predicted)
        self._labels.append(labels)

    def read(self, epoch: int, world: World = ALONE, late: bool = False) -> None:
        """Fetch the losses noted so far, and how long training waited for data. RunError (epoch, step, samples) where a loss is not
        finite.

        late: fetch what was noted until the last such call, and let the rest set out: a device that has more to do by now need not
        run dry while the host waits for these.
        """
        coming, self._coming = self._coming, _Coming(self._unread) if self._unread else None
        self._unread = []
        self._note(coming, epoch, world)
        if not late:
            coming, self._coming = self._coming, None
            self._note(coming, epoch, world)
        self.wait_seconds += self.data_wait.read(late)

    def _note(self, coming: _Coming | None, epoch: int, world: World) -> None:
        if coming is None:
            return
        losses = coming.losses() / world.size
        images = torch.tensor([len(ids) for _, _, ids in coming.steps], dtype=torch.float64)
        summed = world.sum(torch.stack([losses, images], dim=1))().tolist()
        for (value, count), (step, _, ids) in zip(summed, coming.steps, strict=True):
            if not math.isfinite(value):
                shown = shown_ids(ids, world)
                raise RunError(
                    f"the loss is {value} in epoch {epoch + 1} at step {step}, sample ids {shown}. Lower --lr, leave "
                    "--amp away, or look at these samples. The last state saved stays as it was"
                )
            self.loss_sum += value * count
            self.images += int(count)

    def noted(self, world: World = ALONE) -> int:
        """Images so far, those included whose losses are not read, of which other ranks are taken to have as many."""
        steps = [*self._unread, *(self._coming.steps if self._coming else ())]
        return self.images + world.size * sum(len(ids) for _, _, ids in steps)

    @property
    def loss(self) -> float:
        """Mean training loss of the images read so far, nats; 0 before the first."""
        return self.loss_sum / max(1, self.images)

    def gather(self, world: World) -> None:
        """Bring the grades that all ranks noted together on rank 0."""
        if world.size > 1:
            none = torch.empty(0, dtype=torch.int64)
            parts = world.gather([torch.cat(noted).cpu() if noted else none for noted in (self._predicted, self._labels)])
            self._predicted, self._labels = ([part[column] for part in parts] for column in (0, 1))

    def scores(self, classes: Classes) -> Scores:
        """Loss and metrics of the pass so far; everything added must have been read, and gathered."""
        return Scores(self.loss, grade_metrics(torch.cat(self._predicted), torch.cat(self._labels), classes))

    def state_dict(self) -> dict[str, Any]:
        """Plain values and CPU tensors."""
        state: dict[str, Any] = {key: getattr(self, key) for key in ("loss_sum", "images", "seconds", "wait_seconds")}
        if self._labels:
            state |= {"predicted": torch.cat(self._predicted).cpu(), "labels": torch.cat(self._labels).cpu()}
        return state

    def load_state_dict(self, state: dict[str, Any], world: World) -> None:
        """Take over a state_dict(); the grades in it rank 0 alone, which had gathered them."""
        self.loss_sum, self.images = float(state["loss_sum"]), int(state["images"])
        self.seconds, self.wait_seconds = float(state["seconds"]), float(state["wait_seconds"])
        if "labels" in state and world.is_main:
            self._predicted, self._labels = [state["predicted"].to(world.device)], [state["labels"].to(world.device)]


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        epoch: the one being trained, from 0; equal to the number of epochs when the run is finished. batch: training batches done
            in it. step: optimizer steps done in all. history: finished epochs. best_epoch: from 1, None before the first.
        best_test, best_val: the best checkpoint's answers on the test set, and on the validation set if there is one.
        decision: what its head was fitted to, if anything.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    history: list[EpochRecord] = field(default_factory=list)
    best_epoch: int | None = None
    best_test: Predictions | None = None
    best_val: Predictions | None = None
    decision: Decision | None = None
    tally: Tally = field(default_factory=Tally)

    @property
    def best(self) -> EpochRecord | None:
        """The record of the best epoch."""
        return None if self.best_epoch is None else self.history[self.best_epoch - 1]

    @property
    def best_answers(self) -> dict[str, Predictions | None]:
        """The best checkpoint's answers, by data set."""
        return {"test": self.best_test, "val": self.best_val}

    def is_over(self, config: TrainConfig) -> bool:
        """Whether the run is finished: all epochs are done, or the last `patience` of them (of the second phase, if the schedule
        has one) were no better than the best."""
        if self.epoch >= config.epochs:
            return True
        since = max(self.best_epoch or 0, config.second_phase or 0)
        return config.patience is not None and self.batch == 0 and self.epoch - since >= config.patience

    def state_dict(self) -> dict[str, Any]:
        """Plain values and CPU tensors."""
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "step": self.step,
            "history": [asdict(record) for record in self.history],
            "best_epoch": self.best_epoch,
            **{f"best_{name}": answers and dict(vars(answers)) for name, answers in self.best_answers.items()},
            "decision": None if self.decision is None else asdict(self.decision),
            "tally": self.tally.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], world: World = ALONE) -> None:
        """Take over a state_dict(). ValueError, TypeError, KeyError, AttributeError where it is none that a run can have."""
        self.epoch, self.batch, self.step = state["epoch"], state["batch"], state["step"]
        self.history = [EpochRecord.from_dict(record) for record in state["history"]]
        if [record.epoch for record in self.history] != list(range(1, self.epoch + 1)):
            raise ValueError(f"{self.epoch} epochs are done, and there are the metrics of {len(self.history)}")
        self.best_epoch = state["best_epoch"]
        # An older last.pt holds no answers on the validation set.
        self.best_test, self.best_val = (
            None if (found := state.get(f"best_{name}")) is None else Predictions(**found) for name in ("test", "val")
        )
        self.decision = None if state["decision"] is None else Decision(**state["decision"])
        self.tally.load_state_dict(state["tally"], world)
