"""The errors of fastretina: one small tree, each message naming the file, the row or sample, and the way out."""

from __future__ import annotations

import signal
import unicodedata
from pathlib import Path


class FastretinaError(Exception):
    """Base of every error that fastretina raises on purpose. Commands print it in one line and exit with `exit_code`."""

    exit_code = 1


class UsageError(FastretinaError):
    """A command or function was called in a way that cannot work; exit code 2."""

    exit_code = 2


class LabelError(FastretinaError):
    """A label file, or a row of it, cannot be used. Names file and row (1-based line number)."""


class JpegError(FastretinaError):
    """Bytes that are not a JPEG that fastretina accepts (malformed, or past the limits of `fastretina.beton.jpeg`)."""


class BetonError(FastretinaError):
    """A .beton file that is missing, truncated, corrupt, malicious or not in FFCV's version-2 format."""


class ConvertError(FastretinaError):
    """Packing stopped; nothing was left, nor put at the final name, but for what the message says is in its place."""


class LoaderError(FastretinaError):
    """The loader cannot go on, or was used after close()."""


class CheckpointError(FastretinaError):
    """A checkpoint or a weights file that cannot be used."""


class RunError(FastretinaError):
    """A training run that failed (NaN loss, no usable run folder, ...)."""


class SampleError(FastretinaError):
    """One sample that cannot be read as what its file claims: checksum mismatch or undecodable bytes.

    Attributes:
        path: the .beton file. index: row of it. name: the image's name. reason: what is wrong, in words.
    """

    def __init__(self, path: Path | str, index: int, name: str, reason: str) -> None:
        super().__init__(path, index, name, reason)
        self.path, self.index, self.name, self.reason = Path(path), int(index), name, reason

    def __str__(self) -> str:
        return (
            f"{self.path}: sample {self.index} ({self.name}): {self.reason}. "
            f"List all bad samples with: fastretina verify {self.path}"
        )


class CacheError(FastretinaError):
    """A cache folder that cannot be used, or has no room: its limit is too low, its disk is full, or all its files are in use."""


class RemoteError(FastretinaError):
    """A file that cannot be had from its server, after all attempts.

    Attributes:
        url: of the file. reason: what is wrong, in words.
    """

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(url, reason)
        self.url, self.reason = url, reason

    def __str__(self) -> str:
        return f"{self.url}: {self.reason}"


EXIT_SIGINT = 130


class Terminated(SystemExit):
    """SIGTERM or another signal that ends a program arrived; unwinds like Ctrl-C does, so that `finally` and `with` clean up.

    Exits with 128 and the signal's number, as shells say it: 143 for SIGTERM, 129 for SIGHUP, 152 for SIGXCPU.
    """

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__(128 + number)


def printable(text: str, keep: str = "") -> str:
    """A line for people's eyes: what moves a terminal's cursor, ends the line, reorders or hides letters is shown as an escape.

    Names in files and folders are of strangers: raw, they could write over what was said, or say what nobody said. keep: characters
    that stay.
    """
    if text.isprintable():
        return text
    return "".join(
        letter if letter in keep or unicodedata.category(letter) not in _UNSEEN else letter.encode("unicode_escape").decode()
        for letter in text
    )


# Control, format (which bidirectional overrides are), surrogate (bytes of a name that are no text), private and unknown; line ends.
_UNSEEN = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))
