"""A stream of jobs, run piece by piece on threads, delivered in order. A piece is mostly a batch's row.

Threads take single pieces, not batches: none waits at the end of a batch for the slowest, and with two threads and a batch of
two hundred the first batch is ready as soon as it can be. The stream runs at most `ahead` jobs before the consumer.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from typing import Protocol

from fastretina.errors import LoaderError
from fastretina.system.process import OwnProcess


class Job(Protocol):
    """A batch in the making: `pieces` independent pieces of work, 0 or more."""

    pieces: int

    def run(self, piece: int) -> None:
        """Do one piece, on any thread, in any order. What it raises reaches the consumer in place of the job."""


class _Running:
    """A job under way; `claimed` and `pending` are guarded by the pipeline's lock."""

    __slots__ = ("claimed", "error", "job", "pending", "pieces")

    def __init__(self, job: Job | None, error: BaseException | None = None) -> None:
        self.job, self.error = job, error
        self.claimed = 0
        self.pieces = self.pending = job.pieces if job else 0

    @property
    def finished(self) -> bool:
        return self.pending == 0 or self.error is not None


class _Shared:
    """What the threads and the consumer share. It knows nothing of the Pipeline, so that the threads do not keep that alive."""

    def __init__(self, ahead: int) -> None:
        self.ahead = ahead
        self.lock = threading.Lock()
        self.work = threading.Condition(self.lock)  # there may be pieces to claim, or it is time to stop
        self.ready = threading.Condition(self.lock)  # the first job may be finished
        self.jobs: Iterator[Job] = iter(())
        self.exhausted = True
        self.running: deque[_Running] = deque()
        self.closed = False

    def claim(self) -> tuple[_Running, int] | None:
        """The next piece to work on, or None where there is nothing to do now. Called with the lock held."""
        while True:
            for running in self.running:
                if running.claimed < running.pieces and running.error is None:
                    running.claimed += 1
                    return running, running.claimed - 1
            if self.exhausted or len(self.running) >= self.ahead:
                return None
            try:
                begun = _Running(next(self.jobs))
            except StopIteration:
                self.exhausted = True
                self.ready.notify_all()
                return None
            except BaseException as error:
                begun, self.exhausted = _Running(None, error), True
            self.running.append(begun)
            (self.ready if begun.finished else self.work).notify_all()


def _work(shared: _Shared) -> None:
    running: _Running | None = None
    while True:
        with shared.lock:
            if running is not None:
                running.pending -= 1
                if running.finished:
                    shared.ready.notify_all()
                running = None
            while not shared.closed and (claim := shared.claim()) is None:
                shared.work.wait()
            if shared.closed:
                return
            running, piece = claim  # type: ignore[misc]  # the loop above ends with a claim
        assert running.job is not None
        try:
            running.job.run(piece)
        except BaseException as error:
            running.error = running.error or error


class Pipeline:
    """Threads that outlive the streams they work on.

    start() begins a stream (and drops the one before), get() waits for its next job, close() ends the threads. In a forked child,
    which has none of them, `process` says so, and only close() may be called.
    """

    def __init__(self, workers: int, ahead: int) -> None:
        """workers: threads. ahead: jobs, at least 1, that may be under way or waiting."""
        self.process = OwnProcess()
        self._shared = _Shared(ahead)
        self._threads = [
            threading.Thread(target=_work, args=(self._shared,), name=f"fastretina-{k}", daemon=True) for k in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def start(self, jobs: Iterator[Job]) -> None:
        """Work on these jobs from now on; pieces of earlier jobs that are already under way finish unseen."""
        shared = self._shared
        with shared.lock:
            if shared.closed:
                raise LoaderError("the loader is closed")
            shared.jobs, shared.exhausted = jobs, False
            shared.running.clear()
            shared.work.notify_all()

    def get(self) -> Job | None:
        """The next job, finished; None at the end of the stream. Raises what the job raised; the stream then ends."""
        shared = self._shared
        with shared.lock:
            while not (shared.running and shared.running[0].finished):
                if shared.closed:
                    raise LoaderError("the loader is closed")
                if shared.exhausted and not shared.running:
                    return None
                shared.ready.wait()
            running = shared.running.popleft()
            if running.error is not None:
                shared.exhausted = True
                shared.running.clear()
                raise running.error
            shared.work.notify_all()
            return running.job

    def close(self) -> None:
        """Stop and join the threads; each first finishes the piece that it is at. May be called again, from any thread. Nothing in
        a forked child: the threads are the parent's."""
        if not self.process.is_this:
            return
        shared = self._shared
        with shared.lock:
            shared.closed, shared.exhausted = True, True
            shared.running.clear()
            shared.jobs = iter(())
            shared.work.notify_all()
            shared.ready.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
