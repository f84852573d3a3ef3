"""Grade a .beton file with a trained model and compare with its grades, where it has any.

python -m fastretina.evaluate --checkpoint runs/x/best.safetensors --data data/test.beton --tta 8 --out runs/x-test
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastretina import cli
from fastretina.errors import RunError, UsageError
from fastretina.models.options import AmpChoice

if TYPE_CHECKING:
    from fastretina.beton.reader import Beton
    from fastretina.models.checkpoint import CheckpointInfo


@dataclass(frozen=True)
class EvaluateConfig:
    """Grade a .beton file with a trained model and compare with its grades."""

    checkpoint: Path  # a run's best.safetensors
    data: Path  # a .beton file, or a pattern for its shards; several with commas between
    tta: int = 1  # average over so many of the square's 8 symmetries (test-time augmentation)
    fuse_eyes: float = 0.0  # weight of the same patient's other eye in each answer, 0-0.5
    out: Path | None = None  # folder for metrics.json, predictions.csv, confusion.png; none: the table on the terminal is all
    batch_size: int = 32  # images
    device: Literal["auto", "cpu", "cuda"] = "auto"
    amp: AmpChoice = "auto"  # auto: the number format of the training, where this device has it
    decode: Literal["auto", "cpu", "gpu"] = "auto"  # where JPEGs are decoded
    workers: int | None = None  # decoding threads; none: as many as suit this machine


def main(config: EvaluateConfig) -> int:
    # What imports torch, scipy and matplotlib comes now: --help is there before them.
    from fastretina.loading.loader import Loader
    from fastretina.metrics import fusion
    from fastretina.metrics.assessment import Assessment
    from fastretina.metrics.predictions import Scores, write_predictions
    from fastretina.models import inference
    from fastretina.models.checkpoint import open_checkpoint
    from fastretina.models.heads import SMALLEST_PROBABILITY
    from fastretina.models.precision import device_name
    from fastretina.report import assessment as assessed
    from fastretina.report import plots, terminal
    from fastretina.system import files
    from fastretina.training.run_folder import RunFolder
    from fastretina.training.run_info import versions

    inference.check_views(config.tta)
    fusion.check_weight(config.fuse_eyes)
    if config.out is not None and RunFolder(config.out).config.exists():
        raise UsageError(f"--out {config.out}: is the folder of a training run, whose metrics.json would be lost; give another")
    model, info, device, precision = open_checkpoint(config.checkpoint, config.device, config.amp)
    with Loader(
        config.data,
        batch_size=config.batch_size,
        train=False,
        resolution=info.resolution,
        device=str(device),
        workers=config.workers,
        decode=config.decode,
    ) as loader:
        beton = loader.dataset
        unlabelled = _check(config, beton, info)
        classes = info.classes
        eyes = fusion.eyes_of(beton) if config.fuse_eyes else []
        started = time.perf_counter()
        outputs = inference.run_model(model, loader, precision, "grading", views=config.tta)
        answers = outputs.answers(info.grading, info.decision)
        seconds = time.perf_counter() - started
        rows = beton.index_of(answers.ids.numpy()).tolist()
        names = [beton.names[row] for row in rows]
        patients = beton.patients_of(answers.ids.numpy())
        if (said := _known_data(info, beton.digest)) is not None:
            print(f"{config.data}: {said}", file=sys.stderr)
    if config.fuse_eyes:
        fused = fusion.fuse_eyes([eyes[row] for row in rows], answers.log_probabilities.exp(), config.fuse_eyes)
        answers = replace(answers, log_probabilities=fused.clamp_min(SMALLEST_PROBABILITY).log())
    throughput = len(answers.labels) / seconds
    if config.out is not None:
        try:
            config.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"--out {config.out}: cannot be made: {error.strerror}") from error
        write_predictions(config.out / "predictions.csv", answers, names)
    if unlabelled:
        print(
            f"{unlabelled:,} of {len(beton):,} images were packed without a {classes.noun}: there is nothing to compare with, and "
            f"so no metrics\n{len(beton):,} images, {throughput:,.0f} img/s\nwritten to {config.out}: predictions.csv"
        )
        return 0
    scores = Scores.of(answers, classes)
    assessment = Assessment.of(answers, classes, patients, sources=beton.sources)
    lines = terminal.scores_table(scores, len(answers.labels), throughput, classes)
    lines += terminal.sources_table(assessment.sources, classes)
    print("\n".join([*lines, "", *assessed.lines(assessment)]))
    if config.out is not None:
        metrics = {
            "checkpoint": str(config.checkpoint),
            "data": str(config.data),
            "data_digest": beton.digest,
            "arch": info.arch,
            "epoch": info.epoch,
            "resolution": info.resolution,
            "tta": config.tta,
            "fuse_eyes": config.fuse_eyes,
            "classes": classes.as_dict(),
            "images": len(answers.labels),
            **scores.as_dict(),
            **assessment.as_dict(),
            "images_per_second": throughput,
            "device": device_name(device),
            "amp_dtype": precision.name,
            "versions": versions(),
        }
        files.write_json(config.out / "metrics.json", metrics)
        confusion = plots.confusion(
            scores.metrics.confusion, f"{', '.join(path.name for path in beton.sources)}, {info.arch}", classes
        )
        files.write_bytes(config.out / "confusion.png", confusion)
        print(f"written to {config.out}: metrics.json, predictions.csv, confusion.png")
    return 0


def _known_data(info: CheckpointInfo, digest: str) -> str | None:
    """What must be known of metrics on these data, where the checkpoint says that its training has seen them."""
    known = info.data or {}
    if digest == known.get("train"):
        return "is the very set that this model was trained on: its metrics say nothing of other images"
    if digest == known.get(info.selected_on):
        return "is the very set that this model's epoch was chosen on: its metrics are optimistic"
    return None


def _check(config: EvaluateConfig, beton: Beton, info: CheckpointInfo) -> int:
    """How many images have no label. UsageError, RunError where the file and the checkpoint do not go together."""
    from fastretina.beton.reader import UNLABELLED
    from fastretina.packing.preprocessing import preparation_of

    if (found := preparation_of(beton)) != info.preparation:
        raise UsageError(
            f"{config.data} was packed with {found.flags}, {config.checkpoint} learned from images packed with "
            f"{info.preparation.flags}; pack {config.data.name} again with these flags"
        )
    classes, unlabelled = info.classes, int((beton.labels == UNLABELLED).sum())
    if unlabelled < len(beton) and beton.classes != classes:  # where nothing has a label, nothing is of a class
        raise UsageError(
            f"{config.data} and {config.checkpoint} differ in their classes: {beton.classes}, and {classes}; pack "
            f"{config.data.name} again with the --classes, --referable and --class-order that the checkpoint's were packed with"
        )
    if unlabelled and config.out is None:
        raise UsageError(
            f"{config.data}: {unlabelled:,} of {len(beton):,} images were packed without a {classes.noun}, so that there is "
            "nothing to compare with; give --out DIR for the model's answers, predictions.csv"
        )
    if unlabelled and config.out is not None and (config.out / "metrics.json").exists():
        raise UsageError(f"--out {config.out}: holds the metrics of another evaluation; give another")
    if len(beton) == 0 or int(beton.labels.min()) < UNLABELLED or int(beton.labels.max()) >= len(classes):
        raise RunError(f"{config.data}: needs at least one image, and labels in 0-{len(classes) - 1} only")
    return unlabelled


run_command = partial(cli.run, EvaluateConfig, main)

if __name__ == "__main__":
    run_command()
