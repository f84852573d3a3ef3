"""What breaks into a loop over a Loader at any moment: Ctrl-C, a signal handler, exceptions in threads, the garbage collector."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from loader_cases import write

PROGRAM = Path(__file__).with_name("interrupted_loops.py")
AT_ONCE = 250  # interruptions of one process


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("interrupts") / "small.beton", 100, 64)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("interrupts") / "large.beton", 24, 512)


def broken_into(what: str, path: Path, times: int) -> None:
    """See interrupted_loops.py."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    for first in range(0, times, AT_ONCE):
        command = [sys.executable, str(PROGRAM), what, str(path), str(min(AT_ONCE, times - first)), str(first)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), command


@pytest.mark.tries(12, 500)
@pytest.mark.parametrize("size", ["small", "large"])
def test_ctrl_c_in_a_loop_is_a_keyboard_interrupt_and_loses_no_batch(size, tries, tried, request):
    broken_into("interrupts", request.getfixturevalue(size), tries)
    tried(f"loader: SIGINT in a loop over {size} images at a random moment", tries)


@pytest.mark.tries(5, 100)
def test_a_signal_handler_may_close_the_loader_at_any_moment(small, tries, tried):
    broken_into("closed", small, tries)
    tried("loader: close() in a signal handler at a random moment", tries)


@pytest.mark.tries(8, 250)
def test_an_exception_in_a_thread_of_the_loader_reaches_the_consumer_and_the_next_iteration_is_whole(small, tries, tried):
    broken_into("ended", small, tries)
    tried("loader: asynchronous exception in a thread at a random moment", tries)


@pytest.mark.tries(6, 200)
def test_loaders_forgotten_in_cycles_end_their_threads_and_the_collector_lives(small, tries, tried):
    broken_into("cycles", small, tries)
    tried("loader: forgotten in a reference cycle, collected in any thread", tries)


@pytest.mark.tries(5, 100)
def test_ctrl_c_while_photographs_are_prepared_leaves_no_thread(small, tries, tried):
    broken_into("predicting", small, tries)
    tried("predict: SIGINT while photographs are prepared, at a random moment", tries)
