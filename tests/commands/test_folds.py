"""Cross-validation: what the folds are made of, what they find together, and that they go on where they were stopped."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastretina import Grader, one_run
from fastretina.errors import CheckpointError, RunError, UsageError
from fastretina.folds import plan
from fastretina.models import heads
from fastretina.train import main
from fastretina.training.config import TrainConfig, as_settings, check, differing
from fastretina.training.data import open_data
from fastretina.training.run_folder import RunFolder
from fastretina.training.state import load_state

SMALL = {"arch": "resnet10", "epochs": 2, "batch_size": 10, "resolution": 32, "lr": 3e-4, "workers": 1}

pytestmark = pytest.mark.usefixtures("one_thread", "undrawn")


@pytest.fixture(scope="module")
def whole(undrawn, tiny_betons, tmp_path_factory) -> TrainConfig:
    """Two undisturbed folds."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "folds"
    config = TrainConfig(train=tiny_betons.train, test=tiny_betons.test, folds=2, out=out, **SMALL)
    assert main(config) == 0
    return config


def rows(config: TrainConfig) -> dict[str, dict[str, str]]:
    with (config.folder / "folds.csv").open(newline="") as file:
        return {row["fold"]: row for row in csv.DictReader(file)}


def metrics(config: TrainConfig) -> list[dict]:
    return [json.loads((run.config.folder / "metrics.json").read_text()) for run in plan(config)]


def probabilities(path: Path) -> dict[str, np.ndarray]:
    with path.open(newline="") as file:
        return {row["name"]: np.array([float(row[f"p{grade}"]) for grade in range(5)]) for row in csv.DictReader(file)}


@pytest.mark.parametrize("test_fraction", [0.0, 0.25])
def test_the_folds_share_no_patient_and_each_image_is_validated_on_once(tiny_betons, test_fraction):
    test = None if test_fraction else tiny_betons.test
    config = TrainConfig(train=tiny_betons.train, test=test, test_fraction=test_fraction, folds=3)
    validated, tested = [], []
    with ExitStack() as stack:
        rest = open_data(config, stack)["train"]
        for run in plan(config):
            data = open_data(run.config, stack)
            assert not set(data["train"].patients) & set(data["val"].patients)
            assert sorted([*data["train"].names, *data["val"].names]) == sorted(rest.names)
            validated += data["val"].names
            tested.append(data["test"].digest)
    assert sorted(validated) == sorted(rest.names)
    assert len(set(tested)) == 1


def test_by_image_the_eyes_of_a_patient_may_be_in_two_folds(tiny_betons):
    config = TrainConfig(train=tiny_betons.train, test=tiny_betons.test, folds=2, fold=1, split_by="image")
    with ExitStack() as stack:
        data = open_data(config, stack)
        assert set(data["train"].patients) & set(data["val"].patients)


def test_the_table_has_each_fold_and_numpys_mean_and_sd(whole):
    table, found = rows(whole), json.loads((whole.folder / "folds.json").read_text())
    assert list(table) == ["fold-1", "fold-2", "mean", "sd"]
    for name in ("accuracy", "balanced_accuracy", "qwk", "macro_f1"):
        for data in ("val", "test"):
            values = [run["val"]["best"][name] if data == "val" else run["best"][name] for run in metrics(whole)]
            assert [float(table[f"fold-{fold}"][f"{data}_{name}"]) for fold in (1, 2)] == pytest.approx(values, rel=1e-5)
            assert found["mean"][f"{data}_{name}"] == pytest.approx(np.mean(values))
            assert found["sd"][f"{data}_{name}"] == pytest.approx(np.std(values, ddof=1))
    assert float(table["sd"]["test_auroc"]) == pytest.approx(
        np.std([run["best"]["auroc"] for run in metrics(whole)], ddof=1), rel=1e-5
    )
    assert [int(table[f"fold-{fold}"]["val_images"]) for fold in (1, 2)] == [run["data"]["val"]["images"] for run in metrics(whole)]
    assert found["selected_on"] == "val"


