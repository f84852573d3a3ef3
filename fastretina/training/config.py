"""The settings of a training run. The command line is derived from them; the comments are its help.

Imports no torch: --help should not wait for it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from tyro.conf import arg
from tyro.constructors import PrimitiveConstructorSpec

from fastretina.beton.paths import as_path, files_of, parts_of
from fastretina.errors import UsageError
from fastretina.loading.augment import Augment
from fastretina.metrics.table import SelectionMetric
from fastretina.models.options import AmpDtype, ClassWeights, HeadName, backbone_of, folder_name
from fastretina.system.json_text import read_json
from fastretina.training.presets import PRESETS, RecipeName, flag, presets_in_words

MOST_FOLDS = 20
VALIDATION_SHARE = 0.1  # of --train, where nothing else is said
REFERENCE_BATCH = 256  # what --lr is meant for with --scale-lr
OptimizerName = Literal["adamw", "sgd"]
ScheduleName = Literal["cosine", "two-phase", "onecycle", "constant"]
CompileSetting = Literal["auto", "off", "default", "max-autotune-no-cudagraphs", "reduce-overhead"]
SplitBy = Literal["auto", "patient", "image"]
AugmentName = Literal["off", "flips", "on", "full"]
AUGMENTATIONS: dict[AugmentName, Augment] = {
    "off": Augment.none(),
    "flips": Augment(rotate=0.0),
    "on": Augment(),
    "full": Augment.full(),
}


# On a command line the word may be left out.
CompileFlag = Annotated[
    CompileSetting,
    PrimitiveConstructorSpec(
        nargs=(0, 1),
        metavar=f"[{{{','.join(get_args(CompileSetting))}}}]",
        choices=get_args(CompileSetting),
        instance_from_str=lambda words: words[0] if words else "auto",
        is_instance=lambda value: value in get_args(CompileSetting),
        str_from_instance=lambda value: [value],
    ),
]


@dataclass(frozen=True)
class Recipe:
    """What the runs of a comparison have in common: data, training and machine."""

    recipe: Annotated[RecipeName | None, arg(help=f"settings by name, which every flag overrides\n{presets_in_words()}")] = None
    # training set: a .beton file, or a pattern for its shards ("data/train-*.beton"); several packings with commas between
    train: Path = Path("data/train.beton")
    test: Path | None = None  # test set; none: data/test.beton, or what --test-fraction takes from --train
    test_fraction: float = 0.0  # instead of --test: share of --train to test on, which is not trained on, 0-0.5
    val: Path | None = None  # validation set, instead of --val-fraction; the best epoch is chosen on it
    # share of --train to validate on, which is not trained on, 0-0.5; left away: 0.1, or none with --val or --folds;
    # 0: none, and the best epoch is then chosen on the test set, whose metrics are optimistic
    val_fraction: float | None = None
    # patient: all images of a patient stay on one side; image: a person's two eyes may part; auto: by patient, and where patients
    # are unknown --val-fraction by image, which is said
    split_by: SplitBy = "auto"
    # the metric that the best epoch is chosen by; auto: qwk where the classes have an order, else balanced_accuracy
    select_by: SelectionMetric = "auto"
    # what the thresholds for referring that the checkpoint keeps must reach on the validation set, 0-1
    target_sensitivity: float = 0.9
    target_specificity: float = 0.98
    epochs: int = 10  # passes over the training set
    patience: int | None = None  # stop after so many epochs without a better one; none: never
    batch_size: int = 32  # images a step, over all ranks
    # micro-batches that a step is computed in, one after the other: less memory for the same step
    accumulate: Annotated[int, arg(aliases=["--grad-accum-steps"])] = 1
    resolution: Annotated[int, arg(aliases=["--img-size"])] = 512  # side of the square that the network sees, px
    grow_from: int | None = None  # px; the first half of the epochs see squares of this side, which takes less time
    lr: float = 1e-3  # highest learning rate
    scale_lr: bool = False  # multiply --lr by --batch-size / 256, the linear scaling rule
    backbone_lr: Annotated[float, arg(aliases=["--trunk-lr"])] = 1.0  # factor on --lr for all layers but the last
    # factor on the rate of each layer of the backbone for every layer between it and the head; 0.75 is usual for transformers
    layer_decay: float = 1.0
    freeze_epochs: int = 0  # so many epochs train the last layer alone; needs --weights
    optimizer: OptimizerName = "adamw"
    weight_decay: float = 0.01  # of weights of convolutions and linear layers; norms and biases have none
    clip_norm: Annotated[float | None, arg(aliases=["--clip-grad"])] = None  # largest norm of all gradients together
    # decay of the exponential average of the weights that is evaluated and kept; 0: the weights themselves
    ema: Annotated[float, arg(aliases=["--model-ema-decay"])] = 0.0
    # training images that BatchNorm's statistics are estimated from, anew before each evaluation; 0: averages of the steps before
    batchnorm_images: int = 64
    schedule: ScheduleName = "cosine"  # two-phase: --lr for half of the epochs, then a tenth of it from the best weights so far
    head: HeadName = "softmax"  # regression: the grade as a number, divided by thresholds fitted on validation data; ordinal: CORN
    # shuffle, or shards (a few files at a time): each image once an epoch; grades by the root of their number, or equally often
    sampling: Literal["shuffle", "shards", "sqrt", "balanced"] = "shuffle"
    class_weights: ClassWeights = "none"  # on the loss of each image, by the number of its grade
    logit_adjustment: float = 0.0  # times the logarithm of each grade's share, on the logits while training; 1 favours none
    augment: AugmentName = "on"  # on: any rotation, and flips; full: also zoom, shift, brightness, contrast and saturation
    seed: int = 0  # of weights, sampler and augmentation
    amp: bool = False  # bfloat16 or float16 where the hardware has it
    amp_dtype: AmpDtype = "auto"  # with --amp; float16 scales its gradients, and is for CUDA
    tensorboard: bool = False  # also write the epochs' metrics for TensorBoard; needs the extra of that name
    compile: CompileFlag = "off"  # torch.compile the training step; auto, or no word: where it pays; or in the mode named
    profile: int = 0  # record so many training steps, after ten others: a timeline and a table in the run folder
    # under torchrun: BatchNorm's statistics over all ranks' images instead of each rank's own
    sync_batchnorm: Annotated[bool, arg(aliases=["--sync-bn"])] = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    decode: Literal["auto", "cpu", "gpu"] = "auto"  # where JPEGs are decoded
    resident: Literal["auto", "on", "off"] = "auto"  # keep the decoded data set in memory
    workers: int | None = None  # decoding threads of each rank; none: as many as suit this machine
    # a run's config.json, whose settings stand for the flags that are not given: --out too, so that the run itself goes on
    config: Path | None = None

    @property
    def test_file(self) -> Path | None:
        """The test set's file; None where the test set is a part of the training set's."""
        return Path("data/test.beton") if self.test is None and not self.test_fraction else self.test

    @property
    def validation_share(self) -> float:
        """The share of --train that is validated on and not trained on, 0-0.5; 0 where validation data come from elsewhere."""
        if self.val_fraction is not None:
            return self.val_fraction
        return VALIDATION_SHARE if self.val is None else 0.0

    @property
    def learning_rate(self) -> float:
        """The highest learning rate, scaled if it is to be: Goyal et al., Accurate, large minibatch SGD, 2017."""
        return self.lr * self.batch_size / REFERENCE_BATCH if self.scale_lr else self.lr

    @property
    def second_phase(self) -> int | None:
        """The epoch (from 0) that begins the second phase, from the best weights so far; None for a schedule without one."""
        return (self.epochs + 1) // 2 if self.schedule == "two-phase" and self.epochs > 1 else None

    def side(self, epoch: int) -> int:
        """Of the square that the network sees in this epoch (from 0), px."""
        return self.grow_from if self.grow_from is not None and epoch < self.epochs // 2 else self.resolution


@dataclass(frozen=True)
class TrainConfig(Recipe):
    """Train a network to grade fundus photographs; the run folder gets weights, metrics, plots and report.html."""

    # a ResNet by its name (resnet10, 18, 34, 50, 101, 152), retfound, or timm:NAME for any network of timm (extra timm)
    arch: str = "resnet18"
    # file (.pth, .safetensors), torchvision's name (IMAGENET1K_V1), or pretrained for timm's own; none: from scratch
    weights: str | None = None
    # run folder; none: runs/<arch>-<resolution>px-seed<seed>; with --folds it gets a run folder for each: fold-1, fold-2, ...
    out: Annotated[Path | None, arg(aliases=["--output"])] = None
    resume: str = "auto"  # auto: go on with the run in --out, if any; never; or a run's last.pt
    stop_after_steps: int | None = None  # save and exit after so many steps of this call
    # cross-validation in 2-20 parts of --train, each the validation set of a run that trains on the others; 0: none
    folds: int = 0
    fold: int | None = None  # of --folds, from 1: train this one alone, in a run folder of its own; none: all, one after the other

    @property
    def validation_share(self) -> float:
        """See `Recipe`; 0 with --folds, each of which is validated on its own part of --train."""
        return 0.0 if self.folds and self.val_fraction is None else super().validation_share

    @property
    def all_folds(self) -> bool:
        """Whether these are the settings of several runs, one for each fold, and not of one run."""
        return bool(self.folds) and self.fold is None

    @property
    def folder(self) -> Path:
        """The run folder; of all folds together the one that holds theirs."""
        if self.out is not None:
            return self.out
        of_fold = f"/{fold_name(self.fold)}" if self.fold is not None else ""
        of_folds = f"-{self.folds}folds{of_fold}" if self.folds else ""
        return Path(f"runs/{folder_name(self.arch)}-{self.resolution}px-seed{self.seed}{of_folds}")


def fold_name(fold: int) -> str:
    """The folder of a fold, from 1, within that of all."""
    return f"fold-{fold}"


# Settings that a resumed run may change: none of them has a part in what a step computes.
FREE_SETTINGS = frozenset({"epochs", "patience", "out", "resume", "stop_after_steps", "profile", "tensorboard", "workers"})
RENAMED = {"trunk_lr": "backbone_lr"}  # settings of older runs, and what they are called now
# What older runs did that had no setting for it, where another thing is the default now.
BEFORE = {"batchnorm_images": 0, "val_fraction": 0.0}
# Settings of older runs that there are no more, and what they were where they did nothing: docs/recipe.md says why.
REMOVED = {"label_smoothing": 0.0}


def as_settings(config: Recipe) -> dict[str, Any]:
    """The settings as config.json holds them: plain values, paths as text; not the file that they came from."""
    found = {key: str(as_path(value)) if isinstance(value, Path) else value for key, value in asdict(config).items()}
    del found["config"]
    test = None if config.test_file is None else str(as_path(config.test_file))
    return found | {"test": test, "val_fraction": config.validation_share}


def renamed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings out of a config.json or last.pt, by the names of now; without those that are gone and did nothing."""
    return {RENAMED.get(key, key): value for key, value in settings.items() if key not in REMOVED or value != REMOVED[key]}


