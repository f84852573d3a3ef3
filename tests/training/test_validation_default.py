"""Without --val the best epoch is chosen on a tenth of the training set, and on the test set for those alone who ask for it."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from labelled import write_labelled
from test_config import Tiny
from test_settings import parsed, saved

from fastretina import compare, folds, open_beton
from fastretina.compare import CompareConfig
from fastretina.errors import RunError, UsageError
from fastretina.report.run import RunPictures
from fastretina.train import main
from fastretina.training import build
from fastretina.training.config import TrainConfig, as_settings, check, differing
from fastretina.training.data import open_data
from fastretina.training.state import load_state, save_state

UNKNOWN = ["", "", *(str(n // 2) for n in range(38))]  # of 40 images; nobody knows whose the first two are
NOTE = (
    "The validation set was taken from the training set by image, since the patients of 2 of 40 images are unknown: a person's two "
    "eyes may be on both sides."
)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, one_thread):
    monkeypatch.setattr(build, "build_model", lambda arch, outputs, **_: Tiny(outputs))


@pytest.fixture
def unreported(monkeypatch: pytest.MonkeyPatch) -> None:
    """No report at the end, which takes seconds."""
    monkeypatch.setattr(RunPictures, "finish", lambda pictures: None)


@pytest.fixture
def config(tiny_betons, tmp_path):
    sizes = {"epochs": 2, "batch_size": 8, "resolution": 32, "workers": 1}
    return partial(TrainConfig, train=tiny_betons.train, test=tiny_betons.test, out=tmp_path / "run", **sizes)


@pytest.fixture
def packed(tiny_betons, tmp_path):
    """What packs the training images, or the test images, anew: those are then of the patients given."""

    def pack(which: str, patients: list[str]) -> Path:
        with open_beton(getattr(tiny_betons, which)) as images:
            return write_labelled(tmp_path / f"{which}-again.beton", images, patients=patients)

    return pack


def sets(settings: TrainConfig) -> dict[str, list[str]]:
    """The names of the images in each data set."""
    with ExitStack() as stack:
        return {name: list(beton.names) for name, beton in open_data(settings, stack).items()}


def test_a_tenth_of_the_patients_is_validated_on_and_not_trained_on(config, packed):
    """Of 40 people with one eye each, 8 of each grade: a tenth of 8 is one."""
    settings = config(train=packed("train", [str(n) for n in range(40)]))
    found = sets(settings)
    assert (len(found["train"]), len(found["val"]), len(found["test"])) == (35, 5, 20)
    assert found == sets(replace(settings, val_fraction=0.1, split_by="patient"))
    people = {name: {image.partition("_")[0] for image in images} for name, images in sets(config()).items()}
    assert people["val"]
    assert not people["val"] & people["train"]
    assert as_settings(settings)["val_fraction"] == 0.1


def test_where_patients_are_unknown_the_validation_set_is_taken_by_image_which_is_said(config, packed, capsys):
    settings = config(train=packed("train", UNKNOWN), epochs=1)
    assert sets(settings) == sets(replace(settings, split_by="image"))
    main(settings)
    assert f"\nsplit      {NOTE}\n" in capsys.readouterr().out
    assert NOTE in (settings.out / "report.html").read_text().replace("&#x27;", "'")
    found = json.loads((settings.out / "metrics.json").read_text())
    assert (found["selected_on"], found["data"]["split_note"]) == ("val", NOTE)
    with pytest.raises(UsageError, match=r"--val-fraction with --split-by patient: .* of 2 of 40 images are unknown"):
        sets(replace(settings, split_by="patient"))


@pytest.mark.usefixtures("unreported")
def test_where_they_are_known_or_the_division_was_asked_for_nothing_is_said_of_it(config, packed, tmp_path, capsys):
    unknown = packed("train", UNKNOWN)
    main(config(epochs=1))
    main(config(epochs=1, train=unknown, split_by="image", out=tmp_path / "asked"))
    main(config(epochs=1, train=unknown, val_fraction=0, out=tmp_path / "none"))
    assert "by image" not in capsys.readouterr().out


@pytest.mark.parametrize("changes", [{"folds": 2, "fold": 1}, {"test": None, "test_fraction": 0.3}], ids=str)
def test_test_sets_and_folds_are_not_taken_by_image_unless_that_is_asked_for(config, packed, changes):
    """A test set with the other eyes of those who are trained on is worse than none."""
    settings = config(train=packed("train", UNKNOWN), **changes)
    with pytest.raises(UsageError, match=r"--(folds|test-fraction) with --split-by auto: .*2 of 40 images are unknown.*by image"):
        sets(settings)
    assert {"train", "val", "test"} == sets(replace(settings, split_by="image")).keys()


def test_0_asks_for_the_choice_on_the_test_set(config):
    settings = config(val_fraction=0)
    found = sets(settings)
    assert found.keys() == {"train", "test"}
    assert len(found["train"]) == 40


def test_nothing_is_taken_where_a_validation_set_is_given_or_folds_are(config, tiny_betons):
    given = sets(config(val=tiny_betons.train))
    assert len(given["train"]) == len(given["val"]) == 40
    folded = sets(config(folds=2, fold=1))
    assert len(folded["train"]) + len(folded["val"]) == 40
    assert len(sets(config(folds=2))["train"]) == 40
    for settings in (config(val=tiny_betons.train), config(folds=2)):
        check(settings)
        assert as_settings(settings)["val_fraction"] == 0


def test_a_set_too_small_for_a_tenth_is_an_error_that_names_the_way_out(config, packed):
    settings = config(train=packed("test", [str(n) for n in range(20)]))
    message = r"--val-fraction: takes 0 of 20 images and leaves 20; .*--val-fraction 0 takes none, .* on the test set"
    with pytest.raises(UsageError, match=message):
        sets(settings)
    assert len(sets(replace(settings, val_fraction=0))["train"]) == 20


@pytest.mark.usefixtures("unreported")
@pytest.mark.parametrize("stored", [{"val_fraction": 0.0, "split_by": "patient"}, {}], ids=["older", "oldest"])
def test_a_run_of_before_this_default_goes_on_with_0_alone(config, stored):
    """The oldest knew neither flag."""
    settings = config(val_fraction=0, stop_after_steps=6)
    main(settings)
    state = load_state(settings.out / "last.pt")
    for name in ("val_fraction", "split_by"):
        del state["settings"][name]
    state["settings"] |= stored
    save_state(settings.out / "last.pt", state)
    with pytest.raises(RunError, match=r"other settings \(val_fraction was 0\.0, now 0\.1\)"):
        main(config())
    main(config(val_fraction=0))
    found = json.loads((settings.out / "metrics.json").read_text())
    assert (found["last_epoch"], found["selected_on"]) == (2, "test")


def test_older_runs_with_validation_data_have_the_settings_of_now(config, tiny_betons):
    for changes in ({"val": tiny_betons.train}, {"folds": 2}, {"val_fraction": 0.2}):
        now = as_settings(config(**changes))
        older = now | {"split_by": "patient"}
        assert differing(older, now, now) == {}
        assert differing(older | {"split_by": "image"}, now, now) == {"split_by": ("image", "auto")}


@pytest.mark.parametrize("given", [{"val": "v.beton"}, {"folds": 2}, {}], ids=str)
def test_the_config_json_of_an_older_run_is_the_same_run(tmp_path, given):
    older = as_settings(TrainConfig()) | {"val_fraction": 0.0, "split_by": "patient"} | given
    again = parsed(TrainConfig, "--config", saved(tmp_path, older))
    assert as_settings(again) == older


def test_what_a_config_json_gives_is_set_aside_by_0_for_other_validation_data(tmp_path, tiny_betons):
    file = saved(tmp_path, as_settings(TrainConfig(train=tiny_betons.train, test=tiny_betons.test)))
    for other in (["--val", tiny_betons.train], ["--folds", 2]):
        with pytest.raises(UsageError, match="--val-fraction 0 where a --config gives it"):
            check(parsed(TrainConfig, "--config", file, *other))
        check(parsed(TrainConfig, "--config", file, *other, "--val-fraction", 0))


def test_all_runs_of_a_comparison_are_validated_on_the_same_tenth(tiny_betons):
    runs = compare.plan(CompareConfig(train=tiny_betons.train, test=tiny_betons.test, archs="resnet18,resnet34"))
    found = [sets(run.config) for run in runs]
    assert len(found) == 2
    assert found[0]["val"]
    assert found[0] == found[1]


def test_the_folds_of_a_cross_validation_take_nothing_more(config):
    for run in folds.plan(config(folds=2)):
        assert as_settings(run.config)["val_fraction"] == 0
