"""A stream of jobs, run piece by piece on threads, delivered in order. A piece is mostly a batch's row.

Threads take single pieces, not batches: none waits at the end of a batch for the slowest, and with two threads and a batch of
two hundred the first batch is ready as soon as it can be. The stream runs at most `ahead` jobs before the consumer.

Nobody can be left waiting. KeyboardInterrupt may come between any two bytecodes of the consumer, a signal handler may call any
method in the midst of any other, and a thread may be ended by an exception at any bytecode of its own. So no lock is ever waited
for: threading's locks are Python around the system's, and what comes in between leaves them held for good (of 3,821 interrupts 924
came out as "release unlocked lock"). All that is shared changes by single operations that the interpreter's lock makes whole, of
deque, SimpleQueue, iterators in C and attributes; whoever waits, waits in SimpleQueue.get, and looks again at what is so when it
has been woken. An interrupted operation of the consumer may leave its stream torn, never the next one that it starts.
"""

from __future__ import annotations

import _thread
import atexit
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from fastretina.errors import LoaderError
from fastretina.system.process import OwnProcess

_LOOK = 1.0  # seconds until a consumer looks again, though nobody rang: a signal handler may have taken its ring
CLOSING = 10.0  # seconds that close() waits for pieces under way; a row takes milliseconds
_here = threading.local()  # `works`: this is a pipeline's thread


class Job(Protocol):
    """A batch in the making: `pieces` independent pieces of work, 0 or more."""

    pieces: int

    def run(self, piece: int) -> None:
        """Do one piece, on any thread, in any order. What it raises reaches the consumer in place of the job."""


class _Running:
    """A job under way, or the error in its place."""

    def __init__(self, job: Job | None, error: Exception | None = None) -> None:
        self.job, self.error = job, error
        self.pieces = job.pieces if job else 0
        self.finished = self.pieces == 0
        self._claims, self._left = iter(range(self.pieces)), iter(range(self.pieces - 1))  # each number goes to one thread

    def work(self, shared: _Shared, stream: _Stream) -> None:
        """Take pieces until none is left, on any number of threads. Not of a stream that is over, nor of a job that has failed."""
        assert self.job is not None
        for piece in self._claims:
            if shared.stream is not stream or self.error is not None:
                return
            try:
                self.job.run(piece)
            except Exception as error:
                self.error = self.error or error
            if self.error is not None or next(self._left, None) is None:
                self.finished = True
                shared.ring()


class _Stream:
    """Jobs from one start() to the next; None: a stream at its end. Each count has one writer at a time."""

    def __init__(self, jobs: Iterator[Job] | None = None) -> None:
        self._jobs, self.exhausted = jobs, jobs is None
        self.running: deque[_Running] = deque()  # begun, and not taken
        self.begun = 0
        self.taken = 0  # by the consumer

    def may_begin(self, shared: _Shared) -> bool:
        return self._jobs is not None and self.begun - self.taken < shared.ahead

    def begin(self, shared: _Shared) -> None:
        """Begin the next job. Where a thread ends in the midst of it, no other begins one: a failed iterator looks exhausted."""
        jobs, self._jobs = self._jobs, None
        assert jobs is not None
        try:
            running = _Running(next(jobs))
        except StopIteration:
            self.exhausted = True
            shared.ring()
            return
        except Exception as error:
            running, self.exhausted = _Running(None, error), True
        self.begun += 1
        self.running.append(running)
        if running.finished:
            shared.ring()
        for _ in range(min(running.pieces, len(shared.threads))):
            shared.tasks.put((self, running))
        if not self.exhausted:
            self._jobs = jobs


