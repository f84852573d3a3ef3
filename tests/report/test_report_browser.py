"""The reports in a real browser, as wide as a desk's and a phone's screens, and on paper."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import browser
import pytest
import torch
from browser import Browser
from evaluation_cases import glaucoma, retinopathy
from report_cases import batch, history, info

from fastretina import train
from fastretina.grading import Classes
from fastretina.metrics.assessment import Assessment
from fastretina.metrics.predictions import Predictions, Scores
from fastretina.models.heads import Decision
from fastretina.report.compared import ComparedRun
from fastretina.report.comparison import comparison_html
from fastretina.report.evaluation import evaluation_html
from fastretina.report.run import Results, report_html
from fastretina.training.config import TrainConfig, as_settings
from fastretina.training.run_folder import RunFolder
from fastretina.training.run_info import DataInfo, RunInfo

WIDTHS = (1280, 390, 360)
SEVEN = Classes(
    (
        *("normal", "diabetic retinopathy", "glaucoma", "cataract", "age-related macular degeneration"),
        *("hypertensive retinopathy", "pathological myopia"),
    ),
    (1, 2, 4),
)
PAPER = 680  # CSS px: A4 less margins of 15 mm

OVERFLOW = "document.documentElement.scrollWidth - innerWidth"
BROKEN_IMAGES = (
    "Array.from(document.images).filter(i => !(i.complete && i.naturalWidth > 0 && i.alt)).map(i => i.alt || '(no alt)')"
)
CUT_TABLES = "Array.from(document.querySelectorAll('.scroll')).filter(e => e.scrollWidth > e.clientWidth).map(e => e.ariaLabel)"
# WCAG 2.1, success criterion 1.4.3: a contrast of 4.5 between each text and the nearest background with a colour.
FAINT_TEXTS = """
(() => {
  const levels = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const behind = element => {
    for (let at = element; at; at = at.parentElement) {
      const found = levels(getComputedStyle(at).backgroundColor);
      if (found.length < 4 || found[3] > 0) return found;
    }
    return [255, 255, 255];
  };
  const written = e => Array.from(e.childNodes).some(n => n.nodeType === Node.TEXT_NODE && n.data.trim());
  return Array.from(document.body.querySelectorAll('*')).filter(written).filter(e => {
    const [a, b] = [light(levels(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05) < 4.5;
  }).map(e => e.textContent);
})()
"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = browser.find()
    if program is None:
        pytest.skip(f"needs a browser: none of {', '.join(browser.NAMES)} is here (Debian: apt-get install chromium)")
    with Browser(program, tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture(scope="module", params=["run", "compare", "extreme", "classes", "evaluation", "unknown"])
def page(request, chromium, pages) -> Path:
    return pages / f"{request.param}.html"


@pytest.fixture(scope="module")
def pages(tiny_betons, tmp_path_factory) -> Path:
    """Reports of a real run, of a comparison, and of one run with everything in it that is long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("report")
    config = TrainConfig(
        train=tiny_betons.train, test=tiny_betons.test, epochs=1, batch_size=20, resolution=32, out=out / "a", workers=1
    )
    train.main(config)
    torch.set_num_threads(threads)
    (out / "run.html").write_bytes((out / "a" / "report.html").read_bytes())
    run = ComparedRun.read(RunFolder(out / "a"), "resnet18", "/data/" + 12 * "weights" + ".pth")
    many = [replace(run, name=f"resnet18-{8 * 'first'}-{n}") for n in range(9)]
    (out / "compare.html").write_text(comparison_html([run, *many], as_settings(config)))
    long = replace(info(val=True), settings={**info().settings, "out": 40 * "folder", "train": 12 * "<b>a name/"})
    lengthy = history(150, val=True)
    lengthy.decision = Decision((0.123456789,) * 30, 0.2)
    (out / "extreme.html").write_text(report_html(Results.of_run(long, lengthy, batch())))
    (out / "classes.html").write_text(report_html(seven_classes()))
    (out / "evaluation.html").write_text(evaluation_html(retinopathy(400, name=8 * "a long name ")))
    (out / "unknown.html").write_text(evaluation_html(glaucoma(120)))
    return out


def seven_classes() -> Results:
    """Of an evaluation of classes with long names, of patients whom nobody knows."""
    labels = torch.arange(70) % 7
    logits = torch.randn(70, 7, generator=torch.Generator().manual_seed(0)) + 2 * torch.eye(7)[labels]
    answers = Predictions(logits.log_softmax(1), labels, torch.arange(70))
    data = {"test": DataInfo("clinic.beton", [10] * 7, None, None, 70)}
    known = RunInfo({"checkpoint": "best.safetensors"}, data, "a CPU", "float32", "float32", "streaming", 11_179_077, SEVEN, "loss")
    return Results("A clinic", known, {"test": Scores.of(answers, SEVEN)}, answers, Assessment.of(answers, SEVEN, None))


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_fits_the_window_with_all_its_pictures(chromium, page, width):
    chromium.open(page, width)
    assert chromium.evaluate("innerWidth") == width
    assert chromium.evaluate(OVERFLOW) <= 0
    assert chromium.evaluate("document.images.length") > 0
    assert chromium.evaluate(BROKEN_IMAGES) == []


def test_the_browser_asks_the_network_for_nothing_and_complains_of_nothing(chromium, page):
    chromium.open(page, 1280)
    chromium.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert foreign_requests(chromium) == []
    assert complaints(chromium) == []


def test_every_text_can_be_read(chromium, page):
    chromium.open(page, 1280)
    assert chromium.evaluate("document.documentElement.lang") == "en"
    assert chromium.evaluate(FAINT_TEXTS) == []
    assert chromium.evaluate("document.querySelectorAll('th:not([scope])').length") == 0
    assert chromium.evaluate("Array.from(document.querySelectorAll('nav a')).every(a => document.querySelector(a.hash))")


def test_paper_shows_the_whole_of_each_table(chromium, page):
    chromium.open(page, PAPER)
    chromium.call("Emulation.setEmulatedMedia", media="print")
    try:
        assert chromium.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
        assert chromium.evaluate(CUT_TABLES) == []
    finally:
        chromium.call("Emulation.setEmulatedMedia", media="")


def test_these_checks_see_what_is_wrong(chromium, tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text(
        '<!doctype html><html><body><img src="http://example.org/a.png" alt="gone"><p style="width:2000px">wide</p>'
        '<p style="color:#999">faint</p><div class="scroll" aria-label="cut" style="overflow:auto">'
        '<p style="width:3000px">x</p></div>'
        "<script>console.error('oh')</script></body></html>"
    )
    chromium.open(bad, 390)
    assert chromium.evaluate(OVERFLOW) > 0
    assert chromium.evaluate(BROKEN_IMAGES) == ["gone"]
    assert chromium.evaluate(FAINT_TEXTS) == ["faint"]
    assert chromium.evaluate(CUT_TABLES) == ["cut"]
    assert foreign_requests(chromium) == ["http://example.org/a.png"]
    assert any("oh" in complaint for complaint in complaints(chromium))


def foreign_requests(chromium: Browser) -> list[str]:
    """The addresses, other than of files and of data in the page itself, that the page asked for."""
    asked = [params["request"]["url"] for method, params in chromium.events if method == "Network.requestWillBeSent"]
    assert asked
    return [url for url in asked if not url.startswith(("file:", "data:"))]


def complaints(chromium: Browser) -> list[str]:
    """What stands in the console."""
    methods = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
    return [str(params) for method, params in chromium.events if method in methods]
