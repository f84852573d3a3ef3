"""A set on a server belongs to the process that opened it: a forked child has none of the threads that fetch, and must not wait."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from remote_cases import PATTERN, SAMPLES

from fastretina.beton.open import open_beton
from fastretina.errors import RemoteError

# That is what is tested.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def in_child(lock: Any, action: Callable[[], Any]) -> str:
    """What a child, forked while a thread of the parent holds the lock, has to say; "" where it hangs."""
    reading, writing = os.pipe()
    with lock:
        pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        try:
            text = str(action())
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writing, text.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read().decode()
    os.waitpid(pid, 0)
    return text


def test_a_forked_child_gets_an_error_and_takes_nothing_from_its_parent(serve, cache):
    remote = open_beton(f"{serve().url}/{PATTERN}", cache)
    expected = bytes(remote.jpeg(0))
    shelf = remote._shelf
    order = np.arange(SAMPLES)
    for action in (lambda: remote.jpeg(0), lambda: remote.jpeg(SAMPLES - 1), lambda: remote.expect(order)):
        found = in_child(shelf._lock, action)
        assert found.startswith(f"{RemoteError.__name__}: http://")
        assert found.endswith("its set was opened before the process was forked; open it in the process that reads it")
    assert in_child(shelf._lock, lambda: (remote.close(), len(remote.labels))) == f"(None, {SAMPLES})"

    def forget() -> str:
        nonlocal remote
        del remote
        gc.collect()
        return "forgotten"

    assert in_child(shelf._lock, forget) == "forgotten"
    assert not shelf.closing.is_set()
    assert bytes(remote.jpeg(0)) == expected
    assert remote.jpeg(SAMPLES - 1)
    remote.close()


def test_a_set_opened_in_the_forked_child_works(serve, cache):
    url = f"{serve().url}/{PATTERN}"
    with open_beton(url, cache) as remote:
        size = len(remote.jpeg(0))

        def opened_here() -> int:
            with open_beton(url, cache) as own:
                return len(own.jpeg(0))

        assert in_child(remote._shelf._lock, opened_here) == str(size)