class _Shared:
    """What the threads and the consumer share. It knows the Pipeline only weakly, so that the threads do not keep that alive."""

    def __init__(self, owner: Pipeline, workers: int, ahead: int) -> None:
        self.process, self.ahead = OwnProcess(), ahead
        # For a thread: a job to work on; None: jobs to begin; `owner`: the end.
        self.tasks: SimpleQueue[Any] = SimpleQueue()
        self.bell: SimpleQueue[Any] = SimpleQueue()  # for the consumer: something may have changed
        # Puts itself among the tasks when the Pipeline is forgotten. By a function in C, here and below: one in Python, called
        # where the collector likes, would swallow the KeyboardInterrupt that comes in its midst.
        self.owner = weakref.ref(owner, self.tasks.put)
        self.closed = False
        self.ended_by = ""  # the exception that ended a thread, as far as one could tell
        # Each thread's function, which lives for exactly as long as the thread; `ended` gets what died. None: not started yet.
        self.threads: list[weakref.ref[Any] | None] = [None] * workers
        self.ended: deque[weakref.ref[Any] | None] = deque([None])
        self._rings: list[weakref.ref[Any] | None] = [None] * workers
        self.stream = _Stream()
        self.held: _Stream | None = None  # whose job the consumer has, and another is not to be begun for it yet
        self.turn = _thread.allocate_lock()  # to begin a job; never waited for

    def advance(self) -> None:
        """Begin as many jobs as may be. One thread does at a time, of whichever stream: an iterator cannot do two things at once,
        nor a set on a server expect two orders. Who finds another at it can go: that one looks again afterwards."""
        turn = self.turn
        while self.stream.may_begin(self) and turn.acquire(False):
            try:
                stream = self.stream  # before the turn is looked at, which changes first
                if turn is self.turn and stream.may_begin(self):
                    stream.begin(self)
            finally:
                turn.release()
            if turn is not self.turn:
                return

    def ring(self) -> None:
        if self.bell.empty():  # one is enough: who takes it looks at everything
            self.bell.put(None)

    def wait(self, seconds: float) -> None:
        """Until somebody rings, at most so long."""
        with suppress(Empty):
            self.bell.get(True, seconds)

    def start_threads(self) -> None:
        """Start those that are not there. LoaderError where the system has none to give."""
        for number, thread in enumerate(self.threads):
            if thread in self.ended:
                self.turn = _thread.allocate_lock()  # it may have ended with the other
                try:
                    # Not threading.Thread, whose start() and join() wait for locks in Python.
                    _thread.start_new_thread(self._function(number), ())
                except (RuntimeError, MemoryError) as error:
                    self.threads[number] = None
                    raise LoaderError(
                        f"the loader cannot start thread {number + 1} of {len(self.threads)} ({error}): take fewer workers, or "
                        "allow more threads or memory (ulimit -u, ulimit -v)"
                    ) from None

    def _function(self, number: int) -> Callable[[], None]:
        """For a new thread, to which alone it belongs: a traceback must not keep it."""
        function = partial(_work, self)
        self._rings[number] = weakref.ref(function, self.bell.put)
        self.threads[number] = weakref.ref(function, self.ended.append)
        return function

    def end(self) -> None:
        """Have the threads end, each after the piece that it is at."""
        self.closed = True
        self.stream = _Stream()
        self.tasks.put(self.owner)
        self.ring()

    def join(self, deadline: float) -> bool:
        """Wait for the threads until then, by time.monotonic(). False where some are left, which end after their piece."""
        while not all(thread in self.ended for thread in self.threads):
            if time.monotonic() > deadline:
                return False
            self.tasks.put(self.owner)  # a thread that was ended just now may not have handed it on
            time.sleep(0.001)  # the bell is the consumer's
        while not self.tasks.empty():
            self.tasks.get()
        self.tasks.put(self.owner)  # for one that a start() was about to make, in whose midst this was called
        return True


def _work(shared: _Shared) -> None:
    try:
        _here.works = True
        while (task := shared.tasks.get()) is not shared.owner:
            if task is None:
                shared.advance()
            else:
                stream, running = task
                running.work(shared, stream)
                del stream, running
            del task  # or a thread that waits keeps the last job's memory
    except BaseException as error:
        # An asynchronous exception, SystemExit of a job, no memory for the bookkeeping: the consumer hears of it.
        shared.ended_by = f"{type(error).__name__}: {error}".removesuffix(": ")
    finally:
        if shared.closed or shared.owner() is None:
            shared.tasks.put(shared.owner)  # for the next thread


