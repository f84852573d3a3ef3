"""A server that stalls holds up nobody who wants to leave, and one failure is one error for all that wait for it."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from remote_cases import PATTERN, SAMPLES, asked_for_samples, settings

from fastretina.beton.open import open_beton
from fastretina.beton.verify import verify_beton
from fastretina.errors import FastretinaError, RemoteError
from fastretina.loading.loader import Loader
from tests.http_faults import FaultyServer

SOON = 15  # seconds; the patience of a cache that nothing else is said of is 372
OTHERS = 40  # a sample of the second shard


@pytest.fixture
def stalled(serve) -> FaultyServer:
    """Gives all tables, and of samples those of the first shard."""
    server = serve()
    server.faults = lambda number, name: "silent" if server.requests[-1][1] == 1 << 21 and "00000-of" not in name else None
    return server


@pytest.fixture
def patient(cache):
    return replace(cache, timeout=60)


def soon(action: Callable[[], object]) -> None:
    started = time.monotonic()
    try:
        action()
    finally:
        assert time.monotonic() - started < SOON


def asks(server: FaultyServer) -> None:
    """Until a stalled shard has been asked for."""
    while not server.faulty["silent"]:
        time.sleep(0.02)


def test_a_loader_whose_consumer_raises_ends_soon(stalled, patient):
    def consume() -> None:
        with Loader(f"{stalled.url}/{PATTERN}", cache=patient, **settings(sampling="sequential")) as loader:
            next(iter(loader))
            asks(stalled)
            raise KeyError

    with pytest.raises(KeyError):
        soon(consume)


def test_ctrl_c_ends_a_verification_that_waits(stalled, patient, monkeypatch):
    monkeypatch.setenv("FASTRETINA_CACHE", str(patient.folder))

    def verifying() -> None:
        threading.Timer(2, os.kill, (os.getpid(), signal.SIGINT)).start()
        verify_beton(f"{stalled.url}/{PATTERN}")

    with pytest.raises(KeyboardInterrupt):
        soon(verifying)


def test_ctrl_c_ends_a_read_that_waits_and_another_read_works(stalled, patient):
    with open_beton(f"{stalled.url}/{PATTERN}", patient) as beton:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            beton.jpeg(OTHERS)
        assert beton.jpeg(0)
        soon(beton.close)


def test_ctrl_c_ends_an_opening_that_waits(serve, patient):
    server = serve(lambda number, name: "silent")

    def opening() -> None:
        threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            open_beton(f"{server.url}/{PATTERN}", patient)

    soon(opening)


def test_an_opening_that_fails_for_one_shard_does_not_wait_for_another(serve, patient):
    def fault(number: int, name: str) -> str | None:
        return "whole" if "00001-of" in name else "silent" if "00002-of" in name else None

    def opening() -> None:
        with pytest.raises(RemoteError, match=r"00001-of-00012\.beton: the server ignores ranges"):
            open_beton(f"{serve(fault).url}/{PATTERN}", patient)

    soon(opening)


def test_a_signal_handler_may_close_the_set_that_it_interrupts(stalled, patient):
    beton = open_beton(f"{stalled.url}/{PATTERN}", patient)
    before = signal.signal(signal.SIGUSR1, lambda *_: beton.close())
    try:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        with pytest.raises(RemoteError, match="closed while it was read"):
            beton.jpeg(OTHERS)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_threads_that_wait_are_woken_when_the_set_is_closed(stalled, patient):
    beton = open_beton(f"{stalled.url}/{PATTERN}", patient)
    errors: list[Exception] = []

    def read() -> None:
        try:
            beton.jpeg(OTHERS)
        except FastretinaError as error:
            errors.append(error)

    threads = [threading.Thread(target=read, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    asks(stalled)
    soon(beton.close)
    for thread in threads:
        thread.join(SOON)
    assert [type(error) for error in errors] == [RemoteError] * 4


def test_a_selection_that_is_interrupted_leaves_the_others_waiting(stalled, patient):
    with open_beton(f"{stalled.url}/{PATTERN}", replace(patient, timeout=2)) as beton:
        part = beton.select(np.arange(OTHERS, OTHERS + 10))
        found: list[object] = []
        thread = threading.Thread(target=lambda: found.append(beton.jpeg(OTHERS)), daemon=True)
        thread.start()
        asks(stalled)
        part.interrupt()
        with pytest.raises(RemoteError, match="closed while it was read"):
            part.jpeg(0)
        stalled.faults = lambda number, name: None
        thread.join(SOON)
        assert len(found) == 1
        assert part.jpeg(0) == found[0]  # nothing to wait for


def test_one_failure_is_one_error_for_all_that_ask(stalled, cache):
    url, attempts = f"{stalled.url}/{PATTERN}", 2
    impatient = replace(cache, attempts=attempts, timeout=0.5)
    for _ in range(2):
        stalled.requests.clear()
        with (
            pytest.raises(RemoteError, match=f"gave up after {attempts} attempts"),
            Loader(url, cache=impatient, **settings(sampling="sequential", workers=4, batch_size=8)) as loader,
        ):
            list(loader)
        # Each attempt asks for the first sample, and gets no further.
        asked = [times for name, times in asked_for_samples(stalled).items() if "00000-of" not in name]
        assert max(asked) == attempts  # fewer where the end came first


def test_who_has_had_the_error_and_asks_again_tries_again(stalled, cache):
    with open_beton(f"{stalled.url}/{PATTERN}", replace(cache, attempts=1, timeout=0.5)) as beton:
        with pytest.raises(RemoteError, match="gave up"):
            beton.jpeg(OTHERS)
        stalled.faults = lambda number, name: None
        late: list[Exception] = []

        def ask() -> None:
            try:
                beton.jpeg(OTHERS)
            except RemoteError as error:
                late.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        assert [error.url for error in late] == [f"{stalled.url}/{PATTERN}".replace("*", "00001")]
        assert beton.jpeg(OTHERS)


def test_a_thread_that_cannot_start_is_an_error_for_who_waits(serve, cache, monkeypatch):
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("fastretina-fetch"):
            raise RuntimeError("can't start new thread")
        start(thread)

    with open_beton(f"{serve().url}/{PATTERN}", cache) as beton:
        with monkeypatch.context() as context:
            context.setattr(threading.Thread, "start", refuse)
            beton.expect(np.arange(SAMPLES))
            with pytest.raises(RemoteError, match=r"can't start new thread. Raise the limit"):
                beton.jpeg(0)
        assert beton.jpeg(0)


def test_a_set_forgotten_in_a_cycle_is_stopped_whatever_its_finalizer_interrupts(serve, cache):
    beton = open_beton(f"{serve().url}/{PATTERN}", cache)
    beton.jpeg(0)
    shelf = beton._shelf
    cycle = [beton]
    cycle.append(cycle)  # type: ignore[arg-type]
    del beton, cycle
    with shelf._lock:  # the finalizer runs in the midst of the shelf's own work
        gc.collect()
    shelf._clerk.join(SOON)
    assert not shelf._clerk.is_alive()
    assert not shelf._open


def test_who_asked_last_keeps_no_file_open(serve, cache):
    with open_beton(f"{serve().url}/{PATTERN}", cache) as beton:
        beton.jpeg(0)
        shelf = beton._shelf
        with shelf._lock:
            shelf._open.clear()
        gc.collect()
        path = next(path for path in shelf._folder.path.glob("*00000-of*.beton"))
        assert shelf._folder._evict(path.name)
