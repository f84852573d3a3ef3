"""The model as a screening test for referable disease: sections of a report, at thresholds that these data did not choose."""

from __future__ import annotations

from dataclasses import replace

from fastretina.grading import Classes
from fastretina.metrics.assessment import Assessment
from fastretina.metrics.bootstrap import LEVEL
from fastretina.metrics.operating import HIGH_SENSITIVITY, Operating
from fastretina.metrics.screening import HALF, RATES, OperatingPoint, Screening
from fastretina.metrics.table import TITLES
from fastretina.report import plots_screening as plots
from fastretina.report.page import Ranged, Section, image, note, number, pair, paragraph, percent, remark, table

PEOPLE = 1000
NO_THRESHOLDS = (
    "No thresholds were frozen: this model was trained without validation data, with such in which all photographs or none are "
    "referable, or by an older version. What can be judged without choosing a threshold on these very data is its own answer, "
    "and a probability of one half."
)
SAME = "Every person here has one photograph of each eye, so that by eye pair all numbers are those by person."
PLURALS = {"image": "images", "eye pair": "eye pairs", "person": "people"}


def screened(point: OperatingPoint, prevalence: float) -> tuple[int, int, int, int]:
    """What becomes of 1,000 people, of whom a share `prevalence` (0-1) has referable disease: those with it referred and missed,
    those without it referred and not."""
    ill = round(PEOPLE * prevalence)
    found, cleared = round(ill * (point.sensitivity.value or 0)), round((PEOPLE - ill) * (point.specificity.value or 0))
    return found, ill - found, PEOPLE - ill - cleared, cleared


def screened_text(found: int, missed: int, needless: int, cleared: int, by: str = "the model's own answer") -> str:
    """`screened` in whole sentences; by: what decides who is referred."""
    ill, referred, others = found + missed, found + needless, missed + cleared
    counted = (
        f"Of {PEOPLE:,} people screened with one photograph each, {ill} have referable disease, if it is as frequent as in "
        f"this test set. To refer by {by} finds {found} of them and misses {missed}; of the "
        f"{PEOPLE - ill} without it, {needless} are referred needlessly."
    )
    if not referred or not others:
        return f"{counted} It refers {'all' if referred else 'none'} of them."
    return (
        f"{counted} So {found} of the {referred} people referred have the disease, and {missed} of the {others} "
        "who are not. Where it is rarer than here, fewer of those referred have it."
    )


def decided_by(point: OperatingPoint) -> str:
    """What decides who is referred, in words."""
    return "the frozen high-sensitivity threshold" if point.name == HIGH_SENSITIVITY else "the model's own answer"


def main_point(assessment: Assessment) -> OperatingPoint | None:
    """Of images, by the frozen high-sensitivity threshold, or where there is none by the model's own answer; None where no class is
    referable."""
    rule = assessment.subgroup_rule
    return None if rule is None else assessment.screening["image"].point(rule.name)


def frozen_text(operating: Operating | None) -> str:
    """Where the thresholds come from."""
    if operating is None:
        return NO_THRESHOLDS
    known = "of several data sets, or of an unknown one"
    if operating.data:
        known = f"of the data set whose digest begins with {operating.data[:12]}"
    text = (
        f"The thresholds were frozen on {operating.images:,} validation photographs, {operating.referable:,} of them referable "
        f"({known})."
    )
    if operating.members > 1:
        text += (
            f" They are the means of {operating.members} models' own thresholds, as are the rates reached: what the models reach "
            "together on validation data was not measured."
        )
    return text