# Of each whose threads there may be; those that are gone leave by themselves.
_at_work: set[weakref.ref[_Shared]] = set()


@atexit.register
def _end_all() -> None:
    """A thread that is in the midst of C++ as the interpreter goes may end the process by a signal."""
    found = [shared for reference in list(_at_work) if (shared := reference()) is not None and shared.process.is_this]
    for shared in found:
        shared.end()
    for shared in found:
        shared.join(time.monotonic() + CLOSING)


class Pipeline:
    """Threads that outlive the streams they work on.

    start() begins a stream (and drops the one before), get() waits for its next job, close() ends the threads, as does forgetting
    it. After anything but a job came out of get() or start(), begin a stream anew: that also replaces threads that have ended.
    In a forked child, which has none of them, `process` says so, and only close() may be called.
    """

    def __init__(self, workers: int, ahead: int) -> None:
        """workers: threads. ahead: jobs, at least 1, that may be under way or waiting. LoaderError: no more threads to be had."""
        self._shared = _Shared(self, workers, ahead)
        self.process = self._shared.process
        _at_work.add(weakref.ref(self._shared, _at_work.discard))
        try:
            self._shared.start_threads()
        except BaseException:
            self.close()
            raise

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._shared.closed

    def start(self, jobs: Iterator[Job]) -> None:
        """Work on these jobs from now on; pieces of earlier jobs that are already under way finish unseen."""
        shared = self._shared
        if shared.closed:
            raise self._refusal()
        shared.start_threads()
        shared.ended_by = ""
        shared.stream = _Stream(jobs)
        shared.tasks.put(None)

    def get(self, hold: bool = False) -> Job | None:
        """The next job, finished; None at the end of the stream. Raises what the job raised; the stream then ends. So it does with
        a LoaderError where a thread has ended, since what that was at is lost. hold: it counts as under way until `proceed`."""
        shared = self._shared
        stream = shared.stream
        while True:
            if shared.stream is not stream or shared.closed:
                raise self._refusal("the loader was set to other batches while it was waited for")
            exhausted = stream.exhausted  # looked at first: a job may be begun between the two
            if stream.running:
                if stream.running[0].finished:
                    break
            elif exhausted:
                return None
            if any(thread in shared.ended for thread in shared.threads):
                shared.stream = _Stream()
                by = shared.ended_by or "an unknown exception"
                raise self._refusal(f"a thread of the loader was ended by {by}; the next iteration starts another in its place")
            shared.wait(_LOOK)
        running = stream.running.popleft()
        if running.error is not None:
            shared.stream = _Stream()
            stream.running.clear()
            try:
                raise running.error
            finally:
                del running  # the error's own traceback would refer to it
        shared.held = stream
        if not hold:
            self.proceed()
        return running.job

    def proceed(self) -> None:
        """The job that `get` was to hold is done with; nothing where its stream is over."""
        shared = self._shared
        stream, shared.held = shared.held, None
        if stream is not None:
            stream.taken += 1
            shared.tasks.put(None)

    def _refusal(self, otherwise: str = "") -> LoaderError:
        return LoaderError("the loader is closed" if self._shared.closed else otherwise)

    def close(self, *others: Pipeline) -> None:
        """Stop the threads, and others', which may wait for these. Each first finishes the piece that it is at; this waits for
        that, CLOSING seconds at most. May be called again, from any thread and in a signal handler. Nothing in a forked child: the
        threads are the parent's.
        """
        if not self.process.is_this:
            return
        closing = [self._shared, *(other._shared for other in others)]
        for shared in closing:
            shared.end()
        # A thread of a pipeline, where the garbage collector may end whatever the program has, waits for none: it may be its own.
        if getattr(_here, "works", False):
            return
        deadline = time.monotonic() + CLOSING
        left = [shared for shared in closing if not shared.join(deadline)]
        if left:
            warnings.warn(
                f"a thread of the closed loader is still at work after {CLOSING:g} s, and ends when it is done", stacklevel=2
            )
