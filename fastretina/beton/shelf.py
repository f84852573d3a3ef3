"""The shards of a set on a server that are open or on their way.

Whoever reads may be interrupted anywhere: by Ctrl-C, by a signal handler that closes the set, by a finalizer. So readers only look,
ask and wait; what changes is changed by threads of the shelf's own, which no signal reaches.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue

import numpy as np

from fastretina.beton.cache import CachedBeton, CacheFolder, NoRoom, Unfinished
from fastretina.beton.fetch import Patience, RemoteFile, fetch_samples, fetch_tables
from fastretina.beton.reader import Beton
from fastretina.beton.shards import WINDOW
from fastretina.beton.waiting import Answer
from fastretina.errors import CacheError, FastretinaError, RemoteError, UsageError
from fastretina.system.process import OwnProcess

# A shard is done with when its last sample came so many before the first of the one that begins: threads are that far apart.
_SLACK = 256
_SOON = 10.0  # seconds for which who asks for a shard gets the error that others got; attempts of ranks are that far apart
_FAREWELL = 5.0  # seconds that closing waits for threads; the last to end is one in a read of a local file system that hangs


@dataclass(frozen=True)
class Shard:
    file: RemoteFile
    name: str  # in the cache
    tables: CachedBeton  # closed: all but the samples
    tables_bytes: int  # on disk

    def is_in(self, other: Beton) -> bool:
        """Whether another copy of the tables is the same: the server may have replaced the file without another ETag."""
        same_places = all(map(np.array_equal, self.tables.extents, other.extents))
        return same_places and self.tables.digest == other.digest


class _Early(NoRoom):
    """For a shard that nobody waits for yet, which must not push out what is in use."""


@dataclass(frozen=True)
class _Failure:
    """What came of a fetch: an error, at a time of the monotonic clock, which these threads know of."""

    error: RemoteError
    at: float
    told: set[int]

    def is_for(self, thread: int, ordered: bool) -> bool:
        """Whether a thread that asks now is told of it. A loader's threads are, as often as they ask, until the next order; whoever
        reads without an order, and asks again, wants another attempt."""
        return time.monotonic() - self.at < _SOON and (ordered or thread not in self.told)


class Shelf:
    """The shards of a set that are open or on their way, by number.

    Which to fetch next and which to give up follows from the order that `expect` was told: the next to begin, and the one whose
    turn is furthest off.
    """

    def __init__(self, shards: Sequence[Shard], folder: CacheFolder, streams: int, patience: Patience) -> None:
        """streams: shards to fetch at the same time, apart from those that somebody waits for. patience: of all files; when its
        `closing` is set, the fetches end soon. RemoteError where no thread can be started."""
        self._shards, self._folder, self._streams, self.closing = shards, folder, streams, patience.closing
        self._room = folder.limit - sum(shard.tables_bytes for shard in shards)
        self._fits = sum(shard.file.size for shard in shards) <= self._room
        self._process = OwnProcess()
        self._open: dict[int, CachedBeton] = {}  # read by all
        self._begun: set[int] = set()  # read by all: whose turn has come
        self._requests: SimpleQueue[Callable[[], None] | None] = SimpleQueue()  # which a signal handler and a finalizer may fill
        self._lock = threading.Lock()  # of all that follows, taken by no thread but the shelf's own
        self._coming: dict[int, list[tuple[int, Answer[CachedBeton]]]] = {}  # and who waits for it: threads
        self._threads: dict[int, threading.Thread] = {}  # daemons: nothing here is worth keeping a process for
        self._failed: dict[int, _Failure] = {}
        # Positions of each shard's first and last sample in the order; past its end and -1 where it has none.
        self._first, self._last = [0] * len(shards), [len(shards)] * len(shards)
        self._ordered = False  # whether anybody told an order
        self._queue: list[int] = []  # shards still to begin, the next one last
        self._clerk = threading.Thread(target=self._serve, name="fastretina-shelf", daemon=True)
        try:
            self._clerk.start()
        except RuntimeError as error:
            raise _no_thread(shards[0], error) from None

    # ---- for readers ---------------------------------------------------------------------------------------------

    def get(self, number: int, given_up: Callable[[], bool]) -> Beton:
        """The complete shard, fetched if need be. Raises RemoteError, soon after `given_up` says so or the shelf is closed."""
        self._require_threads(number)
        found = self._open.get(number)
        if found is not None and number in self._begun:
            return found
        answer: Answer[CachedBeton] = Answer()
        self._requests.put(partial(self._want, number, threading.get_ident(), answer))
        while (found := answer.wait()) is None:
            if self.closing.is_set() or given_up():
                raise RemoteError(self._shards[number].file.url, "closed while it was read")
        return found

    def expect(self, first: list[int], last: list[int]) -> None:
        """The order that samples will be asked for in: for each shard the positions of its first and last."""
        self._require_threads(0)
        self._begun = set()  # at once: who asks from now on asks in this order
        self._requests.put(partial(self._expect, first, last))

    def _require_threads(self, number: int) -> None:
        if not self._process.is_this:
            url = self._shards[number].file.url
            raise RemoteError(url, "its set was opened before the process was forked; open it in the process that reads it")

    def check(self, sampling: str, url: str) -> None:
        """UsageError where reading in such an order would fetch shards again and again."""
        sizes = sorted(shard.file.size for shard in self._shards)
        needed = {"shards": sum(sizes[-WINDOW - 1 :]), "sequential": sum(sizes[-2:])}.get(sampling, sum(sizes))
        if needed > self._room:
            others = "" if sampling in ("shards", "sequential") else ", or read it with sampling='shards' (--sampling shards)"
            raise UsageError(
                f"{url}: sampling={sampling!r} needs {needed / 1e9:.3f} GB at a time, the cache {self._folder.path} has room for "
                f"{self._room / 1e9:.3f} GB: allow it more{others}"
            )

    def stop(self) -> None:
        """Have the fetches end soon, and the files closed then. For finalizers and signal handlers, too: it waits for nothing.
        Nothing in a forked child, whose parent goes on."""
        if self._process.is_this:
            self.closing.set()
            self._requests.put(None)

    def close(self) -> None:
        """End the fetches, and let go of the files; what was half fetched goes on from there another time."""
        self.stop()
        if self._process.is_this:
            end = time.monotonic() + _FAREWELL
            for thread in (self._clerk, *self._threads.copy().values()):
                if thread is not threading.current_thread():
                    thread.join(max(0.0, end - time.monotonic()))

    # ---- in the shelf's own threads ------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            while (request := self._requests.get()) is not None:
                with self._lock:
                    request()
                request = None  # whose answer would keep its file open
        finally:
            self.closing.set()
            with self._lock:
                self._open.clear()

    def _expect(self, first: list[int], last: list[int]) -> None:
        self._first, self._last, self._begun, self._ordered = first, last, set(), True
        self._failed.clear()
        self._queue = sorted((number for number, position in enumerate(last) if position >= 0), key=lambda k: -first[k])
        self._fill()

    def _want(self, number: int, thread: int, answer: Answer[CachedBeton]) -> None:
        if number not in self._begun:
            self._begin(number)
        if (found := self._open.get(number)) is not None:
            answer.give(found)
        elif (waiting := self._coming.get(number)) is not None:
            waiting.append((thread, answer))
        elif (failure := self._failed.get(number)) and failure.is_for(thread, self._ordered):
            failure.told.add(thread)
            answer.give(copy.copy(failure.error))
        else:
            try:
                self._fetch(number).append((thread, answer))
            except RuntimeError as error:
                answer.give(_no_thread(self._shards[number], error))

    def _begin(self, number: int) -> None:
        """A shard's first sample is asked for: give up what is done with, and fetch what comes next."""
        self._begun.add(number)
        done = self._first[number] - _SLACK
        for other in [] if self._fits else [k for k in self._open if k in self._begun and self._last[k] < done]:
            del self._open[other]
        self._fill()

    def _fill(self) -> None:
        """Fetch the next shards as far as there is room, or room can be had from one whose turn is later."""
        while self._queue and len(self._coming) < self._streams and not self.closing.is_set():
            number = self._queue[-1]
            if number not in self._open and number not in self._coming:
                while self._held() + self._size(number) > self._room:
                    later = [k for k in self._open if k not in self._begun and self._first[k] > self._first[number]]
                    if not later or not self._begun:
                        return
                    del self._open[max(later, key=self._first.__getitem__)]
                try:
                    self._fetch(number)
                except RuntimeError:
                    return  # no thread to be had: whoever asks for it will try, and hear of it
            self._queue.pop()

    def _size(self, number: int) -> int:
        return self._shards[number].file.size

    def _held(self) -> int:
        return sum(self._size(number) for number in {*self._open, *self._coming})

    def _fetch(self, number: int) -> list[tuple[int, Answer[CachedBeton]]]:
        """Who waits for it: nobody yet. RuntimeError where no thread can be started."""
        thread = threading.Thread(target=self._load, args=(number,), name=f"fastretina-fetch-{number}", daemon=True)
        thread.start()  # it needs the lock, which we hold, before it looks at what follows
        self._threads[number], self._coming[number] = thread, []
        return self._coming[number]

    def _load(self, number: int) -> None:
        while not self._loaded(number):
            pass

    def _loaded(self, number: int) -> bool:
        """Whether a fetch came to an end, good or bad; False where there was no room for it yet, and somebody waits for it now."""
        file = self._shards[number].file
        found: CachedBeton | RemoteError
        early = remembered = False
        try:
            found = self._cached(number)
        except RemoteError as error:
            found, remembered = error.with_traceback(None), True  # its frames hold what is to be let go of
        except CacheError as error:
            found, early = RemoteError(file.url, str(error)), isinstance(error, _Early)
        except BaseException as error:  # none may leave anybody waiting
            found = RemoteError(file.url, str(error) if isinstance(error, FastretinaError) else f"{type(error).__name__}: {error}")
        with self._lock:
            if early and self._coming[number]:
                return False
            del self._threads[number]
            waiting = self._coming.pop(number)
            if isinstance(found, RemoteError):
                if remembered:
                    self._failed[number] = _Failure(found, time.monotonic(), {thread for thread, _ in waiting})
            elif not self.closing.is_set():
                self._open[number] = found
            for _, answer in waiting:
                answer.give(copy.copy(found) if isinstance(found, RemoteError) else found)
            self._fill()
        return True

    def _cached(self, number: int) -> CachedBeton:
        shard, file = self._shards[number], self._shards[number].file

        def fetch(target: Unfinished) -> None:
            with self._folder.tables(shard.name, partial(fetch_tables, file)) as tables:
                if shard.is_in(tables):
                    fetch_samples(file, tables, target)
                    return
            raise RemoteError(file.url, "was replaced on the server; open the set again")

        while True:
            try:
                found = self._folder.file(shard.name, file.size, fetch)
            except NoRoom as error:
                if self.closing.is_set() or not self._give_up_one(number, error):
                    raise
                continue
            if shard.is_in(found):
                return found
            found.close()
            self._folder.remove(shard.name)  # of an older version that looked the same to the server

    def _give_up_one(self, number: int, error: NoRoom) -> bool:
        """Make room for a shard that somebody waits for: close the open one that is needed last, or wait for those on their way."""
        with self._lock:
            if number not in self._begun and not self._coming[number]:
                raise _Early(str(error))
            if self._open:
                del self._open[max(self._open, key=lambda k: -1 if k in self._begun else self._first[k])]
                return True
            others = len(self._coming) > 1
        return others and not self.closing.wait(0.1)


def _no_thread(shard: Shard, error: RuntimeError) -> RemoteError:
    return RemoteError(shard.file.url, f"cannot be fetched: {error}. Raise the limit of processes and threads (ulimit -u)")
