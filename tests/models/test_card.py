"""The model card: its numbers are the run's, what is not known is called unknown, and names do nothing."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from report_cases import info as run_info

from fastretina.grading import RETINOPATHY, Classes
from fastretina.loading.augment import IMAGENET_MEAN, IMAGENET_STD
from fastretina.metrics.assessment import Assessment
from fastretina.metrics.operating import fit_operating
from fastretina.metrics.predictions import Predictions, Scores
from fastretina.metrics.ranking import titles
from fastretina.models.card import card, escaped
from fastretina.models.checkpoint import CheckpointInfo
from fastretina.models.heads import Decision
from fastretina.version import __version__

NASTY = '<script>alert("x")</script> [a](https://b.example) **c** | `d` www.e.example\n# f'


def answers(seed: int, classes: Classes = RETINOPATHY, images: int = 60) -> Predictions:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, len(classes), (images,), generator=generator)
    outputs = torch.randn(images, len(classes), generator=generator) + 2 * torch.nn.functional.one_hot(labels, len(classes))
    return Predictions(outputs.log_softmax(1), labels, torch.arange(images))


@pytest.fixture(scope="module")
def validated() -> tuple[CheckpointInfo, dict]:
    """A checkpoint with validation data, and the metrics of its run."""
    val, test, known = answers(1), answers(2), run_info(val=True)
    operating = fit_operating(val.labels.numpy(), val.log_probabilities.double().exp().numpy(), RETINOPATHY, data="0" * 32)
    info = CheckpointInfo(
        "resnet18", 5, 64, IMAGENET_MEAN, IMAGENET_STD, 3, "float32", "qwk", "val", "softmax", Decision((), 1.375),
        data={"train": "1" * 32, "val": "0" * 32}, operating=operating, size=512,
    )  # fmt: skip
    assessment = Assessment.of(test, RETINOPATHY, [str(n // 2) for n in range(60)], operating=operating)
    metrics = {
        "best": {"epoch": 3, **Scores.of(test, RETINOPATHY).as_dict(), **assessment.as_dict()},
        "data": known.data_dict(),
        "versions": {"torch": "2.0"},
    }
    return info, json.loads(json.dumps(metrics))


def section(text: str, title: str) -> str:
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def table_rows(text: str) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("|")]
    return {name: values for name, *values in cells}


def numbers(value: object) -> set[str]:
    """All numbers somewhere in JSON, as the card writes them."""
    match value:
        case dict():
            return set().union(*map(numbers, value.values()))
        case list():
            return set().union(*map(numbers, value))
        case bool() | None | str():
            return set()
    return {f"{value:.3f}", f"{value:.4f}"}


def test_the_metrics_of_the_card_are_those_of_the_run(validated):
    info, metrics = validated
    found, best = table_rows(section(card(info, metrics, None), "Metrics on the test set")), metrics["best"]
    for name in ("accuracy", "balanced_accuracy", "qwk", "macro_f1", "auroc", "auprc", "auroc_referable"):
        value, interval = found[titles(RETINOPATHY)[name]]
        limits = best["intervals"][name]
        assert value == f"{best[name]:.3f}"
        assert interval == f"{limits['low']:.3f} to {limits['high']:.3f}"
    frozen = next(point for point in best["referable"] if point["name"] == "high-sensitivity")
    assert found[frozen["rule"]][0].startswith(f"{frozen['sensitivity']:.3f} ({frozen['intervals']['sensitivity']['low']:.3f} to ")
    data = section(card(info, metrics, None), "Evaluation data")
    assert table_rows(data)["images"] == ["60"]
    assert table_rows(data)["patients"] == [str(metrics["data"]["test"]["patients"])]


def test_no_decimal_number_of_the_card_is_from_anywhere_else(validated):
    info, metrics = validated
    text = card(info, metrics, "ab" * 32).partition("## How photographs are prepared")[0].replace(__version__, "")
    known = numbers(metrics) | numbers(info.operating.as_dict()) | {"1.375", "0.5"}  # the temperature, the plain threshold
    assert set(re.findall(r"\d+\.\d+", text)) <= known


def test_the_thresholds_are_those_of_the_checkpoint_and_say_where_they_are_from(validated):
    info, metrics = validated
    text = section(card(info, metrics, None), "Thresholds for referring")
    found = table_rows(text)
    for threshold in info.operating.thresholds:
        assert found[threshold.name][0] == f"{threshold.value:.4f}"
        assert found[threshold.name][2:] == [f"{threshold.sensitivity:.3f}", f"{threshold.specificity:.3f}"]
    assert "0" * 32 in text
    assert f"60 images, {info.operating.referable} of them referable" in text


def test_without_validation_data_the_card_says_what_that_means(validated):
    info, metrics = replace(validated[0], selected_on="test", operating=None, decision=None), validated[1]
    text = card(info, metrics, None)
    assert "chosen by QWK on the TEST set" in text
    assert "None: there was no validation set" in section(text, "Thresholds for referring")
    assert "not calibrated" in section(text, "Calibration")
    assert "optimistic" in section(text, "Caveats and recommendations")


def test_of_a_checkpoint_alone_everything_else_is_unknown(validated):
    text = card(validated[0], None, None)
    for title in ("Training data", "Evaluation data", "Metrics on the test set", "Environment and versions"):
        assert "nknown" in section(text, title), title
    assert "Nothing is known of how good it is." in text
    assert "SHA-256 of the checkpoint file | unknown" in text
    assert "1" * 32 in section(text, "Training data")  # the digest stands in the checkpoint itself
    assert "accuracy |" not in text


def test_the_header_is_what_model_hubs_read(validated):
    lines = card(validated[0], validated[1], None).splitlines()
    end = lines.index("---", 1)
    header = dict(line.split(": ", 1) for line in lines[1:end])
    assert lines[0] == "---"
    assert json.loads(header["license"]) == "unknown"
    assert json.loads(header["library_name"]) == "fastretina"
    assert {"resnet18", "diabetic-retinopathy"} <= set(json.loads(header["tags"]))
    assert "qwk" in json.loads(header["metrics"])


def test_names_out_of_files_do_nothing_and_show_as_they_are(validated):
    classes = Classes(("no", NASTY.replace("\n", " ")), (1,))
    info = replace(validated[0], classes=classes, num_classes=2, operating=None, data=None)
    data = {
        name: {"path": f"/home/somebody/{name}/{NASTY}", "images": 1, "grades": [1, 0], "patients": None}
        for name in ("train", "test")
    }
    subgroups = [{"column": NASTY, "parts": [{"name": NASTY, "small": True}]}]
    best = {"accuracy": 0.5, "referable": [{"rule": NASTY}], "subgroups": subgroups}
    text = card(info, {"data": data, "best": best, "versions": {"torch": NASTY}}, None)
    without = re.sub(r"\\.", "", text.partition("## Model details")[2])
    assert not re.search(r"<script|\]\(|www\.|://", without)
    assert "\n# f" not in text
    assert "**c" not in without
    assert "somebody" not in text
    for line in text.splitlines():
        if line.startswith("| no") or ("www" in line and line.startswith("|")):
            assert re.sub(r"\\.", "", line).count("|") in (3, 4, 6)


def test_what_is_escaped_reads_as_before():
    """CommonMark shows an escaped punctuation character as itself, and escapes nothing but punctuation."""
    text = "data/train_1.beton *new* <b> a|b `c` #d !e $f www.g.example https://h @i"
    assert re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", escaped(text)) == text
    assert np.all([letter not in re.sub(r"\\.", "", escaped(text)) for letter in "*<>|`#!$@_"])
