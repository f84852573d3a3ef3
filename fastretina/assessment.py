"""All that is said about a model's answers besides grade_metrics: intervals, screening for referable disease, calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from fastretina import plots
from fastretina.history import Predictions
from fastretina.intervals import LEVEL, RESAMPLES, Interval, bootstrap, patient_groups
from fastretina.page import image, number, percent, table
from fastretina.screening import BINS, Calibration, OperatingPoint, calibration, operating_points

TITLES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "qwk": "QWK",
    "auroc_referable": "AUROC, referable (grade ≥ 2)",
}


@dataclass(frozen=True)
class Assessment:
    """Figures of one data set. groups: the patients (or single images, where names tell of no patient) that were drawn."""

    groups: int
    intervals: dict[str, Interval]
    operating_points: list[OperatingPoint]
    calibration: Calibration

    @classmethod
    def of(cls, answers: Predictions, names: Sequence[str]) -> Self:
        """Of a model's answers, with the image's name for each. Some 0.2 s for 7,000 images."""
        labels, probabilities = answers.labels.numpy(), answers.log_probabilities.double().exp().numpy()
        groups = patient_groups(names)
        return cls(
            int(groups.max()) + 1,
            bootstrap(labels, probabilities, groups),
            operating_points(labels, probabilities),
            calibration(labels, probabilities),
        )

    def as_dict(self) -> dict[str, Any]:
        """For metrics.json; None where undefined."""
        return {
            "auroc_referable": self.intervals["auroc_referable"].value,
            "intervals": {
                **{name: {"low": found.low, "high": found.high} for name, found in self.intervals.items()},
                "level": LEVEL,
                "method": "percentile bootstrap, patients drawn whole",
                "resamples": RESAMPLES,
                "patients": self.groups,
            },
            "referable": [asdict(point) for point in self.operating_points],
            "calibration": asdict(self.calibration),
        }

    def html(self, title: str) -> list[str]:
        """Sections of a report."""
        rows = [
            [TITLES[name], number(found.value), f"{number(found.low)} to {number(found.high)}" if found.low is not None else "–"]
            for name, found in self.intervals.items()
        ]
        points = [
            [point.rule, number(point.threshold), percent(point.sensitivity), percent(point.specificity)]
            for point in self.operating_points
        ]
        screening = [
            f"<h2>Referable disease (grade 2 or more), {title}</h2>",
            table(["referred where", "threshold", "sensitivity", "specificity"], points),
            '<p class="soft small">Thresholds are on p2 + p3 + p4. Those “set here” are read off these very images; on '
            "others they will reach a little more or less.</p>",
        ]
        return [
            f"<h2>How sure these figures are, {title}</h2>",
            table(["test set", "figure", f"{100 * LEVEL:.0f} % interval"], rows),
            f'<p class="soft small">Percentile bootstrap, {RESAMPLES:,} resamples of {self.groups:,} patients, drawn with all '
            "their images. It shows what the choice of the test patients does; another seed, or the choice of the epoch, adds to "
            "it.</p>",
            *(screening if self.operating_points else []),
            f"<h2>Calibration, {title}</h2>",
            image(plots.reliability(self.calibration), "reliability curve"),
            f'<p class="soft small">ECE: expected calibration error, {BINS} bins of equal width (Guo et al. 2017).</p>',
        ]

    def lines(self) -> list[str]:
        """For the terminal."""
        found = [f"{'':<30}{'figure':>10}   {100 * LEVEL:.0f} % interval ({self.groups:,} patients drawn {RESAMPLES:,} times)"]
        for name, interval in self.intervals.items():
            bounds = "undefined" if interval.low is None else f"{interval.low:.3f} to {interval.high:.3f}"
            found.append(f"{TITLES[name]:<30}{number(interval.value):>10}   {bounds}")
        if self.operating_points:
            found.append(f"{'referred where':<30}{'threshold':>10}{'sensitivity':>13}{'specificity':>13}")
        found += [
            f"{point.rule:<30}{number(point.threshold):>10}{percent(point.sensitivity):>13}{percent(point.specificity):>13}"
            for point in self.operating_points
        ]
        return [*found, f"{'calibration error (ECE)':<30}{percent(self.calibration.ece):>10}"]
