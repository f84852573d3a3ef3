"""CUDA's streams and events, which a CPU has none of: the same calls serve both."""

from __future__ import annotations

import time
from collections import deque

import torch


def current_stream(device: torch.device) -> torch.cuda.Stream | None:
    """The stream that work on a CUDA device is queued on now; None for a CPU."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def mark(stream: torch.cuda.Stream | None, timed: bool = False) -> torch.cuda.Event | None:
    """An event behind all that is queued on a stream by now; None for no stream. timed: it notes when it is passed.

    Who waits for it sleeps: CUDA's default is to poll, which takes a core from decoding.
    """
    if stream is None:
        return None
    event = torch.cuda.Event(enable_timing=True, blocking=True) if timed else torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


class DataWait:
    """How long training stood still for want of a batch.

    On a stream by the device's clock: from the end of all that was queued when a batch was asked for until the batch was there. A
    host that is late counts, and a copy, decoding or warp that is; a host that blocks while the device has work does not. Without a
    stream by the host's clock, from `begin` to `end`.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._idle: torch.cuda.Event | None = None
        self._started = self._host_seconds = 0.0
        self._unread: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def begin(self, stream: torch.cuda.Stream | None) -> None:
        """A batch is asked for, and the work on all before it is queued on the stream."""
        self._stream, self._idle, self._started = stream, mark(stream, timed=True), time.perf_counter()

    def end(self) -> None:
        """The batch is handed over: the stream has been told to wait for it."""
        there = mark(self._stream, timed=True)
        if self._idle is None or there is None:
            self._host_seconds += time.perf_counter() - self._started
        else:
            self._unread.append((self._idle, there))

    def read(self, late: bool = False) -> float:
        """Seconds that no call before has returned. late: only those that the device has passed by now, without waiting for it."""
        seconds, self._host_seconds = self._host_seconds, 0.0
        while self._unread and (not late or self._unread[0][1].query()):  # type: ignore[no-untyped-call]
            idle, there = self._unread.popleft()
            there.synchronize()
            seconds += idle.elapsed_time(there) / 1000
        return seconds
