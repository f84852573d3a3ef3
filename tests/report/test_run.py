"""Plots and report: complete, self-contained, and safe with whatever stands in names and paths."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image
from report_cases import batch, history, info
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from fastretina import open_beton
from fastretina.grading import RETINOPATHY, Classes
from fastretina.loading.augment import IMAGENET_MEAN, IMAGENET_STD
from fastretina.metrics.assessment import Assessment
from fastretina.metrics.bootstrap import Interval
from fastretina.metrics.predictions import Predictions, Scores
from fastretina.metrics.screening import OperatingPoint
from fastretina.models.heads import Decision
from fastretina.report import plots
from fastretina.report.run import Results, report_html
from fastretina.report.screening import screened, screened_text
from fastretina.report.sections import class_table, confusion_table
from fastretina.training.recorder import metrics_summary
from fastretina.training.run_info import DataInfo, RunInfo, selection_note
from tests.conftest import one_pixel_pictures

unseen = one_pixel_pictures()  # for tests of what the report says
TWO, THREE = Classes(("no", "yes"), (1,)), Classes(("normal", "AMD", "glaucoma"))


class Page(HTMLParser):
    """Collects what a browser would fetch, and the tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "action") and value]
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("val", [False, True])
def test_the_report_is_one_self_contained_page(val):
    text = report_html(Results.of_run(info(val), history(3, val), batch()))
    page = Page(text)
    assert page.open == []
    assert page.links
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert "url(" not in text
    assert "@import" not in text
    assert page.tags.count("img") == len(plots.panels_for(RETINOPATHY)) + 1
    assert page.tags.count("section") == page.tags.count("h2") == sum(link.startswith("#") for link in page.links)


@unseen
def test_names_cannot_put_markup_into_the_report():
    text = report_html(Results.of_run(info(), history(1), batch()))
    assert "<script" not in text
    assert "&lt;script&gt;" in text


@unseen
def test_the_report_says_on_what_data_the_epoch_was_chosen_and_who_stands_in_both_sets():
    assert "on the TEST set" in report_html(Results.of_run(info(), history(2), batch()))
    chosen = report_html(Results.of_run(info(val=True), history(2, val=True), batch()))
    assert "on the validation set" in chosen
    assert "TEST set" not in chosen
    assert "2 patients have images in both train and test" in chosen


@unseen
def test_the_selection_metric_is_the_one_of_the_run():
    by_recall = replace(info(val=True), selection_metric="balanced_accuracy")
    assert "chosen by balanced accuracy on the validation set" in report_html(
        Results.of_run(by_recall, history(2, val=True), batch())
    )
    assert metrics_summary(by_recall, history(2, val=True), finished=True)["selection_metric"] == "balanced_accuracy"
    assert "by kappa_of_tomorrow on the TEST set" in selection_note("kappa_of_tomorrow", "test")


def shared_with_val(patients: list[str] | None, unknown: int = 0) -> RunInfo:
    known = info(val=True)
    people = None if patients is None else frozenset(patients)
    return replace(known, data={**known.data, "val": replace(known.data["val"], patients=people, known_as=people, unknown=unknown)})


@unseen
def test_patients_shared_by_any_two_sets_are_told_and_unknown_ones_are_not_called_none():
    leaky = shared_with_val(["3", "29", "99"])  # train has 0-29, test 28 and 29
    shared = metrics_summary(leaky, history(1, val=True), finished=True)["data"]["patients_shared"]
    assert shared == {"train_val": 2, "train_test": 2, "val_test": 1}
    text = report_html(Results.of_run(leaky, history(1, val=True), batch()))
    assert "2 patients have images in both train and validation" in text
    assert "1 patients have" not in text
    assert "1 patient has images in both validation and test" in text
    unknown = shared_with_val(None, unknown=12)
    data = metrics_summary(unknown, history(1, val=True), finished=True)["data"]
    assert data["patients_shared"] == {"train_val": None, "train_test": 2, "val_test": None}
    assert (data["val"]["patients"], data["val"]["images_of_unknown_patients"], data["train"]["patients"]) == (None, 12, 30)
    text = report_html(Results.of_run(unknown, history(1, val=True), batch()))
    assert '<th scope="row">train and validation</th><td>unknown</td>' in text
    assert "<td>30</td><td>unknown (12 images)</td><td>30</td>" in text
    assert "nobody can say whether a person is in two sets" in text
    none = shared_with_val(["a", "b"])
    assert metrics_summary(none, history(1, val=True), finished=True)["data"]["patients_shared"]["train_val"] == 0
    assert "nobody can say" not in report_html(Results.of_run(none, history(1, val=True), batch()))


