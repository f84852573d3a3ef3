"""Progress of a counted piece of work: a bar on a terminal; elsewhere a line every few seconds, where the caller wants them."""

from __future__ import annotations

import sys
import time
from typing import Any, Self

from tqdm import tqdm

_LINE_SECONDS = 5.0


def progress_bar(title: str, total: int | None, done: int = 0, unit: str = "batch", shown: bool = True, lines: bool = False) -> Any:
    """What counts by `update` and is used in a `with` block. lines: elsewhere than on a terminal lines, where others show nothing.

    total: units, `done` of them before it begins; None: unknown. shown: whether anything is shown at all.
    """
    terminal = sys.stderr.isatty()
    if shown and lines and not terminal:
        return Lines(title, total, unit)
    return tqdm(
        file=sys.__stderr__,  # past what keeps names of strangers from moving the cursor, as a bar does
        total=total, initial=done, desc=title, unit=unit, leave=False, dynamic_ncols=True, disable=not (shown and terminal),
    )  # fmt: skip


class Lines:
    """Prints to standard error how much is done, and how much a second: every few seconds, and at an end without an error."""

    def __init__(self, title: str, total: int | None, unit: str) -> None:
        self._title, self._of, self._unit = title, "" if total is None else f" of {total:,}", unit
        self._done, self._started = 0, time.monotonic()
        self._next = self._started + _LINE_SECONDS

    def update(self, n: int = 1) -> None:
        """So many more are done."""
        self._done += n
        if time.monotonic() >= self._next:
            self._print()

    def _print(self) -> None:
        now = time.monotonic()
        self._next = now + _LINE_SECONDS
        throughput = self._done / max(now - self._started, 1e-9)
        print(
            f"{self._title}: {self._done:,}{self._of} {self._unit}s, {throughput:,.0f} {self._unit}s/s", file=sys.stderr, flush=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._print()
