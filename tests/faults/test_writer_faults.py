"""Several writers of one file, each killed at any moment: the file is always one writer's, whole, and nobody waits for the dead."""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
import warnings
from pathlib import Path

import pytest
from test_pack import listing

from fastretina.errors import RunError
from fastretina.system.files import AtomicFile, write_bytes

SIZE = 20_000  # bytes


def writer(path: Path, number: int) -> int:
    """A child that writes the file over and over, until it is killed; it ends by itself at an error that is not another writer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads, which Python 3.12 warns of: the child uses none
        pid = os.fork()
    while pid == 0:
        try:
            with AtomicFile(path) as file:
                for start in range(0, SIZE, SIZE // 10):
                    file.write(bytes([number]) * (SIZE // 10), start)
                file.publish()
        except RunError as error:
            if "another process is writing this file" not in str(error):
                os._exit(9)
        except BaseException:
            os._exit(8)
    return pid


@pytest.mark.tries(15, 400)
def test_writers_that_are_killed_leave_whole_files_and_no_locks(tries: int, tried) -> None:
    chosen = random.Random(tries)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        path = Path(place) / "a.json"
        write_bytes(path, bytes(SIZE))
        writers = [writer(path, number) for number in range(3)]
        seen = set()
        try:
            for number in range(tries):
                time.sleep(chosen.uniform(0, 0.01))
                data = path.read_bytes()
                assert (len(data), len(set(data))) == (SIZE, 1)
                seen.add(data[0])
                struck = number % len(writers)
                os.kill(writers[struck], signal.SIGKILL)
                assert os.waitstatus_to_exitcode(os.waitpid(writers[struck], 0)[1]) == -signal.SIGKILL
                writers[struck] = writer(path, number % 250)
        finally:
            for pid in writers:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        assert len(seen) > tries // 10
        write_bytes(path, b"last")
        assert path.read_bytes() == b"last"
        assert listing(path.parent) == ["a.json"]
    tried("files: kill -9 of one of three writers of the same file", tries)
