"""What is said on the terminal: of a training run before it begins, after each epoch, and at its end; of an evaluation."""

from __future__ import annotations

from fastretina.grading import grade_title
from fastretina.metrics.predictions import Scores
from fastretina.metrics.table import TITLES
from fastretina.report.page import number
from fastretina.training.build import Run
from fastretina.training.config import REFERENCE_BATCH, TrainConfig
from fastretina.training.distributed import World
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
        *([f"weights    {info.start}"] if config.weights else []),
        *_batch_lines(config, run.training.world),
        f"device     {info.device}",
        f"precision  {info.precision_note}",
        *([f"compile    {run.compiling.note}"] if config.compile != "off" else []),
    ]
    for name, data in info.data.items():
        grades = " / ".join(f"{count:,}" for count in data.grades)
        lines.append(f"{name:<10} {data.path}: {data.images:,} images, grades 0-{len(data.grades) - 1}: {grades}")
    if info.shared_patients:
        lines.append(f"patients   {info.shared_patients:,} have one eye in train and the other in test")
    lines += [f"loader     {info.loader}", f"selection  {info.selection_note}", f"run folder {folder.path}"]
    if progress.step:
        lines.append(f"resuming   epoch {progress.epoch + 1}, after step {progress.step:,}")
    return "\n".join(lines)


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
        return f"{name} acc {number(scores.metrics.accuracy)} QWK {number(scores.metrics.qwk):^5}  " if scores else ""

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
    qwk = "undefined" if metrics.qwk is None else f"{metrics.qwk:.3f}"
    choice = f"by {info.selection_metric} on the {SET_TITLES[info.selected_on]} set"
    return (
        f"best epoch {best.epoch} ({choice}): test accuracy {metrics.accuracy:.3f} "
        f"(always the same grade: {info.data['test'].majority_share:.3f}), QWK {qwk}, "
        f"balanced accuracy {metrics.balanced_accuracy:.3f}\nreport: {folder.report}"
    )


def scores_table(scores: Scores, images: int, throughput: float) -> list[str]:
    """Lines of an evaluation's metrics, by grade and of all `images`; throughput: img/s."""
    found = scores.metrics
    lines = [f"{'grade':<16}{'images':>8}{'right':>8}{'recall':>10}"]
    for grade, recall in enumerate(found.per_class_recall):
        row = found.confusion[grade]
        share = "–" if recall is None else f"{100 * recall:.1f} %"
        lines.append(f"{grade_title(grade):<16}{sum(row):>8,}{row[grade]:>8,}{share:>10}")
    values = [*((TITLES[name], value) for name, value in found.values.items()), ("loss (nats)", scores.loss)]
    lines += [f"{title:<24}{'undefined' if value is None else f'{value:.4f}':>18}" for title, value in values]
    return [*lines, f"{images:,} images, {throughput:,.0f} img/s"]
