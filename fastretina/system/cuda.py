"""CUDA's streams and events, which a CPU has none of: the same calls serve both."""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


def current_stream(device: torch.device) -> torch.cuda.Stream | None:
    """The stream that work on a CUDA device is queued on now; None for a CPU."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def mark(stream: torch.cuda.Stream | None, timed: bool = False) -> torch.cuda.Event | None:
    """An event behind all that is queued on a stream by now; None for no stream. timed: it notes when it is passed.

    Who waits for it sleeps: CUDA's default is to poll, which takes a core from decoding.
    """
    if stream is None:
        return None
    event = torch.cuda.Event(enable_timing=timed, blocking=True)  # type: ignore[no-untyped-call]
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


OPTIMIZER_STATES = 2  # tensors that AdamW keeps for each parameter
STEPS_AHEAD = 2  # that the host may have queued, one of them running
# Beside what one step measures: fragments between blocks, cuDNN's workspaces for the last and shorter batch, the evaluation's.
STEP_MARGIN = 1.15


def device_available_bytes(device: torch.device) -> int:
    """Bytes of a CUDA device's memory that torch may still hand out: what is free, and what its allocator holds unused."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + held


def training_bytes(
    model: nn.Module,
    images: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    batches: int = STEPS_AHEAD + 2,
) -> int:
    """Device memory in bytes that training this model will take beside the model itself: the reserve of resident="auto".

    Measured: the peak of one forward and backward pass of a copy of the model over (B, 3, R, R) zeros of `dtype`; plus the
    optimizer's state and so many batches on their way. The model, its statistics and torch's random state stay as they are.
    0 on a CPU.
    """
    if device.type != "cuda":
        return 0
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    twin = copy.deepcopy(model).train()
    zeros = torch.zeros(images, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)
    with torch.random.fork_rng([device]):
        with autocast():
            answer: Tensor = twin(zeros)
        torch.autograd.backward(answer.float().sum())
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    parameters = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    batch = zeros.numel() * zeros.element_size()
    del twin, zeros, answer
    torch.cuda.empty_cache()
    return int(STEP_MARGIN * peak) + OPTIMIZER_STATES * parameters + batches * batch


class Pace:
    """Keeps the host from queueing more than STEPS_AHEAD steps on a CUDA device.

    A step that is launched in no time, as a CUDA graph is, would otherwise take batch after batch, each in memory of its own. The
    device never runs dry: the host waits for the last step but STEPS_AHEAD. On a CPU there is nothing to do.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._queued: deque[torch.cuda.Event] = deque()

    def step(self) -> None:
        """A step has been queued on the current stream."""
        event = mark(current_stream(self._device))
        if event is None:
            return
        self._queued.append(event)
        if len(self._queued) > STEPS_AHEAD:
            self._queued.popleft().synchronize()
