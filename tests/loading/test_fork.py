"""A Loader belongs to the process that made it: a forked child gets an error at once, and takes nothing from its parent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from loader_cases import COUNT

from fastretina.beton.reader import Beton


@pytest.fixture(scope="module")
def found(path) -> dict[str, Any]:
    """What forks.py met."""
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here.parents[1]), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, str(here / "forks.py"), str(path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    answers: dict[str, Any] = json.loads(done.stdout)
    return answers


@pytest.mark.parametrize("operation", ["iter", "next", "fill", "state_dict", "load_state_dict", "set_epoch"])
def test_a_forked_child_is_told_where_the_threads_are(found, path, operation):
    assert found[operation].startswith(f"LoaderError: {path}: this Loader was made before the process was forked; it has threads")
    assert "num_workers=0" in found[operation]


def test_what_needs_no_thread_works_in_a_forked_child(found, path):
    assert found["len"] == str(-(-COUNT // 16))
    assert found["close"] == str(len(Beton(path).jpeg(3)))
    assert found["forget"] == "forgotten"


def test_a_loader_made_in_the_forked_child_works(found):
    assert found["made_here"] == str(COUNT)


def test_the_parent_goes_on_as_if_it_had_not_forked(found):
    assert found["parent"] == [3 * n + 1 for n in range(COUNT)]


def test_workers_of_a_dataloader_say_so(found, path):
    assert found["fork"].startswith("LoaderError: Caught LoaderError in DataLoader worker process 0")
    assert f"{path}: this Loader was made before the process was forked" in found["fork"]
    for operation in ("spawn", "pickle", "copy"):
        assert found[operation].startswith(f"LoaderError: {path}: a Loader cannot be pickled or copied; it has threads of its own")


def test_a_dataloader_without_workers_gives_the_epoch(found):
    assert found["none"] == str(COUNT)
