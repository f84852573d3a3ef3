"""A process that exits or forks while a batch is being decoded ahead."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import ahead_cases
import devices
import pytest
from ahead_cases import COUNT, SIDE

pytestmark = ahead_cases.needs_no_gpu


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return devices.write_blocks(tmp_path_factory.mktemp("ahead") / "blocks.beton", COUNT, SIDE)


BEGIN = """
import sys, threading
sys.path[:0] = {folders!r}
import ahead_cases, pytest
from fastretina.errors import LoaderError
patch = pytest.MonkeyPatch()
codec = ahead_cases.provide(patch)
gate = codec.gates.setdefault(1, threading.Event())
loader = ahead_cases.make({file!r})
batches = iter(loader)
next(batches)
assert codec.begun(1).wait(30)
"""


def run(file: Path, code: str) -> None:
    """Nothing is said, and it ends by itself."""
    here = Path(__file__).parent
    begin = BEGIN.format(folders=[str(here), str(here.parent)], file=str(file))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here.parents[1]), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", begin + textwrap.dedent(code)],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("ending", ["", "loader.close()", "raise SystemExit(0)", "del loader, batches"])
def test_the_interpreters_exit_is_silent_while_a_batch_is_being_decoded(file, ending):
    run(file, f"threading.Timer(0.2, gate.set).start()\n{ending}\n")


def test_a_forked_child_is_told_where_the_thread_is_and_takes_nothing_from_its_parent(file):
    run(
        file,
        """
        import gc, os, signal
        for action in ("next(batches)", "next(iter(loader))", "loader.state_dict()", "loader.set_epoch(2)"):
            if (pid := os.fork()) == 0:
                signal.alarm(20)
                try:
                    exec(action)
                except LoaderError as error:
                    os._exit(0 if "made before the process was forked" in str(error) else 3)
                os._exit(4)
            assert os.waitpid(pid, 0)[1] == 0, action
        for action in ("loader.close()", "del loader, batches; gc.collect()"):
            if (pid := os.fork()) == 0:
                signal.alarm(20)
                exec(action)
                os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0, action
        gate.set()
        assert len(list(batches)) == 2
        loader.close()
        """,
    )
