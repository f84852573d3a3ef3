"""Grade a .beton file with a trained model and compare with its grades.

python -m fastretina.evaluate --checkpoint runs/x/best.safetensors --data data/test.beton --tta 8 --out runs/x-test
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastretina import cli
from fastretina.errors import RunError, UsageError
from fastretina.grading import grade_title
from fastretina.metrics.table import TITLES
from fastretina.models.options import AmpChoice

if TYPE_CHECKING:
    from fastretina.metrics.predictions import Scores


@dataclass(frozen=True)
class EvaluateConfig:
    """Grade a .beton file with a trained model and compare with its grades."""

    checkpoint: Path  # a run's best.safetensors
    data: Path  # a .beton file, or a pattern for its shards
    tta: int = 1  # average over so many of the square's 8 symmetries (test-time augmentation)
    fuse_eyes: float = 0.0  # weight of the same patient's other eye (10_left, 10_right) in each answer, 0-0.5
    out: Path | None = None  # folder for metrics.json, predictions.csv, confusion.png; none: the table on the terminal is all
    batch_size: int = 32  # images
    device: Literal["auto", "cpu", "cuda"] = "auto"
    amp: AmpChoice = "auto"  # auto: the number format of the training, where this device has it
    decode: Literal["auto", "cpu", "gpu"] = "auto"  # where JPEGs are decoded
    workers: int | None = None  # decoding threads; none: as many as suit this machine


def main(config: EvaluateConfig) -> int:
    """Grade a .beton file with a trained model and compare with its grades."""
    # What imports torch, scipy and matplotlib comes now: --help is there before them.
    from fastretina.loading.loader import Loader
    from fastretina.metrics.assessment import Assessment
    from fastretina.metrics.fusion import check_weight, fuse_eyes
    from fastretina.metrics.predictions import Scores, write_predictions
    from fastretina.models.checkpoint import open_grader
    from fastretina.models.heads import SMALLEST_PROBABILITY
    from fastretina.models.inference import check_views, run_model
    from fastretina.models.precision import device_name
    from fastretina.packing.preprocessing import preparation_of
    from fastretina.report import plots
    from fastretina.report.assessment import lines
    from fastretina.system.files import write_bytes, write_json
    from fastretina.training.run_folder import RunFolder
    from fastretina.training.run_info import versions

    check_views(config.tta)
    check_weight(config.fuse_eyes)
    if config.out is not None and RunFolder(config.out).config.exists():
        raise UsageError(f"--out {config.out}: is the folder of a training run, whose metrics.json would be lost; give another")
    model, grader, device, precision = open_grader(config.checkpoint, config.device, config.amp)
    with Loader(
        config.data,
        batch_size=config.batch_size,
        train=False,
        resolution=grader.resolution,
        device=str(device),
        workers=config.workers,
        decode=config.decode,
    ) as loader:
        beton = loader.dataset
        if (found := preparation_of(beton)) != grader.preparation:
            raise UsageError(
                f"{config.data} was packed with {found.flags}, {config.checkpoint} learned from images packed with "
                f"{grader.preparation.flags}; pack {config.data.name} again with these flags"
            )
        if len(beton) == 0 or int(beton.labels.min()) < 0 or int(beton.labels.max()) >= grader.num_classes:
            raise RunError(f"{config.data}: needs at least one image, and grades in 0-{grader.num_classes - 1} only")
        started = time.perf_counter()
        outputs = run_model(model, loader, precision, "grading", views=config.tta)
        answers = outputs.answers(grader.grading, grader.decision)
        seconds = time.perf_counter() - started
        names = beton.names_of(answers.ids.numpy())
    if config.fuse_eyes:
        fused = fuse_eyes(names, answers.log_probabilities.exp(), config.fuse_eyes)
        answers = replace(answers, log_probabilities=fused.clamp_min(SMALLEST_PROBABILITY).log())
    scores = Scores.of(answers)
    throughput = len(answers.labels) / seconds
    assessment = Assessment.of(answers, names)
    print("\n".join([*_table(scores, len(answers.labels), throughput), "", *lines(assessment)]))
    if config.out is not None:
        try:
            config.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"--out {config.out}: cannot be made: {error.strerror}") from error
        about = {
            "checkpoint": str(config.checkpoint),
            "data": str(config.data),
            "arch": grader.arch,
            "epoch": grader.epoch,
            "resolution": grader.resolution,
            "tta": config.tta,
            "fuse_eyes": config.fuse_eyes,
            "images": len(answers.labels),
            "loss": scores.loss,
        }
        machine = {
            "images_per_second": throughput,
            "device": device_name(device),
            "amp_dtype": precision.name,
            "versions": versions(),
        }
        write_json(config.out / "metrics.json", {**about, **scores.metrics.as_dict(), **assessment.as_dict(), **machine})
        write_predictions(config.out / "predictions.csv", answers, names)
        write_bytes(config.out / "confusion.png", plots.confusion(scores.metrics.confusion, f"{config.data.name}, {grader.arch}"))
        print(f"written to {config.out}: metrics.json, predictions.csv, confusion.png")
    return 0


def _table(scores: Scores, images: int, throughput: float) -> list[str]:
    found = scores.metrics
    lines = [f"{'grade':<16}{'images':>8}{'right':>8}{'recall':>10}"]
    for grade, recall in enumerate(found.per_class_recall):
        row = found.confusion[grade]
        share = "–" if recall is None else f"{100 * recall:.1f} %"
        lines.append(f"{grade_title(grade):<16}{sum(row):>8,}{row[grade]:>8,}{share:>10}")
    values = [*((TITLES[name], value) for name, value in found.values.items()), ("loss (nats)", scores.loss)]
    lines += [f"{title:<24}{'undefined' if value is None else f'{value:.4f}':>18}" for title, value in values]
    return [*lines, f"{images:,} images, {throughput:,.0f} img/s"]


run_command = partial(cli.run, EvaluateConfig, main)

if __name__ == "__main__":
    run_command()
