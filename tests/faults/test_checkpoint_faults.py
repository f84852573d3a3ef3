"""Checkpoints that are cut, flipped or hostile: the save before steps in and says so, and none of them runs code."""

from __future__ import annotations

import functools
import io
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import safetensors.torch
import torch
from test_checkpoint import grader

from fastretina.errors import CheckpointError
from fastretina.models.checkpoint import load_checkpoint, read_tensors, write_checkpoint
from fastretina.models.weights import is_intact, read_weights
from fastretina.training.run_folder import RunFolder
from fastretina.training.state import keep_best_twice, load_state, promote_best, resume_state, save_state

SETTINGS = {"lr": 0.1}


def save(run: RunFolder, epoch: int, best: int | None, improved: bool) -> None:
    """What a run does at the end of an epoch, with small tensors."""
    if improved:
        write_checkpoint(run.staged_best, {"w": torch.full((50,), float(epoch))}, grader(epoch))
    progress = {"epoch": epoch, "batch": 0, "step": 5 * epoch, "best_epoch": best}
    save_state(
        run.last, {"progress": progress, "settings": SETTINGS, "data": {}, "w": torch.full((500,), epoch)}, older=run.previous
    )
    if improved:
        promote_best(run)
    else:
        keep_best_twice(run, best)


@pytest.fixture(params=["improved", "not improved"])
def run(request, tmp_path: Path) -> RunFolder:
    """Saved after epochs 1 to 4; the last of them was, or was not, the best."""
    run = RunFolder(tmp_path / "saved")
    run.path.mkdir()
    save(run, 1, 1, True)
    save(run, 2, 2, True)
    save(run, 3, 2, False)
    save(run, 4, 4 if request.param == "improved" else 2, request.param == "improved")
    return run


def damaged(data: bytes, chosen: random.Random) -> bytes:
    """Cut anywhere, or with one bit flipped anywhere, in turn."""
    if chosen.random() < 0.5:
        return data[: chosen.randrange(len(data))]
    place = chosen.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << chosen.randrange(8)]) + data[place + 1 :]


def harmless(path: Path) -> bool:
    """The flipped bit is in a part of the zip file that carries nothing, such as padding or a date: the state is the same."""
    try:
        state = load_state(path)
    except CheckpointError:
        return False
    return torch.equal(state["w"], torch.full((500,), 4)) and state["progress"]["epoch"] == 4


@pytest.mark.tries(30, 150)
def test_a_damaged_state_falls_back_to_the_one_before_and_says_so(
    run: RunFolder, tmp_path: Path, tries: int, tried, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen, whole, same = random.Random(3), run.last.read_bytes(), 0
    for _ in range(tries):
        struck = RunFolder(tmp_path / "struck")
        shutil.copytree(run.path, struck.path)
        struck.last.write_bytes(damaged(whole, chosen))
        if harmless(struck.last):
            same += 1
        else:
            state = resume_state(struck, "auto", SETTINGS, {})
            assert state is not None
            assert (state["progress"]["epoch"], state["progress"]["best_epoch"]) == (3, 2)
            said = capsys.readouterr().err
            assert f"{struck.last}: " in said
            assert "Going on from the save before it: epoch 4, after step 15" in said
            assert said.count("\n") == 1
            assert torch.equal(read_tensors(struck.best)["w"], torch.full((50,), 2.0))
            # Once settled it is like any other run: the good state is last.pt, and nothing more is said.
            assert load_state(struck.last)["progress"]["epoch"] == 3
            assert resume_state(struck, "auto", SETTINGS, {})["progress"]["epoch"] == 3
            assert capsys.readouterr().err == ""
            assert sorted(entry.name for entry in struck.path.iterdir()) == ["best.safetensors", "last.pt"]
        shutil.rmtree(struck.path)
    assert same < tries / 2
    tried("training: last.pt cut or flipped, the save before it steps in", tries - same)
    tried("training: last.pt flipped where it carries nothing, loads the same", same)


@pytest.mark.tries(30, 100)
def test_a_damaged_best_checkpoint_is_never_graded_with(run: RunFolder, tmp_path: Path, tries: int, tried) -> None:
    chosen, whole = random.Random(4), run.best.read_bytes()
    improved = load_state(run.last)["progress"]["best_epoch"] == 4
    for _ in range(tries):
        struck = RunFolder(tmp_path / "struck")
        shutil.copytree(run.path, struck.path)
        struck.best.write_bytes(damaged(whole, chosen))
        with pytest.raises(CheckpointError, match=r"best\.safetensors"):
            read_tensors(struck.best)
        with pytest.raises(CheckpointError, match=r"best\.safetensors"):
            load_checkpoint(struck.best)
        try:  # as another run's --weights; where the damage took the seal away, the file is another one, or none
            assert read_weights(struck.best).tensors.keys() == {"w"}
            assert is_intact(struck.best.read_bytes()) is None
        except CheckpointError:
            pass
        state = resume_state(struck, "auto", SETTINGS, {})
        assert state is not None
        # The state before speaks of another best checkpoint, or there is a copy of the one that both speak of.
        assert (state["progress"]["epoch"], state["progress"]["best_epoch"]) == ((3, 2) if improved else (4, 2))
        assert torch.equal(read_tensors(struck.best)["w"], torch.full((50,), 2.0))
        assert resume_state(struck, "auto", SETTINGS, {})["progress"] == state["progress"]
        shutil.rmtree(struck.path)
        tried("training: best.safetensors cut or flipped: refused, and at a resume the copy or the state before steps in")


def test_where_both_copies_of_the_best_are_damaged_the_run_is_not_taken_up(run: RunFolder) -> None:
    for path in (run.best, run.previous_best):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="missing, corrupt or not of epoch"):
        resume_state(run, "auto", SETTINGS, {})
    assert run.last.exists()


