"""Train a ResNet to grade fundus photographs.

    python -m fastretina.train --amp                                  # data/train.beton, data/test.beton, the defaults below
    python -m fastretina.train --train train.beton --test test.beton --arch resnet50 --epochs 25 --out runs/r50

Ctrl-C and SIGTERM save first; the same command then goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fastretina import __version__, cli
from fastretina.augment import IMAGENET_MEAN, IMAGENET_STD, Augment
from fastretina.checkpoint import Grader
from fastretina.engine import Training, fit
from fastretina.errors import RunError, UsageError
from fastretina.history import EpochRecord, Progress
from fastretina.keeper import RunKeeper, resume_state
from fastretina.loader import Loader
from fastretina.models import ArchName, build_model
from fastretina.optim import OptimizerName, ScheduleName, build_optimizer, build_schedule, second_phase_epoch
from fastretina.precision import Precision, choose_device, choose_precision, device_name
from fastretina.preparation import common_preparation
from fastretina.report import SELECTION_METRIC, DataFacts, RunFacts
from fastretina.runs import RunFolder, write_json

NUM_CLASSES = 5
SPLITS = ("train", "test", "val")
SET_NAMES = {"test": "test", "val": "validation"}


@dataclass(frozen=True)
class Recipe:
    """What the runs of a comparison have in common: data, training and machine."""

    train: Path = Path("data/train.beton")  # training set, a .beton file
    test: Path = Path("data/test.beton")  # test set
    val: Path | None = None  # validation set; the best epoch is chosen on it, without it on the test set
    epochs: int = 10  # passes over the training set
    batch_size: int = 32  # images a step
    resolution: int = 512  # side of the square that the network sees, px
    lr: float = 1e-3  # highest learning rate
    optimizer: OptimizerName = "adamw"
    weight_decay: float = 0.01  # of weights of convolutions and linear layers; norms and biases have none
    schedule: ScheduleName = "cosine"  # two-phase: --lr for half of the epochs, then a tenth of it from the best weights so far
    augment: Literal["on", "off"] = "on"  # random rotation and flips of training images
    seed: int = 0  # of weights, order and augmentation
    amp: bool = False  # bfloat16 or float16 where the hardware has it
    compile: bool = False  # torch.compile the training step
    device: Literal["auto", "cpu", "cuda"] = "auto"
    decode: Literal["auto", "cpu", "gpu"] = "auto"  # where JPEGs are decoded
    resident: Literal["auto", "on", "off"] = "auto"  # keep the decoded data set in memory
    workers: int | None = None  # decoding threads; none: as many as suit this machine


@dataclass(frozen=True)
class TrainConfig(Recipe):
    """Train a ResNet to grade fundus photographs; the run folder gets weights, figures, plots and report.html."""

    arch: ArchName = "resnet18"
    weights: str | None = None  # file (.pth, .safetensors) or torchvision's name (IMAGENET1K_V1); none: from scratch
    out: Path | None = None  # run folder; none: runs/<arch>-<resolution>px-seed<seed>
    resume: str = "auto"  # auto: go on with the run in --out, if any; never; or a run's last.pt
    stop_after_steps: int | None = None  # save and exit after so many steps of this call


def main(config: TrainConfig) -> int:
    """Train a ResNet to grade fundus photographs; the run folder gets weights, figures, plots and report.html."""
    check(config)
    device = choose_device(config.device)
    precision = choose_precision(config.amp, device)
    run = RunFolder(config.out or f"runs/{config.arch}-{config.resolution}px-seed{config.seed}")
    settings = as_settings(config) | {"out": str(run.path)}
    with run.locked(), ExitStack() as stack:
        state = resume_state(run, config.resume, settings)
        if state is not None and state["progress"]["epoch"] >= config.epochs and run.report.is_file():
            print(
                f"{run.path}: this run of {state['progress']['epoch']} epochs is finished; see {run.report}. "
                "More --epochs go on, another --out begins anew."
            )
            return 0
        # Before anything that takes long: files that do not belong together should not cost a decoding of the data set.
        preparation = common_preparation({name: path for name in SPLITS if (path := getattr(config, name))})
        torch.manual_seed(config.seed)
        torch.backends.cudnn.benchmark = True
        # Made before the data is opened: weights that cannot be had should not cost a decoding of the data set.
        model = build_model(config.arch, NUM_CLASSES, config.weights).to(device)
        loaders = {name: stack.enter_context(_loader(config, name, device, precision)) for name in SPLITS if getattr(config, name)}
        training = _training(config, model, device, precision, loaders)
        test = loaders["test"].beton
        names = dict(zip((int(number) for number in test.ids), test.names, strict=True))
        facts = RunFacts(
            settings=settings,
            data={name: _data_facts(loader) for name, loader in loaders.items()},
            device=device_name(device),
            amp_dtype=precision.name,
            precision_note=precision.note,
            loader=loaders["train"].description,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            test_set=test,
        )

        def grader(epoch: int) -> Grader:
            shape = (config.arch, NUM_CLASSES, config.resolution, IMAGENET_MEAN, IMAGENET_STD)
            return Grader(*shape, epoch, precision.name, SELECTION_METRIC, facts.selected_on, preparation)

        keeper = RunKeeper(
            run, facts, training, grader, names, lambda record: print(_epoch_line(record, config.epochs), flush=True)
        )
        if state is not None:
            keeper.restore(state)
        write_json(run.config, settings)
        print("\n".join(_header(config, facts, run, training.progress)), flush=True)
        finished = fit(training, keeper)
        keeper.finish()
        print(_last_lines(training.progress, facts, run, finished), flush=True)
    return 0


def as_settings(config: Recipe) -> dict[str, Any]:
    """The settings as config.json holds them: plain values, paths as text."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()}


