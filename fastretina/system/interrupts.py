"""Signals that wait until nothing can be lost by them: Ctrl-C may raise between any two instructions of the main thread, between
opening a file and knowing its descriptor just as well as in the middle of the clean-up.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self, TypeVar

from fastretina.system.process import OwnProcess

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU)
POLL = 0.1  # seconds that a signal may wait for a wait to end

T = TypeVar("T")


class HeldSignals:
    """While entered, a signal with a handler of Python's only makes a note; what that raises comes in `check`, `let_in` or the end.

    For work that owns files, locks or processes: all of that is given back before the exception leaves the block. Handlers belong
    to the main thread: elsewhere nothing is held, as nothing is interrupted there. Blocks may be nested.
    """

    def __init__(self) -> None:
        self._before: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._arrived: list[int] = []
        self._held = self._open = False

    def __enter__(self) -> Self:
        self._held, self._process = True, OwnProcess()
        if threading.current_thread() is threading.main_thread():
            try:
                for number in SIGNALS:
                    # Neither ignored nor the system's own: then there is no exception to hold back.
                    if callable(handler := signal.getsignal(number)):
                        self._before[number] = handler
                        signal.signal(number, self._handle)
            except BaseException:
                self._release()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        self._release()
        self.check()

    def _release(self) -> None:
        try:
            for number, handler in reversed(self._before.items()):  # SIGINT last: till then it cannot interrupt this
                signal.signal(number, handler)
        finally:
            self._held = False  # should one of them have: our handlers that are still in place pass on what arrives

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._held and not self._open and self._process.is_this:  # what a fork of another thread gets is the fork's
            self._arrived.append(number)
            return
        was, self._open = self._open, False  # on the way out, if it raises, the next one is held again
        self._before[number](number, frame)
        self._open = was

    def check(self) -> None:
        """Let the signals' own handlers have what has arrived; they raise. To be called where nothing is half done, and often."""
        while self._arrived:
            number = self._arrived.pop(0)
            self._before[number](number, None)  # the frame is over: to keep it would keep alive what it owns

    @contextmanager
    def let_in(self) -> Iterator[None]:
        """In this block signals raise at once, as if not held: for work that may take long and owns nothing."""
        self._open = True
        try:
            self.check()
            yield
        finally:
            self._open = False

    def result(self, future: Future[T]) -> T:
        """The future's, once it is there; signals come in. Not inside `let_in`: an interrupted wait may keep the future's lock."""
        self.check()
        while not future.done():
            wait([future], POLL)
            self.check()
        return future.result()
