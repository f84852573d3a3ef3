"""Parts of a data set beside each other: the values of a column, the packings that it is made of."""

from __future__ import annotations

from collections.abc import Sequence

from fastretina.grading import Classes
from fastretina.metrics.assessment import Assessment
from fastretina.metrics.ranking import AUROC_REFERABLE
from fastretina.metrics.screening import Rule
from fastretina.metrics.subgroups import FEW_IMAGES, FEW_OF_A_KIND, MAX_VALUES, Subgroup
from fastretina.metrics.table import METRICS, TITLES
from fastretina.report.page import Ranged, Section, remark, table

TITLES_HERE = {**TITLES, AUROC_REFERABLE: "AUROC, referable"}
_PERCENT = {metric.name for metric in METRICS if metric.percent}


def subgroup_table(parts: Sequence[Subgroup], column: str, title: str) -> str:
    """A row for each part, with intervals; those that are small are grey, and called so. column: what the parts are values of."""
    named = list(parts[0].intervals)
    rows = [
        [
            part.name,
            part.images,
            "unknown" if part.people is None else part.people,
            "–" if part.referable is None else part.referable,
            *(Ranged.of(part.intervals[name], percent=name in _PERCENT) for name in named),
        ]
        for part in parts
    ]
    header = [column, "images", "people", "referable", *(TITLES_HERE[name] for name in named)]
    return table(header, rows, title, "many", small=[at for at, part in enumerate(parts) if part.small])


def small_remark(classes: Classes) -> str:
    """What a grey row is."""
    kinds = f", or fewer than {FEW_OF_A_KIND} that are referable or {FEW_OF_A_KIND} that are not" if classes.referable else ""
    return f"Small, in grey: fewer than {FEW_IMAGES} images{kinds}; there chance decides. Below each value its 95 % interval."


def subgroups_section(assessment: Assessment) -> Section | None:
    """A table for each column; none without columns."""
    if not assessment.subgroups:
        return None
    parts = [
        remark(
            f"The same model on parts of the data. {small_remark(assessment.classes)} Where the intervals of two rows overlap "
            "widely, the difference may be chance; with many rows some differ by chance alone."
            f"{rule_text(assessment.subgroup_rule)}"
        )
    ]
    for found in assessment.subgroups:
        if found.left_out:
            parts.append(remark(f"{found.column}: {found.count:,} values, more than {MAX_VALUES}: no table is made of it."))
        elif found.parts:
            parts.append(subgroup_table(found.parts, found.column, f"By {found.column}"))
    return Section("Subgroups", parts)


def rule_text(rule: Rule | None) -> str:
    """What sensitivity and specificity of these tables are of."""
    return "" if rule is None else f" Sensitivity and specificity: referred where {rule.text}."


def sources_section(named: Sequence[tuple[str, Sequence[Subgroup], Rule | None]], classes: Classes) -> Section | None:
    """The packings of each data set, with its title and what sensitivity and specificity are of; none where each is one packing."""
    found = [(subgroup_table(parts, "packing", title), rule_text(rule)) for title, parts, rule in named if parts]
    text = f"What a model learned where most of its images come from need not hold elsewhere. {small_remark(classes)}"
    parts = [part for listed, rule in found for part in (listed, remark(rule.strip()) if rule else "")]
    return Section("By packing", [*parts, remark(text)]) if found else None
