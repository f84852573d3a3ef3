"""Sections that the report of a run and that of a comparison share, each from what metrics.json holds."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastretina.grading import RETINOPATHY, Classes
from fastretina.metrics.ranking import AUROC_REFERABLE, RANKINGS, titles
from fastretina.metrics.table import metrics_for
from fastretina.models import purpose as words
from fastretina.report.page import Section, note, number, pair, percent, remark, shown, table, titled
from fastretina.training.run_info import SET_TITLES, versions

PAIRED = 5  # the most classes whose confusion matrices stand side by side
TRAIN_REMARK = (
    "Train metrics are those of the augmented images during each epoch, while the weights moved; test and validation metrics "
    "are of plain images after it. So the train curve may lie below the test curve."
)


def subtitle(classes: Classes, device: str, amp_dtype: str) -> str:
    """The line under a report's title."""
    if classes == RETINOPATHY:
        task = f"Grades of diabetic retinopathy, 0–{len(classes) - 1}"
    else:
        task = f"{classes.nouns.capitalize()}: {', '.join(classes)}"
    return f'<p class="soft">{" · ".join(map(html.escape, (task, device, amp_dtype)))}</p>'


def purpose(classes: Classes) -> Section:
    """What a model of this kind may and may not be used for."""
    does, use, misuse, limits = map(html.escape, words.purpose(classes))
    items = (does, f"<b>It is for</b> {use}", f"<b>It is not for</b> {misuse}", limits)
    return Section("What the model is for, and what not", ["<ul>\n" + "\n".join(f"<li>{item}</li>" for item in items) + "\n</ul>"])


def meanings(classes: Classes) -> Section:
    """The metrics in plain words."""
    one, many = classes.noun, classes.nouns
    scalars = metrics_for(len(classes), classes.ordinal)
    found = [
        *((metric.title, metric.meaning.format(one=one, many=many, first=classes[0], second=classes[1])) for metric in scalars),
        (
            f"Recall of a {one}",
            f"of the photographs of this {one}, the share that the model calls so (for a disease: sensitivity).",
        ),
        (f"Precision of a {one}", f"of the photographs that the model calls so, the share that are of this {one}."),
        (f"F1 of a {one}", "the harmonic mean of its recall and precision: high only if both are."),
        *((f"{ranking.title} of a {one}", ranking.meaning) for ranking in RANKINGS),
    ]
    if classes.referable:
        found.append((titles(classes)[AUROC_REFERABLE], "the AUROC of the probability of all that is referable, against the rest."))
    terms = "".join(f"<dt>{html.escape(term[0].upper() + term[1:])}</dt><dd>{html.escape(text)}</dd>" for term, text in found)
    return Section("What the metrics mean", [f"<dl>{terms}</dl>"])


def metric_columns(classes: Classes) -> list[str]:
    """The titles of the metrics that these classes have, for the head of a table."""
    return [metric.title for metric in metrics_for(len(classes), classes.ordinal)]


def metric_cells(values: Mapping[str, float | None], classes: Classes) -> list[str]:
    """A table's cells under `metric_columns`."""
    return [shown(metric, values[metric.name]) for metric in metrics_for(len(classes), classes.ordinal)]


def data_section(data: Mapping[str, Any], classes: Classes) -> Section:
    """Images and patients of each data set, and what two of them share: `data` of metrics.json."""
    sets = [data[name] for name in SET_TITLES if name in data]
    set_titles = [title for name, title in SET_TITLES.items() if name in data]
    by_class = zip(*(found["grades"] for found in sets), strict=True)
    counts = [
        ["images", *(found["images"] for found in sets)],
        ["digest, its first 12 digits", *((found.get("digest") or "unknown")[:12] for found in sets)],
        ["patients", *map(_people, sets)],
        *([classes.title(number), *numbers] for number, numbers in enumerate(by_class)),
        [f"share of the most frequent {classes.noun}", *(percent(found["majority_share"]) for found in sets)],
    ]
    shared, warnings = [], []
    duplicates: Mapping[str, int | None] = data.get("duplicates_shared", {})
    for key, count in data["patients_shared"].items():
        first, second = (SET_TITLES[name] for name in key.split("_"))
        same = duplicates.get(key)
        shared.append([f"{first} and {second}", *("unknown" if value is None else value for value in (count, same))])
        warnings += shared_patients(count, first, second) + shared_images(same, first, second)
    unknown = UNKNOWN_PATIENTS if None in data["patients_shared"].values() else ""
    return Section(
        "Data",
        [
            table(["set", *set_titles], counts, "Images and patients"),
            table(["sets", "patients in both", "images in both"], shared, "What two sets share") if shared else "",
            note(" ".join([*warnings, FLATTERED])) if warnings else "",
            note(data["split_note"]) if data.get("split_note") else "",
            note(unknown) if unknown else "",
            remark("Images in both: those of the second set that are, byte for byte, in the first, too."),
        ],
    )


