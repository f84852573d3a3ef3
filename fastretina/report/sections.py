"""Sections that the report of a run and that of a comparison share, each from what metrics.json holds."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from fastretina.grading import CLASSES, NUM_CLASSES, REFERABLE, grade_title
from fastretina.metrics.table import AUROC, AUROC_MEANING, METRICS, TITLES
from fastretina.report.page import Section, note, number, percent, remark, shown, table, titled
from fastretina.training.run_info import SET_TITLES, versions

TRAIN_REMARK = (
    "Train metrics are those of the augmented images during each epoch, while the weights moved; test and validation metrics "
    "are of plain images after it. So the train curve may lie below the test curve."
)
_PURPOSE = f"""<ul>
<li>It looks at one photograph of the back of an eye (a fundus photograph) and gives it a grade of diabetic retinopathy, from 0
({html.escape(CLASSES[0])}) to {NUM_CLASSES - 1} ({html.escape(CLASSES[-1])}). {REFERABLE.capitalize()} is
called referable: in screening, an ophthalmologist should see the person.</li>
<li><b>It is for</b> research: to compare ways of training, to find photographs whose grade deserves a second look, to prepare a
study.</li>
<li><b>It is not for</b> diagnosing or treating anybody, nor for deciding who is sent home. It is no medical device and was never
tried in practice.</li>
<li>It knows no other disease of the eye, and it always answers, even if the photograph is too blurred to be graded or shows no eye
at all. Its metrics hold for photographs like those of the test set: with another camera, other people or other graders they may be
far worse.</li>
</ul>"""
_MEANINGS = (
    *((metric.title, metric.meaning) for metric in METRICS),
    (
        "Recall of a grade",
        "of the photographs that have this grade, the share that the model gives it (for a disease: sensitivity).",
    ),
    ("Precision of a grade", "of the photographs that the model gives this grade, the share that have it."),
    ("F1 of a grade", "the harmonic mean of its recall and precision: high only if both are."),
    (TITLES[AUROC], AUROC_MEANING),
)


def subtitle(device: str, amp_dtype: str) -> str:
    """The line under a report's title."""
    machine = f"{html.escape(device)} · {html.escape(amp_dtype)}"
    return f'<p class="soft">Grades of diabetic retinopathy, 0–{NUM_CLASSES - 1} · {machine}</p>'


def purpose() -> Section:
    """What a model of this kind may and may not be used for."""
    return Section("What the model is for, and what not", [_PURPOSE])


def meanings() -> Section:
    """The metrics in plain words."""
    terms = "".join(f"<dt>{html.escape(term[0].upper() + term[1:])}</dt><dd>{html.escape(text)}</dd>" for term, text in _MEANINGS)
    return Section("What the metrics mean", [f"<dl>{terms}</dl>"])


METRIC_COLUMNS = [metric.title for metric in METRICS]


def metric_cells(values: Mapping[str, float | None]) -> list[str]:
    """A table's cells under METRIC_COLUMNS."""
    return [shown(metric, values[metric.name]) for metric in METRICS]


def data_section(data: Mapping[str, Any]) -> Section:
    """Images and patients of each data set, and the patients that two of them share: `data` of metrics.json."""
    sets = [data[name] for name in SET_TITLES if name in data]
    titles = [title for name, title in SET_TITLES.items() if name in data]
    counts = [
        ["images", *(found["images"] for found in sets)],
        ["patients", *(found["patients"] or "–" for found in sets)],
        *([grade_title(grade), *numbers] for grade, numbers in enumerate(zip(*(found["grades"] for found in sets), strict=True))),
        ["share of the most frequent grade", *(percent(found["majority_share"]) for found in sets)],
    ]
    shared, leaks = [], []
    for key, count in data["patients_shared"].items():
        first, second = (SET_TITLES[name] for name in key.split("_"))
        shared.append([f"{first} and {second}", "not known" if count is None else count])
        if count:
            has = "patient has" if count == 1 else "patients have"
            leaks.append(f"{count:,} {has} one eye in {first} and the other in {second}.")
    warning = " ".join([*leaks, "Two eyes of a person are alike: for new patients the metrics would be worse."])
    return Section(
        "Data",
        [
            table(["set", *titles], counts, "Images and patients"),
            table(["sets", "patients in both"], shared, "Patients shared between two sets"),
            note(warning) if leaks else "",
            remark("Patients are told by the images' names (10_left and 10_right are one); a dash where names tell of none."),
        ],
    )


def confusion_table(matrix: Sequence[Sequence[int]], title: str) -> str:
    """A confusion matrix (rows true, columns predicted): counts, and per cent of the row, by which cells are coloured."""

    def cell(row: int, column: int) -> str:
        count, total = matrix[row][column], sum(matrix[row])
        share = count / max(1, total)
        # White to the light blue on which black text has a contrast of 8:1.
        red, green, blue = (round(255 + share * (level - 255)) for level in (86, 180, 233))
        framed = ' class="right"' if row == column else ""
        written = f"{100 * share:.0f}&nbsp;%" if total else "–"
        return f'<td{framed} style="background:rgb({red},{green},{blue})"><b>{count:,}</b><small>{written}</small></td>'

    head, body = "", ""
    for row in range(len(matrix)):
        number, _, words = grade_title(row).partition(" ")
        name = f'{number} <span class="name">{html.escape(words)}</span>'
        head += f'<th scope="col">{name}</th>'
        cells = "".join(cell(row, column) for column in range(len(matrix)))
        body += f'<tr><th scope="row">{name}<small>n = {sum(matrix[row]):,}</small></th>{cells}</tr>'
    return titled(
        f'<table class="matrix" aria-label="{html.escape(title)}">'
        f'<thead><tr><th scope="col">true ↓<br>model →</th>{head}</tr></thead><tbody>{body}</tbody></table>',
        title,
    )


CONFUSION_REMARK = (
    "Each row holds the photographs of one true grade, each column those that the model gave one grade: their number, and "
    "below it their share of the row, by which the cell is coloured. Framed: graded right."
)


def class_table(matrix: Sequence[Sequence[int]], title: str) -> str:
    """Images, recall, precision and F1 by grade, from a confusion matrix; a dash where undefined (scikit-learn: 0/0)."""
    rows = []
    for grade, row in enumerate(matrix):
        right, images, given = row[grade], sum(row), sum(other[grade] for other in matrix)
        recall, precision = percent(right / images if images else None), percent(right / given if given else None)
        f1 = number(2 * right / (images + given) if images + given else None)
        rows.append([grade_title(grade), images, recall, precision, f1])
    return table(["grade", "images", "recall", "precision", "F1"], rows, title)


def settings_section(settings: Mapping[str, Any], others: Sequence[Sequence[object]] = ()) -> Section:
    """All settings, `others` (name, value), and versions."""
    given = [(name.replace("_", "-"), "–" if value is None else str(value)) for name, value in settings.items()]
    rows = [*given, *others, *versions().items()]
    return Section("Settings", [table(["setting", "value"], rows, "Settings and versions", "words")])