def differing(stored: Mapping[str, Any], now: Mapping[str, Any], keys: Iterable[str]) -> dict[str, tuple[Any, Any]]:
    """Those of these settings that are not what they were, (was, now) each. What an older run had no setting for was as `BEFORE`
    says, else as it is by default now; `auto` is what older runs said in full."""
    was = as_settings(TrainConfig()) | BEFORE | renamed(stored)
    for name, in_full in (("select_by", "qwk"), ("split_by", "patient")):
        if now.get(name) == "auto" and was[name] == in_full:
            was[name] = "auto"
    return {key: (was.get(key), now.get(key)) for key in sorted(keys) if was.get(key) != now.get(key)}


def flags_from(kind: type[Recipe], path: Path) -> list[str]:
    """The flags of `kind` that a config.json stands for. UsageError where it cannot be read or holds something else."""
    try:
        settings = renamed(read_json(path))
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"--config {path}: cannot be read as a run's config.json: {error}") from error
    known = as_settings(kind())
    flags: list[str] = []
    for name, value in settings.items():
        if name not in known:
            raise UsageError(f"--config {path}: {name}: no setting of this command")
        if isinstance(value, bool) != isinstance(known[name], bool):
            raise UsageError(f"--config {path}: {name}: cannot be {json.dumps(value)}")
        flags.append(flag(name, value))
    return flags


