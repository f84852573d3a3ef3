"""Comparisons: what they leave, that they restart where a killed one stopped, and what they refuse before training."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastretina import one_run, train, write_beton
from fastretina.compare import CompareConfig, main, plan
from fastretina.errors import CheckpointError, RunError, UsageError
from fastretina.grading import RETINOPATHY, Classes
from fastretina.models.resnet import build_model
from fastretina.report.compared import ComparedRun, terminal_table
from fastretina.report.comparison import comparison_html
from fastretina.training.config import as_settings
from fastretina.training.run_folder import RunFolder
from fastretina.training.state import load_state, report_ending
from tests.conftest import one_pixel_pictures, write_tiny_folder

NAMES = ("accuracy", "balanced_accuracy", "qwk", "macro_f1")
SMALL = {"epochs": 2, "batch_size": 20, "resolution": 32, "lr": 3e-4, "workers": 1, "val_fraction": 0}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A ResNet10 with 1,000 outputs, as torchvision publishes larger ones."""
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("weights") / "first.pth"
    torch.save(build_model("resnet10", 1000).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def whole(tiny_betons, weights, tmp_path_factory) -> CompareConfig:
    """An undisturbed comparison of a ResNet10 from scratch with one from a file."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "compare"
    config = CompareConfig(
        train=tiny_betons.train, test=tiny_betons.test, archs="resnet10", weights=f"none,{weights}", out=out, **SMALL
    )
    real = one_run.main

    def undrawn_run(settings):
        with one_pixel_pictures():
            return real(settings)

    with pytest.MonkeyPatch.context() as patch:  # the pictures of the comparison are looked at, those of its runs are not
        patch.setattr(one_run, "main", undrawn_run)
        assert main(config) == 0
    return config


@pytest.fixture
def undrawn_after_it(whole):
    """Those of later ones are not looked at."""
    with one_pixel_pictures():
        yield


def rows(config: CompareConfig) -> list[dict[str, str]]:
    with (config.out / "compare.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def folders(config: CompareConfig) -> list[Path]:
    return [config.out / run.name for run in plan(config)]


def test_the_table_holds_what_the_runs_found(whole):
    table, summary = rows(whole), json.loads((whole.out / "compare.json").read_text())
    assert [row["run"] for row in table] == [run.name for run in plan(whole)]
    for row, entry, folder in zip(table, summary["runs"], folders(whole), strict=True):
        found = json.loads((folder / "metrics.json").read_text())
        for which in ("best", "last"):
            for name in NAMES:
                assert float(row[f"{which}_{name}"]) == pytest.approx(found[which][name], rel=1e-5)
                assert entry[f"{which}_{name}"] == found[which][name]
            assert entry[f"{which}_confusion"] == found[which]["confusion"]
        assert int(row["best_epoch"]) == found["best_epoch"]
        assert float(row["seconds"]) == pytest.approx(sum(found["epoch_seconds"]), rel=1e-5)
        assert len(entry["train_accuracy"]) == len(entry["test_accuracy"]) == whole.epochs
        assert entry["test_accuracy"][-1] == pytest.approx(found["last"]["accuracy"])
    assert summary["selected_on"] == "test"
    assert {"torch", "fastretina"} <= summary["versions"].keys()


@pytest.mark.usefixtures("undrawn_after_it")
def test_each_run_is_the_one_that_train_makes(whole, tmp_path):
    train.main(replace(plan(whole)[1].config, out=tmp_path / "alone"))
    compared, alone = (load_state(folder / "last.pt")["model"] for folder in (folders(whole)[1], tmp_path / "alone"))
    assert all(torch.equal(value, alone[key]) for key, value in compared.items())


def test_the_report_needs_no_network_and_links_the_runs(whole):
    text = (whole.out / "report.html").read_text()
    assert 'src="data:image/png;base64,' in text
    assert "http:" not in text
    assert "https:" not in text
    assert "on the TEST set" in text
    for folder in folders(whole):
        assert f'href="{folder.name}/report.html"' in text
        assert (whole.out / folder.name / "report.html").is_file()
    image = Image.open(io.BytesIO((whole.out / "compare.png").read_bytes()))
    assert min(image.size) > 1000


def test_each_metric_of_the_report_stands_in_its_column(whole):
    text = (whole.out / "report.html").read_text().replace("&nbsp;", " ")
    for title, which in (("Test set, best epochs", "best"), ("Test set, last epochs", "last")):
        found = text.partition(f'<table class="" aria-label="{title}">')[2].partition("</table>")[0]
        columns = re.findall(r'<th scope="col">(.*?)</th>', found)[1:]
        shown = [dict(zip(columns, re.findall(r"<td>(.*?)</td>", row), strict=True)) for row in found.split("<tr>")[2:]]
        for row, folder in zip(shown, folders(whole), strict=True):
            found = json.loads((folder / "metrics.json").read_text())[which]
            assert row["QWK"] == f"{found['qwk']:.3f}"
            assert row["macro F1"] == f"{found['macro_f1']:.3f}"
            assert row["accuracy"] == f"{100 * found['accuracy']:.1f} %"
            assert row["balanced accuracy"] == f"{100 * found['balanced_accuracy']:.1f} %"


def test_a_finished_comparison_is_shown_again_and_nothing_is_trained(whole, capsys):
    before = [(folder / "last.pt").stat().st_mtime_ns for folder in folders(whole)]
    assert main(whole) == 0
    printed = capsys.readouterr().out
    assert all(f"\n{folder.name} " in printed for folder in folders(whole))
    assert [(folder / "last.pt").stat().st_mtime_ns for folder in folders(whole)] == before


@pytest.mark.usefixtures("undrawn_after_it")
def test_a_killed_comparison_restarts_where_it_stopped(whole, tmp_path, capsys):
    """SIGKILL in the second epoch of the second run; the first is not touched, the second becomes what it would have been."""
    settings = replace(whole, out=tmp_path / "compare")
    script = (
        "import os, sys, torch; from fastretina import compare; from fastretina.models import heads\n"
        "from tests.conftest import one_pixel_pictures; undrawn = one_pixel_pictures(); undrawn.__enter__()\n"
        "real = heads.Loss.__call__; steps = []\n"
        "torch.set_num_threads(1)\n"
        "def counted(*given):\n    steps.append(1)\n    if len(steps) == 8: os.kill(os.getpid(), 9)\n    return real(*given)\n"
        "heads.Loss.__call__ = counted; compare.run_command(sys.argv[1:])"
    )
    flags = [
        f"--{name.replace('_', '-')}={getattr(settings, name)}" for name in ("train", "test", "archs", "weights", "out", *SMALL)
    ]
    done = subprocess.run(
        [sys.executable, "-c", script, *flags], capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    first, second = folders(settings)
    assert [row["run"] for row in rows(settings)] == [first.name]
    assert load_state(second / "last.pt")["progress"]["epoch"] == 1
    before = (first / "last.pt").stat().st_mtime_ns
    assert main(settings) == 0
    assert "resuming   epoch 2" in capsys.readouterr().out
    assert (first / "last.pt").stat().st_mtime_ns == before
    for ours, undisturbed in zip(rows(settings), rows(whole), strict=True):
        assert all(ours[key] == undisturbed[key] for key in ours if key.startswith(("best_", "last_")))
    resumed, straight = (load_state(folder / "last.pt")["model"] for folder in (second, folders(whole)[1]))
    assert all(torch.equal(value, straight[key]) for key, value in resumed.items())


def test_other_settings_are_named_and_refused(whole):
    with pytest.raises(RunError, match=r"epochs was 2, now 3, seed was 0, now 1"):
        main(replace(whole, epochs=3, seed=1))


def test_a_comparison_whose_data_were_packed_anew_is_refused_by_name(whole, tiny_betons, tmp_path):
    """Its finished runs are of other data than those to come."""
    shutil.copytree(whole.out, tmp_path / "compare")
    images = tmp_path / "images"
    write_tiny_folder(images, 20, 60, seed=9)
    write_beton(tmp_path / "other.beton", images=images, labels=images / "labels.csv", size=64, workers=1)
    settings = replace(whole, out=tmp_path / "compare", archs="resnet10,resnet50")
    before = tiny_betons.test.read_bytes()
    try:
        shutil.copy(tmp_path / "other.beton", tiny_betons.test)
        with pytest.raises(RunError, match=r"test\.beton: is not the test set that .*resnet10-scratch was begun with"):
            main(settings)
    finally:
        tiny_betons.test.write_bytes(before)
    assert not (tmp_path / "compare" / "resnet50-scratch").exists()


@pytest.mark.usefixtures("undrawn_after_it")
def test_a_run_with_the_report_of_another_state_is_not_taken_for_finished(whole, tmp_path, capsys):
    shutil.copytree(whole.out, tmp_path / "compare")
    settings = replace(whole, out=tmp_path / "compare")
    first = RunFolder(folders(settings)[0])
    written = first.report.read_text()
    first.report.write_text(written.rpartition("<!--")[0] + report_ending("0" * 32))
    state = first.last.read_bytes()
    assert main(settings) == 0
    assert f"{first.path}, finished" not in capsys.readouterr().out
    assert first.report.read_text().endswith(written[written.rindex("<!--") :])
    assert first.last.read_bytes() == state


def test_weights_that_do_not_fit_an_architecture_are_refused_before_anything_is_trained(tiny_betons, weights, tmp_path):
    settings = CompareConfig(
        train=tiny_betons.train, test=tiny_betons.test, archs="resnet10,resnet50", weights=f"none,{weights}",
        out=tmp_path / "compare", **SMALL,
    )  # fmt: skip
    with pytest.raises(
        CheckpointError,
        match=r"first\.pth for resnet50: .*not the weights of a resnet50.*--arch resnet10.*ARCH=FILE.*Nothing was trained",
    ):
        main(settings)
    with pytest.raises(CheckpointError, match=r"absent\.pth"):
        main(replace(settings, weights=f"none,{tmp_path}/absent.pth"))
    assert {entry.name for entry in (tmp_path / "compare").iterdir()} <= {".lock"}


def test_the_folder_of_a_single_run_is_not_taken(whole):
    with pytest.raises(RunError, match="folder of a single training run"):
        main(replace(whole, out=folders(whole)[0]))


def test_a_run_that_fails_does_not_cost_the_others(whole, tmp_path, monkeypatch, capsys):
    finished = [ComparedRun.read(RunFolder(run.config.out), run.config.arch, run.config.weights) for run in plan(whole)]

    def fails_first(config):
        if config.out.name == finished[0].name:
            raise RunError("the loss is nan")

    monkeypatch.setattr(one_run, "main", fails_first)
    monkeypatch.setattr(ComparedRun, "read", lambda *_: finished[1])
    settings = replace(whole, out=tmp_path / "compare")
    with pytest.raises(RunError, match=rf"1 of 2 runs failed: {finished[0].name};"):
        main(settings)
    assert "error: the loss is nan" in capsys.readouterr().err
    assert [row["run"] for row in rows(settings)] == [finished[1].name]


def test_every_architecture_gets_every_weight_and_a_file_may_be_for_one_alone():
    config = CompareConfig(weights="none,IMAGENET1K_V1,runs/{arch}/best.safetensors,resnet18=a/w.pth,resnet18=b/a/w.pth")
    assert [(run.name, run.config.weights) for run in plan(config)] == [
        ("resnet18-scratch", None),
        ("resnet18-IMAGENET1K_V1", "IMAGENET1K_V1"),
        ("resnet18-best", "runs/resnet18/best.safetensors"),
        ("resnet18-a-w", "a/w.pth"),
        ("resnet18-a-w-18904f9a", "b/a/w.pth"),
        ("resnet50-scratch", None),
        ("resnet50-IMAGENET1K_V1", "IMAGENET1K_V1"),
        ("resnet50-best", "runs/resnet50/best.safetensors"),
    ]
    assert all(run.config.out == config.out / run.name for run in plan(config))


@pytest.mark.parametrize(
    ("archs", "weights", "reason"),
    [
        ("resnet19", "none", "unknown architecture .resnet19."),
        ("", "none", "--archs: is empty"),
        ("resnet18", " , ", "--weights: is empty"),
        ("resnet18,resnet18", "none", "names something twice"),
        ("resnet18", "a.pth,resnet18=a.pth", "a second time"),
        ("resnet18", "none,resnet50=a.pth", "resnet50 is not among --archs"),
        ("resnet18,resnet50", "resnet18=a.pth", "nothing for resnet50"),
    ],
)
def test_a_comparison_that_makes_no_sense_is_a_usage_error(archs, weights, reason):
    with pytest.raises(UsageError, match=reason):
        plan(CompareConfig(archs=archs, weights=weights))


def test_several_ranks_are_told_to_train_each_run_by_itself(whole, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="not for torchrun"):
        main(whole)


def test_a_run_that_answers_one_grade_for_all_is_called_so_and_names_are_escaped(whole):
    run = plan(whole)[0]
    found = ComparedRun.read(RunFolder(run.config.out), "resnet10", "<script>alert(1)</script>.pth")
    confusion = [[0, 4, 0, 0, 0]] * 5
    collapsed = replace(found, metrics={**found.metrics, "best": {**found.metrics["best"], "confusion": confusion, "qwk": None}})
    assert terminal_table([found, collapsed])[2].endswith("one grade for all")
    text = comparison_html([collapsed], as_settings(whole))
    assert "One and the same grade for every test image: resnet10-scratch." in text
    assert "<script" not in text


def test_runs_of_classes_without_an_order_are_compared_without_kappa(whole):
    run = plan(whole)[0]
    old = ComparedRun.read(RunFolder(run.config.out), "resnet10", None)
    assert old.classes == RETINOPATHY
    assert replace(old, metrics={key: value for key, value in old.metrics.items() if key != "classes"}).classes == RETINOPATHY
    classes = Classes(("normal", "AMD", "glaucoma", "cataract", "myopia"))
    changed = {"classes": classes.as_dict(), "selection_metric": "balanced_accuracy"}
    found = replace(old, metrics={**old.metrics, **changed})
    assert found.row()["best_qwk"] is None
    assert found.row()["best_balanced_accuracy_low"] == old.metrics["best"]["intervals"]["balanced_accuracy"]["low"]
    assert found.row()["best_auroc"] == old.metrics["best"]["auroc"]
    header, line = terminal_table([found])
    assert "QWK" not in header
    assert "last balanced accuracy" in header
    assert f"{100 * old.metrics['last']['balanced_accuracy']:.1f} %" in line
    text = re.sub('base64,[^"]*', "", comparison_html([found], as_settings(whole)))
    assert "QWK" not in text
    assert "retinopathy" not in text
    assert "Screening" not in text
    assert "Recall of each class" in text
    assert "Screening" in comparison_html([old], as_settings(whole))


def test_corrupt_metrics_of_a_run_are_an_error_that_names_the_folder(tmp_path):
    (tmp_path / "metrics.json").write_text('{"best": {')
    (tmp_path / "results.csv").write_text("epoch\n1\n")
    with pytest.raises(RunError, match=str(tmp_path)):
        ComparedRun.read(RunFolder(tmp_path), "resnet18", None)


def test_a_run_without_a_row_of_results_is_an_error_that_names_the_folder(whole, tmp_path):
    finished = RunFolder(plan(whole)[0].config.out)
    (tmp_path / "metrics.json").write_bytes(finished.metrics.read_bytes())
    (tmp_path / "results.csv").write_text(finished.results.read_text().splitlines()[0] + "\n")
    with pytest.raises(RunError, match=f"{tmp_path}.*no epoch"):
        ComparedRun.read(RunFolder(tmp_path), "resnet18", None)