def screening_section(assessment: Assessment) -> Section | None:
    """Thresholds, rates by image, by eye pair and by person, and what they mean for 1,000 people; none where no class is
    referable."""
    classes, point = assessment.classes, main_point(assessment)
    if point is None:
        return None
    parts = [
        remark(
            f"Referable: {classes.referable_title}. Sensitivity: of those with referable disease, the share that is referred. "
            "Specificity: of those without it, the share that is rightly not referred. To raise the one lowers the other. PPV: of "
            "those referred, the share that has it; NPV: of those not referred, the share that has not. Both depend on how "
            "frequent the disease is."
        ),
        paragraph(frozen_text(assessment.operating)),
    ]
    if assessment.operating is not None:
        parts.append(_thresholds(assessment.operating))
    parts.append(_unit_table(assessment))
    pairs, people = (assessment.screening.get(unit) for unit in ("eye pair", "person"))
    same = pairs is not None and people is not None and replace(pairs, unit="person") == people
    for found in assessment.screening.values():
        parts += [remark(SAME)] if same and found is pairs else _rates(found)
    parts += [remark(f"Not counted by {unit}: {why}.") for unit, why in assessment.unknown.items()]
    if not assessment.operating_points or assessment.prevalence is None:
        return Section(TITLE, [*parts, note(_one_kind(assessment))])
    counts = [[each.rule, *screened(each, assessment.prevalence)] for each in assessment.operating_points]
    return Section(
        TITLE,
        [
            *parts,
            paragraph(screened_text(*screened(point, assessment.prevalence), decided_by(point))),
            table(
                ["refer where", "ill, referred", "ill, missed", "well, referred", "well, not"],
                counts,
                f"Of {PEOPLE:,} people, {percent(assessment.prevalence)} of them ill as in this test set",
            ),
            remark(
                f"Thresholds are on {_referable(classes)}. Small print in tables: {100 * LEVEL:.0f} % intervals; of a rate of 0 or "
                "100 %, where all resamples are alike, those of Clopper and Pearson for so many people."
            ),
        ],
    )


TITLE = "As a screening test for referable disease"


def _one_kind(assessment: Assessment) -> str:
    kind = "Every photograph here is referable" if assessment.prevalence else "No photograph here is referable"
    return f"{kind}: what needs both kinds, as the AUROC does, is undefined."


def _thresholds(operating: Operating) -> str:
    rows = [
        [found.name, number(found.value), percent(found.target), percent(found.sensitivity), percent(found.specificity)]
        for found in operating.thresholds
    ]
    columns = ["threshold", "refer from", "asked for", "sensitivity", "specificity"]
    return table(columns, rows, "The frozen thresholds, and what they reached on the validation data")


def _unit_table(assessment: Assessment) -> str:
    """What is counted, and how well the score tells the ill from the well."""
    names = {"auroc": "AUROC", "auprc": "AUPRC", "accuracy": "accuracy", "qwk": "QWK"}
    shown = [name for name in names if any(name in found.intervals for found in assessment.screening.values())]
    rows = []
    for unit, found in assessment.screening.items():
        cells = [Ranged.of(found.intervals[name], percent=name == "accuracy") for name in shown]
        rows.append([f"by {unit}", found.number, found.referable, *cells])
    title = "What is counted: a person or an eye pair is ill where one image is, and has the highest score and the worst grade"
    return table(["counted", "number", "referable", *(names[name] for name in shown)], rows, title, "many")


def _rates(found: Screening) -> list[str]:
    """Tables of one unit: rates with intervals, and the counts that they are made of."""
    rows = [[point.rule, *(Ranged.of(getattr(point, rate), percent=True) for rate in RATES)] for point in found.points]
    counts = [[point.rule, point.tp, point.fn, point.fp, point.tn] for point in found.points]
    named = f"by {found.unit} ({found.number:,}, {found.referable:,} of them referable)"
    columns = ["refer where", *(TITLES[rate] for rate in RATES)]
    listed = table(["refer where", "ill, referred", "ill, missed", "well, referred", "well, not"], counts, f"Counts {named}")
    return [
        table(columns, rows, f"Sensitivity, specificity and predictive values {named}", "many"),
        f"<details><summary>The counts behind them, by {found.unit}</summary>{listed}</details>",
    ]


def _referable(classes: Classes) -> str:
    """What the thresholds are compared with."""
    score, title = classes.referable_score, classes.referable_title
    if len(classes.referable) == 1:
        return f"{score}, the probability of {title}"
    return f"{score}, the probabilities of {title} together"


