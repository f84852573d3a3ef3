"""A run and its folder: removed, renamed or taken by another run while the run goes on, it must not write among another's files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import rank_run
from test_run_identity import left
from test_train import config

from fastretina.errors import RunError
from fastretina.report.run import RunPictures
from fastretina.train import main
from fastretina.training import build
from fastretina.training.recorder import Recorder
from fastretina.training.run_folder import RunFolder
from fastretina.training.state import load_state

pytestmark = pytest.mark.usefixtures("one_thread")


def removed(run: Path) -> None:
    shutil.rmtree(run)


def taken(run: Path) -> None:
    shutil.rmtree(run)
    other(run)


def emptied_and_taken(run: Path) -> None:
    """The folder stays, and another run locks a file of its own in it."""
    for entry in run.iterdir():
        entry.unlink()
    other(run)


def other(run: Path) -> None:
    run.mkdir(exist_ok=True)
    (run / ".lock").touch()
    (run / "last.pt").write_bytes(b"another run's")


def renamed(run: Path) -> None:
    run.rename(run.with_name("moved"))


def swapped(run: Path) -> None:
    """What was a folder, or a link to one, is a link to another run's."""
    run.rename(run.with_name("moved"))
    other(run.with_name("others"))
    run.symlink_to(run.with_name("others"))


def unlocked(run: Path) -> None:
    (run / ".lock").unlink()


LOST = [removed, taken, emptied_and_taken, renamed, swapped, unlocked]


@pytest.mark.parametrize(
    ("lose", "moment"),
    [*((lose, "_save") for lose in LOST), (taken, "first_batch"), (renamed, "_write_tables"), (swapped, "finish")],
)
def test_a_run_that_has_lost_its_folder_stops_and_writes_nothing_more(
    lose: Callable[[Path], None], moment: str, tiny_betons, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(tiny_betons, tmp_path / "run", epochs=2)
    kept: dict[str, dict[str, bytes]] = {}
    owner = RunPictures if moment == "finish" else Recorder
    real = getattr(owner, moment)

    def losing(writer: object, *given: object, **more: object) -> object:
        if not kept:
            lose(settings.out)
            kept.update({entry.name: left(entry) for entry in tmp_path.iterdir()})
        return real(writer, *given, **more)

    monkeypatch.setattr(build, "build_model", lambda arch, outputs, **_: rank_run.Tiny(outputs))
    monkeypatch.setattr(owner, moment, losing)
    with pytest.raises(RunError, match=r"run: was removed, renamed or taken by another run"):
        main(settings)
    assert {entry.name: left(entry) for entry in tmp_path.iterdir()} == kept
    if moment == "_write_tables":
        assert load_state(tmp_path / "moved" / "last.pt")["progress"]["epoch"] == 1


def test_a_folder_that_is_removed_between_opening_and_locking_it_is_not_held(tmp_path, monkeypatch):
    from fastretina.training import run_folder

    def late(descriptor: int) -> bool:
        shutil.rmtree(tmp_path / "run")
        return True

    monkeypatch.setattr(run_folder, "try_lock", late)
    with pytest.raises(RunError, match="was removed"), RunFolder(tmp_path / "run").locked():
        pass


def test_a_run_behind_a_link_owns_the_folder_that_it_leads_to(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    run = RunFolder(tmp_path / "link")
    with run.locked():
        assert run.last == tmp_path / "link" / "last.pt"
        with pytest.raises(RunError, match="another run is writing"), RunFolder(tmp_path / "real").locked():
            pass
    assert run.last.name == "last.pt"


def test_an_unlocked_folder_gives_its_paths_without_asking(tmp_path):
    assert RunFolder(tmp_path / "absent").report == tmp_path / "absent" / "report.html"
    assert list(tmp_path.iterdir()) == []