@unseen
def test_images_that_two_sets_share_byte_for_byte_are_counted_and_told():
    known = info(val=True)
    contents = {"train": [1, 2, 3, 4], "val": [5, 6], "test": [4, 4, 2, 9]}
    data = {name: replace(found, contents=np.array(contents[name])) for name, found in known.data.items()}
    doubled = replace(known, data=data)
    assert doubled.duplicates_shared == {"train_val": 0, "train_test": 3, "val_test": 0}
    assert metrics_summary(doubled, history(1), finished=True)["data"]["duplicates_shared"] == doubled.duplicates_shared
    assert "3 images of test are in train, too." in report_html(Results.of_run(doubled, history(1), batch()))
    foreign = replace(known, data={**data, "val": replace(data["val"], contents=None)})
    assert foreign.duplicates_shared == {"train_val": None, "train_test": 3, "val_test": None}


@unseen
def test_how_a_grade_is_decided_is_told_where_the_run_tells_it():
    assert "How a grade is decided" not in report_html(Results.of_run(info(), history(1), batch()))
    fitted = history(1, val=True)
    fitted.decision = Decision((0.51, 1.4, 2.6, 3.5), 0.2)
    assert "0.510, 1.400, 2.600, 3.500</td>" in report_html(Results.of_run(info(val=True), fitted, batch()))


def cells(table: str) -> list[list[str]]:
    """The text of a table's body."""
    rows = table.partition("<tbody>")[2].replace("&nbsp;", " ").split("<tr>")[1:]
    return [[part.partition(">")[2].partition("</td>")[0] for part in row.split("<td")[1:]] for row in rows]


@pytest.mark.parametrize("seed", range(20))
def test_metrics_by_grade_are_those_of_scikit_learn(seed):
    random = np.random.default_rng(seed)
    labels, predicted = random.integers(0, 4, 40), random.integers(1, 5, 40)  # no 4 among the labels, no 0 predicted
    matrix = confusion_matrix(labels, predicted, labels=range(5)).tolist()
    found = precision_recall_fscore_support(labels, predicted, labels=range(5), zero_division=np.nan)
    precision, recall, f1, support = (column.tolist() for column in found)
    for row, images, r, p, f in zip(cells(class_table(matrix, "T", RETINOPATHY)), support, recall, precision, f1, strict=True):
        assert int(row[0]) == images
        assert row[1] == ("–" if np.isnan(r) else f"{100 * r:.1f} %")
        assert row[2] == ("–" if np.isnan(p) else f"{100 * p:.1f} %")
        assert row[3] == ("–" if np.isnan(f) else f"{f:.3f}")


def test_a_confusion_matrix_shows_counts_and_shares_of_each_row():
    shown = cells(confusion_table([[3, 1, 0], [0, 1000, 0], [0, 0, 0]], "T", THREE))
    assert [[cell.rpartition("<b>")[2].partition("</b>")[0] for cell in row] for row in shown] == [
        ["3", "1", "0"],
        ["0", "1,000", "0"],
        ["0", "0", "0"],
    ]
    assert [[cell.rpartition("<small>")[2].partition("</small>")[0] for cell in row] for row in shown] == [
        ["75 %", "25 %", "0 %"],
        ["0 %", "100 %", "0 %"],
        ["–", "–", "–"],
    ]


def rates(sensitivity: float, specificity: float) -> OperatingPoint:
    both = Interval(sensitivity, None, None), Interval(specificity, None, None)
    return OperatingPoint("answer", "rule", None, 0, 0, 0, 0, *both, Interval(None, None, None), Interval(None, None, None))


def test_a_thousand_people_are_all_counted_once():
    point = rates(0.835, 0.991)
    counts = screened(point, prevalence=0.197)
    assert counts == (164, 33, 7, 796)
    assert sum(counts) == 1000
    assert "33 of the 829 who are not" in screened_text(*counts)
    assert screened_text(*screened(rates(0.0, 1.0), 0.2)).endswith("It refers none of them.")
    assert screened_text(*screened(rates(1.0, 0.0), 0.2)).endswith("It refers all of them.")


def test_undefined_metrics_are_null_in_json_and_a_dash_in_the_report():
    progress = history(2, single=True)
    summary = json.loads(json.dumps(metrics_summary(info(), progress, finished=True), allow_nan=False))
    assert summary["best"]["qwk"] is None
    assert summary["best"]["per_class_recall"] == [1.0, None, None, None, None]
    with one_pixel_pictures():
        assert "<b>–</b><span>QWK, test" in report_html(Results.of_run(info(), progress, batch()))
    assert plots.curves(progress.history, 1, 0.75, "cross-entropy", RETINOPATHY).startswith(b"\x89PNG")


