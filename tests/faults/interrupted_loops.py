"""A loop over a Loader that something breaks into at random moments, in a process of its own, which can be ended where it hangs.

Arguments: what breaks in (a function below), a .beton, how many times, a seed. Nothing on stderr and exit code 0: all was met as
promised. Each sample's id, order and pixels are compared with what they should be, after each interruption and over whole epochs.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from fastretina.beton.reader import Beton
from fastretina.errors import LoaderError
from fastretina.loading.augment import Augment
from fastretina.loading.batches import Batch
from fastretina.loading.loader import Loader
from fastretina.loading.sampler import epoch_order
from fastretina.models.photographs import Photograph, prepared
from fastretina.packing.preprocessing import UNPREPARED

WORKERS = 3
HUNG = 30.0  # seconds
LONGEST = 0.03  # seconds until it breaks in
# Another process sends the signal: a thread of this one would send it only where the interpreter changes threads.
SENDER = """
import os, signal, sys, time
for line in sys.stdin:
    time.sleep(float(line))
    os.kill(int(sys.argv[1]), signal.SIGINT)
"""


def threads() -> int:
    return sum(1 for _ in Path("/proc/self/task").iterdir())


def await_threads(count: int) -> None:
    deadline = time.monotonic() + HUNG
    while threads() != count:
        assert time.monotonic() < deadline, f"{threads()} threads instead of {count}"
        time.sleep(0.005)


class Watched:
    """A Loader, and what its consumer has had of an epoch."""

    def __init__(self, path: str, seed: int, **settings: Any) -> None:
        self.path, self.seed = path, seed
        self.settings = {"batch_size": 4, "workers": WORKERS, "seed": seed, "dtype": torch.uint8} | settings
        self.random = random.Random(seed)
        with Loader(path, train=False, **self.settings) as plain:
            self.sums = {int(id): int(image.sum()) for batch in plain for id, image in zip(batch.ids, batch.images, strict=True)}
        time.sleep(0.2)  # until those of the plain loader are gone
        self.threads = threads()
        self.open()

    def open(self) -> None:
        self.loader = Loader(self.path, train=True, augment=Augment.none(), **self.settings)
        self.begin()

    def begin(self) -> None:
        """A new iteration, wherever it begins."""
        self.epoch, self.had = self.loader.epoch, []
        self.batches = iter(self.loader)

    def note(self, batch: Batch) -> None:
        """Noted again, where the first time was interrupted, a batch is there once."""
        if not self.had or self.had[-1] is not batch.ids:
            self.had.append(batch.ids)

    def loop(self) -> None:
        """Iterate for ever."""
        batch = None
        try:
            while True:
                for batch in self.batches:
                    self.note(batch)
                    for id, image in zip(batch.ids.tolist(), batch.images, strict=True):
                        assert int(image.sum()) == self.sums[id], f"sample {id} has other pixels"
                batch = None
                self.compare(len(self.loader))
                self.begin()
        finally:
            if batch is not None:
                self.note(batch)

    def expected(self, epoch: int) -> list[list[int]]:
        indices = epoch_order(self.loader.dataset.labels, "shuffle", self.seed, epoch).indices
        ids = self.loader.dataset.ids[indices].tolist()
        return [ids[first : first + 4] for first in range(0, len(ids), 4)]

    def compare(self, count: int) -> None:
        had = [ids.tolist() for ids in self.had]
        assert had == self.expected(self.epoch)[:count], f"epoch {self.epoch}: {had}"

    def check_position(self) -> None:
        """What the loader says comes next is what the consumer has not had."""
        self.compare(len(self.had))
        state, whole = self.loader.state_dict(), len(self.had) == len(self.loader)
        found, right = (state["epoch"], state["batch"]), (self.epoch + whole, 0 if whole else len(self.had))
        assert found == right, f"the loader stands at {found}, the consumer at {right}"

    def go_on(self) -> None:
        """By the same iterator, by a state, or as a notebook's cell that is run again."""
        self.check_position()
        how = self.random.choice(("next", "state", "again"))
        if how == "state":
            self.loader.load_state_dict(self.loader.state_dict())
        if not self.had or (how != "next" and self.loader.epoch != self.epoch):
            self.begin()
        elif how != "next":  # in mid-epoch, of a state of which nothing has been delivered yet
            self.batches = iter(self.loader)

    def end(self) -> None:
        self.loader.close()
        await_threads(self.threads)


def sender() -> tuple[subprocess.Popen[str], Callable[[float], None]]:
    process = subprocess.Popen([sys.executable, "-c", SENDER, str(os.getpid())], stdin=subprocess.PIPE, text=True, bufsize=1)
    assert process.stdin is not None
    pipe = process.stdin
    return process, lambda seconds: print(f"{seconds:.6f}", file=pipe)


def interrupts(path: str, tries: int, seed: int) -> None:
    """Ctrl-C."""
    watched = Watched(path, seed)
    process, send = sender()
    for _ in range(tries):
        delay = watched.random.uniform(0, LONGEST)
        try:
            started = time.monotonic()
            send(delay)
            watched.loop()
        except KeyboardInterrupt:
            assert time.monotonic() - started < delay + HUNG / 3
        watched.go_on()
        await_threads(watched.threads + WORKERS)
    process.kill()
    process.wait()
    watched.end()


def closed(path: str, tries: int, seed: int) -> None:
    """A signal handler that closes the loader."""
    watched = Watched(path, seed)
    process, send = sender()
    signal.signal(signal.SIGINT, lambda *_: watched.loader.close())
    for _ in range(tries):
        send(watched.random.uniform(0, LONGEST))
        try:
            watched.loop()
        except LoaderError as error:
            if "closed" not in str(error):
                raise
        await_threads(watched.threads)
        watched.open()
    process.kill()
    process.wait()
    watched.end()


class Ended(BaseException):
    """From outside."""


def ended(path: str, tries: int, seed: int) -> None:
    """An asynchronous exception in one of the threads, at whatever bytecode that is."""
    watched = Watched(path, seed)
    raised = met = 0

    def break_in(kind: type[BaseException], delay: float) -> None:
        nonlocal raised
        time.sleep(delay)
        others = {threading.main_thread().ident, threading.get_ident()}
        ident = watched.random.choice([ident for ident in sys._current_frames() if ident not in others])
        raised += ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(kind))

    while raised < tries:
        kind = watched.random.choice((Ended, SystemExit, MemoryError))
        thread = threading.Thread(target=break_in, args=(kind, watched.random.uniform(0, LONGEST)))
        thread.start()
        signal.setitimer(signal.ITIMER_REAL, 2 * LONGEST)
        try:
            watched.loop()
        except MemoryError:  # of a row
            met += 1
        except LoaderError as error:
            if "a thread of the loader was ended by" not in str(error):
                raise
            met += 1
        except KeyboardInterrupt:
            pass
        signal.setitimer(signal.ITIMER_REAL, 0)
        thread.join()
        watched.check_position()
        watched.begin()
    assert met > tries // 4, f"only {met} of {raised} were noticed"
    for _ in range(10):  # the last one may hit a thread only now
        try:
            watched.begin()
            assert len(list(watched.batches)) == len(watched.loader)
        except (LoaderError, MemoryError):
            continue
    await_threads(watched.threads + WORKERS)
    watched.end()


def cycles(path: str, tries: int, seed: int) -> None:
    """Loaders forgotten in reference cycles, which the garbage collector finds in the threads of another one."""
    watched = Watched(path, seed)
    collected: set[bool] = set()

    class Trainer:
        """Closes its loader when it is forgotten, as people write it."""

        def __init__(self) -> None:
            self.loader, self.itself = Loader(path, batch_size=4, workers=WORKERS), self
            self.batches: Iterator[Batch] = iter(self.loader)
            next(self.batches)

        def __del__(self) -> None:
            if collected_by_hand:
                self.loader.close()

    def where(phase: str, _: dict[str, int]) -> None:
        collected.add(threading.current_thread() is threading.main_thread())

    gc.callbacks.append(where)
    for number in range(tries):
        collected_by_hand = number % 2
        Trainer()
        gc.set_threshold(5)
        assert len(list(watched.batches)) == len(watched.loader)
        watched.begin()
        gc.set_threshold(700)
    gc.callbacks.clear()
    assert collected == {True, False}, "the collector did not run both in the main thread and in others"
    gc.collect()
    await_threads(watched.threads + WORKERS)
    box: Any = Ended()
    box.itself, gone = box, weakref.ref(box)
    del box
    gc.set_threshold(5)
    assert len(list(watched.batches)) == len(watched.loader)
    assert gone() is None, "the collector is dead"
    watched.end()


def predicting(path: str, tries: int, seed: int) -> None:
    """Ctrl-C while photographs are prepared for grading, which has threads too."""
    files = []
    with tempfile.TemporaryDirectory() as folder, Beton(path) as beton:
        for number, jpeg in enumerate(beton):
            path = Path(folder) / f"{number}.jpg"
            path.write_bytes(jpeg)
            files.append(Photograph(path, str(path)))
        before, (process, send), delays = threads(), sender(), random.Random(seed)
        for _ in range(tries):
            try:
                send(delays.uniform(0, LONGEST))
                while True:
                    with closing(prepared(files, 64, UNPREPARED, (64,), WORKERS, 8)) as ready:
                        assert [one.name for one in ready if one.images is not None] == [one.name for one in files]
            except KeyboardInterrupt:
                await_threads(before)
        process.kill()
        process.wait()


def main() -> None:
    what, path, tries, seed = sys.argv[1:]
    faulthandler.dump_traceback_later(float(os.environ.get("HUNG", "100")), exit=True)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    torch.set_num_threads(1)
    globals()[what](path, int(tries), int(seed))


if __name__ == "__main__":
    main()
