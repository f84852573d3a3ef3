"""What TensorBoard's own reader finds in a run folder."""

from __future__ import annotations

import sys
import threading
from contextlib import closing

import pytest
from report_cases import history

from fastretina.errors import UsageError
from fastretina.training.tensorboard import Tracker, require_tensorboard

COLUMNS = {"loss/train": "train_loss", "balanced_accuracy/train": "train_balanced_accuracy", "qwk/test": "test_qwk"}
COLUMNS |= {f"run/{name}": name for name in ("lr", "images_per_second", "data_wait_seconds", "train_seconds", "epoch_seconds")}


@pytest.fixture
def read():
    """folder → {tag: [(epoch, value), ...]}, as TensorBoard shows it."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs the tensorboard extra")

    def points(folder):
        found = reader.EventAccumulator(str(folder / "tensorboard"), size_guidance={reader.SCALARS: 0})
        found.Reload()
        return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}

    return points


@pytest.mark.parametrize("val", [False, True])
def test_every_metric_of_results_csv_is_there_by_epoch(tmp_path, read, val):
    records = history(3, val).history
    with closing(Tracker(tmp_path, 1)) as tracker:
        for record in records:
            tracker.epoch(record.row())
    found = read(tmp_path)
    rows = [record.row() for record in records]
    assert len(found) == len(rows[0]) - 1
    for tag, column in (COLUMNS | ({"qwk/val": "val_qwk"} if val else {})).items():
        assert [step for step, _ in found[tag]] == [1, 2, 3]
        assert [value for _, value in found[tag]] == pytest.approx([row[column] for row in rows], rel=1e-6)


def test_a_resumed_run_has_one_point_for_each_epoch(tmp_path, read):
    """Killed after its fourth epoch was written here and before the state was saved: epochs 4 and 5 come from the second call."""
    records = history(5).history
    first = Tracker(tmp_path, 1)
    for record in records[:4]:
        first.epoch(record.row())
    del first  # never closed
    with closing(Tracker(tmp_path, 4)) as second:
        for record in records[3:]:
            second.epoch(record.row())
    assert all([step for step, _ in points] == [1, 2, 3, 4, 5] for points in read(tmp_path).values())


def test_undefined_metrics_are_left_out(tmp_path, read):
    with closing(Tracker(tmp_path, 1)) as tracker:
        tracker.epoch(history(1, single=True).history[0].row())
    found = read(tmp_path)
    assert "qwk/test" not in found
    assert "qwk/train" in found


def test_closing_leaves_no_thread(tmp_path, read):
    before = set(threading.enumerate())
    with closing(Tracker(tmp_path, 1)) as tracker:
        tracker.epoch(history(1).history[0].row())
    assert set(threading.enumerate()) == before


def test_without_tensorboard_the_error_names_the_extra_and_nothing_is_made(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UsageError, match=r"fastretina\[tensorboard\]"):
        require_tensorboard()
    with pytest.raises(UsageError, match=r"fastretina\[tensorboard\]"):
        Tracker(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []
