"""Ranks that are late, hang, die, or have other files: a healthy run goes on, however long rank 0 works alone; others end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastretina import write_beton
from fastretina.training.state import load_state
from tests.conftest import write_tiny_folder

PATIENCE = 2.0  # seconds, instead of 50
ALONE = ["begin", "judging", "best weights", "report", "save"]  # what rank 0 does while the others wait


class Ranks:
    """Starts runs in the process of fork_ranks.py."""

    def __init__(self, train: Path, test: Path) -> None:
        self.data = [f"--train={train}", f"--test={test}", "--val-fraction=0"]
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "fork_ranks.py"), str(train)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip

    def __call__(self, out: Path, **job: Any) -> list[dict[str, Any]]:
        """What became of each rank of a run of two phases of an epoch each, in `out`."""
        usual = [f"--out={out}", "--epochs=2", "--schedule=two-phase", "--batch-size=8", "--resolution=32", "--workers=1"]
        job = {"flags": [*self.data, *usual], "ranks": 2, "patience": PATIENCE, **job}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def ranks(tiny_betons) -> Iterator[Ranks]:
    server = Ranks(tiny_betons.train, tiny_betons.test)
    yield server
    server.close()


def errors(found: list[dict[str, Any]]) -> list[str]:
    return [line for rank in found for line in rank["output"].splitlines() if line.startswith("error: ")]


@pytest.mark.tries(1, len(ALONE))
def test_ranks_wait_for_what_rank_0_does_alone_longer_than_for_one_that_hangs(
    ranks: Ranks, tmp_path: Path, tries: int, tried
) -> None:
    for place in ALONE[-tries:]:
        out = tmp_path / place.replace(" ", "-")
        found = ranks(out, at=place, rank=0, what=1.5 * PATIENCE)
        assert [rank["code"] for rank in found] == [0, 0], (place, found)
        assert found[0]["seconds"] > 1.5 * PATIENCE
        assert load_state(out / "last.pt")["progress"]["epoch"] == 2
        tried("ranks: rank 0 works alone for longer than the patience, the run goes on")


@pytest.mark.tries(1, 4)
def test_a_stopped_rank_ends_the_others_once_their_patience_is_over(ranks: Ranks, tmp_path: Path, tries: int, tried) -> None:
    """Also where the store that torchrun shares among them is in the process that hangs."""
    for place, rank, own in [("save", 0, True), ("save", 0, False), ("step", 1, False), ("evaluation", 1, False)][:tries]:
        found = ranks(tmp_path / f"{place}{rank}{own}", at=place, rank=rank, what="stop", own_store=own)
        assert found[rank]["code"] == -signal.SIGKILL, (place, found)
        assert found[1 - rank]["code"] == 1
        assert errors(found) == [line for line in errors(found) if f"rank {1 - rank}: another rank is gone" in line]
        assert len(errors(found)) == 1
        assert PATIENCE < found[1 - rank]["seconds"] < 3 * PATIENCE + 10
        tried("ranks: one hangs (SIGSTOP), the others end with one error")


@pytest.mark.tries(2, 8)
def test_a_killed_rank_ends_the_others_at_once(ranks: Ranks, tmp_path: Path, tries: int, tried) -> None:
    others = [("step", 0), ("step", 1), ("evaluation", 0)]
    for place, rank in [("evaluation", 1), ("save", 0), *others, *((place, 0) for place in ALONE[:3])][:tries]:
        found = ranks(tmp_path / f"{place}{rank}", at=place, rank=rank, what="kill", patience=30)
        assert found[rank]["code"] == -signal.SIGKILL, (place, found)
        assert found[1 - rank]["code"] == 1
        assert len(errors(found)) == 1
        assert found[1 - rank]["seconds"] < 20
        tried("ranks: kill -9 of one, in evaluation, in a save, ...: the others end")


def test_ranks_whose_files_differ_are_refused_by_rank_and_file(ranks: Ranks, tiny_betons, tmp_path: Path, tried) -> None:
    folder = write_tiny_folder(tmp_path / "other", 40, 60, seed=5)
    write_beton(tmp_path / "other.beton", images=folder, labels=folder / "labels.csv", size=64, workers=1)
    found = ranks(tmp_path / "run", others={1: [f"--train={tmp_path / 'other.beton'}"]})
    assert [rank["code"] for rank in found] == [1, 1]
    assert errors(found) == [
        f"error: rank 0: {tmp_path / 'other.beton'}: rank 1 has another train set there than rank 0 in {tiny_betons.train}; "
        "give all ranks the same files"
    ]
    assert not (tmp_path / "run" / "config.json").exists()
    tried("ranks: the files of one differ")


def test_a_second_run_of_several_ranks_in_the_same_folder_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    from fastretina.training.run_folder import RunFolder

    with RunFolder(tmp_path / "run").locked():
        found = ranks(tmp_path / "run")
    assert [rank["code"] for rank in found] == [1, 1]
    assert len(errors(found)) == 1
    assert "another run is writing to this folder" in errors(found)[0]
