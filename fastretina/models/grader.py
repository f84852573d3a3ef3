"""Grades photographs with trained models: the one way that predict, evaluate and everybody's own programs go.

grader = Grader.load("runs/x/best.safetensors")
table = grader.grade(["eye.jpg", array, pil_image])
"""

from __future__ import annotations

import math
import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from fastretina.beton.reader import Beton
from fastretina.errors import RunError, UsageError
from fastretina.loading.loader import Loader
from fastretina.metrics.fusion import Eye, fuse_eyes
from fastretina.metrics.operating import Operating, referable_scores
from fastretina.metrics.predictions import Predictions
from fastretina.metrics.uncertainty import disagreement
from fastretina.models.checkpoint import CheckpointInfo, open_checkpoint
from fastretina.models.folder import checkpoint_files, save_folder
from fastretina.models.heads import SMALLEST_PROBABILITY
from fastretina.models.inference import Outputs, check_views, run_model, view_outputs
from fastretina.models.options import AmpChoice
from fastretina.models.photographs import Photograph, Picture, Tally, photographs, prepared
from fastretina.models.precision import Precision

Given = str | os.PathLike[str] | bytes | Picture


class Member(NamedTuple):
    """One trained model, in evaluation mode on its device, and what its checkpoint says of it."""

    model: nn.Module
    info: CheckpointInfo
    path: Path
    precision: Precision


@dataclass(frozen=True)
class Answers:
    """What a grader says of N images.

    Attributes:
        predictions: the mean over its members. uncalibrated: the same without any temperature. by_member: of each of them.
    """

    predictions: Predictions
    uncalibrated: Predictions
    by_member: tuple[Predictions, ...]

    @property
    def uncertainty(self) -> NDArray[np.float64] | None:
        """(N,) nats by which the members disagree, see `metrics.uncertainty.disagreement`; None of one member."""
        if len(self.by_member) < 2:
            return None
        return disagreement(torch.stack([one.log_probabilities for one in self.by_member]).double().exp().numpy())

    def fused(self, eyes: Sequence[Eye], weight: float) -> Answers:
        """With the other eye of the same person in each; see `metrics.fusion.fuse_eyes`, which says what is refused."""

        def fuse(answers: Predictions) -> Predictions:
            mixed = fuse_eyes(eyes, answers.log_probabilities.exp(), weight)
            return replace(answers, log_probabilities=mixed.clamp_min(SMALLEST_PROBABILITY).log())

        return Answers(fuse(self.predictions), fuse(self.uncalibrated), tuple(map(fuse, self.by_member)))


class Batch(NamedTuple):
    """Photographs that were prepared together, and of those without an error, in their order: images, (B, 3, R, R) float32 by
    resolution; log_probabilities, (B, C) float32 on the CPU; by_member, (M, B, C)."""

    photographs: list[Photograph]
    images: dict[int, Tensor]
    log_probabilities: Tensor
    by_member: Tensor


class Answer(NamedTuple):
    """What is said of one photograph. referable: None where no class is; probabilities: of the classes; uncertainty: how far the
    members of an ensemble disagree, in nats (`metrics.uncertainty.disagreement`), None of one model."""

    grade: int
    referable: bool | None
    probabilities: list[float]
    uncertainty: float | None


