"""Grade a .beton file with a trained model and compare with its grades, where it has any.

python -m fastretina.evaluate --checkpoint runs/x/best.safetensors --data data/test.beton --tta 8 --out runs/x-test
python -m fastretina.evaluate --checkpoint runs/a,runs/b,runs/c --data clinic.beton --out runs/clinic
"""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastretina import cli
from fastretina.beton.paths import parts_of
from fastretina.errors import RunError, UsageError
from fastretina.models.options import AmpChoice

if TYPE_CHECKING:
    from fastretina.beton.reader import Beton
    from fastretina.models.grader import Grader


@dataclass(frozen=True)
class EvaluateConfig:
    """Grade a .beton file with a trained model and compare with its grades; at the thresholds that its training froze."""

    checkpoint: Path  # a run's best.safetensors, or a folder with one; several with commas between: the mean of their probabilities
    data: Path  # a .beton file, or a pattern for its shards; several with commas between
    tta: int = 1  # average over so many of the square's 8 symmetries (test-time augmentation)
    fuse_eyes: float = 0.0  # weight of the same patient's other eye in each answer, 0-0.5
    out: Path | None = None  # folder for report.html, metrics.json, predictions.csv, confusion.png; none: the terminal is all
    batch_size: int = 32  # images
    device: Literal["auto", "cpu", "cuda"] = "auto"
    amp: AmpChoice = "auto"  # auto: the number format of the training, where this device has it
    decode: Literal["auto", "cpu", "gpu"] = "auto"  # where JPEGs are decoded
    workers: int | None = None  # decoding threads; none: as many as suit this machine


def main(config: EvaluateConfig, loaded: Grader | None = None, opened: Beton | None = None) -> int:
    # What imports torch, scipy and matplotlib comes now: --help is there before them.
    from fastretina.beton.open import open_beton
    from fastretina.metrics import fusion
    from fastretina.metrics.data import assess
    from fastretina.metrics.flow import Flow
    from fastretina.metrics.predictions import Scores, write_predictions
    from fastretina.models.grader import Grader
    from fastretina.models.inference import check_views
    from fastretina.report import assessment as assessed
    from fastretina.report import plots, terminal
    from fastretina.report.evaluation import Evaluation, evaluation_html
    from fastretina.system import files
    from fastretina.system.malloc import keep_freed_memory
    from fastretina.training.run_folder import RunFolder
    from fastretina.training.run_info import versions

    check_views(config.tta)
    fusion.check_weight(config.fuse_eyes)
    if config.out is not None and RunFolder(config.out).config.exists():
        raise UsageError(f"--out {config.out}: is the folder of a training run, whose metrics.json would be lost; give another")
    grader = loaded or Grader.load(parts_of(config.checkpoint), device=config.device, amp=config.amp, tta=config.tta)
    if grader.device.type == "cpu":
        keep_freed_memory()
    with nullcontext(opened) if opened is not None else open_beton(config.data) as beton:
        unlabelled = _check(config, beton, grader)
        classes = grader.classes
        eyes = fusion.eyes_of(beton) if config.fuse_eyes else []
        started = time.perf_counter()
        found = grader.answers(beton, batch_size=config.batch_size, workers=config.workers, decode=config.decode)
        throughput = len(beton) / (time.perf_counter() - started)
        ids = found.predictions.ids.numpy()
        if config.fuse_eyes:
            found = found.fused([eyes[row] for row in beton.index_of(ids)], config.fuse_eyes)
        answers = found.predictions
        warnings = _warnings(config, grader, beton)
        print("".join(f"{warning}\n" for warning in warnings), end="", file=sys.stderr)
        if config.out is not None:
            try:
                config.out.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise RunError(f"--out {config.out}: cannot be made: {error.strerror}") from error
            write_predictions(config.out / "predictions.csv", answers, beton.names_of(ids), found.uncertainty)
        if unlabelled:
            print(
                f"{unlabelled:,} of {len(beton):,} images were packed without a {classes.noun}: there is nothing to compare with, "
                f"and so no metrics\n{len(beton):,} images, {throughput:,.0f} img/s\nwritten to {config.out}: predictions.csv"
            )
            return 0
        scores = Scores.of(answers, classes)
        members = found.by_member if len(grader.members) > 1 else ()
        assessment = assess(answers, beton, classes, operating=grader.operating, uncalibrated=found.uncalibrated, members=members)
        lines = terminal.scores_table(scores, len(answers.labels), throughput, classes)
        lines += terminal.sources_table(assessment.sources, classes)
        print("\n".join([*lines, "", *assessed.lines(assessment)]))
        if config.out is not None:
            described, flow = _described(config, grader, beton), Flow.of(beton)
            metrics = {
                **described,
                "images": len(answers.labels),
                **scores.as_dict(),
                **assessment.as_dict(),
                "flow": flow.as_dict(),
                "warnings": warnings,
                "images_per_second": throughput,
                "versions": versions(),
            }
            title = f"{', '.join(path.name for path in beton.sources)}, {_arch(grader)}"
            report = Evaluation(
                title=title,
                members=[(member.path, member.info) for member in grader.members],
                data=str(config.data),
                digest=beton.digest,
                scores=scores,
                answers=answers,
                assessment=assessment,
                device=str(described["device"]),
                amp_dtype=str(described["amp_dtype"]),
                beton=beton,
                flow=flow,
                warnings=warnings,
                settings=asdict(config),
            )
            files.write_bytes(config.out / "confusion.png", plots.confusion(scores.metrics.confusion, title, classes))
            files.write_bytes(config.out / "report.html", evaluation_html(report).encode(errors="backslashreplace"))
            files.write_json(config.out / "metrics.json", metrics)
            print(f"written to {config.out}: report.html, metrics.json, predictions.csv, confusion.png")
    return 0


