"""Stopping a run where its state is worth saving."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Self

from fastretina.errors import Terminated
from fastretina.training.distributed import ALONE, World


class StopAsked(Exception):
    """A signal arrived, or the steps of this call are done, and this is a good place to stop."""


IMPATIENT = (signal.SIGINT, signal.SIGTERM)
# These come again by themselves: SIGHUP from the kernel, from the shell that is closed too, and from systemd after SIGTERM; SIGXCPU
# every second.
REPEATED = (signal.SIGHUP, signal.SIGXCPU)


class Signals:
    """While entered, SIGINT, SIGTERM, SIGHUP (the terminal is closed) and SIGXCPU (a limit of CPU time) only make a note, for
    `stop_if_asked`; a second SIGINT or SIGTERM stops at once, as if not entered. What is ignored stays so: nohup ignores SIGHUP.

    In the middle of an optimizer step there is no state worth saving, so that a run must come to the end of one first. Of several
    ranks all stop after the same step, though each may be told at another moment, or only one of them.
    """

    def __init__(self, world: World = ALONE) -> None:
        self._world = world
        self._arrived = 0  # here
        self.agreed = 0  # the signal that all ranks stop for, once `stop_if_asked` has raised

    def __enter__(self) -> Self:
        # Python lets only the main thread set handlers; a run elsewhere is its caller's to stop.
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            heard = [number for number in (*IMPATIENT, *REPEATED) if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        if self._main:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._arrived:
            if number in REPEATED:
                return
            raise self.exception()
        self._arrived = number
        if self._world.is_main and number != signal.SIGHUP:  # after which there may be no terminal, and a line there is an error
            print("stopping after this step; once more to stop without saving", file=sys.stderr, flush=True)

    def exception(self) -> BaseException:
        """What the command should end with: KeyboardInterrupt (130), or Terminated (128 and the signal's number)."""
        asked = self.agreed or self._arrived
        return KeyboardInterrupt() if asked == signal.SIGINT else Terminated(asked)

    def stop_if_asked(self) -> None:
        """Raise StopAsked, on all ranks, where a signal has arrived on any."""
        self.agreed = self._world.largest(self._arrived)
        if self.agreed:
            raise StopAsked
