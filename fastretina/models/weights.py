"""Weights to start from, checked before use.

A safetensors file of ours holds a checksum over every byte of it, header, metadata and tensors, which the format does not have: a
metadata entry, the crc32 of the file as it is with eight zeros in its place.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import socket
import sys
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torchvision
from safetensors import SafetensorError
from torch import Tensor, nn

from fastretina.errors import CheckpointError, UsageError
from fastretina.models.options import BACKBONES, TIMM, Backbone
from fastretina.models.wrappings import Stored

# torchvision's names end in the first 8 or more digits of the file's sha256. All decimal is taken for a date, not a digest.
DIGEST = re.compile(r"-(?!\d+\.)([0-9a-f]{8,64})\.(?:pth|pt|safetensors)$")
PRETRAINED = "pretrained"  # timm's own weights of a network of timm
DOWNLOAD_TIMEOUT = 30.0  # seconds without an answer
_ZEROS = "0" * 8
UNSEALED = {"crc32": _ZEROS}  # goes into the metadata before `seal`
# In what torch says of a pickle that it refuses: the class or function that is not among those it knows, or what else is wrong.
_FOREIGN = re.compile(r"\bGLOBAL (\S+)")
_UNPICKLING = re.compile(r"(?<=WeightsUnpickler error: )[^\n]+")
_FIRST_LINE = re.compile(r"\S[^\n]*")
_SEAL = re.compile(rb'"crc32":"([0-9a-f]{8})"')  # quotes inside other values are escaped: they never look like this


def load_exactly(model: nn.Module, state: dict[str, Tensor], source: Path) -> None:
    """Copy `state`, of a checkpoint of our own, into the model that it is of. CheckpointError where a name or a shape differs."""
    own = model.state_dict()
    for name in sorted(own.keys() | state.keys()):
        if name not in own or name not in state:
            raise CheckpointError(
                f"{source}: {'lacks' if name in own else 'has'} {name}: not of the network that its metadata name"
            )
        if own[name].shape != state[name].shape:
            raise CheckpointError(
                f"{source}: {name} has shape {tuple(state[name].shape)}, the network that its metadata name needs "
                f"{tuple(own[name].shape)}"
            )
    model.load_state_dict(state)


def read_weights(path: Path) -> Stored:
    """Read named tensors, out of their containers, from a .safetensors file or one of torch.save; runs no code from it. Checked by
    the digest in its name and by its seal, if it has them.

    Raises CheckpointError naming the file: missing, corrupt, other bytes than its name promises, or without tensors by name.
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
            return Stored(safetensors.torch.load(data))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: not a safetensors file, or corrupt: {error}") from error
    # timm and others put their arguments beside the weights. A Namespace only holds attributes, themselves of what may be read
    # anywhere; a pickle that gives it a method of its choice can only take one of the functions that it could call anyway.
    return Stored.of(load_safely(path, [argparse.Namespace]), path)


def load_safely(path: Path, also: Sequence[type] = ()) -> Any:
    """`torch.load` on the CPU with weights_only=True: tensors and plain values, never code. CheckpointError naming the file.

    also: classes of which it may hold objects.
    """
    refuse_inflating(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(list(also)):
            warnings.simplefilter("ignore")  # torch remarks on foreign pickles before it refuses them; the error says it
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # corrupt bytes make torch raise anything: struct.error, IndexError, UnpicklingError, RuntimeError
        if (foreign := _FOREIGN.search(str(error))) is not None:
            raise CheckpointError(
                f"{path}: cannot be read safely: it holds an object of {foreign[1]}, and only tensors and plain values are read. "
                "Whoever made it can save the weights by themselves: torch.save(model.state_dict(), FILE)"
            ) from error
        reason = (_UNPICKLING.search(str(error)) or _FIRST_LINE.search(str(error)) or [type(error).__name__])[0]
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
    if path.is_dir():
        from fastretina.models.folder import checkpoint_files  # which imports this module, too

        first, *others = checkpoint_files(path)
        if others:
            raise UsageError(f"--weights {weights}: holds {1 + len(others)} checkpoints; name one, such as {first}")
        return first
    if path.suffix in {".pth", ".pt", ".safetensors"} or path.exists():
        return path
    if not BACKBONES.get(arch, Backbone(arch)).builder.startswith("torchvision."):
        beside = f", nor {PRETRAINED!r}" if arch.startswith(TIMM) else ""
        raise UsageError(f"--weights {weights}: not a .pth or .safetensors file{beside}, which are what {arch} may start from")
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
