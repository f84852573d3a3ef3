"""An exported graph answers as the network and its head do, for any number of images, and says what it is."""

from __future__ import annotations

import hashlib
import io
import json
import logging
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from test_checkpoint import grader as info_of
from torch import nn

from fastretina.errors import RunError, UsageError
from fastretina.grading import RETINOPATHY, Classes
from fastretina.loading.augment import IMAGENET_MEAN, IMAGENET_STD
from fastretina.metrics.operating import Operating, Threshold
from fastretina.models import exported
from fastretina.models.export_checks import Loss, difference, expected
from fastretina.models.exported import Exported, about, as_onnx, as_pt2, onnx_run, pt2_run, quantised, rules, with_metadata
from fastretina.models.grader import Grader, Member
from fastretina.models.heads import HEADS, Decision
from fastretina.models.precision import Precision
from fastretina.packing.preprocessing import Preparation

SIDE = 16
DECISIONS = {"softmax": Decision((), 1.7), "regression": Decision((0.4, 1.3, 2.6, 3.1), 0.6), "ordinal": Decision((), 1.6)}
OPERATING = Operating(
    (Threshold("high-sensitivity", 0.31, 0.9, 0.92, 0.7), Threshold("youden", 0.42, None, 0.85, 0.83)), 90, 30, "ab12"
)
pytestmark = pytest.mark.usefixtures("one_thread")


class Tiny(nn.Module):
    """What a backbone is made of, in small: convolution, BatchNorm, pooling, a last linear layer."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.Linear(8, outputs)
        self.norm.running_mean.normal_()

    def forward(self, images):
        return self.fc(self.norm(self.conv(images)).relu().amax(dim=(2, 3)))


def grader_of(path, *heads, seed=0, resolution=SIDE) -> Grader:
    """Members that a file stands for which is not read but for its digest."""
    torch.manual_seed(seed)
    path.write_bytes(b"weights")
    members = []
    for name in heads:
        info = replace(info_of(), head=name, decision=DECISIONS[name], resolution=resolution, size=SIDE, operating=OPERATING)
        model = Tiny(HEADS[name](5).outputs).to(memory_format=torch.channels_last).eval()
        members.append(Member(model, info, path, Precision("cpu", None, "")))
    return Grader(members, torch.device("cpu"))


def pixels(count: int, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)


def by_hand(grader: Grader, images):
    """The mean over members of what their heads say of images that are normalised as torchvision's documentation has it."""
    scaled = (images.astype(np.float64) / 255 - IMAGENET_MEAN) / IMAGENET_STD
    with torch.no_grad():
        outputs = [member.model.double()(torch.from_numpy(scaled).permute(0, 3, 1, 2)) for member in grader.members]
    for member in grader.members:
        member.model.float()
    pairs = zip(grader.members, outputs, strict=True)
    return torch.stack([info.grading.log_probabilities(out, info.decision).exp() for (_, info, _, _), out in pairs]).mean(0).numpy()


@pytest.mark.parametrize("heads", [("regression",), ("softmax", "ordinal")], ids="+".join)
def test_the_graph_holds_normalisation_head_and_decision_for_any_number_of_images(tmp_path, heads):
    grader = grader_of(tmp_path / "best.safetensors", *heads)
    program = Exported(grader).trace()
    runs = [onnx_run(as_onnx(program, {}), 1), pt2_run(as_pt2(program, {})), Exported(grader).run]
    for count in (1, 5):
        right = by_hand(grader, pixels(count))
        assert right.max() < 0.999, "so sure that no mistake would show"
        for run in runs:
            found = run(pixels(count))
            assert found.dtype == np.float32
            assert found == pytest.approx(right, abs=2e-6)
        assert expected(grader, pixels(count)) == pytest.approx(right, abs=2e-6)
    for run in runs:
        assert difference(run, grader, pixels(40)) < 2e-6


