"""The two files that a run can be taken up from: best.safetensors to grade with, last.pt to go on training with.

Both carry checksums. The save before the last is kept (last.prev.pt, best.prev.safetensors), and a corrupt one falls back to it.
"""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fastretina.errors import CheckpointError, UsageError
from fastretina.grading import RETINOPATHY, Classes
from fastretina.loading.augment import IMAGENET_MEAN, IMAGENET_STD
from fastretina.metrics.operating import Operating
from fastretina.models.heads import HEADS, Decision, Head
from fastretina.models.options import AmpChoice, HeadName, is_arch
from fastretina.models.precision import Precision, choose_device, choose_precision
from fastretina.models.resnet import build_model
from fastretina.models.weights import UNSEALED, is_intact, load_exactly, seal
from fastretina.packing.preprocessing import UNPREPARED, Preparation
from fastretina.system.files import write_atomically
from fastretina.system.json_text import parse_json
from fastretina.version import __version__


@dataclass(frozen=True)
class CheckpointInfo:
    """Everything needed to grade an image with a trained model; the metadata of best.safetensors.

    Attributes:
        resolution: side of the square input in pixels. mean, std: what inputs in 0-1 were normalised by. epoch: from 1.
        amp_dtype: the number format of its training. metric, selected_on: how and on what data its epoch was chosen.
        head, decision: what the last layer means.
        preparation: what was done to the photographs that it learned from, and is to be done to those that it grades.
        classes: what it tells apart.
        data: digests (`Beton.digest`) of the data sets that had a part in it, by name: train, what its epoch was chosen on
            (val, else test), and whole, the files that the training set is of; None where they are not known.
        operating: thresholds for referring, frozen on its validation data; None without such data, or where nothing is referable.
        size: side in pixels of the photographs that it learned from, as they were packed; None where unknown, or not all alike.
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
    classes: Classes = RETINOPATHY
    data: dict[str, str | None] | None = None
    operating: Operating | None = None
    size: int | None = None

    @property
    def grading(self) -> Head:
        """The head, which makes probabilities of the network's outputs."""
        return HEADS[self.head](self.num_classes)

    def metadata(self) -> dict[str, str]:
        """As safetensors wants it: text by text."""
        return {**{key: json.dumps(value) for key, value in asdict(self).items()}, "fastretina": __version__}


def save_checkpoint(path: Path, model: nn.Module, info: CheckpointInfo) -> None:
    """Write weights and metadata atomically."""
    # safetensors refuses strided views; channels-last weights are such.
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    write_checkpoint(path, tensors, info)


def write_checkpoint(path: Path, tensors: dict[str, Tensor], info: CheckpointInfo) -> None:
    """Write contiguous tensors on the CPU, metadata and a checksum over all of it atomically."""
    data = seal(safetensors.torch.save(tensors, metadata={**info.metadata(), **UNSEALED}))
    write_atomically(path, lambda file: file.write(data))


def read_info(path: Path) -> CheckpointInfo:
    """Read a checkpoint's metadata alone, without its checksum. CheckpointError: missing, corrupt or not fastretina's."""
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such checkpoint")
    try:
        with safe_open(path, framework="numpy") as file:  # torch's way of mapping a file wants a path in UTF-8
            stored = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a safetensors file, or corrupt: {error}") from error
    try:
        # Checkpoints from before a field was there mean its default.
        names = [field.name for field in fields(CheckpointInfo) if field.name in stored or field.default is MISSING]
        values = {name: parse_json(stored[name]) for name in names}
        values["preparation"] = Preparation(**values.get("preparation", {}))
        if values.get("decision") is not None:
            values["decision"] = _decision(values["decision"], values["head"], values["num_classes"])
        values |= {name: tuple(values[name]) for name in ("mean", "std")}
        if "classes" in values:
            values["classes"] = Classes.stored(values["classes"])
        if values.get("operating") is not None:
            values["operating"] = Operating.stored(values["operating"])
        info = CheckpointInfo(**values)
        numbers = (info.num_classes, info.resolution, info.epoch, 1 if info.size is None else info.size)
        if not (isinstance(info.arch, str) and is_arch(info.arch)) or not all(
            isinstance(number, int) and 0 < number < 100_000 for number in numbers
        ):
            raise ValueError(f"arch {info.arch!r}, {numbers}")
        if info.data is not None and not isinstance(info.data, dict):
            raise ValueError(f"data {info.data!r}")
        if len(info.classes) != info.num_classes:
            raise ValueError(f"classes {info.classes}, of which there are {info.num_classes}")
        if info.head not in HEADS or (HEADS[info.head].needs_order and not info.classes.ordinal):
            raise ValueError(f"head {info.head!r} for classes {info.classes}")
        if [len(triple) for triple in (info.mean, info.std)] != [3, 3] or not all(float(value) > 0 for value in info.std):
            raise ValueError("mean and std must be three numbers each")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: its metadata is not that of a fastretina checkpoint ({error}); bare weights go in by train's --weights"
        ) from error
    return info


def _decision(stored: dict[str, Any], head: str, num_classes: int) -> Decision:
    thresholds, scale = tuple(float(value) for value in stored["thresholds"]), float(stored["scale"])
    expected = num_classes - 1 if head == "regression" else 0
    if len(thresholds) != expected or not all(map(math.isfinite, thresholds)) or not 0 < scale < math.inf:
        raise ValueError(f"thresholds {thresholds}, scale {scale} of head {head!r}")
    return Decision(thresholds, scale)


def load_checkpoint(path: Path) -> tuple[nn.Module, CheckpointInfo]:
    """The model (channels-last, in evaluation mode, on the CPU) and its metadata. Raises CheckpointError as `read_info` does."""
    info = read_info(path)
    try:
        model = build_model(info.arch, info.grading.outputs, resolution=info.resolution)
    except UsageError as error:  # timm is not installed, or an older or newer one has no such network
        raise CheckpointError(f"{path}: {error}") from error
    load_exactly(model, read_tensors(path), path)
    return model.eval(), info


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint, by name, after a look at its checksum. CheckpointError naming the file."""
    try:
        return safetensors.torch.load(sealed_bytes(path))
    except SafetensorError as error:
        raise CheckpointError(f"{path}: corrupt: {error}") from error


def sealed_bytes(path: Path) -> bytes:
    """All bytes of a checkpoint, which cannot have changed since they were written. CheckpointError naming the file."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    intact = is_intact(data)
    if intact is None:
        raise CheckpointError(f"{path}: corrupt, or not a checkpoint of fastretina: it holds no checksum")
    if not intact:
        raise CheckpointError(f"{path}: corrupt: its checksum is wrong")
    return data


def open_checkpoint(path: Path, device_name: str, amp: AmpChoice) -> tuple[nn.Module, CheckpointInfo, torch.device, Precision]:
    """A checkpoint's model on the device, its metadata, the device, and the number format to grade in."""
    device = choose_device(device_name)
    model, info = load_checkpoint(path)
    if (info.mean, info.std) != (IMAGENET_MEAN, IMAGENET_STD):
        raise CheckpointError(
            f"{path}: trained on images normalised by {info.mean} and {info.std}, which this version does not make"
        )
    precision = choose_precision(amp == "on" or (amp == "auto" and info.amp_dtype != "float32"), device)
    return model.to(device), info, device, precision
