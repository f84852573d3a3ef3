"""What is said on the terminal: of a training run before it begins, after each epoch, and at its end; of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence

from fastretina.errors import printable
from fastretina.grading import Classes
from fastretina.metrics.predictions import Scores
from fastretina.metrics.subgroups import Subgroup
from fastretina.metrics.table import metrics_for
from fastretina.report.page import number, shown
from fastretina.report.sections import shared_images, shared_patients
from fastretina.training.build import Run
from fastretina.training.config import REFERENCE_BATCH, TrainConfig
from fastretina.training.distributed import World
from fastretina.training.presets import recipe_in_words
from fastretina.training.progress import EpochRecord, Progress
from fastretina.training.run_folder import RunFolder
from fastretina.training.run_info import SET_TITLES, RunInfo
from fastretina.version import __version__


def header(config: TrainConfig, run: Run, folder: RunFolder) -> str:
    """The settings that matter, the data sets, and what the machine makes of them."""
    info, progress = run.info, run.training.progress
    start = f"weights {config.weights}" if config.weights else "from scratch"
    lines = [
        f"fastretina {__version__}: {config.arch} ({info.parameters / 1e6:.1f} M parameters), {start}, {config.resolution} px, "
        f"{config.optimizer} {config.learning_rate:g} {config.schedule}, batch {config.batch_size}, seed {config.seed}",
        *([f"recipe     {recipe_in_words(config.recipe, info.settings)}"] if config.recipe else []),
        *([f"weights    {info.start}"] if config.weights else []),
        *_batch_lines(config, run.training.world),
        f"device     {info.device}",
        f"precision  {info.precision_note}",
        *([f"compile    {run.compiling.note}"] if config.compile != "off" else []),
    ]
    for name, data in info.data.items():
        lines.append(f"{name:<10} {data.path}: {data.images:,} images, {_counts(data.grades, info.classes)}")
    lines += _shared(info)
    lines += [f"loader     {info.loader}", f"selection  {info.selection_note}", f"run folder {folder.path}"]
    if progress.step:
        lines.append(f"resuming   epoch {progress.epoch + 1}, after step {progress.step:,}")
    return "\n".join(map(printable, lines))


def _counts(grades: Sequence[int], classes: Classes) -> str:
    """Images by class: `grades 0-4: 20 / 4 / 7 / 2 / 1`, `normal 20, AMD 4`."""
    if classes.ordinal:
        return f"grades 0-{len(classes) - 1}: " + " / ".join(f"{count:,}" for count in grades)
    return ", ".join(f"{name} {count:,}" for name, count in zip(classes, grades, strict=True))


def _shared(info: RunInfo) -> list[str]:
    """What a reader must know of the patients and the images that two sets share."""
    lines = []
    for key, count in info.patients_shared.items():
        first, second = (SET_TITLES[name] for name in key.split("_"))
        if count is None:
            unknown = " and ".join(f"{name} ({data.unknown:,} images)" for name, data in info.data.items() if data.patients is None)
            lines.append(f"patients   unknown in {unknown}: nobody can say whether two sets share any")
            break
        lines += [f"patients   {text}" for text in shared_patients(count, first, second)]
    for key, count in info.duplicates_shared.items():
        first, second = (SET_TITLES[name] for name in key.split("_"))
        lines += [f"duplicates {text}" for text in shared_images(count, first, second)]
    return lines


def _batch_lines(config: TrainConfig, world: World) -> list[str]:
    """How a step is divided and what it makes of the learning rate, where that is not plain."""
    lines = []
    if world.size > 1 or config.accumulate > 1:
        largest = -(-config.batch_size // world.size)
        batchnorm = "over all ranks" if config.sync_batchnorm else "of each rank's own images"
        ranks = f"{world.size} ranks of {largest} images, BatchNorm {batchnorm}" if world.size > 1 else "1 rank"
        parts = f", in {config.accumulate} micro-batches of {-(-largest // config.accumulate)}" if config.accumulate > 1 else ""
        lines.append(f"step       {config.batch_size} images: {ranks}{parts}")
    if config.scale_lr:
        lines.append(f"rate       {config.learning_rate:g} = --lr {config.lr:g} x {config.batch_size} / {REFERENCE_BATCH}")
    return lines


def epoch_line(record: EpochRecord, epochs: int) -> str:
    """One line for a finished epoch of `epochs`."""

    def found(name: str, scores: Scores | None) -> str:
        if scores is None:
            return ""
        title, value = ("QWK", scores.metrics.qwk) if scores.metrics.ordinal else ("bal", scores.metrics.balanced_accuracy)
        return f"{name} acc {number(scores.metrics.accuracy)} {title} {number(value):^5}  "

    return (
        f"epoch {record.epoch:>{len(str(epochs))}}/{epochs}  loss {record.train.loss:.3f}  "
        f"train acc {number(record.train.metrics.accuracy)}  {found('test', record.test)}{found('val', record.val)}"
        f"{record.images_per_second:,.0f} img/s  data wait {100 * record.data_wait_share:.1f} %  {record.epoch_seconds:.1f} s"
    )


def last_lines(progress: Progress, info: RunInfo, folder: RunFolder, finished: bool) -> str:
    """What came out, and where the report is; or how a run that was stopped goes on."""
    best = progress.best
    if not finished or best is None:
        return f"stopped after step {progress.step:,} as --stop-after-steps says; the same command goes on from {folder.last}"
    metrics = best.test.metrics
    title, value = ("QWK", metrics.qwk) if metrics.ordinal else ("macro F1", metrics.macro_f1)
    choice = f"by {info.selection_metric} on the {SET_TITLES[info.selected_on]} set"
    return (
        f"best epoch {best.epoch} ({choice}): test accuracy {metrics.accuracy:.3f} "
        f"(always the same {info.classes.noun}: {info.data['test'].majority_share:.3f}), "
        f"{title} {'undefined' if value is None else f'{value:.3f}'}, "
        f"balanced accuracy {metrics.balanced_accuracy:.3f}\nreport: {printable(str(folder.report))}"
    )


def sources_table(sources: Sequence[Subgroup], classes: Classes) -> list[str]:
    """Lines of the metrics of each packing, where there are several."""
    if not sources:
        return []
    metrics = [metric for metric in metrics_for(len(classes), classes.ordinal) if metric.name in sources[0].values]
    paths = [printable(found.name) for found in sources]
    width = max(map(len, paths))
    lines = ["", "  ".join([f"{'packing':<{width}}", f"{'images':>8}", *(f"{metric.title:>8}" for metric in metrics)])]
    for path, found in zip(paths, sources, strict=True):
        cells = [f"{shown(metric, found.values[metric.name]):>{max(8, len(metric.title))}}" for metric in metrics]
        lines.append("  ".join([f"{path:<{width}}", f"{found.images:>8,}", *cells]))
    return lines


def scores_table(scores: Scores, images: int, throughput: float, classes: Classes) -> list[str]:
    """Lines of an evaluation's metrics, by class and of all `images`; throughput: img/s."""
    found = scores.metrics
    names = [classes.title(number) for number in range(len(classes))]
    width = max(15, *map(len, names)) + 1
    lines = [f"{classes.noun:<{width}}{'images':>8}{'right':>8}{'recall':>10}"]
    for at, (name, recall) in enumerate(zip(names, found.per_class_recall, strict=True)):
        row = found.confusion[at]
        share = "–" if recall is None else f"{100 * recall:.1f} %"
        lines.append(f"{name:<{width}}{sum(row):>8,}{row[at]:>8,}{share:>10}")
    known = metrics_for(len(classes), classes.ordinal)
    values = [*((metric.title, found.values[metric.name]) for metric in known), ("loss (nats)", scores.loss)]
    lines += [f"{title:<24}{'undefined' if value is None else f'{value:.4f}':>18}" for title, value in values]
    return [*lines, f"{images:,} images, {throughput:,.0f} img/s"]
