"""A model card: what a checkpoint is, what it was trained and measured on, what it is for and what it is not, in Markdown.

Its sections are those of Mitchell et al., Model Cards for Model Reporting, FAT* 2019; what is said of data, thresholds and missing
evaluations follows TRIPOD+AI (Collins et al., BMJ 385:e078378, 2024). Every number is one of the run's metrics.json, or of the
checkpoint's own metadata; what neither holds is called unknown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastretina.beton.paths import as_path, parts_of
from fastretina.errors import printable
from fastretina.grading import RETINOPATHY
from fastretina.metrics.ranking import RANKINGS, titles
from fastretina.metrics.table import TITLES, metrics_for
from fastretina.models.checkpoint import CheckpointInfo
from fastretina.models.purpose import purpose
from fastretina.version import __version__

UNKNOWN = "unknown"
SETS = {"train": "training", "val": "validation", "test": "test"}
_MARKUP = re.compile(r"[\\`*_{}\[\]<>#|~&!$@^]|:(?=//)|(?<=www)\.", re.IGNORECASE)  # of GitHub's and the hubs' Markdown
_CITED = (
    "Sections after Mitchell et al., Model Cards for Model Reporting, FAT* 2019; what must be said of data and thresholds after "
    "TRIPOD+AI (Collins et al., BMJ 385:e078378, 2024)."
)


def card(info: CheckpointInfo, metrics: Mapping[str, Any] | None, digest: str | None) -> str:
    """The text of card.md, with the header that model hubs read.

    Args:
        info: the checkpoint's metadata. metrics: its run's metrics.json; None where there is none. digest: SHA-256 of the
            checkpoint file, hexadecimal; None where unknown.
    """
    metrics = metrics or {}
    best: Mapping[str, Any] = metrics.get("best") or {}
    parts = {
        "Model details": _details(info, digest),
        "Intended use": _use(info),
        "Training data": _data(info, metrics, ("train", "val")),
        "Evaluation data": _data(info, metrics, ("test",)),
        "Metrics on the test set": _metrics(info, metrics, best),
        "Thresholds for referring": _thresholds(info),
        "Calibration": _calibration(info, best),
        "Factors: who and what it was not tried on": _factors(best),
        "Ethical considerations": _ethics(),
        "Caveats and recommendations": _caveats(info, metrics, best),
        "How photographs are prepared": _preparation(info),
        "Environment and versions": _environment(metrics),
    }
    body = "\n\n".join(f"## {title}\n\n" + "\n".join(lines) for title, lines in parts.items() if lines)
    return f"{_header(info)}\n# {escaped(_title(info))}\n\n{body}\n\n{_CITED}\n"


def escaped(text: object) -> str:
    """Text of strangers, such as names of files and classes, in Markdown: it shows as it is and does nothing."""
    return _MARKUP.sub(lambda found: "\\" + found[0], printable(str(text)))


def _header(info: CheckpointInfo) -> str:
    """YAML between dashes: JSON's strings and lists are YAML's, too."""
    retinopathy = ["diabetic-retinopathy"] if info.classes == RETINOPATHY else []
    fields = {
        "license": UNKNOWN,
        "library_name": "fastretina",
        "pipeline_tag": "image-classification",
        "tags": ["fundus", "ophthalmology", *retinopathy, info.arch],
        "metrics": [
            *(metric.name for metric in metrics_for(len(info.classes), info.classes.ordinal)),
            *(ranking.name for ranking in RANKINGS),
        ],
    }
    return "\n".join(["---", *(f"{name}: {json.dumps(value)}" for name, value in fields.items()), "---"])


def _title(info: CheckpointInfo) -> str:
    what = "grades of diabetic retinopathy" if info.classes == RETINOPATHY else f"{info.classes.nouns}: {', '.join(info.classes)}"
    return f"{info.arch} at {info.resolution} px, {what}"


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]


def _details(info: CheckpointInfo, digest: str | None) -> list[str]:
    rows = [
        ("architecture", escaped(info.arch)),
        ("input", f"{info.resolution} × {info.resolution} px, RGB"),
        ("output", f"probabilities of {len(info.classes)} {info.classes.nouns}, by the head “{info.head}”"),
        (info.classes.nouns, escaped("; ".join(info.classes.title(number) for number in range(len(info.classes))))),
        ("referable", escaped(info.classes.referable_title or "none")),
        ("epoch", info.epoch),
        ("number format of the training", info.amp_dtype),
        ("card written by", f"fastretina {__version__}"),
        ("SHA-256 of the checkpoint file", f"`{digest}`" if digest else UNKNOWN),
        ("licence", f"{UNKNOWN}: whoever passes it on must state it"),
    ]
    return _table(("", ""), rows)


def _use(info: CheckpointInfo) -> list[str]:
    words = purpose(info.classes)
    return [
        f"- {escaped(words.does)}",
        f"- **It is for** {escaped(words.use)}",
        f"- **Out of scope**: it is not for {escaped(words.misuse)}",
        f"- {escaped(words.limits)}",
    ]


def _data(info: CheckpointInfo, metrics: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    data: Mapping[str, Any] = metrics.get("data") or {}
    digests = {**{name: data[name].get("digest") for name in names if name in data}, **(info.data or {})}
    present = [name for name in names if name in data or (digests.get(name) and name in SETS)]
    if not present:
        return [f"{UNKNOWN.capitalize()}: there is no metrics.json with this checkpoint."]
    rows: list[list[object]] = [["file", *(_file(data.get(name)) for name in present)]]
    rows += [["digest", *(f"`{digests.get(name) or UNKNOWN}`" for name in present)]]
    rows += [["images", *(_known(data.get(name), "images") for name in present)]]
    rows += [["patients", *(_known(data.get(name), "patients") for name in present)]]
    counts = [(data.get(name) or {}).get("grades") or [None] * len(info.classes) for name in present]
    for number, values in enumerate(zip(*counts, strict=True)):
        rows.append([escaped(info.classes.title(number)), *(UNKNOWN if value is None else f"{value:,}" for value in values)])
    lines = _table(["", *(SETS[name] for name in present)], rows)
    shared = {pair: count for pair, count in (data.get("patients_shared") or {}).items() if pair.split("_")[1] in names}
    for pair, count in shared.items():
        first, second = pair.split("_")
        files = [(data.get(name) or {}).get("path") for name in (first, second)]
        parted = " (two parts of one file)" if files[0] is not None and files[0] == files[1] else ""
        people = f"{UNKNOWN}: it is not known whose photographs these are" if count is None else f"{count:,}"
        lines += ["", f"Patients with images in both the {SETS[first]} and the {SETS[second]} set{parted}: {people}."]
    if "val" in names and "val" not in present:
        lines += ["", "There was no validation set."]
    return lines


def _file(found: Mapping[str, Any] | None) -> str:
    """Names alone: the folders above them are nobody's business."""
    if not found or not found.get("path"):
        return UNKNOWN
    return escaped(", ".join(Path(part).name for part in parts_of(as_path(str(found["path"])))))


