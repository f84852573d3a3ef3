"""Train a ResNet to grade fundus photographs.

    python -m fastretina.train --amp                                  # data/train.beton, data/test.beton, the defaults below
    python -m fastretina.train --train train.beton --test test.beton --arch resnet50 --epochs 25 --out runs/r50
    torchrun --nproc-per-node 8 -m fastretina.train --amp --batch-size 256 --scale-lr --sync-batchnorm

Ctrl-C and SIGTERM save first; the same command then goes on where it stopped.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from typing import Any

import torch
from torch import Tensor, nn

from fastretina import __version__, cli
from fastretina.beton.open import open_beton
from fastretina.beton.reader import Beton
from fastretina.errors import RunError
from fastretina.grading import NUM_CLASSES
from fastretina.loading.augment import IMAGENET_MEAN, IMAGENET_STD, Augment
from fastretina.loading.decode.choice import FASTEST_FLOPS
from fastretina.loading.loader import Loader
from fastretina.loading.sampler import rank_positions
from fastretina.models.checkpoint import Grader
from fastretina.models.heads import HEADS, Head, Loss
from fastretina.models.precision import Precision, bf16_speedup, choose_precision, device_name
from fastretina.models.resnet import build_model
from fastretina.packing.preprocessing import common_preparation
from fastretina.report.pictures import RunPictures
from fastretina.system.cuda import training_bytes
from fastretina.system.files import write_json
from fastretina.training.compile import CompileChoice, StepForward, choose_compile, training_flops
from fastretina.training.config import AUGMENTATIONS, REFERENCE_BATCH, TrainConfig, as_settings, check
from fastretina.training.distributed import World, joined
from fastretina.training.loop import Training, fit
from fastretina.training.optim import ExponentialAverage, build_optimizer, build_schedule, second_phase_epoch
from fastretina.training.profiler import StepProfiler
from fastretina.training.progress import EpochRecord, Progress
from fastretina.training.recorder import NoCallbacks, Recorder
from fastretina.training.run_folder import RunFolder
from fastretina.training.run_info import DataInfo, RunInfo
from fastretina.training.split import validation_split
from fastretina.training.state import restore, resume_state
from fastretina.training.sync_batchnorm import synchronise_batchnorm
from fastretina.training.tensorboard import Tracker

SET_NAMES = {"test": "test", "val": "validation"}


def main(config: TrainConfig) -> int:
    """Train a ResNet to grade fundus photographs; the run folder gets weights, figures, plots and report.html."""
    run = RunFolder(config.out or f"runs/{config.arch}-{config.resolution}px-seed{config.seed}")
    settings = as_settings(config) | {"out": str(run.path)}
    with joined(config.device, compiling=config.compile != "off") as world, ExitStack() as stack:
        check(config)
        if world.is_main:
            stack.enter_context(run.locked())
        state, report_there = world.decided(lambda: (resume_state(run, config.resume, settings), run.report.is_file()))
        if state is not None and report_there and _is_over(config, state):
            if world.is_main:
                print(
                    f"{run.path}: this run of {state['progress']['epoch']} epochs is finished; see {run.report}. "
                    "More --epochs go on, another --out begins anew."
                )
            return 0
        torch.manual_seed(config.seed)
        torch.backends.cudnn.benchmark = True
        head = HEADS[config.head](NUM_CLASSES)
        # Made before the data is opened: weights that cannot be had should not cost a decoding of the data set.
        model = build_model(config.arch, head.outputs, config.weights).to(world.device)
        precision = world.decided(lambda: _precision(config, model, world, state))
        if config.sync_batchnorm and world.size > 1:
            model = synchronise_batchnorm(model, world.device)
        data = _open_data(config, stack)
        preparation = common_preparation(data)
        facts = {name: DataInfo.of(str(beton.path), beton.labels, beton.names, NUM_CLASSES) for name, beton in data.items()}
        loss = Loss(head, facts["train"].grades, config.class_weights, config.logit_adjustment, config.label_smoothing)

        # Measured before any data is on the device, so that --resident auto leaves the model its room.
        reserve = _reserve(config, model, world, precision) if world.device.type == "cuda" else None
        decoding = _decoding(config, model, world, state)

        def loader(name: str, resolution: int = config.resolution) -> Loader:
            return _loader(config, name, data[name], resolution, world, precision, reserve, decoding)

        growth = stack.enter_context(closing(Growth(config, lambda resolution: loader("train", resolution))))
        evaluated = {name: stack.enter_context(loader(name)) for name in data if name != "train"}
        begun = 0 if state is None else int(state["progress"]["epoch"])
        steps = (config.epochs - begun) * len(growth(0))  # made here, by all ranks: they share what it keeps
        choice = world.decided(lambda: _compile_choice(config, model, world, steps))
        training = _training(config, run, model, head, loss.to(world.device), world, precision, growth, evaluated, choice.mode)
        if state is not None:
            restore(training, state, run.last)
        if not world.is_main:
            fit(training, NoCallbacks())
            return 0
        about = RunInfo(
            settings=settings,
            data=facts,
            device=f"{world.size} x {device_name(world.device)}" if world.size > 1 else device_name(world.device),
            amp_dtype=precision.name,
            precision_note=precision.note,
            loader=growth(0).description,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            test_set=data["test"],
            selection_metric=config.select_by,
        )

        def grader(progress: Progress) -> Grader:
            shape = (config.arch, NUM_CLASSES, config.resolution, IMAGENET_MEAN, IMAGENET_STD)
            choice = (precision.name, config.select_by, about.selected_on)
            return Grader(*shape, progress.history[-1].epoch, *choice, config.head, progress.decision, preparation)

        tracker: Tracker | None = None

        def show(record: EpochRecord) -> None:
            print(_epoch_line(record, config.epochs), flush=True)
            if tracker is not None:
                tracker.epoch(record)

        pictures = RunPictures(run, about, training.progress, head.objective)
        recorder = Recorder(run, about, training, grader, pictures.first_batch, [pictures.after_epoch, show])
        recorder.catch_up()
        if config.tensorboard:
            tracker = stack.enter_context(Tracker(run.path, training.progress.epoch + 1))
        write_json(run.config, settings)
        print("\n".join(_header(config, about, run, training, choice)), flush=True)
        finished = fit(training, recorder)
        if training.profiler.table:
            print(f"{training.profiler.table}\ntimeline: {run.path / 'profile.json.gz'}", flush=True)
        recorder.finish()
        pictures.finish()
        print(_last_lines(training.progress, about, run, finished), flush=True)
    return 0


def _is_over(config: TrainConfig, state: dict[str, Any]) -> bool:
    at = state["progress"]
    progress = Progress(epoch=at["epoch"], batch=at["batch"], best_epoch=at["best_epoch"])
    return progress.is_over(config.epochs, config.patience, second_phase_epoch(config.schedule, config.epochs))


class Growth:
    """The training loader of each epoch: at `--grow-from` px for the first half of them, then at full resolution. Another
    resolution is another loader, which goes on with the very next sample. side: the resolution of now, px."""

    def __init__(self, config: TrainConfig, make: Callable[[int], Loader]) -> None:
        self._config, self._make = config, make
        self.side = 0
        self._loader: Loader | None = None

    def __call__(self, epoch: int) -> Loader:
        config = self._config
        side = config.grow_from if config.grow_from is not None and epoch < config.epochs // 2 else config.resolution
        if self._loader is None or side != self.side:
            before, self.side, self._loader = self._loader, side, self._make(side)
            if before is not None:
                self._loader.load_state_dict(before.state_dict())
                before.close()
        return self._loader

    def close(self) -> None:
        """Close the loader of now."""
        if self._loader is not None:
            self._loader.close()


def _open_data(config: TrainConfig, stack: ExitStack) -> dict[str, Beton]:
    """The data sets by name: train, test and, if there is one, val."""
    paths = {"train": config.train, "test": config.test} | ({"val": config.val} if config.val else {})
    data = {name: stack.enter_context(open_beton(path)) for name, path in paths.items()}
    for beton in data.values():
        if int(beton.labels.min()) < 0 or int(beton.labels.max()) >= NUM_CLASSES:
            raise RunError(
                f"{beton.path}: grades must be 0-{NUM_CLASSES - 1}, found {int(beton.labels.min())}-{int(beton.labels.max())}"
            )
    if config.val_fraction:
        whole = data["train"]
        training, validation = validation_split(whole.names, whole.labels, config.val_fraction, config.split_by)
        data |= {"train": whole.select(training), "val": whole.select(validation)}
    return data


def _precision(config: TrainConfig, model: nn.Module, world: World, state: dict[str, Any] | None) -> Precision:
    began = None if state is None else state.get("precision")
    images = _images(config, world)
    return choose_precision(config.amp, world.device, config.amp_dtype, lambda: bf16_speedup(model, images), began)


def _images(config: TrainConfig, world: World) -> tuple[int, int, int, int]:
    """(B, 3, R, R) of a rank's largest step."""
    return -(-config.batch_size // world.size), 3, config.resolution, config.resolution


def _full_batch(config: TrainConfig, world: World) -> int:
    """The images that this rank has of every batch but the last; ranks may differ by one."""
    return len(rank_positions(0, config.batch_size, config.batch_size, world.rank, world.size))


def _micro_batch(config: TrainConfig, world: World) -> int:
    """The most images that one forward pass of a rank takes."""
    return -(-_images(config, world)[0] // config.accumulate)


def _image_dtype(world: World, precision: Precision) -> torch.dtype:
    """Of the images that the loader makes. On a GPU half the bytes to write and read, where autocast would convert them anyway."""
    return precision.dtype or torch.float32 if world.device.type == "cuda" else torch.float32


def _compile_choice(config: TrainConfig, model: nn.Module, world: World, steps: int) -> CompileChoice:
    images, parts = _micro_batch(config, world), config.accumulate
    return choose_compile(config.compile, world.device, model, config.resolution, images, steps * parts, accumulate=parts)


def _reserve(config: TrainConfig, model: nn.Module, world: World, precision: Precision) -> int:
    return training_bytes(model, _images(config, world), precision.dtype or torch.float32, world.device, precision.autocast)


def _decoding(config: TrainConfig, model: nn.Module, world: World, state: dict[str, Any] | None) -> dict[str, Any]:
    """What the loaders are told of decoding: the same for all, and as the run began, on a machine with other cores too."""
    if config.decode != "auto" or world.device.type == "cpu":
        return {"decode": config.decode}
    began = None if state is None else state.get("decode")
    if began == "cpu":
        return {"decode": "cpu"}
    return {"demand": math.inf if began == "gpu" else FASTEST_FLOPS / training_flops(model, config.resolution)}


def _loader(
    config: TrainConfig,
    name: str,
    beton: Beton,
    resolution: int,
    world: World,
    precision: Precision,
    reserve: int | None,
    decoding: dict[str, Any],
) -> Loader:
    device = world.device
    return Loader(
        beton,
        batch_size=config.batch_size,
        train=name == "train",
        resolution=resolution,
        device=str(device),
        seed=config.seed,
        workers=config.workers or max(1, len(os.sched_getaffinity(0)) // world.local_size),
        **decoding,
        resident=config.resident,
        reserve=reserve,
        dtype=_image_dtype(world, precision),
        sampling=config.sampling if name == "train" else None,
        augment=AUGMENTATIONS[config.augment] if name == "train" else Augment.none(),
        rank=world.rank,
        world_size=world.size,
        peers=world.peers,
    )


def _training(
    config: TrainConfig,
    run: RunFolder,
    model: nn.Module,
    head: Head,
    loss: Loss,
    world: World,
    precision: Precision,
    growth: Growth,
    loaders: dict[str, Loader],
    compile_mode: str | None,
) -> Training:
    optimizer = build_optimizer(model, config.optimizer, config.learning_rate, config.weight_decay, config.backbone_lr)

    def wrap(model: nn.Module) -> Callable[[Tensor], Tensor]:
        forward = world.wrap(model)
        if compile_mode is None:
            return forward
        compiled = StepForward(forward, compile_mode, _micro_batch(config, world))
        shape = _micro_batch(config, world), 3, growth.side, growth.side
        seconds = compiled.warm_up(shape, _image_dtype(world, precision), world.device, precision.autocast)
        if world.is_main:
            print(f"compiled in {seconds:.0f} s, which no epoch's time holds", flush=True)
        return compiled

    return Training(
        model=model,
        wrap=wrap,
        head=head,
        loss=loss,
        average=ExponentialAverage(model, config.ema) if config.ema else None,
        optimizer=optimizer,
        schedule=build_schedule(optimizer, config.schedule, config.epochs, len(growth(0))),
        scaler=precision.scaler(),
        precision=precision,
        world=world,
        train_loader=growth,
        full_batch=_full_batch(config, world),
        test_loader=loaders["test"],
        val_loader=loaders.get("val"),
        epochs=config.epochs,
        patience=config.patience,
        select_by=config.select_by,
        second_phase=second_phase_epoch(config.schedule, config.epochs),
        freeze_epochs=config.freeze_epochs,
        clip_norm=config.clip_norm,
        accumulate=config.accumulate,
        stop_after=config.stop_after_steps,
        profiler=StepProfiler(run.path, config.profile if world.is_main else 0),
        progress=Progress(),
    )


def _header(config: TrainConfig, facts: RunInfo, run: RunFolder, training: Training, compiling: CompileChoice) -> list[str]:
    progress = training.progress
    start = f"weights {config.weights}" if config.weights else "from scratch"
    lines = [
        f"fastretina {__version__}: {config.arch} ({facts.parameters / 1e6:.1f} M parameters), {start}, {config.resolution} px, "
        f"{config.optimizer} {config.learning_rate:g} {config.schedule}, batch {config.batch_size}, seed {config.seed}",
        *_batch_lines(config, training.world),
        f"device     {facts.device}",
        f"precision  {facts.precision_note}",
        *([f"compile    {compiling.note}"] if config.compile != "off" else []),
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


def _last_lines(progress: Progress, facts: RunInfo, run: RunFolder, finished: bool) -> str:
    if not finished:
        return f"stopped after step {progress.step:,} as --stop-after-steps says; the same command goes on from {run.last}"
    best: Any = progress.best
    figures = best.test.metrics
    qwk = "undefined" if figures.qwk is None else f"{figures.qwk:.3f}"
    choice = f"by {facts.settings['select_by']} on the {SET_NAMES[facts.selected_on]} set"
    return (
        f"best epoch {best.epoch} ({choice}): test accuracy {figures.accuracy:.3f} "
        f"(always the same grade: {facts.data['test'].majority_share:.3f}), QWK {qwk}, "
        f"balanced accuracy {figures.balanced_accuracy:.3f}\nreport: {run.report}"
    )


def run_command(argv: Sequence[str] | None = None) -> None:
    """The command line of this module; exits."""
    cli.run(TrainConfig, main, argv)


if __name__ == "__main__":
    run_command()
