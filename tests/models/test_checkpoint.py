"""Files of a run are complete or absent, are read without running code, and say what is wrong with them."""

from __future__ import annotations

import errno
import json
import os
import pickle
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from fastretina.errors import CheckpointError, RunError
from fastretina.grading import RETINOPATHY, Classes
from fastretina.loading.augment import IMAGENET_MEAN, IMAGENET_STD
from fastretina.metrics.predictions import Predictions, write_predictions
from fastretina.models.checkpoint import CheckpointInfo, load_checkpoint, read_info, save_checkpoint, write_checkpoint
from fastretina.models.resnet import build_model
from fastretina.system.files import write_bytes, write_json
from fastretina.training.run_folder import RunFolder
from fastretina.training.state import find_best, load_state, save_state, settle


def grader(epoch: int = 3) -> CheckpointInfo:
    return CheckpointInfo("resnet18", 5, 64, IMAGENET_MEAN, IMAGENET_STD, epoch, "bfloat16", "qwk", "test")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "best.safetensors"
    model = build_model("resnet18")
    save_checkpoint(path, model, grader())
    return path, model


def light(path, epoch: int) -> None:
    """A checkpoint with hardly any weights."""
    write_checkpoint(path, {"x": torch.zeros(1)}, grader(epoch))


def test_a_checkpoint_comes_back_with_its_metadata(saved):
    path, model = saved
    loaded, about = load_checkpoint(path)
    assert about == grader()
    assert not loaded.training
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_a_checkpoint_with_another_head_than_its_metadata_name_is_refused(tmp_path):
    path = tmp_path / "best.safetensors"
    save_checkpoint(path, build_model("resnet18", 4), grader())
    with pytest.raises(CheckpointError, match=r"best\.safetensors: fc\.bias has shape \(4,\), the network .* needs \(5,\)"):
        load_checkpoint(path)
    tensors = {name: value.contiguous() for name, value in build_model("resnet18").state_dict().items()}
    write_checkpoint(path, {name: value for name, value in tensors.items() if name != "fc.bias"}, grader())
    with pytest.raises(CheckpointError, match=r"best\.safetensors: lacks fc\.bias"):
        load_checkpoint(path)


def test_a_checkpoint_from_before_classes_were_noted_has_the_grades_of_retinopathy(tmp_path):
    assert Classes.stored(json.loads(grader().metadata()["classes"])) == RETINOPATHY
    metadata = {key: value for key, value in grader().metadata().items() if key != "classes"}
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "old.safetensors", metadata=metadata)
    assert read_info(tmp_path / "old.safetensors") == grader()


def test_classes_come_back_and_a_bare_list_of_names_is_that_of_an_older_checkpoint(tmp_path):
    seven = replace(grader(), num_classes=7, classes=Classes(tuple("abcdefg"), (2, 5)))
    write_checkpoint(tmp_path / "seven.safetensors", {"x": torch.zeros(1)}, seven)
    assert read_info(tmp_path / "seven.safetensors") == seven
    for names, expected in ((RETINOPATHY.names, RETINOPATHY), (tuple("abcde"), Classes(tuple("abcde")))):
        metadata = {**grader().metadata(), "classes": json.dumps(names)}
        safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "old.safetensors", metadata=metadata)
        assert read_info(tmp_path / "old.safetensors").classes == expected


@pytest.mark.parametrize(
    "change",
    [
        {"arch": '"resnet9"'},
        {"arch": "1.5"},
        {"arch": "[]"},
        {"num_classes": "0"},
        {"resolution": '"big"'},
        {"std": "[0.1]"},
        {"epoch": "{"},
        {"mean": None},
        {"classes": '["no"]'},
        {"classes": '["no", "yes"]'},
        {"classes": '["a", "b", "c", "d", "e"]', "head": '"ordinal"'},
    ],
)
def test_checkpoints_with_other_metadata_are_refused(tmp_path, change):
    metadata = {key: value for key, value in {**grader().metadata(), **change}.items() if value is not None}
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "odd.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError, match=r"odd\.safetensors: its metadata"):
        read_info(tmp_path / "odd.safetensors")