def curves_section(assessment: Assessment) -> Section | None:
    """ROC and precision-recall curves, by image and by person, with the operating points; none where undefined."""
    pictures = []
    for unit in ("image", "person"):
        found = assessment.screening.get(unit)
        if found is None or found.roc is None or found.precision_recall is None:
            continue
        auroc, auprc = (number(found.intervals[name].value) for name in ("auroc", "auprc"))
        rates = [(_mark(point), *(getattr(point, rate).value for rate in RATES)) for point in found.points]
        told = "; ".join(
            f"{rule}: sensitivity {percent(a)}, specificity {percent(b)}, PPV {percent(c)}" for rule, a, b, c, _ in rates
        )
        marks = [plots.Mark(rule, 1 - specificity, sensitivity) for rule, sensitivity, specificity, _, _ in rates]
        drawn = plots.roc(found.roc.x, found.roc.y, unit, f"AUROC {auroc}", marks)
        pictures.append(image(drawn, f"ROC curve by {unit}, AUROC {auroc}. {told}"))
        marks = [plots.Mark(rule, sensitivity, ppv) for rule, sensitivity, _, ppv, _ in rates if ppv is not None]
        curve, share = found.precision_recall, found.referable / found.number
        drawn = plots.precision_recall(curve.x, curve.y, share, unit, f"AUPRC {auprc}", marks)
        pictures.append(image(drawn, f"Precision-recall curve by {unit}, AUPRC {auprc}. {told}"))
    if not pictures:
        return None
    text = (
        "Each point of a curve is a threshold on the probability of referable disease: from left to right more are referred. "
        "A ROC curve that goes up steeply finds the ill before it refers the well. The higher a precision-recall curve stays, the "
        "more of those referred are ill. The marks are the rules of the tables above."
    )
    return Section("All thresholds", [remark(text), pair(pictures)])


def _mark(point: OperatingPoint) -> str:
    """A rule in a legend, where there is little room."""
    if point.threshold is None:
        return point.rule
    value = f"≥ {point.threshold:.3g}"
    return value if point.name == HALF else f"{point.name} ({value})"


def decision_section(assessment: Assessment) -> Section | None:
    """Net benefit over threshold probabilities; none where nobody is referable, or everybody."""
    curve = assessment.decision
    if curve is None or not assessment.operating_points:
        return None
    rows = zip(curve.thresholds, curve.model, curve.everyone, strict=True)
    better = [at for at, model, every in rows if model > max(0.0, every) + 1e-12]
    told = "at none of the thresholds"
    if better:
        told = f"at {len(better)} of {len(curve.thresholds)} thresholds, the lowest {better[0]:.0%}, the highest {better[-1]:.0%}"
    told = f"The model is of more use than to refer all, or nobody, {told.replace('%', ' %')}."
    chosen = [0.05, 0.1, 0.2, 0.3, 0.5]
    at = [min(range(len(curve.thresholds)), key=lambda n: abs(curve.thresholds[n] - value)) for value in chosen]
    cells = [[percent(curve.thresholds[n]), *(f"{100 * way[n]:.1f}" for way in (curve.model, curve.everyone)), "0.0"] for n in at]
    explained = (
        "How many needless referrals is one person found worth? Who accepts nine of them for one would refer from a probability of "
        "10 % on. For each such threshold the curve shows the net benefit (Vickers and Elkin 2006): people found, less needless "
        "referrals at that rate of exchange, by photograph. The model is of use where its curve lies above both others."
    )
    columns = ["refer from", "model", "refer all", "refer nobody"]
    listed = table(columns, cells, "Net benefit, in people found per 100 photographs")
    drawn = plots.decision_curve(curve.thresholds, curve.model, curve.everyone)
    picture = image(drawn, f"Decision curve. {told}")
    return Section("Decision curve: is the model of use?", [pair([picture, paragraph(explained) + paragraph(told) + listed])])
