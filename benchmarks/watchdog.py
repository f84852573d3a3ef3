"""What ends a process that hangs: nothing else can be done about a call into a driver that does not return."""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

HUNG = 4  # the process's exit code
_LAST_RESORT_S = 15.0  # later, from a thread that needs no Python: what hangs may hold the interpreter's lock


class Watchdog:
    """Looks at one piece of work at a time."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._ends: float | None = None
        self._hung: Callable[[], None] = lambda: None
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @contextmanager
    def over(self, seconds: float, hung: Callable[[], None]) -> Iterator[None]:
        """While entered for longer than that: `hung` is called, from another thread, and the process ends with HUNG.

        Where not even that is possible the process ends 15 s later, with 1, and where it was is on standard error.
        """
        with self._changed:
            self._ends, self._hung = time.monotonic() + seconds, hung
            self._changed.notify()
        faulthandler.dump_traceback_later(seconds + _LAST_RESORT_S, exit=True, file=2)
        try:
            yield
        finally:
            with self._changed:  # held by the other thread from its decision to the end of the process
                self._ends = None
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        with self._changed:
            while True:
                left = None if self._ends is None else self._ends - time.monotonic()
                if left is not None and left <= 0:
                    try:
                        self._hung()
                    finally:
                        os._exit(HUNG)
                self._changed.wait(left)
