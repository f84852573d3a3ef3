"""Grader.save: a folder that loads anywhere, complete or not there, with what others need to know of the model."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fastretina import Grader, train
from fastretina.errors import CheckpointError, RunError, UsageError
from fastretina.models import folder as folders
from fastretina.models.checkpoint import read_info
from fastretina.training.config import TrainConfig


@pytest.fixture(scope="module")
def runs(undrawn, tiny_betons, tmp_path_factory) -> list[Path]:
    """Two runs of one epoch: with validation data, and without."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs")
    settings = {"arch": "resnet10", "epochs": 1, "batch_size": 8, "resolution": 32, "workers": 1}
    settings |= {"train": tiny_betons.train, "test": tiny_betons.test}
    train.main(TrainConfig(**settings, val_fraction=0.3, out=out / "a"))
    train.main(TrainConfig(**settings, seed=1, val_fraction=0, out=out / "b"))
    return [out / "a", out / "b"]


def probabilities(grader: Grader, photos: Path) -> np.ndarray:
    return grader.grade(photos, workers=1)[[f"p{grade}" for grade in range(5)]].to_numpy()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("which", [(0,), (0, 1)], ids=["one", "ensemble"])
def test_a_saved_folder_gives_the_same_answers_elsewhere(runs, tiny_betons, tmp_path, which):
    grader = Grader.load([runs[number] for number in which])
    grader.save(tmp_path / "deep" / "model")
    moved = shutil.move(tmp_path / "deep" / "model", tmp_path / "elsewhere")
    again = Grader.load(moved)
    assert np.array_equal(probabilities(again, tiny_betons.test_images), probabilities(grader, tiny_betons.test_images))
    suffixes = [""] if len(which) == 1 else ["-1", "-2"]
    names = {f"{name}{suffix}" for suffix in suffixes for name in ("model", "card")}
    assert {path.stem for path in moved.iterdir()} == names | {"thresholds", "preparation"}
    for suffix, number in zip(suffixes, which, strict=True):
        data = (moved / f"model{suffix}.safetensors").read_bytes()
        assert data == (runs[number] / "best.safetensors").read_bytes()
        card = (moved / f"card{suffix}.md").read_text()
        assert hashlib.sha256(data).hexdigest() in card
        assert card == (runs[number] / "card.md").read_text()  # its run's metrics lie beside it
    thresholds = json.loads((moved / "thresholds.json").read_text())
    assert thresholds == (read_info(runs[0] / "best.safetensors").operating.as_dict() if len(which) == 1 else None)
    preparation = json.loads((moved / "preparation.json").read_text())
    assert (preparation["size"], preparation["resolution"], preparation["crop"]) == (64, [32] * len(which), "none")
    again.save(tmp_path / "once more")
    assert all((tmp_path / "once more" / path.name).read_bytes() == path.read_bytes() for path in moved.iterdir())


def test_a_checkpoint_alone_has_a_card_that_calls_its_metrics_unknown(runs, tmp_path):
    shutil.copy(runs[0] / "best.safetensors", tmp_path / "x.safetensors")
    Grader.load(tmp_path / "x.safetensors").save(tmp_path / "model")
    text = (tmp_path / "model" / "card.md").read_text()
    assert "Unknown: there is no metrics.json" in text[text.index("## Metrics on the test set") : text.index("## Thresholds")]


def test_a_folder_that_holds_anything_is_left_alone(runs, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    grader = Grader.load(runs[0])
    for name in ("full", "file"):
        with pytest.raises(UsageError, match=f"{name}: is there already"):
            grader.save(tmp_path / name)
    with pytest.raises(RunError, match="cannot be made"):
        grader.save(tmp_path / "file" / "below")
    (tmp_path / "empty").mkdir()
    grader.save(tmp_path / "empty")
    assert {path.name for path in tmp_path.iterdir()} == {"full", "file", "empty"}
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]


def test_a_save_that_fails_leaves_nothing(runs, tmp_path, monkeypatch):
    def full(path: Path, data: object) -> None:
        raise RunError(f"{path}: cannot be written: No space left on device")

    grader = Grader.load(runs[0])
    monkeypatch.setattr(folders, "write_json", full)
    with pytest.raises(RunError, match="No space"):
        grader.save(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_changed_since_it_was_loaded_is_not_given_away(runs, tmp_path):
    path = Path(shutil.copy(runs[0] / "best.safetensors", tmp_path / "x.safetensors"))
    grader = Grader.load(path)
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="checksum"):
        grader.save(tmp_path / "model")
    shutil.copy(runs[1] / "best.safetensors", path)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: is another checkpoint"):
        grader.save(tmp_path / "model")
    assert not (tmp_path / "model").exists()