class Grader:
    """One trained model, or an ensemble of several whose probabilities are averaged.

    Attributes:
        members: the models. classes: what they tell apart. preparation, size: how photographs are prepared for them, and the side
            in pixels of the square that they become. device: where it computes. views: of each image, 1 to 8.
    """

    def __init__(self, members: Sequence[Member], device: torch.device, views: int = 1) -> None:
        """UsageError where the members do not go together."""
        check_views(views)
        self.members, self.device, self.views = tuple(members), device, views
        first = self.members[0]
        self.classes, self.preparation, self.size = first.info.classes, first.info.preparation, _size(first.info)
        for other in self.members[1:]:
            for what, one, two in (
                ("classes", self.classes, other.info.classes),
                ("preparation", self.preparation.flags, other.info.preparation.flags),
                ("size of the photographs", f"{self.size} px", f"{_size(other.info)} px"),
            ):
                if one != two:
                    raise UsageError(
                        f"{first.path} and {other.path} make no ensemble: they differ in their {what}: {one}, and {two}"
                    )

    @classmethod
    def load(
        cls,
        checkpoint: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        amp: AmpChoice = "auto",
        tta: int = 1,
    ) -> Grader:
        """Read one checkpoint, or several for an ensemble.

        Args:
            checkpoint: a run's best.safetensors, its folder, that of all folds of a run, or one that `save` wrote.
            device: auto takes a GPU where there is one. amp: auto takes the number format of the training, where the device has it.
            tta: average over so many of the square's 8 symmetries (test-time augmentation).

        Raises CheckpointError: missing, corrupt, or not fastretina's; UsageError: models that do not go together.
        """
        given = [checkpoint] if isinstance(checkpoint, str | os.PathLike) else checkpoint
        paths = [file for path in given for file in checkpoint_files(Path(path))]
        if not paths:
            raise UsageError("give at least one checkpoint")
        members = []
        for path in paths:
            model, info, place, precision = open_checkpoint(path, device, amp)
            members.append(Member(model, info, path, precision))
        return cls(members, place, tta)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a new folder that `load` reads anywhere: model.safetensors (of an ensemble model-1.safetensors, ...), the card
        card.md of each, thresholds.json and preparation.json; docs/sharing.md says what is in them.

        Raises UsageError where there is something already, CheckpointError where a checkpoint has changed since, RunError.
        """
        save_folder(Path(folder), [(member.path, member.info) for member in self.members], self.size, self.operating)

    @property
    def operating(self) -> Operating | None:
        """The thresholds for referring that were frozen on validation data: of several models the means of theirs. None where one
        of them has none."""
        found = [member.info.operating for member in self.members]
        known = [one for one in found if one is not None]
        if len(known) < len(found):
            return None
        return known[0] if len(known) == 1 else Operating.mean(known)

    def threshold(self, asked: str | float) -> float:
        """What the probability of referable disease must reach: that of this name, or the number itself. UsageError."""
        if not self.classes.referable:
            raise UsageError(f"--threshold {asked}: no class is referable: {self.classes}")
        names = [] if self.operating is None else [one.name for one in self.operating.thresholds]
        if self.operating is not None and asked in names:
            return self.operating.named(str(asked)).value
        try:
            value = float(asked)
        except ValueError:
            if self.operating is None:
                without = ", ".join(str(member.path) for member in self.members if member.info.operating is None)
                reason = (
                    f"{without}: has no frozen thresholds: it was trained without validation data that show referable disease; "
                    "give a number in 0-1, or train with --val or --val-fraction"
                )
            else:
                reason = f"one of {', '.join(names)}, or a number in 0-1"
            raise UsageError(f"--threshold {asked}: {reason}") from None
        if not 0 <= value <= 1:
            raise UsageError(f"--threshold {asked}: a probability lies in 0-1")
        return value

    def answers(
        self, beton: Beton, *, batch_size: int = 32, workers: int | None = None, decode: Literal["auto", "cpu", "gpu"] = "auto"
    ) -> Answers:
        """Of all images of a data set, in its order. Raises RunError where an answer is not finite, and what a Loader raises."""
        found = []
        for number, member in enumerate(self.members, start=1):
            title = "grading" if len(self.members) == 1 else f"grading, model {number}/{len(self.members)}"
            with Loader(
                beton,
                batch_size=batch_size,
                train=False,
                resolution=member.info.resolution,
                device=str(self.device),
                workers=workers,
                decode=decode,
            ) as loader:
                found.append(run_model(member.model, loader, member.precision, title, views=self.views))
        calibrated = tuple(
            outputs.answers(member.info.grading, member.info.decision) for outputs, member in zip(found, self.members, strict=True)
        )
        plain = [_uncalibrated(outputs, member.info) for outputs, member in zip(found, self.members, strict=True)]
        return Answers(_mean(calibrated), _mean(plain), calibrated)

    def graded(self, given: Sequence[Photograph], batch_size: int = 32, workers: int | None = None) -> Generator[Batch]:
        """Photographs, batch by batch, in their order; see `models.photographs`. RunError where an answer is not finite."""
        workers = workers or len(os.sched_getaffinity(0))
        resolutions = {member.info.resolution for member in self.members}
        ready = prepared(given, self.size, self.preparation, resolutions, workers, batch_size + 2 * workers)
        with torch.no_grad(), closing(ready):
            while batch := list(islice(ready, batch_size)):
                good = [one.images for one in batch if one.images is not None]
                images = {
                    resolution: torch.from_numpy(np.stack([one[resolution] for one in good])).permute(0, 3, 1, 2).to(self.device)
                    for resolution in (resolutions if good else ())
                }
                parts = [self._answer(member, images) for member in self.members] if good else [torch.empty(0, len(self.classes))]
                # The pixels have gone to the network: kept, those of all photographs would fill the memory.
                yield Batch([one._replace(images=None) for one in batch], images, mean_of(parts), torch.stack(parts))

    def _answer(self, member: Member, images: dict[int, Tensor]) -> Tensor:
        """(B, C) log-probabilities on the CPU."""
        outputs = view_outputs(member.model, images[member.info.resolution], member.precision, self.views).cpu()
        if not bool(torch.isfinite(outputs).all()):
            raise RunError(f"{member.path}: the model's answer is not finite: its weights contain NaN or Inf")
        return member.info.grading.answer(outputs, member.info.decision)

    def refers(self, log_probabilities: Tensor, threshold: float | None) -> list[bool | None]:
        """Whether each of (B, C) answers refers: the answer is a referable class; or the probability of referable disease reaches
        the threshold. None where no class is referable."""
        if not self.classes.referable:
            return [None] * len(log_probabilities)
        if threshold is None:
            return [best in self.classes.referable for best in log_probabilities.argmax(dim=1).tolist()]
        scores = referable_scores(log_probabilities.double().exp().numpy(), self.classes)
        return [bool(score >= threshold) for score in scores]

    def grade(
        self,
        images: Given | Sequence[Given],
        *,
        threshold: str | float | None = None,
        batch_size: int = 32,
        workers: int | None = None,
    ) -> pd.DataFrame:
        """Grade photographs of any size. One that cannot be graded has its reason in `error`, and nothing else.

        Args:
            images: one or several of: a path (of a folder: all photographs below it), a file's bytes, an array of (H, W, 3) uint8
                RGB pixels, an image of Pillow's.
            threshold: refer where the probability of referable disease reaches it: "high-sensitivity", "high-specificity" or
                "youden", as frozen in the checkpoint, or a number. None: where the grade is a referable one.
            workers: threads that prepare; None: one for each core.

        Returns a row for each photograph: name (its path, or "image 3"), grade, referable, p0, p1, ... (probabilities, calibrated
        where the model was trained with validation data), done (to the photograph), error; of an ensemble uncertainty, too (its
        members' disagreement, nats, 0 for none; see `metrics.uncertainty`). UsageError for what it cannot take.
        """
        value = None if threshold is None else self.threshold(threshold)
        columns = [f"p{number}" for number in range(len(self.classes))]
        rows: list[list[object]] = []
        for batch in self.graded(as_photographs(images), batch_size, workers):
            answers = self.of_batch(batch, value)
            for one in batch.photographs:
                if one.error:
                    rows.append([one.name, *[None] * (len(columns) + 3), None, one.error])
                else:
                    best, refers, probabilities, uncertainty = next(answers)
                    rows.append([one.name, best, refers, *probabilities, uncertainty, "; ".join(one.done), None])
        table = pd.DataFrame(rows, columns=["name", "grade", "referable", *columns, "uncertainty", "done", "error"])
        table = table.astype({"grade": "Int64", "referable": "boolean", **dict.fromkeys([*columns, "uncertainty"], "float64")})
        return table if len(self.members) > 1 else table.drop(columns="uncertainty")

    def of_batch(self, batch: Batch, threshold: float | None) -> Iterator[Answer]:
        """Of each photograph of a batch that could be graded, in their order. threshold: as of `refers`."""
        probabilities = batch.log_probabilities.exp()
        grades, refers = probabilities.argmax(dim=1).tolist(), self.refers(batch.log_probabilities, threshold)
        unsure: list[float | None] = [None] * len(grades)
        if len(self.members) > 1:
            unsure = disagreement(batch.by_member.double().exp().numpy()).tolist()
        return map(Answer, grades, refers, probabilities.tolist(), unsure)


def as_photographs(images: Given | Sequence[Given]) -> list[Photograph]:
    """What is to be graded, each called by its path, or by its number, from 1. UsageError for what is no photograph."""
    several = images if isinstance(images, list | tuple) else [images]
    found = []
    for number, one in enumerate(several, start=1):
        if isinstance(one, str | os.PathLike):
            found += photographs([Path(one)], Tally())
        elif isinstance(one, bytes | Image.Image) or (isinstance(one, np.ndarray) and one.dtype == np.uint8 and one.ndim in (2, 3)):
            found.append(Photograph(one, f"image {number}"))
        else:
            kind = f"an array of {one.dtype}, {one.shape}" if isinstance(one, np.ndarray) else f"a {type(one).__name__}"
            raise UsageError(f"image {number}: is {kind}; give a path, bytes of a file, (H, W, 3) uint8 RGB pixels or a PIL image")
    return found


def mean_of(log_probabilities: Sequence[Tensor]) -> Tensor:
    """(N, C) logarithms of the mean of the probabilities of M models."""
    if len(log_probabilities) == 1:
        return log_probabilities[0]
    return torch.stack(list(log_probabilities)).logsumexp(dim=0) - math.log(len(log_probabilities))


def _mean(several: Sequence[Predictions]) -> Predictions:
    return Predictions(mean_of([one.log_probabilities for one in several]), several[0].labels, several[0].ids)


def _uncalibrated(outputs: Outputs, info: CheckpointInfo) -> Predictions:
    head = info.grading
    return outputs.answers(head, head.uncalibrated(info.decision))


def _size(info: CheckpointInfo) -> int:
    """Of the square that photographs become. Unknown of older checkpoints: then what the network sees."""
    return info.size or info.resolution
