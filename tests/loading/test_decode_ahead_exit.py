"""A process that exits or forks while a batch is being decoded ahead."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import ahead_cases
import devices
import pytest
from ahead_cases import COUNT, SIDE

pytestmark = ahead_cases.needs_no_gpu

ENDINGS = ["", "loader.close()", "raise SystemExit(0)", "del loader, batches"]
FORKS = """
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
"""
CASES = [*(f"threading.Timer(0.2, gate.set).start()\n{ending}\n" for ending in ENDINGS), FORKS]

# A child for each case, which begins where torch has been imported and no thread started, and ends as an interpreter does: the
# case is the main program's last statement.
PROGRAM = """
import json, os, sys, threading
sys.path[:0] = {folders!r}
import ahead_cases, pytest
from fastretina.errors import LoaderError
cases, found, case = {cases!r}, [], None
for code in cases:
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        os.dup2(writing, 1), os.dup2(writing, 2)
        os.close(reading), os.close(writing)
        case = code
        break
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    found.append((os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said))
if case is None:
    print(json.dumps(found))
    raise SystemExit
patch = pytest.MonkeyPatch()
codec = ahead_cases.provide(patch)
gate = codec.gates.setdefault(1, threading.Event())
loader = ahead_cases.make({file!r})
batches = iter(loader)
next(batches)
assert codec.begun(1).wait(30)
exec(case)
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, tuple[int, str]]:
    """Of each case its exit code and what it said."""
    file = devices.write_blocks(tmp_path_factory.mktemp("ahead") / "blocks.beton", COUNT, SIDE)
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here.parents[1]), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(folders=[str(here), str(here.parent)], cases=CASES, file=str(file))],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return dict(zip([*ENDINGS, FORKS], map(tuple, json.loads(done.stdout)), strict=True))


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_interpreters_exit_is_silent_while_a_batch_is_being_decoded(found, ending):
    assert found[ending] == (0, "")


def test_a_forked_child_is_told_where_the_thread_is_and_takes_nothing_from_its_parent(found):
    assert found[FORKS] == (0, "")