def test_out_of_fold_each_image_has_the_answer_of_the_model_that_did_not_learn_from_it(whole):
    found = json.loads((whole.folder / "folds.json").read_text())["out_of_fold"]
    assert found["images"] == 40
    assert found["confusion"] == np.sum([run["val"]["best"]["confusion"] for run in metrics(whole)], axis=0).tolist()
    answers = probabilities(whole.folder / "out_of_fold.csv")
    with ExitStack() as stack:
        for run in plan(whole):
            validation, best = open_data(run.config, stack)["val"], load_state(run.folder.last)["progress"]["best_val"]
            for name, expected in zip(validation.names, best["log_probabilities"].exp(), strict=True):
                assert answers[name] == pytest.approx(expected.numpy(), abs=1e-5)


def test_the_ensemble_is_the_mean_of_the_probabilities_of_all_folds(whole):
    members = [probabilities(run.folder.predictions) for run in plan(whole)]
    found = probabilities(whole.folder / "ensemble" / "predictions.csv")
    assert len(found) == 20
    for name, values in found.items():
        assert values == pytest.approx(np.mean([member[name] for member in members], axis=0), abs=1e-4)
    told = json.loads((whole.folder / "ensemble" / "metrics.json").read_text())
    assert json.loads((whole.folder / "folds.json").read_text())["ensemble"] == told
    assert {"low", "high"} <= told["intervals"]["qwk"].keys()


def test_the_report_links_each_fold_and_says_how_far_apart_they_are(whole):
    text = whole.folder.joinpath("report.html").read_text().replace("&nbsp;", " ")
    found = json.loads((whole.folder / "folds.json").read_text())
    assert f"{found['mean']['test_qwk']:.3f} ± {found['sd']['test_qwk']:.3f}" in text
    assert f"{100 * found['mean']['test_accuracy']:.1f} ± {100 * found['sd']['test_accuracy']:.1f} %" in text
    assert all(f'href="fold-{fold}/report.html"' in text for fold in (1, 2))
    assert "on the validation set; the test set had no part in it" in text
    assert "http:" not in text
    assert "https:" not in text


def test_each_fold_has_a_card_of_its_own_checkpoint(whole):
    for run, found in zip(plan(whole), metrics(whole), strict=True):
        text = run.folder.card.read_text()
        assert hashlib.sha256(run.folder.best.read_bytes()).hexdigest() in text
        assert f"| QWK | {found['best']['qwk']:.3f} |" in text


class Killed(BaseException):
    """Nothing catches it, as nothing does SIGKILL."""


def test_a_fold_begun_by_itself_and_killed_goes_on_among_all_and_becomes_what_it_would_have_been(
    whole, tmp_path, monkeypatch, capsys
):
    config = replace(whole, out=tmp_path / "folds")
    first, second = (run.folder for run in plan(config))
    shutil.copytree(plan(whole)[0].folder.path, first.path)
    real, steps = heads.Loss.__call__, []

    def counted(*given):
        steps.append(1)
        if len(steps) == 4:
            raise Killed
        return real(*given)

    with monkeypatch.context() as patched:
        patched.setattr(heads.Loss, "__call__", counted)
        with pytest.raises(Killed):
            main(replace(config, fold=2, out=second.path))
    assert load_state(second.last)["progress"]["epoch"] == 1
    before = first.last.stat().st_mtime_ns
    assert main(config) == 0
    printed = capsys.readouterr().out
    assert f"{first.path}, finished" in printed
    assert "resuming   epoch 2" in printed
    assert first.last.stat().st_mtime_ns == before
    timed = {"seconds"}
    assert [{key: row[key] for key in row.keys() - timed} for row in rows(config).values()] == [
        {key: row[key] for key in row.keys() - timed} for row in rows(whole).values()
    ]
    resumed, straight = (load_state(folder.last)["model"] for folder in (second, plan(whole)[1].folder))
    assert all(torch.equal(value, straight[key]) for key, value in resumed.items())


def test_other_settings_are_named_and_refused_before_anything_is_trained(whole, monkeypatch):
    monkeypatch.setattr(one_run, "main", lambda config: pytest.fail("trained"))
    with pytest.raises(RunError, match=r"fold-1: begun with other settings \(epochs was 2, now 3\)"):
        main(replace(whole, epochs=3))
    with pytest.raises(RunError, match="is the folder of 2 folds"):
        main(replace(whole, folds=3))


def test_other_data_are_refused_before_anything_is_trained(whole, tiny_betons, monkeypatch):
    monkeypatch.setattr(one_run, "main", lambda config: pytest.fail("trained"))
    with pytest.raises(RunError, match="begun with other settings"):
        main(replace(whole, train=tiny_betons.test))


