"""What a run is of: its data sets, which must be those that it began with, and its state, of which its report must be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import rank_run
import torch
from test_train import config, rows

from fastretina import open_beton, write_beton
from fastretina.errors import CheckpointError, RunError
from fastretina.models.checkpoint import read_info
from fastretina.report.run import RunPictures
from fastretina.train import main
from fastretina.training import build
from fastretina.training.config import TrainConfig
from fastretina.training.run_folder import RunFolder
from fastretina.training.state import is_reported, load_state, save_state
from tests.conftest import write_tiny_folder

pytestmark = pytest.mark.usefixtures("one_thread", "small")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that trains in milliseconds."""
    monkeypatch.setattr(build, "build_model", lambda arch, outputs, **_: rank_run.Tiny(outputs))


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pictures and no report: they take seconds."""
    monkeypatch.setattr(RunPictures, "finish", lambda pictures: None)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """As many images of other people, fewer of them, and the images of the test set under other people's names."""
    root, found = tmp_path_factory.mktemp("others"), {}
    for name, count, patient, seed in (("as many", 40, 60, 5), ("fewer", 10, 60, 5), ("20", 20, 60, 5), ("renamed", 20, 30, 2)):
        folder = write_tiny_folder(root / name, count, patient, seed)
        found[name] = root / f"{name}.beton"
        write_beton(found[name], images=folder, labels=folder / "labels.csv", size=64, workers=1)
    return found


@pytest.fixture(scope="module")
def begun(tiny_betons, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, Path]:
    """A run of two epochs that was stopped in its second, on copies of the data; and a copy of it all."""
    root = tmp_path_factory.mktemp("begun")
    settings = config(tiny_betons, root / "all" / "run", epochs=2, schedule="constant", val=root / "all" / "val.beton")
    settings = replace(settings, train=root / "all" / "train.beton", test=root / "all" / "test.beton")
    (root / "all").mkdir()
    for path, source in ((settings.train, tiny_betons.train), (settings.test, tiny_betons.test), (settings.val, tiny_betons.train)):
        shutil.copy(source, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "build_model", lambda arch, outputs, **_: rank_run.Tiny(outputs))
        patch.setattr(RunPictures, "finish", lambda pictures: None)
        main(replace(settings, stop_after_steps=7))
    shutil.copytree(root / "all", root / "kept")
    return settings, root / "kept"


@pytest.fixture
def stopped(begun: tuple[TrainConfig, Path], plain) -> TrainConfig:
    """The run as it was stopped."""
    settings, kept = begun
    shutil.rmtree(settings.out.parent)
    shutil.copytree(kept, settings.out.parent)
    return settings


@pytest.fixture(scope="module")
def reported(tiny_betons, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, Path]:
    """A run of one epoch with its report, on a copy of the test set; and a copy of it all."""
    root = tmp_path_factory.mktemp("reported")
    settings = replace(config(tiny_betons, root / "all" / "run", epochs=1), test=root / "all" / "test.beton")
    (root / "all").mkdir()
    shutil.copy(tiny_betons.test, settings.test)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "build_model", lambda arch, outputs, **_: rank_run.Tiny(outputs))
        main(settings)
    shutil.copytree(root / "all", root / "kept")
    return settings, root / "kept"


@pytest.fixture
def finished(reported: tuple[TrainConfig, Path]) -> TrainConfig:
    """The run as it ended."""
    settings, kept = reported
    shutil.rmtree(settings.out.parent)
    shutil.copytree(kept, settings.out.parent)
    return settings


def assert_same(one: Path, other: Path) -> None:
    """The same weights, metrics, and answers."""
    first, second = (load_state(path / "last.pt")["model"] for path in (one, other))
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert rows(one) == rows(other)
    assert (one / "predictions.csv").read_bytes() == (other / "predictions.csv").read_bytes()


def left(folder: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in folder.iterdir()}


@pytest.mark.parametrize(
    ("name", "other"), [("train", "as many"), ("val", "as many"), ("test", "20"), ("test", "renamed"), ("test", "fewer")]
)
def test_a_run_whose_data_were_packed_anew_is_refused_by_name_and_left_as_it_is(stopped, others, name, other):
    before = left(stopped.out)
    shutil.copy(others[other], getattr(stopped, name))
    title = "validation" if name == "val" else name
    with pytest.raises(RunError, match=rf"{name}\.beton: is not the {title} set that .*run was begun with.*--out"):
        main(stopped)
    assert left(stopped.out) == before


