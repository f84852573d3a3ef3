"""Named ranges around what the host does, for a timeline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.profiler import record_function

_NOTHING: AbstractContextManager[None] = nullcontext()
_recording = False  # whether spans leave a mark


def record(on: bool) -> None:
    """Whether spans leave a mark from now on."""
    global _recording
    _recording = on


def span(name: str) -> AbstractContextManager[None]:
    """A named range around what the `with` block does, while steps are recorded; nothing otherwise."""
    return _marked(name) if _recording else _NOTHING


@contextmanager
def _marked(name: str) -> Iterator[None]:
    with record_function(name):
        if torch.cuda.is_available():
            torch.cuda.nvtx.range_push(name)  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]