def test_a_finished_cross_validation_is_shown_again_and_nothing_is_trained(whole, monkeypatch, capsys):
    monkeypatch.setattr(one_run, "main", lambda config: pytest.fail("trained"))
    assert main(whole) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-7:-1]] == ["fold", "fold-1", "fold-2", "mean", "ensemble", "out"]


def test_a_fold_that_fails_does_not_cost_the_others(whole, tmp_path, monkeypatch, capsys):
    def fails(config):
        raise RunError("the loss is nan")

    config = replace(whole, out=tmp_path / "folds")
    shutil.copytree(plan(whole)[1].folder.path, plan(config)[1].folder.path)
    monkeypatch.setattr(one_run, "main", fails)
    with pytest.raises(RunError, match=r"1 of 2 runs failed: fold-1;"):
        main(config)
    assert "error: the loss is nan" in capsys.readouterr().err
    table = rows(config)
    assert list(table) == ["fold-2", "mean", "sd"]
    assert table["mean"]["test_qwk"] == table["fold-2"]["test_qwk"]
    assert table["sd"]["test_qwk"] == ""
    assert "1 of 2 folds are not finished" in (config.folder / "report.html").read_text()


def test_the_folder_of_folds_and_that_of_a_run_are_not_mixed_up(whole):
    with pytest.raises(RunError, match="folder of a single training run"):
        main(replace(whole, out=plan(whole)[0].config.folder))
    with pytest.raises(RunError, match="is the folder of 2 folds"):
        main(replace(whole, folds=0))
    assert RunFolder(plan(whole)[0].config.folder).holds_several() is None


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"folds": 1}, "--folds must lie in 2-20, got 1"),
        ({"folds": -3}, "--folds must lie in 2-20"),
        ({"folds": 21}, "--folds must lie in 2-20"),
        ({"fold": 1}, "--fold 1: is one of --folds 0"),
        ({"folds": 5, "fold": 6}, "--fold 6: is one of --folds 5"),
        ({"folds": 5, "fold": 0}, "--fold 0"),
        ({"folds": 5, "val_fraction": 0.1}, "--folds with --val"),
        ({"folds": 5, "val": Path("val.beton")}, "--folds with --val"),
    ],
)
def test_folds_that_make_no_sense_are_a_usage_error(settings, reason):
    with pytest.raises(UsageError, match=reason):
        check(TrainConfig(**settings))


def test_what_is_for_one_run_is_refused_for_all_folds(whole, monkeypatch):
    for settings in ({"resume": "never"}, {"stop_after_steps": 5}):
        with pytest.raises(UsageError, match="are for one run"):
            main(replace(whole, **settings))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="--folds 2 is not for torchrun"):
        main(whole)


def test_more_folds_than_patients_is_a_usage_error_that_counts_them(tiny_betons):
    config = TrainConfig(train=tiny_betons.test, test=tiny_betons.train, folds=20, fold=1)
    with ExitStack() as stack, pytest.raises(UsageError, match=r"--folds 20: the 20 images of --train make folds of "):
        open_data(config, stack)


def test_a_run_of_before_there_were_folds_goes_on(whole):
    now = as_settings(TrainConfig())
    older = {key: value for key, value in now.items() if key not in ("folds", "fold")}
    assert differing(older, now, now) == {}
    assert differing(older, as_settings(whole), {"folds"}) == {"folds": (0, 2)}


def test_runs_are_called_by_their_folds_where_no_folder_is_named():
    assert TrainConfig().folder == Path("runs/resnet18-512px-seed0")
    assert TrainConfig(folds=5).folder == Path("runs/resnet18-512px-seed0-5folds")
    assert TrainConfig(folds=5, fold=2).folder == TrainConfig(folds=5).folder / "fold-2"


def test_the_folder_of_all_folds_stands_for_their_ensemble(whole, tmp_path):
    members = Grader.load(whole.out).members
    assert [member.path for member in members] == [whole.out / f"fold-{number}" / "best.safetensors" for number in (1, 2)]
    (tmp_path / "config.json").write_text((whole.out / "config.json").read_text())
    (tmp_path / "fold-1").mkdir()
    shutil.copy(members[0].path, tmp_path / "fold-1")
    with pytest.raises(CheckpointError, match=r"1 of its 2 folds have no checkpoint, .*fold-2.best\.safetensors first"):
        Grader.load(tmp_path)