def test_a_run_whose_files_were_packed_again_from_the_same_photographs_goes_on(stopped, tiny_betons, capsys):
    folder = tiny_betons.test_images
    write_beton(stopped.test, images=folder, labels=folder / "labels.csv", size=64, workers=1)
    assert main(stopped) == 0
    assert "resuming" in capsys.readouterr().out


def test_a_part_of_the_training_set_that_is_another_one_is_refused(tiny_betons, plain, others, tmp_path):
    shutil.copy(tiny_betons.train, tmp_path / "train.beton")
    settings = replace(config(tiny_betons, tmp_path / "run", epochs=1, test_fraction=0.3), test=None)
    settings = replace(settings, train=tmp_path / "train.beton")
    main(replace(settings, stop_after_steps=1))
    shutil.copy(others["as many"], settings.train)
    with pytest.raises(RunError, match=r"train\.beton: is not the train set"):
        main(settings)


def test_a_finished_run_is_not_shown_for_other_data(finished, others, capsys):
    assert main(finished) == 0
    assert "is finished" in capsys.readouterr().out
    shutil.copy(others["renamed"], finished.test)
    with pytest.raises(RunError, match="is not the test set"):
        main(finished)


def test_state_metrics_checkpoint_and_report_say_of_what_data_they_are(tiny_betons, finished):
    run = RunFolder(finished.out)
    with open_beton(tiny_betons.train) as train, open_beton(tiny_betons.test) as test:
        digests = {"train": train.digest, "test": test.digest}
    assert load_state(run.last)["data"] == digests
    assert read_info(run.best).data == digests | {"whole": digests["train"]}
    assert {name: json.loads(run.metrics.read_text())["data"][name]["digest"] for name in digests} == digests
    assert all(digest[:12] in run.report.read_text() for digest in digests.values())


def changed(run: RunFolder, change: Callable[[dict[str, Any]], object]) -> None:
    state = load_state(run.last)
    change(state)
    save_state(run.last, state)


def test_a_state_of_an_older_version_goes_on_and_says_that_its_data_are_unknown(stopped, capsys):
    def older(state: dict[str, Any]) -> None:
        del state["data"], state["loader"]["data"]

    changed(RunFolder(stopped.out), older)
    assert main(stopped) == 0
    said = capsys.readouterr().err
    assert "last.pt: of an older fastretina" in said
    assert "is unknown" in said


@pytest.mark.parametrize("other", ["20", "fewer"])
def test_answers_that_are_not_for_the_images_of_the_test_set_are_refused_whatever_the_state_says(stopped, others, other):
    with open_beton(others[other]) as beton:
        labels = beton.labels.copy()
        ids, digest = beton.ids, beton.digest

    def forged(state: dict[str, Any]) -> None:
        state["data"]["test"] = digest
        if other == "20":  # the same ids, and one image of another grade
            state["progress"]["best_test"]["labels"][3] += 1

    shutil.copy(others[other], stopped.test)
    changed(RunFolder(stopped.out), forged)
    assert len(ids) == len(labels)
    with pytest.raises(CheckpointError, match=r"last\.pt: does not fit this run: .*test\.beton"):
        main(stopped)


NONSENSE: dict[str, Callable[[dict[str, Any]], object]] = {
    "batch past the end": lambda state: state["progress"].update(batch=6),
    "negative batch": lambda state: state["progress"].update(batch=-1),
    "epoch as text": lambda state: state["progress"].update(epoch="1"),
    "a truth as a number": lambda state: state["progress"].update(step=True),
    "an epoch without metrics": lambda state: state["progress"].update(epoch=2),
    "a best epoch to come": lambda state: state["progress"].update(best_epoch=9),
    "history of text": lambda state: state["progress"].update(history=["well"]),
    "a rate as text": lambda state: state["progress"]["history"][0].update(lr="fast"),
    "a confusion matrix of text": lambda state: state["progress"]["history"][0]["test"]["metrics"].update(confusion="none"),
    "answers as a number": lambda state: state["progress"].update(best_test=7),
    "a tally of text": lambda state: state["progress"]["tally"].update(loss_sum="much"),
    "no progress": lambda state: state.update(progress=[1]),
    "no settings": lambda state: state.update(settings=None),
    "data as a list": lambda state: state.update(data=["train"]),
    "loader elsewhere": lambda state: state["loader"].update(batch=4),
    "loader of another epoch": lambda state: state["loader"].update(epoch=5),
    "no loader": lambda state: state.update(loader=None),
    "loader of other data": lambda state: state["loader"].update(data="0" * 32),
    "no generator": lambda state: state.update(rng_cpu=None),
    "weights of another network": lambda state: state["model"].popitem(),
    "moments as a list": lambda state: state.update(optimizer=[]),
}


