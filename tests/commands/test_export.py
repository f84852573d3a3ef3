"""export: the file answers as evaluate does, or it is not there."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from labelled import write_labelled
from test_checkpoint import grader as info_of

from fastretina import export, open_beton, write_beton
from fastretina.errors import CheckpointError, RunError, UsageError
from fastretina.export import ExportConfig
from fastretina.metrics.operating import Operating, Threshold
from fastretina.models import export_checks, exported
from fastretina.models.checkpoint import save_checkpoint
from fastretina.models.grader import Grader
from fastretina.models.heads import Decision
from fastretina.models.resnet import build_model

DOCS = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(tiny_betons, tmp_path_factory) -> Path:
    """Of a network that has learned nothing, with a threshold that refers half of the test images."""
    path = tmp_path_factory.mktemp("checkpoint") / "best.safetensors"
    torch.manual_seed(0)
    model, info = build_model("resnet18"), replace(info_of(), decision=Decision((), 1.5), size=64)
    save_checkpoint(path, model, info)
    with open_beton(tiny_betons.test) as beton:
        answers = Grader.load(path, amp="off").answers(beton).predictions
    middle = float(answers.log_probabilities.double().exp()[:, list(info.classes.referable)].sum(dim=1).sort().values[9:11].mean())
    operating = Operating((Threshold("high-sensitivity", middle, 0.9, 0.92, 0.7),), 90, 30, "ab12")
    save_checkpoint(path, model, replace(info, operating=operating))
    return path


@pytest.fixture(scope="module")
def made(checkpoint, tiny_betons, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    assert export.main(ExportConfig(checkpoint, path, data=tiny_betons.test, time=False)) == 0
    return path


def test_the_exported_file_answers_as_evaluate_does(made, checkpoint, tiny_betons):
    session = onnxruntime.InferenceSession(made)
    with open_beton(tiny_betons.train) as beton:
        right = Grader.load(checkpoint, amp="off").answers(beton).predictions
        found = np.concatenate([session.run(None, {"pixels": pixels})[0] for pixels, _ in export_checks.batches(beton, 64)])
    assert found == pytest.approx(right.log_probabilities.exp().numpy(), abs=1e-5)
    assert found.argmax(axis=1).tolist() == right.predicted.tolist()


def test_the_example_of_the_documentation_refers_as_predict_does(made, checkpoint, tiny_betons, monkeypatch, capsys):
    monkeypatch.chdir(made.parent)
    (example,) = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    paths = sorted(tiny_betons.test_images.glob("*.jpeg"))
    exec(example, {"paths": paths})
    right = Grader.load(checkpoint, amp="off").grade(list(map(str, paths)), threshold="high-sensitivity")
    lines = [f"{path} {name} {'refer' if refer else 'no'}" for path, name, refer in zip(
        paths, [info_of().classes[grade] for grade in right["grade"]], right["referable"], strict=True)]  # fmt: skip
    assert capsys.readouterr().out.splitlines() == lines
    assert right["referable"].sum() == 10


def test_the_documentation_explains_every_key(made):
    told = json.loads(onnxruntime.InferenceSession(made).get_modelmeta().custom_metadata_map["fastretina"])
    explained = set(re.findall(r"^\| `(\w+)`", DOCS, re.MULTILINE))
    assert explained == told.keys()


def test_int8_is_smaller_and_tells_its_loss_and_all_sides_are_timed(checkpoint, made, tiny_betons, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export_checks, "PAUSE", 0.0)
    monkeypatch.setattr(export_checks, "ROUNDS", 1)
    monkeypatch.setattr(exported, "as_onnx", lambda program, metadata: made.read_bytes())
    export.main(ExportConfig(checkpoint, tmp_path / "int8.onnx", data=tiny_betons.test, quantise=True))
    assert (tmp_path / "int8.onnx").stat().st_size < made.stat().st_size / 3.5
    printed = capsys.readouterr().out
    assert re.search(r"^int8: 11\.\d MB, 44\.\d MB before; QWK -?0\.\d{4}, before -?0\.\d{4}: a loss of ", printed, re.MULTILINE)
    assert len(re.findall(r"torch [\d.,]+, onnxruntime [\d.,]+ \([\d.]+ times as many\), int8 ", printed)) == 2
    told = json.loads(onnxruntime.InferenceSession(tmp_path / "int8.onnx").get_modelmeta().custom_metadata_map["fastretina"])
    with open_beton(tiny_betons.test) as beton:
        assert (told["quantised"]["data"], told["quantised"]["images"]) == (beton.digest, 20)


@pytest.fixture
def unmade(monkeypatch) -> None:
    """Nothing is traced, made or painted that takes seconds."""
    monkeypatch.setattr(export, "PHOTOGRAPHS", 2)
    monkeypatch.setattr(exported.Exported, "trace", lambda self: None)
    monkeypatch.setattr(exported, "as_onnx", lambda program, metadata: b"new")


@pytest.mark.parametrize("off", [2e-4, float("nan")])
def test_answers_that_differ_leave_the_file_that_was_there_and_no_other(checkpoint, tmp_path, monkeypatch, unmade, off):
    (tmp_path / "model.onnx").write_bytes(b"old")
    grader = Grader.load(checkpoint, amp="off")
    monkeypatch.setattr(exported, "onnx_run", lambda model, threads: lambda pixels: export_checks.expected(grader, pixels) + off)
    with pytest.raises(RunError, match=r"model\.onnx: not written: .* differ from torch's by .* on 2 painted photographs"):
        export.main(ExportConfig(checkpoint, tmp_path / "model.onnx"))
    assert (tmp_path / "model.onnx").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_whoever_is_interrupted_leaves_nothing(checkpoint, tiny_betons, tmp_path, monkeypatch, unmade):
    def interrupted(model, threads):
        assert len(list(tmp_path.iterdir())) == 1, "it is known by now whether the file can be written"
        raise KeyboardInterrupt

    monkeypatch.setattr(exported, "onnx_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export.main(ExportConfig(checkpoint, tmp_path / "model.onnx", data=tiny_betons.test))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"out": Path("model.pb")}, r"--out model\.pb: .* \.onnx or \.pt2"),
        ({"out": Path("model.pt2"), "quantise": True}, r"--quantise: is for an \.onnx"),
        ({"quantise": True}, "--quantise: needs --data FILE"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_loaded(tmp_path, monkeypatch, change, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=said):
        export.main(replace(ExportConfig(Path("absent"), Path("model.onnx")), **change))
    assert not list(tmp_path.iterdir())


def test_a_corrupt_checkpoint_is_named_and_nothing_written(checkpoint, tmp_path):
    (tmp_path / "best.safetensors").write_bytes(checkpoint.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"best\.safetensors"):
        export.main(ExportConfig(tmp_path / "best.safetensors", tmp_path / "model.onnx"))
    assert [path.name for path in tmp_path.iterdir()] == ["best.safetensors"]


def test_without_the_packages_it_says_how_to_get_them(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UsageError, match=r"pip install 'fastretina\[export\]'; or export to a \.pt2"):
        export.main(ExportConfig(checkpoint, tmp_path / "model.onnx"))


def test_photographs_that_were_prepared_otherwise_or_have_no_grades_are_refused(checkpoint, tiny_betons, tmp_path):
    images = tiny_betons.test_images
    local, bare = tmp_path / "local.beton", tmp_path / "bare.beton"
    write_beton(local, images=images, labels=images / "labels.csv", size=64, workers=1, contrast="local")
    with open_beton(tiny_betons.test) as beton:
        write_labelled(bare, beton, labels=[-1] * len(beton))
    for data, said in ((local, "was packed with --crop none --contrast local"), (bare, "photographs that all have a grade")):
        with pytest.raises(UsageError, match=said):
            export.main(ExportConfig(checkpoint, tmp_path / "model.onnx", data=data, quantise=True))
    assert not (tmp_path / "model.onnx").exists()
