"""Standard output and error as a command finds them, closed, full, broken off or in ASCII; and safe to print strange names to."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, TextIO, cast

from fastretina.errors import printable

_COLOURS = re.compile(r"(\x1b\[[\d;]*m)")


class Printed:
    """A text stream through which nothing reaches a terminal but printable text, line ends and tabs.

    Standard output that cannot be written is an OSError that says so. What is said on standard error is said to nobody then.
    """

    def __init__(self, stream: TextIO, title: str = "") -> None:
        """title: of a stream that must be written; without it an error is no reason to stop."""
        self._stream, self._title = stream, title
        self.coloured = False  # whether colours come through as well: while only the command line is parsed
        if isinstance(stream, io.TextIOWrapper):
            with suppress(OSError):  # of a file whose descriptor has become a pipe's: then it is done all the same
                stream.reconfigure(errors="backslashreplace")  # the locale may have no letters but ASCII's

    def write(self, text: str) -> int:
        parts = _COLOURS.split(text) if self.coloured else [text]
        safe = "".join(part if number % 2 else printable(part, "\n\t") for number, part in enumerate(parts))
        with self._reported():
            self._stream.write(safe)
        return len(text)

    def flush(self) -> None:
        with self._reported():
            self._stream.flush()

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # What is left in its buffer would fail once more as Python exits.
            with suppress(OSError), Path(os.devnull).open("wb") as nobody:
                os.dup2(nobody.fileno(), self._stream.fileno())
            if self._title:
                raise OSError(error.errno, error.strerror, self._title) from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def standard_streams() -> Iterator[tuple[Printed, Printed]]:
    """Makes standard output and error what they are to be, for the time of a command. Closed ones lead to /dev/null.

    Of the three descriptors none stays free: the next file to be opened would get its number, and all that is printed.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest number that is free
    out = Printed(sys.stdout or open(1, "w", closefd=False), "standard output")  # noqa: SIM115
    error = Printed(sys.stderr or open(2, "w", closefd=False))  # noqa: SIM115
    with redirect_stdout(cast(TextIO, out)), redirect_stderr(cast(TextIO, error)):
        yield out, error


@contextmanager
def coloured(streams: tuple[Printed, Printed]) -> Iterator[None]:
    """Lets colours through meanwhile, which help and messages about flags have."""
    for stream in streams:
        stream.coloured = True
    try:
        yield
    finally:
        for stream in streams:
            stream.coloured = False
