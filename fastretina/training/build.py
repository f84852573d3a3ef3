"""A run's parts, built from its settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from fastretina.beton.reader import Beton
from fastretina.errors import UsageError
from fastretina.grading import Classes
from fastretina.loading.augment import IMAGENET_MEAN, IMAGENET_STD
from fastretina.loading.loader import Loader
from fastretina.loading.sampler import rank_positions
from fastretina.metrics.table import headline, metrics_for
from fastretina.models.checkpoint import CheckpointInfo
from fastretina.models.heads import Loss, head_for
from fastretina.models.precision import Precision, bf16_speedup, choose_precision, device_name
from fastretina.models.resnet import build_model, load_initial
from fastretina.models.timm_backbones import check_growth
from fastretina.packing.preprocessing import common_preparation
from fastretina.system.cuda import training_bytes
from fastretina.training.batchnorm_statistics import batches_of, estimate_statistics, has_batchnorm
from fastretina.training.batchnorm_values import refuse_single_values
from fastretina.training.compile import CompileChoice, StepForward, choose_compile
from fastretina.training.config import TrainConfig
from fastretina.training.data import Growth, decoding, image_dtype, make_loader
from fastretina.training.distributed import World
from fastretina.training.environment import environment
from fastretina.training.loop import Training
from fastretina.training.optim import ExponentialAverage, build_optimizer, rate_factor
from fastretina.training.profiler import StepProfiler
from fastretina.training.progress import Progress
from fastretina.training.run_folder import RunFolder
from fastretina.training.run_info import DataInfo, RunInfo
from fastretina.training.state import restore
from fastretina.training.sync_batchnorm import synchronise_batchnorm


class Run(NamedTuple):
    """A run that may begin, or go on.

    Attributes:
        info: what is known of it before it begins. compiling: whether it will be compiled. describe: makes the metadata of the best
            checkpoint from where the run stands.
    """

    training: Training
    info: RunInfo
    compiling: CompileChoice
    describe: Callable[[Progress], CheckpointInfo]


def build_run(
    config: TrainConfig,
    settings: Mapping[str, Any],
    folder: RunFolder,
    world: World,
    state: dict[str, Any] | None,
    data: Mapping[str, Beton],
    stack: ExitStack,
) -> Run:
    """Build all parts. To be called by all ranks.

    Args:
        settings: as config.json holds them. state: of last.pt, to go on from; None to begin. data: the open
            data sets by name. stack: closes what is opened here.
    """
    torch.manual_seed(config.seed)
    torch.backends.cudnn.benchmark = True
    classes = data["train"].classes
    config = replace(config, select_by=selection_metric(config.select_by, classes))
    head = head_for(config.head, classes)
    # Made before the loaders: weights that cannot be had should not cost a decoding of the data set.
    check_growth(config.arch, config.grow_from, config.resolution)
    model = build_model(config.arch, head.outputs, resolution=config.resolution)
    start = "from scratch" if config.weights is None else load_initial(model, config.arch, config.weights, config.resolution)
    model.to(world.device)
    if world.device.type == "cuda":
        from fastretina.models.stem import accelerate_stem  # here, because a CPU needs no Triton

        accelerate_stem(model)
    begun = 0 if state is None else int(state["progress"]["epoch"])
    refuse_single_values(config, model, len(data["train"]), world.size, begun)
    largest = -(-config.batch_size // world.size), 3, config.resolution, config.resolution  # of a rank's steps
    began = None if state is None else state.get("precision")
    precision = world.decided(
        lambda: choose_precision(config.amp, world.device, config.amp_dtype, lambda: bf16_speedup(model, largest), began)
    )
    if config.sync_batchnorm and world.size > 1:
        model = synchronise_batchnorm(model, world.device)
    preparation = common_preparation(data)
    described = {name: DataInfo.of(beton) for name, beton in data.items()}
    loss = Loss(head, described["train"].grades, config.class_weights, config.logit_adjustment)

    # Measured before any data is on the device, so that --resident auto leaves the model its room.
    reserve = training_bytes(model, largest, image_dtype(world, precision), world.device, precision.autocast) or None
    options = {"reserve": reserve, **decoding(config, model, world, state)}

    def loader(name: str, resolution: int, **more: Any) -> Loader:
        return make_loader(config, name, data[name], resolution, world, precision, **options, **more)

    def estimate(model: nn.Module, epoch: int, stop: Callable[[], None]) -> None:
        if not (config.batchnorm_images and has_batchnorm(model)):
            return
        # Where they are not of all ranks' parts, each rank sees the same images by itself, and finds the same.
        alone = {} if config.sync_batchnorm else {"rank": 0, "world_size": 1}
        few = batches_of(len(data["train"]), world.size if config.sync_batchnorm else 1)
        with loader("train", config.resolution, resident="off", peers=None, **few, **alone) as images:
            estimate_statistics(model, images, config.batchnorm_images, epoch, precision, stop)

    growth = stack.enter_context(closing(Growth(config, lambda resolution: loader("train", resolution))))
    evaluated = {name: stack.enter_context(loader(name, config.resolution)) for name in data if name != "train"}
    for beton in data.values():
        stack.callback(beton.interrupt)  # before the loaders are closed, whose threads may be waiting for a server
    steps = (config.epochs - begun) * len(growth(0))  # made here, by all ranks: they share what it keeps
    compiling = world.decided(lambda: compile_choice(config, model, world, steps))
    info = RunInfo(
        settings=settings,
        data=described,
        device=f"{world.size} x {device_name(world.device)}" if world.size > 1 else device_name(world.device),
        amp_dtype=precision.name,
        precision_note=precision.note,
        loader=growth(0).description,
        start=start,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        classes=classes,
        test_set=data["test"],
        selection_metric=config.select_by,
        environment=environment(world),
    )
    rates = config.learning_rate, config.weight_decay, config.backbone_lr, config.layer_decay
    optimizer = build_optimizer(model, config.optimizer, *rates)
    training = Training(
        config=config,
        classes=classes,
        model=model,
        wrap=_wrapper(config, world, precision, growth, compiling.mode),
        head=head,
        loss=loss.to(world.device),
        average=ExponentialAverage(model, config.ema) if config.ema else None,
        optimizer=optimizer,
        schedule=LambdaLR(optimizer, rate_factor(config, len(growth(0)))),
        scaler=precision.scaler(),
        precision=precision,
        world=world,
        train_loader=growth,
        full_batch=full_batch(config, world),
        estimate_statistics=estimate,
        test_loader=evaluated["test"],
        val_loader=evaluated.get("val"),
        profiler=StepProfiler(folder, config.profile if world.is_main else 0),
        progress=Progress(),
    )
    if state is not None:
        restore(training, state, folder.last)

    def describe(progress: Progress) -> CheckpointInfo:
        return CheckpointInfo(
            arch=config.arch,
            num_classes=len(classes),
            resolution=config.resolution,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            epoch=progress.history[-1].epoch,
            amp_dtype=precision.name,
            metric=config.select_by,
            selected_on=info.selected_on,
            head=config.head,
            decision=progress.decision,
            preparation=preparation,
            classes=classes,
            # Not a test set that had no part in it. "whole": the file that the training set is a part of.
            data={**{name: info.digests[name] for name in ("train", info.selected_on)}, "whole": data["train"].whole.digest},
            operating=info.freeze(progress.best_val),
            size=data["train"].side,
        )

    return Run(training, info, compiling, describe)


def selection_metric(asked: str, classes: Classes) -> str:
    """The metric that an epoch is chosen by where --select-by says `asked`. UsageError where these classes do not have it."""
    if asked == "auto":
        return headline(classes.ordinal)
    known = [*(metric.name for metric in metrics_for(len(classes), classes.ordinal)), "loss"]
    if asked not in known:
        raise UsageError(f"--select-by {asked}: undefined for the classes {classes}; one of {', '.join(known)}, or auto")
    return asked


def is_over(config: TrainConfig, state: dict[str, Any]) -> bool:
    """Whether nothing is left to train of a run whose last.pt holds `state`."""
    at = state["progress"]
    progress = Progress(epoch=at["epoch"], batch=at["batch"], best_epoch=at["best_epoch"])
    return progress.is_over(config)


def full_batch(config: TrainConfig, world: World) -> int:
    """The images that this rank has of every batch but the last; ranks may differ by one."""
    return len(rank_positions(0, config.batch_size, config.batch_size, world.rank, world.size))


def compile_choice(config: TrainConfig, model: nn.Module, world: World, steps: int) -> CompileChoice:
    """See `choose_compile`. steps: those left in this run."""
    images, parts = _micro_batch(config, world), config.accumulate
    return choose_compile(config.compile, world.device, model, config.resolution, images, steps * parts, accumulate=parts)


def _micro_batch(config: TrainConfig, world: World) -> int:
    """The most images that one forward pass of a rank takes."""
    return -(-config.batch_size // (world.size * config.accumulate))


def _wrapper(
    config: TrainConfig, world: World, precision: Precision, growth: Growth, compile_mode: str | None
) -> Callable[[nn.Module], Callable[[Tensor], Tensor]]:
    def wrap(model: nn.Module) -> Callable[[Tensor], Tensor]:
        forward = world.wrap(model)
        if compile_mode is None:
            return forward
        compiled = StepForward(forward, compile_mode, _micro_batch(config, world))
        shape = _micro_batch(config, world), 3, growth.side, growth.side
        seconds = compiled.warm_up(shape, image_dtype(world, precision), world.device, precision.autocast)
        if world.is_main:
            print(f"compiled in {seconds:.0f} s, which no epoch's time holds", flush=True)
        return compiled

    return wrap