def check(config: TrainConfig) -> None:
    """UsageError where the settings cannot work: numbers out of range, missing data, the test set given for validation."""
    for name in ("epochs", "batch_size", "resolution"):
        if getattr(config, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be 1 or more, got {getattr(config, name)}")
    if config.stop_after_steps is not None and config.stop_after_steps < 1:
        raise UsageError(f"--stop-after-steps must be 1 or more, got {config.stop_after_steps}")
    if not config.lr > 0 or config.weight_decay < 0:
        raise UsageError(f"--lr must be above 0 and --weight-decay not below, got {config.lr} and {config.weight_decay}")
    for name in ("train", "test"):
        path = getattr(config, name)
        if not path.exists():
            raise UsageError(
                f"{path}: no such file. Make it from a folder of JPEGs and its CSVs:  python tools/write_beton.py --root DIR "
                f"--split {name} --out {path}   or, for a sample data set and a run on it:  make demo"
            )
    if config.val is not None and not config.val.exists():
        raise UsageError(f"--val {config.val}: no such file")
    if config.val is not None and config.val.samefile(config.test):
        raise UsageError(
            f"--val {config.val}: is the test set; leave --val away and the report says that the choice was made on it"
        )


def _loader(config: TrainConfig, name: str, device: torch.device, precision: Precision) -> Loader:
    return Loader(
        getattr(config, name),
        batch_size=config.batch_size,
        train=name == "train",
        resolution=config.resolution,
        device=str(device),
        seed=config.seed,
        workers=config.workers,
        decode=config.decode,
        resident=config.resident,
        # On a GPU half the bytes to write and read; autocast would convert at the first convolution anyway.
        dtype=precision.dtype or torch.float32 if device.type == "cuda" else torch.float32,
        augment=Augment() if name == "train" and config.augment == "on" else Augment.none(),
    )


def _training(
    config: TrainConfig, model: nn.Module, device: torch.device, precision: Precision, loaders: dict[str, Loader]
) -> Training:
    optimizer = build_optimizer(model, config.optimizer, config.lr, config.weight_decay)
    return Training(
        model=model,
        forward=torch.compile(model) if config.compile else model,
        optimizer=optimizer,
        schedule=build_schedule(optimizer, config.schedule, config.epochs, len(loaders["train"])),
        scaler=precision.scaler(),
        precision=precision,
        device=device,
        train_loader=loaders["train"],
        test_loader=loaders["test"],
        val_loader=loaders.get("val"),
        epochs=config.epochs,
        num_classes=NUM_CLASSES,
        second_phase=second_phase_epoch(config.schedule, config.epochs),
        stop_after=config.stop_after_steps,
        progress=Progress(),
    )


def _data_facts(loader: Loader) -> DataFacts:
    beton = loader.beton
    if len(beton) == 0:
        raise RunError(f"{beton.path}: holds no image")
    if int(beton.labels.min()) < 0 or int(beton.labels.max()) >= NUM_CLASSES:
        raise RunError(
            f"{beton.path}: grades must be 0-{NUM_CLASSES - 1}, found {int(beton.labels.min())}-{int(beton.labels.max())}"
        )
    return DataFacts.of(str(beton.path), beton.labels, beton.names, NUM_CLASSES)


def _header(config: TrainConfig, facts: RunFacts, run: RunFolder, progress: Progress) -> list[str]:
    start = f"weights {config.weights}" if config.weights else "from scratch"
    lines = [
        f"fastretina {__version__}: {config.arch} ({facts.parameters / 1e6:.1f} M parameters), {start}, {config.resolution} px, "
        f"{config.optimizer} {config.lr:g} {config.schedule}, batch {config.batch_size}, seed {config.seed}",
        f"device     {facts.device}",
        f"precision  {facts.precision_note}",
    ]
    for name, data in facts.data.items():
        grades = " / ".join(f"{count:,}" for count in data.grades)
        lines.append(f"{name:<10} {data.path}: {data.images:,} images, grades 0-{len(data.grades) - 1}: {grades}")
    if facts.shared_patients:
        lines.append(f"patients   {facts.shared_patients:,} have one eye in train and the other in test")
    lines += [f"loader     {facts.loader}", f"selection  {facts.selection_note}", f"run folder {run.path}"]
    if progress.step:
        lines.append(f"resuming   epoch {progress.epoch + 1}, after step {progress.step:,}")
    return lines


def _epoch_line(record: EpochRecord, epochs: int) -> str:
    def number(value: float | None) -> str:
        return "  –  " if value is None else f"{value:.3f}"

    val = ""
    if record.val is not None:
        val = f"val acc {number(record.val.metrics.accuracy)} QWK {number(record.val.metrics.qwk)}  "
    return (
        f"epoch {record.epoch:>{len(str(epochs))}}/{epochs}  loss {record.train.loss:.3f}  "
        f"train acc {number(record.train.metrics.accuracy)}  "
        f"test acc {number(record.test.metrics.accuracy)} QWK {number(record.test.metrics.qwk)}  {val}"
        f"{record.images_per_second:,.0f} img/s  data wait {100 * record.data_wait_share:.1f} %  {record.epoch_seconds:.1f} s"
    )


def _last_lines(progress: Progress, facts: RunFacts, run: RunFolder, finished: bool) -> str:
    if not finished:
        return f"stopped after step {progress.step:,} as --stop-after-steps says; the same command goes on from {run.last}"
    best: Any = progress.best
    figures = best.test.metrics
    qwk = "undefined" if figures.qwk is None else f"{figures.qwk:.3f}"
    return (
        f"best epoch {best.epoch} (by QWK on the {SET_NAMES[facts.selected_on]} set): test accuracy {figures.accuracy:.3f} "
        f"(always the same grade: {facts.data['test'].majority_share:.3f}), QWK {qwk}, "
        f"balanced accuracy {figures.balanced_accuracy:.3f}\nreport: {run.report}"
    )


def run_command(argv: Sequence[str] | None = None) -> None:
    """The command line of this module; exits."""
    cli.run(TrainConfig, main, argv)


if __name__ == "__main__":
    run_command()