def _described(config: EvaluateConfig, grader: Grader, beton: Beton) -> dict[str, object]:
    """What was evaluated, for metrics.json."""
    from fastretina.models.precision import device_name

    infos = [member.info for member in grader.members]
    return {
        "checkpoint": str(config.checkpoint),
        "members": [
            {"checkpoint": str(member.path), "arch": member.info.arch, "epoch": member.info.epoch, "data": member.info.data}
            for member in grader.members
        ],
        "data": str(config.data),
        "data_digest": beton.digest,
        "arch": _arch(grader),
        "epoch": infos[0].epoch if len(infos) == 1 else None,
        "resolution": infos[0].resolution if len({info.resolution for info in infos}) == 1 else None,
        "tta": config.tta,
        "fuse_eyes": config.fuse_eyes,
        "classes": grader.classes.as_dict(),
        "device": device_name(grader.device),
        "amp_dtype": ", ".join(dict.fromkeys(member.precision.name for member in grader.members)),
    }


def _arch(grader: Grader) -> str:
    return ", ".join(dict.fromkeys(member.info.arch for member in grader.members))


def _warnings(config: EvaluateConfig, grader: Grader, beton: Beton) -> list[str]:
    """What must be known of metrics on these data, where a checkpoint says that its training has seen them, or other pictures."""
    found = []
    for member in grader.members:
        name = "this model" if len(grader.members) == 1 else f"{member.path}"
        known = member.info.data or {}
        if beton.digest == known.get("train"):
            found.append(f"{config.data}: is the very set that {name} was trained on: its metrics say nothing of other images")
        elif beton.digest == known.get("whole"):
            found.append(f"{config.data}: holds all that {name} was trained on: its metrics say little of other images")
        elif beton.digest == known.get(member.info.selected_on):
            found.append(f"{config.data}: is the very set that {name}'s epoch was chosen on: its metrics are optimistic")
    asked = [flag for flag, given in (("--tta", config.tta > 1), ("--fuse-eyes", config.fuse_eyes > 0)) if given]
    if asked and grader.operating is not None:
        found.append(f"The temperature and the thresholds were frozen on answers without {' and '.join(asked)}")
    learned = grader.members[0].info.size
    if learned is not None and beton.side != learned:
        size = "different sizes" if beton.side is None else f"{beton.side} px"
        found.append(f"{config.data}: has photographs of {size}, the model learned from those of {learned} px")
    return found


def _check(config: EvaluateConfig, beton: Beton, grader: Grader) -> int:
    """How many images have no label. UsageError, RunError where the file and the checkpoint do not go together."""
    from fastretina.beton.reader import UNLABELLED
    from fastretina.packing.preprocessing import preparation_of

    if (found := preparation_of(beton)) != grader.preparation:
        raise UsageError(
            f"{config.data} was packed with {found.flags}, {config.checkpoint} learned from images packed with "
            f"{grader.preparation.flags}; pack {config.data.name} again with these flags"
        )
    classes, unlabelled = grader.classes, int((beton.labels == UNLABELLED).sum())
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