def test_a_best_checkpoint_that_was_damaged_during_the_run_is_named_at_the_next_save(run: RunFolder) -> None:
    run.best.write_bytes(run.best.read_bytes()[:-1])
    run.previous_best.unlink()
    with pytest.raises(CheckpointError, match=r"best\.safetensors: corrupt"):
        keep_best_twice(run, 4)


def test_where_both_states_are_damaged_the_newer_one_is_named(run: RunFolder) -> None:
    run.last.write_bytes(b"")
    run.previous.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"last\.pt: "):
        resume_state(run, "auto", SETTINGS, {})


def test_a_missing_state_falls_back_too(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    run.last.unlink()
    assert resume_state(run, "auto", SETTINGS, {})["progress"]["epoch"] == 3
    assert "no such training state" in capsys.readouterr().err


def test_a_run_taken_up_by_its_own_name_falls_back_as_with_auto(run: RunFolder) -> None:
    run.last.write_bytes(b"damaged")
    assert resume_state(run, str(run.path / "last.pt"), SETTINGS, {})["progress"]["epoch"] == 3
    assert load_state(run.last)["progress"]["epoch"] == 3
    assert not run.previous.exists()


def test_a_run_taken_up_elsewhere_falls_back_without_touching_the_source(run: RunFolder, tmp_path: Path) -> None:
    run.last.write_bytes(b"damaged")
    before = {entry.name: entry.read_bytes() for entry in run.path.iterdir()}
    other = RunFolder(tmp_path / "other")
    other.path.mkdir()
    assert resume_state(other, str(run.path), SETTINGS, {})["progress"]["epoch"] == 3
    assert torch.equal(read_tensors(other.best)["w"], torch.full((50,), 2.0))
    assert {entry.name: entry.read_bytes() for entry in run.path.iterdir()} == before


@functools.cache
def zip_bomb() -> bytes:
    """A gigabyte of zeros in a megabyte."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive, archive.open("a/data.pkl", "w") as part:
        for _ in range(1024):
            part.write(bytes(1 << 20))
    return out.getvalue()


def overlapping() -> bytes:
    """A thousand entries that share one part: stored, but read a thousand times."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a/data.pkl", bytes(1 << 20))
        archive.filelist *= 1_000
    return out.getvalue()


def attack(folder: Path) -> object:
    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (os.mkdir, (str(folder / "attacked"),))

    return Attack()


def saved(value: object, **options: object) -> bytes:
    out = io.BytesIO()
    torch.save(value, out, **options)
    return out.getvalue()


HOSTILE: dict[str, Callable[[Path], bytes]] = {
    "malicious pickle": lambda folder: pickle.dumps(attack(folder)),
    "malicious pickle in torch's zip": lambda folder: saved({"progress": {}, "x": attack(folder)}),
    "malicious pickle in torch's old format": lambda folder: saved(
        {"progress": {}, "x": attack(folder)}, _use_new_zipfile_serialization=False
    ),
    "foreign pickle": lambda _: pickle.dumps({"progress": {}, "when": psutil.Process}),
    "zip bomb": lambda _: zip_bomb(),
    "zip of overlapping parts": lambda _: overlapping(),
    "safetensors of a header of 2^63 bytes": lambda _: struct.pack("<Q", 1 << 63) + b"{}",
    "safetensors of a tensor past the end": lambda _: (
        struct.pack("<Q", 60) + b'{"x":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'.ljust(60)
    ),
}


@pytest.mark.parametrize("suffix", ["last.pt", "weights.pth", "weights.safetensors", "best.safetensors"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_checkpoint_is_refused_and_runs_nothing(kind: str, suffix: str, tmp_path: Path, tried) -> None:
    path = tmp_path / suffix
    path.write_bytes(HOSTILE[kind](tmp_path))
    read = {"last.pt": load_state, "best.safetensors": load_checkpoint}.get(suffix, read_weights)
    before = psutil.Process().memory_info().rss
    # A bomb must be known for one before it is unpacked: afterwards it would be refused for other reasons.
    is_bomb = kind.startswith("zip") and not suffix.endswith("safetensors")
    with pytest.raises(CheckpointError, match=f"{suffix}.*compressed or overlapping parts, which unpack to" if is_bomb else suffix):
        read(path)
    assert psutil.Process().memory_info().rss - before < 64 << 20
    assert not (tmp_path / "attacked").exists()
    tried("training: hostile file as a checkpoint or as weights")


def test_the_attack_would_work_on_a_careless_reader(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(attack(tmp_path)))
    assert (tmp_path / "attacked").exists()


def test_a_checkpoint_without_a_checksum_is_refused(tmp_path: Path) -> None:
    safetensors.torch.save_file({"w": torch.zeros(1)}, tmp_path / "bare.safetensors", metadata=grader().metadata())
    with pytest.raises(CheckpointError, match="holds no checksum"):
        read_tensors(tmp_path / "bare.safetensors")


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    code = f"from fastretina.training.run_folder import RunFolder\nwith RunFolder({str(folder.path)!r}).locked(): pass"
    with folder.locked():
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
        assert "another run is writing to this folder" in done.stderr
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