def test_cut_and_foreign_checkpoints_are_named(saved, tmp_path):
    data = saved[0].read_bytes()
    for size in (0, 7, 500, len(data) // 2, len(data) - 1):
        (tmp_path / "truncated.safetensors").write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=r"truncated\.safetensors"):
            load_checkpoint(tmp_path / "truncated.safetensors")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "absent.safetensors")


def test_a_training_state_comes_back_equal(tmp_path):
    state = {"progress": {"epoch": 2, "batch": 0, "step": 3}, "tensor": torch.arange(5), "nested": [{"a": None}, (1.5, "x")]}
    save_state(tmp_path / "last.pt", state)
    loaded = load_state(tmp_path / "last.pt")
    assert loaded["progress"] == state["progress"]
    assert torch.equal(loaded["tensor"], state["tensor"])
    assert loaded["nested"] == state["nested"]


def test_truncated_flipped_foreign_and_malicious_training_states_are_refused(tmp_path):
    path = tmp_path / "last.pt"
    save_state(path, {"progress": {}, "weights": torch.arange(10_000)})
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF

    class Attack:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "attacked"),))

    for content in (b"", b"x", path.read_bytes()[:-100], path.read_bytes()[:3000], bytes(data), pickle.dumps(Attack())):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"last\.pt"):
            load_state(path)
    assert not (tmp_path / "attacked").exists()
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="not a training state"):
        load_state(path)
    torch.save({"progress": {}, "format": 999}, path)
    with pytest.raises(CheckpointError, match="format 999"):
        load_state(path)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_state(path, {"progress": {"epoch": 1, "batch": 0, "step": 3}})

    def full(state, file):
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunError, match=r"last\.pt: cannot be written: No space left"):
        save_state(path, {"progress": {"epoch": 2, "batch": 0, "step": 6}})
    assert load_state(path)["progress"] == {"epoch": 1, "batch": 0, "step": 3}
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    write_bytes(tmp_path / "a.json", b"old")
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_bytes(tmp_path / "a.json", b"new")
    assert (tmp_path / "a.json").read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [tmp_path / "a.json"]


@pytest.mark.parametrize("staged", [None, 4, 7])
def test_the_best_checkpoint_is_settled_by_what_last_pt_says(tmp_path, staged):
    """Killed between the three steps of a save: the staged file of epoch 4 is known to last.pt, that of epoch 7 is not."""
    run = RunFolder(tmp_path)
    light(run.best, 4 if staged != 4 else 2)
    if staged is not None:
        light(run.staged_best, staged)
    settle(run, find_best(run, 4), fell_back=False)
    assert read_info(run.best).epoch == 4
    assert not run.staged_best.exists()


def test_a_missing_best_checkpoint_is_noticed(tmp_path):
    run = RunFolder(tmp_path)
    settle(run, find_best(run, None), fell_back=False)
    with pytest.raises(CheckpointError, match="missing, corrupt or not of epoch 2"):
        find_best(run, 2)


def test_two_runs_cannot_share_a_folder(tmp_path):
    with RunFolder(tmp_path / "run").locked():
        (tmp_path / "run" / "config.json").write_text("{}")
        with pytest.raises(RunError, match="another run is writing"), RunFolder(tmp_path / "run").locked():
            pass
    with RunFolder(tmp_path / "run").locked():
        pass


def test_a_folder_of_other_things_is_not_taken_for_a_run(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(RunError, match="no run folder"), RunFolder(tmp_path).locked():
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be used"), RunFolder(tmp_path / "file" / "run").locked():
        pass


def test_json_never_holds_nan(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"qwk": float("nan")})
    write_json(tmp_path / "a.json", {"qwk": None, "name": "é"})
    assert json.loads((tmp_path / "a.json").read_text()) == {"qwk": None, "name": "é"}


def test_predictions_hold_a_row_for_each_sample_and_no_grade_where_it_has_none(tmp_path):
    probabilities = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.25, 0.25]])
    answers = Predictions(probabilities.log(), torch.tensor([1, -1]), torch.tensor([4, 9]))
    write_predictions(tmp_path / "p.csv", answers, ["10_left", "=cmd"])
    assert (tmp_path / "p.csv").read_text().splitlines() == [
        "id,name,grade,predicted,p0,p1,p2",
        "4,10_left,1,1,0.1,0.7,0.2",
        "9,'=cmd,,0,0.5,0.25,0.25",
    ]
