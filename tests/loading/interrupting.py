"""Something that happens in the midst of the loader's own code, at each place where a signal's handler can run.

The interpreter runs it after a call, at a jump back and as a function begins, and nowhere else: a store and a return that follow
each other are one.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Self

import fastretina.loading

OWN = str(Path(fastretina.loading.__file__).parent)
LOOKS = {dis.opmap[name] for name in ("RESUME", "CALL", "CALL_FUNCTION_EX", "JUMP_BACKWARD")}


class At:
    """While entered, calls `action` at the `number`-th such place, of these modules or all, that this thread comes to. came:
    whether it did."""

    def __init__(self, number: int, action: Callable[[], None], module: str | tuple[str, ...] = "") -> None:
        self.came, self._left, self._action, self._module = False, number, action, module
        self._before: dict[FrameType, int] = {}

    def __enter__(self) -> Self:
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)
        self._before.clear()

    def _call(self, frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(OWN) or not frame.f_code.co_filename.endswith(self._module):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._opcode

    def _opcode(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "opcode":
            if self._before.get(frame) in LOOKS:
                self._left -= 1
                if self._left == 0:
                    self.came = True
                    sys.settrace(None)
                    self._action()
            self._before[frame] = frame.f_code.co_code[frame.f_lasti]
        elif event == "return":
            self._before.pop(frame, None)
        return self._opcode


def interrupt() -> None:
    raise KeyboardInterrupt
