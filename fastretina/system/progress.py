"""Progress of something counted in images: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

_LINE_SECONDS = 5.0


class ImageCounter:
    """Counts images on standard error, with images/s. Use as a context manager; `advance` is cheap."""

    def __init__(self, total: int, what: str, enabled: bool = True) -> None:
        self._total, self._what, self._enabled = total, what, enabled
        self._done, self._started = 0, time.monotonic()
        self._next = self._started + _LINE_SECONDS
        self._bar: Any = None
        if enabled and sys.stderr.isatty():
            self._bar = tqdm(total=total, desc=what, unit="img", dynamic_ncols=True, mininterval=0.2)

    def advance(self) -> None:
        """One image more."""
        self._done += 1
        if self._bar is not None:
            self._bar.update()
        elif self._enabled and self._done & 15 == 0 and time.monotonic() >= self._next:
            self._line()

    def _line(self) -> None:
        now = time.monotonic()
        self._next = now + _LINE_SECONDS
        rate = self._done / max(now - self._started, 1e-9)
        print(f"{self._what}: {self._done:,} of {self._total:,} images, {rate:,.0f} images/s", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._enabled and kind is None:
            self._line()


def progress_bar(title: str, total: int | None, done: int, unit: str = "batch", shown: bool = True) -> tqdm:
    """A bar on a terminal, nothing elsewhere, or where it is not to be shown."""
    disable = not (shown and sys.stderr.isatty())
    return tqdm(total=total, initial=done, desc=title, unit=unit, leave=False, dynamic_ncols=True, disable=disable)