@pytest.mark.parametrize("kind", NONSENSE)
def test_a_state_that_no_run_can_have_saved_is_refused_by_name(stopped, kind):
    changed(RunFolder(stopped.out), NONSENSE[kind])
    (stopped.out / "last.prev.pt").unlink()
    with pytest.raises(CheckpointError, match=r"last\.pt: "):
        main(stopped)


def test_a_run_killed_in_the_report_of_its_further_epochs_writes_it_at_the_next_start(finished, monkeypatch, capsys):
    settings, run, finish = finished, RunFolder(finished.out), RunPictures.finish
    monkeypatch.setattr(RunPictures, "finish", lambda pictures: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        main(replace(settings, epochs=2))
    assert "32 px, 1 epoch<" in run.report.read_text()
    monkeypatch.setattr(RunPictures, "finish", finish)
    state = run.last.read_bytes()
    assert main(replace(settings, epochs=2)) == 0
    assert "is finished" not in capsys.readouterr().out
    assert "32 px, 2 epochs<" in run.report.read_text()
    assert run.last.read_bytes() == state
    assert main(replace(settings, epochs=2)) == 0
    assert "is finished" in capsys.readouterr().out


def older_metrics(run: RunFolder) -> None:
    metrics = json.loads(run.metrics.read_text())
    run.metrics.write_text(json.dumps(metrics | {"state": "0" * 32, "best_epoch": 7}))


SPOILT: dict[str, Callable[[RunFolder], object]] = {
    "report missing": lambda run: run.report.unlink(),
    "report truncated": lambda run: run.report.write_bytes(run.report.read_bytes()[:-1]),
    "report empty": lambda run: run.report.write_bytes(b""),
    "report of an older version": lambda run: run.report.write_bytes(run.report.read_bytes().rpartition(b"<!--")[0]),
    "metrics missing": lambda run: run.metrics.unlink(),
    "metrics truncated": lambda run: run.metrics.write_bytes(run.metrics.read_bytes()[:99]),
    "metrics of another state": older_metrics,
    "predictions missing": lambda run: run.predictions.unlink(),
    "curves missing": lambda run: run.curves.unlink(),
}


def test_what_is_missing_or_of_another_state_in_a_finished_run_is_written_anew(finished):
    run = RunFolder(finished.out)
    whole = left(run.path)
    for kind, spoil in SPOILT.items():
        spoil(run)
        assert not is_reported(run), kind
        for name, data in whole.items():
            (run.path / name).write_bytes(data)
        assert is_reported(run)
    run.report.unlink()
    older_metrics(run)
    run.predictions.unlink()
    assert main(finished) == 0
    assert is_reported(run)
    assert json.loads(run.metrics.read_text())["best_epoch"] == 1
    assert run.predictions.read_bytes() == whole["predictions.csv"]


def test_a_finished_run_whose_state_was_removed_is_finished_as_long_as_the_rest_agrees(finished):
    run = RunFolder(finished.out)
    run.last.unlink()
    assert is_reported(run)
    older_metrics(run)
    assert not is_reported(run)


def test_a_run_taken_up_elsewhere_has_a_state_of_its_own_from_the_start(tiny_betons, plain, tmp_path):
    """Also where nothing is left to train: a folder without it could not be taken up again."""
    settings = config(tiny_betons, tmp_path / "first", epochs=2, schedule="constant")
    main(settings)
    second = replace(settings, out=tmp_path / "second", resume=str(settings.out))
    main(second)
    assert_same(settings.out, second.out)
    main(replace(second, resume="auto", epochs=3))
    assert load_state(second.out / "last.pt")["progress"]["epoch"] == 3


def test_a_copied_and_a_linked_run_folder_go_on_as_the_run_itself(stopped, tmp_path):
    shutil.copytree(stopped.out, tmp_path / "copy")
    (tmp_path / "linked").mkdir()
    shutil.copytree(stopped.out, tmp_path / "linked" / "run")
    (tmp_path / "link").symlink_to(tmp_path / "linked" / "run")
    main(stopped)
    for name in ("copy", "link"):
        main(replace(stopped, out=tmp_path / name))
        assert_same(stopped.out, tmp_path / name)
    assert torch.equal(*(load_state(tmp_path / name / "last.pt")["rng_cpu"] for name in ("copy", "link")))
