"""Weights to start from, checked before use.

A safetensors file of ours holds a checksum over every byte of it, header, metadata and tensors, which the format does not have: a
metadata entry, the crc32 of the file as it is with eight zeros in its place.
"""

from __future__ import annotations

import hashlib
import re
import socket
import sys
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torchvision
from safetensors import SafetensorError
from torch import Tensor, nn

from fastretina.errors import CheckpointError, UsageError
from fastretina.models.heads import head_layer

# torchvision's names end in the first 8 or more digits of the file's sha256. All decimal is taken for a date, not a digest.
DIGEST = re.compile(r"-(?!\d+\.)([0-9a-f]{8,64})\.(?:pth|pt|safetensors)$")
DOWNLOAD_TIMEOUT = 30.0  # seconds without an answer
_ZEROS = "0" * 8
UNSEALED = {"crc32": _ZEROS}  # goes into the metadata before `seal`
_SEAL = re.compile(rb'"crc32":"([0-9a-f]{8})"')  # quotes inside other values are escaped: they never look like this


def load_backbone(model: nn.Module, state: dict[str, Tensor], source: Path) -> None:
    """Copy `state` into `model`; a head of another size stays out. CheckpointError where other keys or shapes differ."""
    own = model.state_dict()
    name, head = head_layer(model)
    if (theirs := state.get(f"{name}.weight")) is not None and theirs.shape != head.weight.shape:
        state = {**state, **{key: value for key, value in own.items() if key.startswith(f"{name}.")}}
    # Old torchvision files lack this counter, which only a BatchNorm without momentum would read.
    state = {**{key: value for key, value in own.items() if key.endswith("num_batches_tracked")}, **state}
    missing, foreign = own.keys() - state.keys(), state.keys() - own.keys()
    if missing or foreign:
        example = ", ".join([f"lacks {key}" for key in sorted(missing)[:2]] + [f"has {key}" for key in sorted(foreign)[:2]])
        raise CheckpointError(
            f"{source}: these weights are not of this architecture ({example}); give the --arch they were made with"
        )
    for key, value in state.items():
        if value.shape != own[key].shape:
            raise CheckpointError(
                f"{source}: {key} has shape {tuple(value.shape)}, the model needs {tuple(own[key].shape)}; "
                "give the --arch the weights were made with"
            )
    model.load_state_dict(state)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a .safetensors, .pth or .pt file of named tensors; runs no code from it. Checked by the digest in its
    name and by its seal, if it has them.

    Raises CheckpointError naming the file: missing, corrupt, other bytes than its name promises, or not a dictionary of tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such weights file")
    digest = DIGEST.search(path.name)
    if digest is not None:
        with path.open("rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
        if not actual.startswith(digest[1]):
            raise CheckpointError(
                f"{path}: the file's sha256 begins {actual[: len(digest[1])]}, not {digest[1]} as its name says; "
                "fetch it again (or rename it)"
            )
    if path.suffix == ".safetensors":
        try:
            data = path.read_bytes()
            if is_intact(data) is False:
                raise CheckpointError(f"{path}: corrupt: its checksum is wrong")
            return safetensors.torch.load(data)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: not a safetensors file, or corrupt: {error}") from error
    state = load_safely(path)
    if not isinstance(state, dict) or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
        raise CheckpointError(
            f"{path}: must hold one dictionary of tensors under torchvision's names, such as torch.save(model.state_dict())"
        )
    return state


def load_safely(path: Path) -> Any:
    """`torch.load` on the CPU with weights_only=True: tensors and plain values, never code. CheckpointError naming the file."""
    refuse_inflating(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch remarks on foreign pickles before it refuses them; the error says it
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # corrupt bytes make torch raise anything: struct.error, IndexError, UnpicklingError, RuntimeError
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: corrupt, or not a file that can be read safely: {reason}") from error


def refuse_inflating(path: Path) -> None:
    """CheckpointError where a zip file holds more than its own size: torch.save stores, it never compresses.

    A few kilobytes can claim to unpack to terabytes, which a reader would try to allocate or spend hours on.
    """
    try:
        if not zipfile.is_zipfile(path):
            return  # the format before torch 1.6
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
        size, stored = sum(part.file_size for part in parts), all(part.compress_type == zipfile.ZIP_STORED for part in parts)
        if not stored or size > path.stat().st_size:
            raise CheckpointError(f"{path}: not of torch.save: compressed or overlapping parts, which unpack to {size:,} bytes")
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"{path}: corrupt, or not a file that can be read safely: {error}") from error


def weights_file(arch: str, weights: str | Path) -> Path:
    path = Path(weights)
    if path.suffix in {".pth", ".pt", ".safetensors"} or path.exists():
        return path
    known = {entry.name: str(entry.url) for entry in torchvision.models.get_model_weights(arch)}
    if str(weights) not in known:
        raise UsageError(
            f"--weights {weights}: neither a .pth or .safetensors file nor one of torchvision's for {arch}: {', '.join(known)}"
        )
    url = known[str(weights)]
    target = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if not target.exists():
        _download(url, target)
    return target


def _download(url: str, target: Path) -> None:
    way_out = f"fetch {url} elsewhere and put it at {target}, or give its path as --weights"
    waiting = socket.getdefaulttimeout()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torch.hub sets none: a silent network would hang for ever
        torch.hub.download_url_to_file(url, str(target), progress=sys.stderr.isatty())
    except OSError as error:  # urllib's errors and timeouts are all OSErrors
        raise CheckpointError(f"cannot download {target.name} ({error}); {way_out}") from error
    finally:
        socket.setdefaulttimeout(waiting)


def seal(data: bytes) -> bytes:
    """The file `data`, whose metadata holds UNSEALED, with its checksum filled in."""
    span = _checksum_span(data)
    assert span is not None
    start, end = span
    return data[:start] + f"{zlib.crc32(data):08x}".encode() + data[end:]


def is_intact(data: bytes) -> bool | None:
    """Whether `data` is as it was sealed; None where it holds no checksum. 20 ms for ResNet18's 45 MB."""
    span = _checksum_span(data)
    if span is None:
        return None
    start, end = span
    view = memoryview(data)
    crc = zlib.crc32(view[end:], zlib.crc32(_ZEROS.encode(), zlib.crc32(view[:start])))
    return f"{crc:08x}".encode() == data[start:end]


def _checksum_span(data: bytes) -> tuple[int, int] | None:
    """Where the checksum's digits are, within the header."""
    found = _SEAL.search(data, 8, min(len(data), 8 + int.from_bytes(data[:8], "little")))
    return found.span(1) if found else None
