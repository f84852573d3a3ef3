"""CUDA's streams, events and memory, simulated on a CPU at their most unkind.

Work that is queued on a stream runs late, in any order that the events allow, and reads and writes bare addresses, as a device
does. Memory that a program lets go of is overwritten as soon as CUDA's allocator might hand it out again: behind the work of the
stream that it was allocated on, and behind what the streams named by record_stream had queued by then. So whatever relies on luck,
a wait too few or a reference dropped too early, shows in the values. Threads may share it: each has a current stream of its own,
and one at a time queues work or runs some.

    with monkeypatch.context() as patch:
        cuda = SimulatedCuda(patch, np.random.default_rng(0))

Only what fastretina.loading.device_stage calls is there.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

POISON = 0xAA


class Mark:
    """A point in a stream's queue, passed once the stream is there."""

    passed = False

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __call__(self) -> None:
        self.passed = True


class Stream:
    def __init__(self, cuda: SimulatedCuda) -> None:
        self.cuda = cuda
        self.queue: deque[tuple[Mark | None, Callable[[], None]]] = deque()  # work, and what must be passed before it
        cuda.streams.append(self)

    def add(self, work: Callable[[], None], after: Mark | None = None) -> None:
        with self.cuda.lock:
            self.queue.append((after, work))

    def wait_event(self, event: Event) -> None:
        if event.mark is not None:
            self.add(lambda: None, after=event.mark)

    def wait_stream(self, stream: Stream) -> None:
        self.add(lambda: None, after=stream.mark())

    def mark(self) -> Mark:
        mark = Mark(self)
        self.add(mark)
        return mark

    def can_go_on(self) -> bool:
        return bool(self.queue) and (self.queue[0][0] is None or self.queue[0][0].passed)

    def go_on(self) -> None:
        self.queue.popleft()[1]()

    def run_until(self, mark: Mark) -> None:
        """No more than what the mark needs, of this stream and of those that it waits for: all else stays as late as it can be."""
        with self.cuda.lock:
            while not mark.passed:
                after = self.queue[0][0]
                if after is not None and not after.passed:
                    after.stream.run_until(after)
                self.go_on()


class Event:
    def __init__(self, cuda: SimulatedCuda, blocking: bool = False, enable_timing: bool = False) -> None:
        self.cuda = cuda
        self.mark: Mark | None = None

    def record(self, stream: Stream) -> None:
        self.mark = stream.mark()

    def query(self) -> bool:
        self.cuda.run(int(self.cuda.random.integers(0, 4)))
        return self.mark is None or self.mark.passed

    def synchronize(self) -> None:
        if self.mark is not None:
            self.mark.stream.run_until(self.mark)


class SimulatedCuda:
    """Takes torch.cuda's place while `patch` holds; `current` is the consumer's stream at first, and another in other threads."""

    def __init__(self, patch, random: np.random.Generator) -> None:
        self.random = random
        self.lock = threading.RLock()
        self.streams: list[Stream] = []
        self._entered = threading.local()
        self._others = Stream(self)
        self.current = Stream(self)
        self._memory: dict[int, tuple[np.ndarray, list[Stream]]] = {}  # by address, with the streams of record_stream
        cuda = self

        @contextmanager
        def on(stream: Stream) -> Iterator[None]:
            before, cuda.current = cuda.current, stream
            try:
                yield
            finally:
                cuda.current = before

        real_to = torch.Tensor.to

        def to(tensor, *where, non_blocking=False, **others):
            if where[:1] != (torch.device("cpu"),):
                return real_to(tensor, *where, non_blocking=non_blocking, **others)
            found = cuda.empty(tuple(tensor.shape), dtype=tensor.dtype)
            cuda.copy(found, tensor)
            if not non_blocking:
                cuda.finish(cuda.current)
            return found

        def copy_(target, source):
            cuda.copy(target, source)
            return target

        patch.setattr(torch.cuda, "Event", functools.partial(Event, self))
        patch.setattr(torch.cuda, "stream", on)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: cuda.current)
        patch.setattr(torch.Tensor, "to", to)
        patch.setattr(torch.Tensor, "copy_", copy_)
        patch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: cuda.record_stream(tensor, stream))
        real_empty = torch.empty
        patch.setattr(
            torch,
            "empty",
            lambda *shape, device=None, **others: real_empty(*shape, **others) if device is None else cuda.empty(*shape, **others),
        )

    @property
    def current(self) -> Stream:
        return getattr(self._entered, "stream", self._others)

    @current.setter
    def current(self, stream: Stream) -> None:
        self._entered.stream = stream

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory of the current stream, poisoned; given back to it when the last tensor over it is gone."""
        nbytes = int(np.prod(shape)) * dtype.itemsize
        memory = np.full(nbytes, POISON, np.uint8)  # stays for good, so that late readers find poison there and not a fault
        handle, users = memory[:], []
        self._memory[memory.ctypes.data] = memory, users
        weakref.finalize(handle, self._free, memory, self.current, users)
        return torch.from_numpy(handle).view(dtype).view(shape)

    def _free(self, memory: np.ndarray, owner: Stream, users: list[Stream]) -> None:
        for user in users:
            owner.add(lambda: None, after=user.mark())
        owner.add(lambda: memory.fill(POISON))

    def record_stream(self, tensor: torch.Tensor, stream: Stream) -> None:
        self._memory[tensor.untyped_storage().data_ptr()][1].append(stream)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        assert target.is_contiguous()
        assert source.is_contiguous()
        to, of, nbytes = target.data_ptr(), source.data_ptr(), target.numel() * target.element_size()
        self.launch(lambda: write(to, bytes_at(of, nbytes)))

    def launch(self, work: Callable[[], None]) -> None:
        """Queue work on the current stream. It must hold no tensor, as a kernel does not."""
        self.current.add(work)

    def run(self, steps: int) -> None:
        """So many pieces of work, each of a stream drawn at random from those that can go on."""
        with self.lock:
            for _ in range(steps):
                able = [stream for stream in self.streams if stream.can_go_on()]
                if not able:
                    return
                able[int(self.random.integers(len(able)))].go_on()

    def finish(self, *streams: Stream) -> None:
        """Run until these streams, or all, have nothing left."""
        with self.lock:
            while any(stream.queue for stream in streams or self.streams):
                before = sum(len(stream.queue) for stream in self.streams)
                self.run(1)
                assert sum(len(stream.queue) for stream in self.streams) < before, "streams wait for each other"


def bytes_at(address: int, nbytes: int) -> np.ndarray:
    """A copy of what is there now; poison where nothing is, which a program that is at fault may ask for."""
    try:
        with Path("/proc/self/mem").open("rb", buffering=0) as memory:
            found = os.pread(memory.fileno(), nbytes, address)
    except (OSError, OverflowError):
        found = b""
    return np.frombuffer(found.ljust(nbytes, bytes([POISON])), np.uint8)


def write(address: int, content: np.ndarray) -> None:
    """Put bytes at an address, which must be one of the simulation's."""
    ctypes.memmove(address, content.ctypes.data, content.nbytes)