def _known(found: Mapping[str, Any] | None, name: str) -> str:
    value = (found or {}).get(name)
    return UNKNOWN if value is None else f"{value:,}"


def _share(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def _bounds(interval: Mapping[str, Any] | None) -> str:
    low, high = (None, None) if not interval else (interval.get("low"), interval.get("high"))
    return UNKNOWN if low is None or high is None else f"{low:.3f} to {high:.3f}"


def _metrics(info: CheckpointInfo, metrics: Mapping[str, Any], best: Mapping[str, Any]) -> list[str]:
    metric = TITLES.get(info.metric, info.metric)
    if info.selected_on == "val":
        choice = f"The epoch was chosen by {metric} on the validation set; the test set had no part in it."
    else:
        choice = (
            f"**The epoch was chosen by {metric} on the TEST set, since there was no validation set: the metrics on the test set "
            "are optimistic.**"
        )
    if not best:
        return [f"{UNKNOWN.capitalize()}: there is no metrics.json with this checkpoint. {choice}"]
    intervals: Mapping[str, Any] = best.get("intervals") or {}
    rows = [
        (title, _share(best[name]), _bounds(intervals.get(name)) if name != "loss" else "none")
        for name, title in titles(info.classes).items()
        if name in best and not (best[name] is None and name not in intervals)
    ]
    how = intervals.get("method")
    drawn = f"Intervals: {how}, {intervals['resamples']:,} resamples." if how else "The intervals are unknown."
    lines = [choice, "", *_table(("metric", "value", "95 % interval"), rows), "", f"{drawn} Epoch {best.get('epoch', UNKNOWN)}."]
    points: Sequence[Mapping[str, Any]] = best.get("referable") or []
    if points:
        rates = ("sensitivity", "specificity", "ppv", "npv")
        found = [
            [
                escaped(point["rule"]),
                *(f"{_share(point.get(rate))} ({_bounds((point.get('intervals') or {}).get(rate))})" for rate in rates),
            ]
            for point in points
        ]
        lines += ["", "As a screening test for referable disease, by image, with 95 % intervals:", ""]
        lines += _table(("refer where", "sensitivity", "specificity", "PPV", "NPV"), found)
        lines += [
            "",
            f"Share of images with referable disease, on which PPV and NPV depend: {_share(best.get('prevalence_referable'))}.",
        ]
    return lines


def _thresholds(info: CheckpointInfo) -> list[str]:
    frozen = info.operating
    if frozen is None:
        if not info.classes.referable:
            return ["None: no class is called referable."]
        if info.selected_on != "val":
            return ["None: there was no validation set to choose them on, and a test set must not choose them."]
        return [
            "None: the validation set holds no image with referable disease, or nothing else; or an older fastretina trained it."
        ]
    rows = [
        (
            found.name,
            f"{found.value:.4f}",
            "–" if found.target is None else f"{found.target:.3f}",
            *map(_share, (found.sensitivity, found.specificity)),
        )
        for found in frozen.thresholds
    ]
    return [
        f"Refer where the probability of referable disease, {info.classes.referable_score}, is at or above the threshold. They "
        f"were fitted on validation data and frozen: {frozen.images:,} images, {frozen.referable:,} of them referable, digest "
        f"`{frozen.data or UNKNOWN}`. Elsewhere they reach other values.",
        "",
        *_table(("threshold", "value", "asked for", "sensitivity reached there", "specificity reached there"), rows),
    ]


def _calibration(info: CheckpointInfo, best: Mapping[str, Any]) -> list[str]:
    if info.decision is None:
        how = "The probabilities are not calibrated: there was no validation set to fit a temperature on."
    else:
        how = f"The probabilities are calibrated by a temperature of {info.decision.scale:.3f}, fitted on the validation set."
        if info.decision.thresholds:
            between = ", ".join(f"{threshold:.3f}" for threshold in info.decision.thresholds)
            how = (
                f"The network's number is divided into {info.classes.nouns} at {between}, and a scale of {info.decision.scale:.3f} "
                "makes probabilities of it; both were fitted on the validation set."
            )
    found: Mapping[str, Any] = best.get("calibration") or {}
    brier = "" if found.get("brier") is None else f" Brier score of referable disease: {found['brier']:.4f}."
    return [how, "", f"Expected calibration error on the test set: {_share(found['ece']) if 'ece' in found else UNKNOWN}.{brier}"]


def _factors(best: Mapping[str, Any]) -> list[str]:
    tables: Sequence[Mapping[str, Any]] = best.get("subgroups") or []
    columns = [escaped(table["column"]) for table in tables]
    lines = []
    if columns:
        lines = [f"Evaluated by subgroups of the test set: {', '.join(columns)}; the run's report has the tables."]
        small = [
            f"{escaped(table['column'])} {escaped(part['name'])}" for table in tables for part in table["parts"] if part["small"]
        ]
        lines += [f"Too few images to tell anything from chance: {', '.join(small)}."] if small else []
    but = ", but for what stands above" if columns else ""
    return [
        *lines,
        f"How well it does for people of one age, sex, ethnicity or kind of diabetes, or for photographs of one camera, clinic or "
        f"quality, is {UNKNOWN}{but}: it was not evaluated by them.",
    ]


def _ethics() -> list[str]:
    return [
        "A model may hold traces of the photographs that it learned from. No name of a file or a person is in the checkpoint; "
        "whether its training data may be used so is for whoever passes it on to know. Where it is wrong more often for some "
        "people than for others, whoever relies on it passes that on to them.",
    ]


def _caveats(info: CheckpointInfo, metrics: Mapping[str, Any], best: Mapping[str, Any]) -> list[str]:
    data: Mapping[str, Any] = metrics.get("data") or {}
    found = ["Before any use, evaluate it on photographs of the place where it is to be used: `fastretina evaluate`."]
    if not best:
        found.append("Nothing is known of how good it is.")
    if info.selected_on != "val":
        found.append(
            "It had no validation data: its test metrics are optimistic, its probabilities uncalibrated, its thresholds missing."
        )
    shared = data.get("patients_shared") or {}
    if any(shared.values()):
        found.append("Some people have photographs in two of its sets: for new patients its metrics would be worse.")
    if not shared or None in shared.values():
        found.append("Nobody can say whether a person is in two of its sets; if so, its metrics would be worse for new patients.")
    return [f"- {line}" for line in found]


def _preparation(info: CheckpointInfo) -> list[str]:
    side = f"{info.size} px" if info.size else f"{UNKNOWN} number of px"
    means, deviations = (", ".join(f"{value:g}" for value in triple) for triple in (info.mean, info.std))
    return [
        f"Packed with `{info.preparation.flags}` to squares with a side of {side}, then {info.resolution} px for the network; "
        f"pixels of 0-1 are normalised by means {means} and standard deviations {deviations}. `Grader` does all of it.",
    ]


def _environment(metrics: Mapping[str, Any]) -> list[str]:
    known = {**(metrics.get("environment") or {}), **(metrics.get("versions") or {})}
    if not known:
        return [f"{UNKNOWN.capitalize()}: there is no metrics.json with this checkpoint."]
    return _table(("", ""), [(escaped(name), escaped(value)) for name, value in known.items()])
