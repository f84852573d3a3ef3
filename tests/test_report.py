"""Plots and report: complete, self-contained, and safe with whatever stands in names and paths."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from fastretina import Beton, plots
from fastretina.augment import IMAGENET_MEAN, IMAGENET_STD
from fastretina.history import EpochRecord, Predictions, Progress, Scores
from fastretina.metrics import grade_metrics
from fastretina.report import DataFacts, RunFacts, metrics_summary, report_html

NASTY = '<script>alert("x")</script>&.beton'


def scores(seed: int, single: bool = False) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 1 if single else 5, (60,), generator=generator)
    predicted = labels if single else torch.where(torch.rand(60, generator=generator) < 0.5, labels, labels.roll(1))
    return Scores(1.0 / (seed + 1), grade_metrics(predicted, labels))


def history(epochs: int, val: bool = False, single: bool = False) -> Progress:
    progress = Progress(epoch=epochs, best_epoch=1)
    for epoch in range(1, epochs + 1):
        held_out = scores(epoch + 200) if val else None
        progress.history.append(
            EpochRecord(epoch, 1e-3, scores(epoch), scores(epoch + 100, single), held_out, 10.0, 12.0, 0.5, 6.0)
        )
    return progress


def facts(val: bool = False) -> RunFacts:
    names = [f"{n // 2}_{'left' if n % 2 else 'right'}" for n in range(60)]
    data = {
        "train": DataFacts.of(NASTY, [n % 5 for n in range(60)], names, 5),
        "test": DataFacts.of("test.beton", [0] * 45 + [2] * 15, names[-4:] + ["odd"] * 56, 5),
    }
    if val:
        data["val"] = DataFacts.of("val.beton", [1] * 60, ["x"] * 60, 5)
    settings = {"arch": "resnet18", "resolution": 64, "train": NASTY, "weights": None}
    return RunFacts(settings, data, "a CPU, 2 threads", "float32", "float32", "streaming", 11_179_077)


def pictures() -> dict[str, bytes]:
    matrix = scores(1).metrics.confusion
    return {"confusion_test": plots.confusion(matrix, "Test"), "confusion_train": plots.confusion(matrix, "Train")}


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
    text = report_html(facts(val), history(3, val), pictures())
    page = Page(text)
    assert page.open == []
    assert page.links
    assert all(link.startswith("data:") for link in page.links)
    assert "url(" not in text
    assert "@import" not in text
    assert page.tags.count("img") == len(plots.PANELS) + 2


def test_names_cannot_put_markup_into_the_report():
    text = report_html(facts(), history(1), pictures())
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_the_report_says_on_what_data_the_epoch_was_chosen_and_who_stands_in_both_sets():
    assert "on the TEST set" in report_html(facts(), history(2), pictures())
    chosen = report_html(facts(val=True), history(2, val=True), pictures())
    assert "on the validation set" in chosen
    assert "TEST set" not in chosen
    assert "2 patients have one eye in train and the other in test" in chosen


def test_undefined_figures_are_null_in_json_and_a_dash_in_the_report():
    progress = history(2, single=True)
    summary = json.loads(json.dumps(metrics_summary(facts(), progress, finished=True), allow_nan=False))
    assert summary["best"]["qwk"] is None
    assert summary["best"]["per_class_recall"] == [1.0, None, None, None, None]
    assert "<b>–</b><span>QWK, test" in report_html(facts(), progress, pictures())
    assert plots.curves(progress.history, 1, 0.75).startswith(b"\x89PNG")


def test_with_the_test_set_at_hand_the_report_tells_intervals_screening_calibration_and_mistakes(tiny_betons):
    with Beton(tiny_betons.test) as beton:
        progress = history(2)
        labels, ids = (torch.from_numpy(np.asarray(column).astype(np.int64)) for column in (beton.labels, beton.ids))
        logits = torch.randn(len(labels), 5, generator=torch.Generator().manual_seed(0))
        progress.best_test = Predictions(logits.log_softmax(1), labels, ids)
        known = replace(facts(), test_set=beton)
        text = report_html(known, progress, pictures())
        finished, going_on = (metrics_summary(known, progress, done)["best"] for done in (True, False))
    assert Page(text).open == []
    for part in ("95 % interval", "10 patients", "sensitivity ≥ 90 %", "ECE", "Most confident mistakes"):
        assert part in text
    wrong = int((logits.argmax(1) != labels).sum())
    assert text.count("<figure>") == min(12, wrong)
    assert "intervals" in finished
    assert "intervals" not in going_on


def test_an_unfinished_run_is_marked():
    assert metrics_summary(facts(), history(2), finished=False)["finished"] is False
    assert metrics_summary(facts(), history(2), finished=True)["finished"] is True


@pytest.mark.parametrize("epochs", [1, 2, 150])
def test_curves_can_be_drawn_for_any_number_of_epochs(epochs):
    image = Image.open(io.BytesIO(plots.curves(history(epochs, val=True).history, 1, 0.7)))
    assert min(image.size) > 600


def test_pictures_that_are_equal_have_equal_bytes():
    assert plots.confusion([[1, 2], [3, 4]], "T") == plots.confusion([[1, 2], [3, 4]], "T")


def test_empty_rows_of_a_confusion_matrix_are_no_error():
    assert plots.confusion([[0, 0, 0], [0, 5, 1], [0, 0, 0]], "T").startswith(b"\x89PNG")


@pytest.mark.parametrize("count", [1, 3, 5, 40])
def test_a_batch_of_any_size_can_be_drawn(count):
    images = torch.randn(count, 3, 16, 16)
    assert plots.batch_grid(images, torch.arange(count) % 5).startswith(b"\x89PNG")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_denormalised_pixels_are_those_that_were_normalised(dtype):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    normal = (pixels / 255.0 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    back = plots.denormalise(torch.from_numpy(normal).permute(0, 3, 1, 2).to(dtype))
    assert int(np.abs(back.astype(int) - pixels.astype(int)).max()) <= (0 if dtype is torch.float32 else 1)