def test_with_the_test_set_at_hand_the_report_tells_intervals_screening_calibration_and_mistakes(tiny_betons):
    with open_beton(tiny_betons.test) as beton:
        progress = history(2)
        labels, ids = (torch.from_numpy(np.asarray(column).astype(np.int64)) for column in (beton.labels, beton.ids))
        logits = torch.randn(len(labels), 5, generator=torch.Generator().manual_seed(0))
        progress.best_test = Predictions(logits.log_softmax(1), labels, ids)
        known = replace(info(), test_set=beton)
        text = report_html(Results.of_run(known, progress, batch()))
        finished, going_on = (metrics_summary(known, progress, done)["best"] for done in (True, False))
    assert Page(text).open == []
    for part in (
        "95&nbsp;% interval",
        "10 patients",
        "No thresholds were frozen",
        "Of 1,000 people screened",
        "ECE",
        "Most confident mistakes",
    ):
        assert part in text
    wrong = int((logits.argmax(1) != labels).sum())
    assert text.count("<figure>") == min(12, wrong)
    assert "intervals" in finished
    assert "intervals" not in going_on


@unseen
def test_a_report_is_made_of_predictions_and_an_assessment_without_any_training(tiny_betons):
    with open_beton(tiny_betons.test) as beton:
        labels, ids = (torch.from_numpy(np.asarray(column).astype(np.int64)) for column in (beton.labels, beton.ids))
        logits = torch.randn(len(labels), 5, generator=torch.Generator().manual_seed(0))
        answers = Predictions(logits.log_softmax(1), labels, ids)
        assessment = Assessment.of(answers, RETINOPATHY, beton.patients)
        data = {"test": DataInfo.of(beton)}
        plain = RunInfo(
            {"checkpoint": "best.safetensors"}, data, "a CPU", "float32", "float32", "streaming", 11_179_077, RETINOPATHY, "qwk"
        )
        without, with_pictures = (
            report_html(Results("A clinic's photographs", known, {"test": Scores.of(answers, RETINOPATHY)}, answers, assessment))
            for known in (plain, replace(plain, test_set=beton))
        )
    assert Page(with_pictures).open == []
    for part in (
        "A clinic&#x27;s photographs",
        "Test set",
        "How sure these metrics are",
        "Of 1,000 people screened",
        "ECE",
        "best.safetensors",
    ):
        assert part in without
    for part in ("By epoch", "Best and last epoch", "Speed", "TEST set", "Most confident mistakes", "What the network saw"):
        assert part not in without
    assert "Most confident mistakes" in with_pictures
    matrix = Scores.of(answers, RETINOPATHY).metrics
    assert f"<b>{matrix.qwk:.3f}</b><span>QWK, test; 95&nbsp;% interval" in without
    assert confusion_table(matrix.confusion, "Test set", RETINOPATHY) in without


def test_an_unfinished_run_is_marked():
    assert metrics_summary(info(), history(2), finished=False)["finished"] is False
    assert metrics_summary(info(), history(2), finished=True)["finished"] is True


@pytest.mark.parametrize("epochs", [1, 2, 150])
def test_curves_can_be_drawn_for_any_number_of_epochs(epochs):
    image = Image.open(io.BytesIO(plots.curves(history(epochs, val=True).history, 1, 0.7, "cross-entropy", RETINOPATHY)))
    assert min(image.size) > 600


def test_the_loss_panel_names_the_training_loss(monkeypatch):
    legends = []
    monkeypatch.setattr(Axes, "legend", lambda axis, **how: legends.append(axis.get_legend_handles_labels()[1]))
    for panel in plots.panels_for(RETINOPATHY):
        plots.curves(history(2, val=True).history, 1, 0.7, "squared error", RETINOPATHY, [panel])
    assert legends[0][:3] == ["train (squared error)", "test", "val"]
    assert all(names[:3] == ["train", "test", "val"] for names in legends[1:])


def test_pictures_that_are_equal_have_equal_bytes():
    assert plots.confusion([[1, 2], [3, 4]], "T", TWO) == plots.confusion([[1, 2], [3, 4]], "T", TWO)


def test_empty_rows_of_a_confusion_matrix_are_no_error():
    assert plots.confusion([[0, 0, 0], [0, 5, 1], [0, 0, 0]], "T", THREE).startswith(b"\x89PNG")


@pytest.mark.parametrize("count", [1, 3, 5, 40])
def test_a_batch_of_any_size_can_be_drawn(count):
    images = torch.randn(count, 3, 16, 16)
    assert plots.batch_grid(images, torch.arange(count) % 5, RETINOPATHY).startswith(b"\x89PNG")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_denormalised_pixels_are_those_that_were_normalised(dtype):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    normal = (pixels / 255.0 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    back = plots.denormalise(torch.from_numpy(normal).permute(0, 3, 1, 2).to(dtype))
    assert int(np.abs(back.astype(int) - pixels.astype(int)).max()) <= (0 if dtype is torch.float32 else 1)
