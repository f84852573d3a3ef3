"""Waiting that whoever likes can end: a signal handler in the midst of any call, a finalizer that interrupts any thread.

Neither may take a lock of Python's, whose holder may be the very thread that it interrupts. So here nothing is held by whoever
waits, or ends a wait: an attribute is set, and looked at every 50 ms.
"""

from __future__ import annotations

import threading
import time
from typing import Generic, TypeVar

POLL = 0.05  # seconds between looks
_Found = TypeVar("_Found")


class Closing:
    """As threading.Event, which has a lock that is not re-entrant."""

    def __init__(self) -> None:
        self._is_set = False

    def set(self) -> None:
        self._is_set = True

    def is_set(self) -> bool:
        return self._is_set

    def wait(self, seconds: float) -> bool:
        """Whether it is set, at the latest after so many seconds."""
        end = time.monotonic() + seconds
        while not self._is_set and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, POLL))
        return self._is_set


class Answer(Generic[_Found]):
    """What one thread waits for and another gives, once."""

    def __init__(self) -> None:
        self._found: _Found | Exception | None = None
        self._gate = threading.Lock()  # to be woken by at once; that it was given, `_found` says
        self._gate.acquire()

    def give(self, found: _Found | Exception) -> None:
        """An exception is raised where it is waited for."""
        self._found = found
        self._gate.release()

    def wait(self) -> _Found | None:
        """What was given; None if that was nothing within 50 ms."""
        # Interrupted between these two, the gate stays closed: then the others find what was given 50 ms later.
        if self._found is None and self._gate.acquire(timeout=POLL):
            self._gate.release()
        if isinstance(self._found, Exception):
            raise self._found
        return self._found