def flags_before(kind: type[Recipe], words: Sequence[str]) -> list[str]:
    """The flags that --config and --recipe among `words` stand for. They are to stand before `words`, whose own flags override
    them; and a recipe that is asked for overrides that of the file. An architecture it sets for a single run alone: a comparison
    has its own."""
    asking = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    asking.add_argument("--config", type=Path)
    asking.add_argument("--recipe")
    given = asking.parse_known_args(words)[0]
    flags = [] if given.config is None else flags_from(kind, given.config)
    if given.recipe in PRESETS:
        known = {field.name for field in fields(kind)}
        flags += [flag(name, value) for name, value in PRESETS[given.recipe].settings.items() if name in known]
    return flags


def check(config: TrainConfig) -> None:
    """UsageError where the settings cannot work: numbers out of range, missing data, the test set given for validation."""
    for name in ("epochs", "batch_size", "accumulate", "resolution", "grow_from", "patience", "stop_after_steps"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be 1 or more, got {value}")
    backbone_of(config.arch)  # that there is such a one
    if config.accumulate > config.batch_size:
        raise UsageError(f"--accumulate {config.accumulate}: is more than --batch-size {config.batch_size}")
    if config.accumulate > 1 and config.compile == "reduce-overhead":
        # The gradients of all micro-batches but one may be missing, without a word (pytorch#96693).
        raise UsageError(
            f"--compile reduce-overhead with --accumulate {config.accumulate}: CUDA graphs may lose gradients that add up "
            "over micro-batches; use --compile default, or leave --accumulate away"
        )
    for name in ("profile", "batchnorm_images"):
        if getattr(config, name) < 0:
            raise UsageError(f"--{name.replace('_', '-')} must be 0 or more, got {getattr(config, name)}")
    if not config.lr > 0 or config.weight_decay < 0:
        raise UsageError(f"--lr must be above 0 and --weight-decay not below, got {config.lr} and {config.weight_decay}")
    ranges = {
        "val_fraction": 0.5,
        "test_fraction": 0.5,
        "ema": 0.99999,
        "backbone_lr": 1e6,
        "layer_decay": 1,
    }
    for name, high in ranges.items():
        if not 0 <= (getattr(config, name) or 0) <= high:
            raise UsageError(f"--{name.replace('_', '-')} must lie in 0-{high:g}, got {getattr(config, name)}")
    for name in ("target_sensitivity", "target_specificity"):
        if not 0 < getattr(config, name) <= 1:
            raise UsageError(f"--{name.replace('_', '-')} must lie above 0 and be 1 at most, got {getattr(config, name)}")
    if config.clip_norm is not None and not config.clip_norm > 0:
        raise UsageError(f"--clip-norm must be above 0, got {config.clip_norm}")
    if config.grow_from is not None and config.grow_from > config.resolution:
        raise UsageError(f"--grow-from {config.grow_from}: is larger than --resolution {config.resolution}")
    if config.freeze_epochs < 0 or (config.freeze_epochs and config.weights is None):
        raise UsageError(
            f"--freeze-epochs {config.freeze_epochs}: 0 or more, and only with --weights: random layers hold nothing to keep"
        )
    if config.tensorboard:
        from fastretina.training.tensorboard import require_tensorboard

        require_tensorboard()
    _check_folds(config)
    _check_data(config)


def _check_folds(config: TrainConfig) -> None:
    if config.folds and not 2 <= config.folds <= MOST_FOLDS:
        raise UsageError(f"--folds must lie in 2-{MOST_FOLDS}, got {config.folds}")
    if config.fold is not None and not 1 <= config.fold <= config.folds:
        raise UsageError(f"--fold {config.fold}: is one of --folds {config.folds}, from 1")
    if config.folds and (config.val is not None or config.val_fraction):
        raise UsageError(
            "--folds with --val or --val-fraction: each fold is validated on its own part of --train; leave them away, or say "
            "--val-fraction 0 where a --config gives it"
        )


def _check_data(config: TrainConfig) -> None:
    if config.test is not None and config.test_fraction:
        raise UsageError("--test and --test-fraction: give one of them")
    if config.val is not None and config.val_fraction:
        raise UsageError("--val and --val-fraction: give one of them, and --val-fraction 0 where a --config gives it")
    if missing := _missing(config.train):
        raise UsageError(f"{missing}: no such file. Make it of photographs and their grades:  {_packing(missing, 'train')}")
    test = config.test_file
    if test is not None and (missing := _missing(test)):
        raise UsageError(
            f"{missing}: no such file. Test on a part of {config.train}, which is then not trained on:  --test-fraction 0.2  "
            f"or make it:  {_packing(missing, 'test')}"
        )
    if config.val is None:
        return
    if missing := _missing(config.val):
        raise UsageError(f"--val {missing}: no such file")
    if test is not None and set(files_of(config.val)) & set(files_of(test)):
        raise UsageError(
            f"--val {config.val}: is the test set; leave --val away, or say --val-fraction 0 instead, and the report says that the "
            "choice was made on the test set"
        )


def _missing(path: Path) -> Path | None:
    """The first of these packings that is not there."""
    return next((part for part in parts_of(path) if not files_of(part)), None)


def _packing(out: Path, split: str) -> str:
    lab = f"fastretina pack --root DIR --split {split} --out {out}"
    return f"fastretina pack --images DIR --labels FILE --out {out}  (of four CSVs without a header: {lab})"