def test_a_difference_is_found_wherever_it_is(tmp_path):
    grader = grader_of(tmp_path / "best.safetensors", "softmax")
    for wrong in (0, 1, 20, 39):

        def run(images, wrong=wrong):
            found = Exported(grader).run(images)
            found[(images == pixels(40)[wrong]).all(axis=(1, 2, 3)), 3] += 0.25
            return found

        assert difference(run, grader, pixels(40)) == pytest.approx(0.25, abs=1e-6)
    assert np.isnan(difference(lambda images: np.full((len(images), 5), np.nan, np.float32), grader, pixels(3)))


def test_either_file_says_what_it_is_and_nothing_of_where_it_was_made(tmp_path):
    grader = grader_of(tmp_path / "best.safetensors", "regression")
    program, told = Exported(grader).trace(), json.loads(json.dumps(about(grader)))
    model, other = as_onnx(program, told), as_pt2(program, told)
    graph, extra = onnx.load_from_string(model), {"fastretina": ""}
    torch.export.load(io.BytesIO(other), extra_files=extra)
    assert {entry.key: json.loads(entry.value) for entry in graph.metadata_props} == {"fastretina": told}
    assert json.loads(extra["fastretina"]) == told
    shapes = {
        value.name: [side.dim_param or side.dim_value for side in value.type.tensor_type.shape.dim]
        for value in (*graph.graph.input, *graph.graph.output)
    }
    assert shapes == {told[way]["name"]: told[way]["shape"] for way in ("input", "output")}
    assert shapes == {"pixels": ["batch", SIDE, SIDE, 3], "probabilities": ["batch", 5]}
    assert Operating.stored(told["operating"]) == OPERATING
    assert Classes.stored(told["classes"]) == RETINOPATHY
    assert told["members"][0]["sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert told["members"][0]["decision"] == {"thresholds": [0.4, 1.3, 2.6, 3.1], "scale": 0.6}
    for data in (model, other):
        assert b"site-packages" not in data
        assert __file__.encode() not in data
        assert str(tmp_path).encode() not in data


def test_the_rules_say_what_is_done_to_a_photograph():
    said = "\n".join(rules(Preparation("fundus", "local"), 512, 224))
    for part in ("disc", "Lanczos to 512 x 512 px", "local average colour", "quality 95, 4:4:4", "from 512 to 224 px"):
        assert part in said
    said = "\n".join(rules(Preparation(), 512, 512))
    assert "longer side is 512 px" in said
    for part in ("disc", "local", "from 512"):
        assert part not in said


def test_members_of_several_resolutions_make_no_graph(tmp_path):
    one, other = (grader_of(tmp_path / "best.safetensors", "softmax", resolution=side) for side in (SIDE, 32))
    with pytest.raises(UsageError, match="16 px and 32 px"):
        Exported(Grader((*one.members, *other.members), torch.device("cpu")))


def test_weights_that_an_onnx_file_cannot_hold_are_refused_before_it_is_made(tmp_path, monkeypatch):
    grader = grader_of(tmp_path / "best.safetensors", "softmax")
    monkeypatch.setattr(exported, "MOST_BYTES", 100)
    monkeypatch.setattr(torch.onnx, "export", None)
    with pytest.raises(RunError, match=r"2 GB; export to a \.pt2"):
        as_onnx(Exported(grader).trace(), {})


def test_int8_keeps_the_meaning_and_says_nothing_of_before(tmp_path, capfd, caplog):
    grader = grader_of(tmp_path / "best.safetensors", "softmax")
    model = as_onnx(Exported(grader).trace(), {"before": True})
    graph = quantised(model)
    assert {"ConvInteger", "MatMulInteger"} <= {node.op_type for node in graph.graph.node}
    small = with_metadata(graph, {"after": True})
    assert [entry.value for entry in onnx.load_from_string(small).metadata_props] == ['{"after": true}']
    off = np.abs(onnx_run(small, 1)(pixels(8)) - by_hand(grader, pixels(8))).max()
    assert 1e-6 < off < 0.1
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_loss_in_words():
    loss = Loss("ab12", 1400, "qwk", 0.82, 0.8123, 3)
    assert str(loss) == "QWK 0.8123, before 0.8200: a loss of 0.0077; another class for 3 of the 1,400 images"
    assert "undefined" in str(replace(loss, before=None))
