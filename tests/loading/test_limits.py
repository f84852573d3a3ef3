"""What the machine withholds in mid-epoch: threads, memory, descriptors, a clock that goes forward. An error, and no hang."""

from __future__ import annotations

import ctypes
import itertools
import subprocess
import sys
import threading
import time

import pytest
import torch
from loader_cases import COUNT, SIDE, epoch, kwargs, same, settled, threads

from fastretina.beton.reader import Beton
from fastretina.errors import LoaderError
from fastretina.loading import pipeline
from fastretina.loading.loader import Loader

# With so much memory as it has, and 64 MiB: first every batch is kept, until there is no more, then none.
LITTLE_MEMORY = f"""
import resource, sys
from pathlib import Path
from fastretina.loading.loader import Loader

with Loader(sys.argv[1], batch_size=16, resolution=512, workers=2, seed=5) as loader:
    next(iter(loader))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**26, resource.RLIM_INFINITY))
    try:
        kept = [batch for _ in range(9) for batch in loader]
    except (MemoryError, RuntimeError) as error:
        print(type(error).__name__)
    kept = None
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(sum(len(batch.ids) for batch in loader) == {COUNT})
"""
NO_DESCRIPTORS = f"""
import resource, sys
from fastretina.loading.loader import Loader

with Loader(sys.argv[1], batch_size=16, resolution={SIDE}, workers=2) as loader:
    batches = iter(loader)
    found = len(next(batches).ids)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 4096))
    found += sum(len(batch.ids) for batch in batches)
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
    print(found == {COUNT})
"""


def said(program: str, path) -> list[str]:
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def test_memory_that_ends_in_mid_epoch_is_an_error_and_the_next_epoch_is_whole(path):
    error, whole = said(LITTLE_MEMORY, path)
    assert error in ("MemoryError", "RuntimeError")  # the second is torch's
    assert whole == "True"


def test_an_open_file_needs_no_more_descriptors(path):
    assert said(NO_DESCRIPTORS, path) == ["True"]


def few(monkeypatch, count: int) -> None:
    """From now on the system has so many threads."""
    real, left = pipeline._thread.start_new_thread, itertools.count(count, -1)

    def start(*given):
        if next(left) <= 0:
            raise RuntimeError("can't start new thread")
        return real(*given)

    monkeypatch.setattr(pipeline._thread, "start_new_thread", start)


def test_threads_that_cannot_be_had_are_an_error_that_leaves_none(path, monkeypatch):
    time.sleep(0.2)
    before = threads()
    few(monkeypatch, 3)
    with pytest.raises(LoaderError, match=r"cannot start thread 4 of 5 \(can't start new thread\): take fewer workers, or"):
        Loader(path, **kwargs(workers=5))
    assert settled(before)


class Ended(BaseException):
    """From outside."""


def at_work(others: set[int], count: int) -> set[int]:
    """The idents of so many threads besides the others, as soon as all of them are within their function: one that the system has
    not let run yet cannot be ended there."""
    begin = pipeline._work.__code__
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        frames = {ident: frame for ident, frame in sys._current_frames().items() if ident not in others}
        if len(frames) == count and all(f.f_code is not begin or f.f_lineno > begin.co_firstlineno + 1 for f in frames.values()):
            return set(frames)
        time.sleep(0.01)
    raise AssertionError(f"{len(frames)} of {count} threads are at work")


def test_a_thread_that_has_ended_is_an_error_and_replaced_as_soon_as_one_can_be_had(path, monkeypatch):
    expected = epoch(path)
    assert same(expected[0], expected[0])  # torch starts threads of its own for it
    time.sleep(0.2)  # until its threads are no longer listed
    alone, others = threads(), set(sys._current_frames())  # pytest-xdist's among them, which threading does not know either
    with Loader(path, **kwargs()) as loader:
        next(iter(loader))
        for ident in at_work(others, count=2):
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(Ended))
        with pytest.raises(LoaderError, match=r"a thread of the loader was ended by Ended; the next iteration starts another"):
            list(itertools.chain.from_iterable(itertools.repeat(loader, 10)))
        loader._pipeline._shared.tasks.put(None)  # one that was waiting is only ended as it goes on
        assert settled(alone)
        with monkeypatch.context() as patch:
            few(patch, 1)
            loader.set_epoch(0)
            with pytest.raises(LoaderError, match="cannot start thread 2 of 2"):
                list(loader)
        loader.set_epoch(0)
        assert all(same(a, b) for a, b in zip(loader, expected, strict=True))
        assert threads() == alone + 2
    assert settled(alone)


def until_closed(loader: Loader) -> None:
    with pytest.raises(LoaderError, match="closed"):
        next(iter(loader))


@pytest.mark.parametrize("own", [True, False])
def test_closing_interrupts_what_waits_for_a_server_before_it_waits_for_threads(path, monkeypatch, own):
    waiting, closing = threading.Event(), threading.Event()
    real = Beton.jpeg

    def stalled(beton, index):
        waiting.set()
        assert closing.wait(30)
        return real(beton, index)

    monkeypatch.setattr(Beton, "jpeg", stalled)
    monkeypatch.setattr(Beton, "interrupt", lambda beton: closing.set())
    with Beton(path) as beton:
        loader = Loader(path if own else beton, **kwargs())
        thread = threading.Thread(target=until_closed, args=(loader,))
        thread.start()
        assert waiting.wait(30)
        if not own:  # the caller's, which others may read
            threading.Timer(0.2, closing.set).start()
            monkeypatch.setattr(Beton, "interrupt", lambda beton: pytest.fail("a data set of the caller's was interrupted"))
        loader.close()
        thread.join(30)
        assert not thread.is_alive()


def test_a_row_that_does_not_end_is_left_with_a_warning(path, monkeypatch):
    waiting, over = threading.Event(), threading.Event()
    monkeypatch.setattr(Beton, "jpeg", lambda *_: waiting.set() or over.wait(60))
    monkeypatch.setattr(pipeline, "CLOSING", 0.1)
    time.sleep(0.2)
    before = threads()
    loader = Loader(path, **kwargs())
    iterator = threading.Thread(target=until_closed, args=(loader,))
    iterator.start()
    assert waiting.wait(30)
    with pytest.warns(UserWarning, match="still at work"):
        loader.close()
    over.set()
    iterator.join(30)
    assert settled(before)


def test_a_clock_that_goes_back_delays_nothing(path, monkeypatch):
    back = itertools.count(10**9, -3600)
    for name in ("time", "perf_counter"):
        monkeypatch.setattr(time, name, lambda: float(next(back)))
    assert sum(len(batch.ids) for batch in epoch(path)) == COUNT


def test_batches_are_the_same_in_torchs_deterministic_mode(path):
    expected = epoch(path)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        found = epoch(path)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))
