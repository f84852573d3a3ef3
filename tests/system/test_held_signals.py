"""Signals that are held: an exception may come between any two instructions, and each of them is tried."""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from test_pack import SIZE, folder, listing, plain

from fastretina.packing.pack import write_beton
from fastretina.system import interrupts
from fastretina.system.files import write_atomically, write_bytes
from fastretina.system.interrupts import SIGNALS, HeldSignals


def struck(call: Callable[[], object], number: int | None) -> tuple[int, BaseException | None]:
    """Call with a SIGINT at its `number`-th instruction in fastretina and contextlib: how many there are, and what was raised."""
    done, watched = 0, (str(Path(interrupts.__file__).parents[1]), os.fspath(Path(os.__file__).with_name("contextlib.py")))

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal done
        if not frame.f_code.co_filename.startswith(watched):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            done += 1
            if done == number:
                signal.raise_signal(signal.SIGINT)
        return trace

    raised, before = None, sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt as error:
        raised = error  # with its frames and what they hold
    finally:
        sys.settrace(before)
    return done, raised


def descriptors_open() -> list[str]:
    return sorted(str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink())


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory: on a disk a file that replaces another is written to it at once, which is most of what hundreds of them take."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        yield Path(place)


@pytest.fixture
def nothing_left(tmp_path: Path) -> Iterator[Callable[[], None]]:
    threads = set(threading.enumerate())
    handlers, descriptors = [signal.getsignal(number) for number in SIGNALS], descriptors_open()

    def check() -> None:
        assert [name for name in listing(tmp_path) if name.startswith(".")] == []
        assert [signal.getsignal(number) for number in SIGNALS] == handlers
        assert descriptors_open() == descriptors
        assert [thread for thread in threading.enumerate() if thread not in threads and thread.name != "tqdm_monitor"] == []

    return check


def test_a_file_is_old_or_new_and_unlocked_wherever_its_writing_is_interrupted(tmp_path: Path, nothing_left) -> None:
    path, older, kept = tmp_path / "a.json", tmp_path / "a.prev.json", []

    def write() -> None:
        write_atomically(path, lambda file: file.write(b"new"), older)

    path.write_bytes(b"old")
    count, _ = struck(write, None)
    assert count > 300
    for number in range(1, count + 1):
        path.write_bytes(b"old")
        kept.append(struck(write, number)[1])
        assert kept[-1] is not None, number
        nothing_left()
        assert path.read_bytes() in (b"old", b"new")
        write_bytes(path, b"next")
        assert path.read_bytes() == b"next"


def test_a_packing_leaves_nothing_wherever_it_is_interrupted(tmp_path: Path, nothing_left) -> None:
    root, out, kept = folder(tmp_path / "in", plain(3) | {"9_left.jpeg": b"no image"}), tmp_path / "o.beton", []

    def pack() -> None:
        write_beton(out, root=root, split="train", size=SIZE, workers=1, on_bad="skip", max_bad="50%")

    pack()
    whole = out.read_bytes()
    count, _ = struck(pack, None)
    for number in random.Random(0).sample(range(1, count), 150):
        kept.append(struck(pack, number)[1])
        assert kept[-1] is not None, number
        nothing_left()
        assert out.read_bytes() == whole
    pack()
    assert out.read_bytes() == whole


def test_what_arrives_while_signals_are_held_comes_at_a_check_in_a_window_or_at_the_end() -> None:
    interrupt, done = partial(signal.raise_signal, signal.SIGINT), []

    def until_the_end() -> None:
        with HeldSignals():
            interrupt()
            done.append("held")

    def in_a_window(signals: HeldSignals, strike: Callable[[], None]) -> None:
        with signals.let_in():
            strike()
            done.append("not interrupted")

    with pytest.raises(KeyboardInterrupt):
        until_the_end()
    with HeldSignals() as signals:
        with HeldSignals() as inner:
            in_a_window(inner, interrupt)  # the outer one holds it
        with pytest.raises(KeyboardInterrupt):
            signals.check()
        with pytest.raises(KeyboardInterrupt):
            in_a_window(signals, interrupt)
        interrupt()
        with pytest.raises(KeyboardInterrupt):
            in_a_window(signals, lambda: None)
        signals.check()
    assert done == ["held", "not interrupted"]


def test_a_forked_child_holds_nothing_of_its_parents() -> None:
    """Of another thread: it has nothing to clean up, and would never come to the end of the block."""

    def fork() -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of threads, which Python 3.12 warns of
            if pid := os.fork():
                return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        try:
            signal.raise_signal(signal.SIGINT)
            os._exit(1)
        except KeyboardInterrupt:
            os._exit(7)

    with ThreadPoolExecutor(1) as threads, HeldSignals() as signals:
        assert signals.result(threads.submit(fork)) == 7


def test_handlers_that_raise_nothing_are_called_and_ignored_signals_stay_ignored() -> None:
    noted: list[int] = []
    before = {number: signal.signal(number, lambda number, _: noted.append(number)) for number in (signal.SIGTERM, signal.SIGINT)}
    before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with HeldSignals() as signals:
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            signal.raise_signal(signal.SIGINT)
            assert noted == []
            with signals.let_in():
                assert noted == [signal.SIGINT]
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGINT)
                assert noted == [signal.SIGINT, signal.SIGTERM, signal.SIGINT]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_other_threads_hold_nothing_and_a_wait_for_one_lets_signals_in() -> None:
    with ThreadPoolExecutor(1) as threads, HeldSignals() as signals:

        def hold() -> int:
            with HeldSignals():
                return 7

        assert signals.result(threads.submit(hold)) == 7
        go = threading.Event()
        future = threads.submit(go.wait, 30)
        threading.Timer(0.2, signal.raise_signal, [signal.SIGINT]).start()
        with pytest.raises(KeyboardInterrupt):
            signals.result(future)
        assert not future.done()
        go.set()