FLATTERED = "What a model has seen of a person, it knows: for new patients the metrics would be worse."
UNKNOWN_PATIENTS = (
    "Whose photographs these are is unknown, so that nobody can say whether a person is in two sets: if so, for new patients the "
    "metrics would be worse. Patients come from a column or the names of images when they are packed (--patient-column, "
    "--patient-pattern)."
)


def shared_patients(count: int | None, first: str, second: str) -> list[str]:
    """What to say of so many patients in two sets, if anything."""
    return [f"{count:,} {'patient has' if count == 1 else 'patients have'} images in both {first} and {second}."] if count else []


def shared_images(count: int | None, first: str, second: str) -> list[str]:
    """What to say of so many images of the second set that are in the first, too, if anything."""
    return (
        [f"{count:,} {'image' if count == 1 else 'images'} of {second} {'is' if count == 1 else 'are'} in {first}, too."]
        if count
        else []
    )


def _people(found: Mapping[str, Any]) -> int | str:
    """How many patients a data set has, from its part of metrics.json; 0 stands there of older runs that knew none."""
    if found["patients"]:
        return int(found["patients"])
    unknown = found.get("images_of_unknown_patients") or found["images"]
    return "unknown" if unknown == found["images"] else f"unknown ({unknown:,} images)"


def confusion_table(matrix: Sequence[Sequence[int]], title: str, classes: Classes) -> str:
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
        number, _, words = classes.title(row).partition(" ")
        name = f'{html.escape(number)} <span class="name">{html.escape(words)}</span>'
        head += f'<th scope="col">{name}</th>'
        cells = "".join(cell(row, column) for column in range(len(matrix)))
        body += f'<tr><th scope="row">{name}<small>n = {sum(matrix[row]):,}</small></th>{cells}</tr>'
    return titled(
        f'<table class="matrix" aria-label="{html.escape(title)}">'
        f'<thead><tr><th scope="col">true ↓<br>model →</th>{head}</tr></thead><tbody>{body}</tbody></table>',
        title,
    )


def confusion_remark(classes: Classes) -> str:
    """How to read `confusion_table`."""
    return (
        f"Each row holds the photographs of one true {classes.noun}, each column those that the model gave one {classes.noun}: "
        "their number, and below it their share of the row, by which the cell is coloured. Framed: right."
    )


def confusion_tables(named: Iterable[tuple[str, Sequence[Sequence[int]]]], classes: Classes) -> str:
    """Several of them: side by side, where their columns are not too many for that."""
    tables = [confusion_table(matrix, title, classes) for title, matrix in named]
    return pair(tables) if len(classes) <= PAIRED else "".join(tables)


def class_table(matrix: Sequence[Sequence[int]], title: str, classes: Classes) -> str:
    """Images, recall, precision and F1 by class, from a confusion matrix; a dash where undefined (scikit-learn: 0/0)."""
    rows = []
    for at, row in enumerate(matrix):
        right, images, given = row[at], sum(row), sum(other[at] for other in matrix)
        recall, precision = percent(right / images if images else None), percent(right / given if given else None)
        f1 = number(2 * right / (images + given) if images + given else None)
        rows.append([classes.title(at), images, recall, precision, f1])
    return table([classes.noun, "images", "recall", "precision", "F1"], rows, title)


def settings_section(settings: Mapping[str, Any], others: Sequence[Sequence[object]] = ()) -> Section:
    """All settings, `others` (name, value), and versions."""
    given = [(name.replace("_", "-"), "–" if value is None else str(value)) for name, value in settings.items()]
    rows = [*given, *others, *versions().items()]
    return Section("Settings", [table(["setting", "value"], rows, "Settings and versions", "words")])
