"""The two files that a run can be taken up from: best.safetensors to grade with, last.pt to go on training with.

Both carry checksums. The save before the last is kept (last.prev.pt, best.prev.safetensors), and a damaged one falls back to it.
"""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fastretina import __version__
from fastretina.errors import CheckpointError
from fastretina.heads import HEADS, Decision, Head, HeadName
from fastretina.models import ARCHS, build_model, load_safely, load_trunk, refuse_inflating
from fastretina.preparation import UNPREPARED, Preparation
from fastretina.runs import RunFolder, sync_folder, unfinished, write_atomically, write_bytes
from fastretina.seal import UNSEALED, is_intact, seal

STATE_FORMAT = 2  # last.pt's layout; one more whenever an older program could misread it


@dataclass(frozen=True)
class Grader:
    """Everything needed to grade an image with a trained model; the metadata of best.safetensors.

    Attributes:
        resolution: side of the square input in pixels. mean, std: what inputs in 0-1 were normalised by. epoch: from 1.
        amp_dtype: the number format of its training. metric, selected_on: how and on what data its epoch was chosen.
        head, decision: what the last layer means.
        preparation: what was done to the photographs that it learned from, and is to be done to those that it grades.
    """

    arch: str
    num_classes: int
    resolution: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    epoch: int
    amp_dtype: str
    metric: str
    selected_on: str
    head: HeadName = "softmax"
    decision: Decision | None = None
    preparation: Preparation = UNPREPARED

    @property
    def grading(self) -> Head:
        """The head, which makes probabilities of the network's outputs."""
        return HEADS[self.head](self.num_classes)

    def metadata(self) -> dict[str, str]:
        """As safetensors wants it: text by text."""
        return {**{key: json.dumps(value) for key, value in asdict(self).items()}, "fastretina": __version__}


def save_grader(path: Path, model: nn.Module, grader: Grader) -> None:
    """Write weights and metadata atomically."""
    # safetensors refuses strided views; channels-last weights are such.
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    write_grader(path, tensors, grader)


def write_grader(path: Path, tensors: dict[str, Tensor], grader: Grader) -> None:
    """Write contiguous tensors on the CPU, metadata and a checksum over all of it atomically."""
    data = seal(safetensors.torch.save(tensors, metadata={**grader.metadata(), **UNSEALED}))
    write_atomically(path, lambda file: file.write(data))


def read_grader(path: Path) -> Grader:
    """Read a checkpoint's metadata alone, without its checksum. CheckpointError: missing, damaged or not fastretina's."""
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such checkpoint")
    try:
        with safe_open(path, framework="pt") as file:
            stored = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a safetensors file, or damaged: {error}") from error
    try:
        # Checkpoints from before a field was there mean its default.
        names = [field.name for field in fields(Grader) if field.name in stored or field.default is MISSING]
        values = {name: json.loads(stored[name]) for name in names}
        values["preparation"] = Preparation(**values.get("preparation", {}))
        if values.get("decision") is not None:
            values["decision"] = _decision(values["decision"], values["num_classes"])
        grader = Grader(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})
        numbers = (grader.num_classes, grader.resolution, grader.epoch)
        if grader.arch not in ARCHS or not all(isinstance(number, int) and 0 < number < 100_000 for number in numbers):
            raise ValueError(f"arch {grader.arch!r}, {numbers}")
        if grader.head not in HEADS:
            raise ValueError(f"head {grader.head!r}")
        if [len(triple) for triple in (grader.mean, grader.std)] != [3, 3] or not all(float(value) > 0 for value in grader.std):
            raise ValueError("mean and std must be three numbers each")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: its metadata is not that of a fastretina checkpoint ({error}); bare weights go in by train's --weights"
        ) from error
    return grader


def _decision(stored: dict[str, Any], num_classes: int) -> Decision:
    thresholds, scale = tuple(float(value) for value in stored["thresholds"]), float(stored["scale"])
    if len(thresholds) != num_classes - 1 or not all(map(math.isfinite, thresholds)) or not 0 < scale < math.inf:
        raise ValueError(f"thresholds {thresholds}, scale {scale}")
    return Decision(thresholds, scale)


def load_grader(path: Path) -> tuple[nn.Module, Grader]:
    """The model (channels-last, in evaluation mode, on the CPU) and its metadata. Raises CheckpointError as `read_grader` does."""
    grader = read_grader(path)
    model = build_model(grader.arch, grader.grading.outputs)
    load_trunk(model, read_tensors(path), path)
    return model.eval(), grader


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint, by name, after a look at its checksum. CheckpointError naming the file."""
    try:
        return safetensors.torch.load(_sealed(path))
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged: {error}") from error


def _sealed(path: Path) -> bytes:
    """All bytes of a checkpoint, checked: they cannot have changed since they were written."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    intact = is_intact(data)
    if intact is None:
        raise CheckpointError(f"{path}: damaged, or not a checkpoint of fastretina: it holds no checksum")
    if not intact:
        raise CheckpointError(f"{path}: damaged: its checksum is wrong")
    return data


def save_state(path: Path, state: dict[str, Any], older: Path | None = None) -> None:
    """Write a training state (tensors and plain values) atomically: `path` holds the new state or, come what may, the old one.

    older: where the old one stays.
    """
    write_atomically(path, lambda file: torch.save({"format": STATE_FORMAT, "fastretina": __version__, **state}, file), older)


def load_state(path: Path) -> dict[str, Any]:
    """Read a training state, on the CPU; runs no code from it. CheckpointError naming the file and the way out."""
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such training state")
    refuse_inflating(path)
    try:
        # torch.save notes a crc32 of each tensor, torch.load does not look at it: 0.1 s for ResNet18's 134 MB.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, zlib.error, NotImplementedError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged, or not a training state (last.pt): {error}") from error
    if damaged is not None:
        raise CheckpointError(f"{path}: damaged: the checksum of {damaged} is wrong")
    state = load_safely(path)
    if not isinstance(state, dict) or "progress" not in state:
        raise CheckpointError(f"{path}: not a training state of fastretina; give a run's last.pt to --resume")
    if state.get("format") != STATE_FORMAT:
        raise CheckpointError(
            f"{path}: format {state.get('format')}, this fastretina reads {STATE_FORMAT}; go on with the version that wrote it"
        )
    return state


def staged_best(run: RunFolder) -> Path:
    """Where a new best checkpoint waits until the last.pt that speaks of it is on disk."""
    return run.best.with_name(".next." + run.best.name)


def find_best(run: RunFolder, best_epoch: int | None) -> Path | None:
    """The sound checkpoint of `best_epoch` (from 1; None before the first), whatever name it has just now.

    CheckpointError where there is none.
    """
    if best_epoch is None:
        return None
    for path in (run.best, staged_best(run), run.previous_best):
        try:
            if read_grader(path).epoch == best_epoch:
                _sealed(path)
                return path
        except CheckpointError:
            continue
    raise CheckpointError(
        f"{run.best}: missing, damaged or not of epoch {best_epoch}, which the training state beside it calls the best; "
        "start anew in another --out"
    )


def latest_state(run: RunFolder) -> tuple[dict[str, Any], Path | None, CheckpointError | None]:
    """The newest training state that is sound and has its best checkpoint; that checkpoint; what is wrong with last.pt, if it is.

    CheckpointError (of last.pt) where neither state can be used. Changes nothing.
    """
    problem: CheckpointError | None = None
    for path in (run.last, run.previous):
        try:
            state = load_state(path)
            return state, find_best(run, state["progress"]["best_epoch"]), problem
        except CheckpointError as error:
            problem = problem or error
    assert problem is not None
    raise problem


def settle(run: RunFolder, best: Path | None, fell_back: bool) -> None:
    """Make the folder agree with the state and the checkpoint that `latest_state` found.

    A run saves in the order: staged best, last.pt, promote. Killed anywhere between, the next start comes here and finds either a
    staged best that last.pt knows of, which gets its name, or one that last.pt has never heard of, which goes.
    """
    if best is None:
        run.best.unlink(missing_ok=True)  # of a later state, which could not be read
    elif best == run.previous_best:
        best.replace(run.best)
    elif best != run.best:
        promote_best(run)
    staged_best(run).unlink(missing_ok=True)
    unfinished(run.previous_best).unlink(missing_ok=True)
    if fell_back:
        run.previous.replace(run.last)
        run.previous_best.unlink(missing_ok=True)
    sync_folder(run.path)


def keep_best_twice(run: RunFolder, best_epoch: int | None) -> None:
    """Where both states speak of the same best checkpoint, let there be two of it, for the day when one is damaged.

    CheckpointError where it is damaged by now.
    """
    try:
        if read_grader(run.previous_best).epoch == best_epoch:
            return
    except CheckpointError:
        pass
    if best_epoch is not None:
        write_bytes(run.previous_best, _sealed(run.best))


def promote_best(run: RunFolder) -> None:
    """Give the staged checkpoint its name; the one before it stays, for the state before the last speaks of it."""
    if run.best.is_file():
        run.best.replace(run.previous_best)
    staged_best(run).replace(run.best)
    sync_folder(run.path)
