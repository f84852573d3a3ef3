"""The benchmark of exported files, in small: its numbers mean nothing here."""

from __future__ import annotations

import json

import pytest
from test_exported import SIDE, grader_of


@pytest.mark.usefixtures("one_thread")
def test_every_side_is_measured_and_the_sides_are_compared_round_by_round(tmp_path, monkeypatch):
    import export_speed

    monkeypatch.setattr(export_speed, "untrained", lambda arch, side: grader_of(tmp_path / "a", "softmax", resolution=side))
    out = tmp_path / "speed.json"
    export_speed.main(export_speed.ExportSpeed(("tiny",), (SIDE,), (1, 2), threads=1, rounds=2, seconds=0.0, json=out))
    found = json.loads(out.read_text())["found"]
    assert [(one["resolution"], one["batch"]) for one in found] == [(SIDE, 1), (SIDE, 2)]
    for one in found:
        assert one["images_per_second"].keys() == {"torch", "onnxruntime", "int8"}
        assert one["times_torch"].keys() == {"onnxruntime", "int8"}
        for told in (*one["images_per_second"].values(), *one["times_torch"].values()):
            assert 0 < told["least"] <= told["median"] <= told["most"]
