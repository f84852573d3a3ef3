"""The two files that a run can be taken up from: best.safetensors to grade with, last.pt to go on training with."""

from __future__ import annotations

import json
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from fastretina import __version__
from fastretina.errors import CheckpointError
from fastretina.models import ARCHS, build_model, load_safely, load_trunk
from fastretina.runs import RunFolder, sync_folder, write_atomically

STATE_FORMAT = 1  # last.pt's layout; one more whenever an older program could misread it


@dataclass(frozen=True)
class Grader:
    """Everything needed to grade an image with a trained model; the metadata of best.safetensors.

    Attributes:
        resolution: side of the square input in pixels. mean, std: what inputs in 0-1 were normalised by. epoch: from 1.
        amp_dtype: the number format of its training. metric, selected_on: how and on what data its epoch was chosen.
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

    def metadata(self) -> dict[str, str]:
        """As safetensors wants it: text by text."""
        return {**{key: json.dumps(value) for key, value in vars(self).items()}, "fastretina": __version__}


def save_grader(path: Path, model: nn.Module, grader: Grader) -> None:
    """Write weights and metadata atomically."""
    # safetensors refuses strided views; channels-last weights are such.
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    data = safetensors.torch.save(tensors, metadata=grader.metadata())
    write_atomically(path, lambda file: file.write(data))


def read_grader(path: Path) -> Grader:
    """Read a checkpoint's metadata alone. CheckpointError naming the file where it is missing, damaged or not fastretina's."""
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such checkpoint")
    try:
        with safe_open(path, framework="pt") as file:
            stored = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a safetensors file, or damaged: {error}") from error
    try:
        values = {key: json.loads(stored[key]) for key in Grader.__dataclass_fields__}
        grader = Grader(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})
        numbers = (grader.num_classes, grader.resolution, grader.epoch)
        if grader.arch not in ARCHS or not all(isinstance(number, int) and 0 < number < 100_000 for number in numbers):
            raise ValueError(f"arch {grader.arch!r}, {numbers}")
        if [len(triple) for triple in (grader.mean, grader.std)] != [3, 3] or not all(float(value) > 0 for value in grader.std):
            raise ValueError("mean and std must be three numbers each")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: its metadata is not that of a fastretina checkpoint ({error}); bare weights go in by train's --weights"
        ) from error
    return grader


def load_grader(path: Path) -> tuple[nn.Module, Grader]:
    """The model (channels-last, in evaluation mode, on the CPU) and its metadata. Raises CheckpointError as `read_grader` does."""
    grader = read_grader(path)
    model = build_model(grader.arch, grader.num_classes)
    try:
        state = safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged: {error}") from error
    load_trunk(model, state, path)
    return model.eval(), grader


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a training state (tensors and plain values) atomically: `path` holds the new state or, come what may, the old one."""
    write_atomically(path, lambda file: torch.save({"format": STATE_FORMAT, "fastretina": __version__, **state}, file))


def load_state(path: Path) -> dict[str, Any]:
    """Read a training state, on the CPU; runs no code from it. CheckpointError naming the file and the way out."""
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such training state (last.pt)")
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


def settle_best(run: RunFolder, best_epoch: int | None) -> None:
    """Make best.safetensors agree with last.pt, which says that `best_epoch` (from 1) is the best.

    A run saves in the order: staged best, last.pt, settle. Killed anywhere between, the next start comes here and finds either a
    staged best that last.pt knows of, which gets its name, or one that last.pt has never heard of, which goes.
    """
    staged = staged_best(run)
    if staged.is_file():
        if best_epoch is not None and read_grader(staged).epoch == best_epoch:
            staged.replace(run.best)
            sync_folder(run.path)
        else:
            staged.unlink()
    if best_epoch is not None and (not run.best.is_file() or read_grader(run.best).epoch != best_epoch):
        raise CheckpointError(
            f"{run.best}: missing or not of epoch {best_epoch}, which {run.last} calls the best; start anew in another --out"
        )
