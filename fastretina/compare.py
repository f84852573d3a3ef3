"""Train architectures × initial weights with one recipe, and put the results side by side.

fastretina compare --archs resnet18,resnet50 --weights none --out runs/scratch
fastretina compare --archs resnet18,resnet50 --weights none,IMAGENET1K_V1 --out runs/imagenet
fastretina compare --weights 'none,runs/scratch/{arch}-scratch/best.safetensors' --out runs/again
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from fastretina import cli, train
from fastretina.errors import CheckpointError, FastretinaError, RunError, UsageError, printable
from fastretina.models.options import backbone_of, folder_name, is_arch
from fastretina.system.json_text import read_json
from fastretina.training.config import FREE_SETTINGS, Recipe, TrainConfig, as_settings, check, differing, flags_from
from fastretina.training.run_folder import RunFolder

if TYPE_CHECKING:
    from fastretina.beton.reader import Beton
    from fastretina.report.compared import ComparedRun

SCRATCH = "none"
# A run by itself may be given more epochs later; those of a comparison are compared at equal epochs.
FIXED = frozenset(as_settings(TrainConfig())) - (FREE_SETTINGS - {"epochs"})


@dataclass(frozen=True)
class CompareConfig(Recipe):
    """Train architectures × initial weights with one recipe, and put the results side by side: a table, a plot, a report.

    An entry of --weights is "none" (from scratch), one of torchvision's names (IMAGENET1K_V1), pretrained (timm's own), or a file;
    in a file's path {arch} stands for the architecture, with - for a colon: runs/first/{arch}/best.safetensors. An entry holds for
    all architectures, or for one alone when its name stands before it: resnet18=first.pth. Weights that do not fit are refused
    before anything is trained.

    Each run is one of `fastretina train` in a sub-folder of --out. The same command again skips finished runs and goes on with the
    one that was stopped. More --archs and --weights may be added; other changed settings are refused.
    """

    archs: str = "resnet18,resnet50"  # architectures as train's --arch has them, separated by commas
    weights: str = SCRATCH  # initial weights, separated by commas, as above
    out: Annotated[Path, tyro.conf.arg(aliases=["--output"])] = Path(
        "runs/compare"
    )  # folder for the comparison; each run has a sub-folder


@dataclass(frozen=True)
class PlannedRun:
    """One run of a comparison. name: its sub-folder. entry: what --weights said."""

    name: str
    entry: str
    config: TrainConfig
    folder: RunFolder


def main(config: CompareConfig) -> int:
    # What imports torch, scipy and matplotlib comes now: --help is there before them.
    from fastretina.models.precision import choose_device
    from fastretina.report.compared import ComparedRun, terminal_table
    from fastretina.report.comparison import write_comparison
    from fastretina.system.files import write_json
    from fastretina.training.data import open_data

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "fastretina.compare is not for torchrun: train each run by torchrun -m fastretina.train, with one --out each"
        )
    runs = plan(config)
    for run in runs:
        check(run.config)
    choose_device(config.device)
    folder = RunFolder(config.out)
    if folder.last.exists():
        raise RunError(f"{folder.path}: is the folder of a single training run; give another --out")
    with folder.locked(), ExitStack() as stack:
        _refuse_other_settings(runs)
        data = open_data(runs[0].config, stack)  # the same for all
        _refuse_other_data(runs, data)
        _check_models([run for run in runs if not _finished(run)], data["train"])
        settings = as_settings(config)
        write_json(folder.config, settings)
        done: list[ComparedRun] = []
        failed: list[str] = []
        for number, run in enumerate(runs, start=1):
            finished = _finished(run)
            state = ", finished" if finished else ""
            print(f"\n[{number}/{len(runs)}] {run.config.arch}, weights {run.entry}: {run.folder.path}{state}", flush=True)
            try:
                if not finished:
                    train.main(run.config)
                done.append(ComparedRun.read(run.folder, run.config.arch, run.config.weights))
            except FastretinaError as error:  # the others should not be lost for it
                print(printable(f"error: {error}"), file=sys.stderr, flush=True)
                failed.append(run.name)
                continue
            if not finished and number < len(runs):  # to look at while the others train
                write_comparison(folder, done, settings)
        if done:
            write_comparison(folder, done, settings)
            print("\n" + "\n".join(terminal_table(done)))
            print(f"report: {folder.report}", flush=True)
        if failed:
            raise RunError(
                f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}; the reason stands above at each. "
                "The table holds the others; the same command tries again"
            )
    return 0


def plan(config: CompareConfig) -> list[PlannedRun]:
    """The runs that --archs and --weights ask for, in their order. UsageError where they ask for none, or for one twice."""
    archs = _split("--archs", config.archs)
    for arch in archs:
        backbone_of(arch)  # that there is such a one
    entries = _split("--weights", config.weights)
    recipe = {field.name: getattr(config, field.name) for field in fields(Recipe)}
    runs: list[PlannedRun] = []
    for arch in archs:
        for entry in entries:
            only, equals, weights = entry.partition("=")
            if not equals or not is_arch(only):
                only, weights = arch, entry
            if only not in archs:
                raise UsageError(f"--weights {entry}: {only} is not among --archs {config.archs}")
            if only != arch:
                continue
            start = None if weights == SCRATCH else weights.replace("{arch}", folder_name(arch))
            name = _name(arch, start)
            if any(run.config.arch == arch and run.config.weights == start for run in runs):
                raise UsageError(f"--weights {entry}: names the same weights for {arch} a second time")
            if any(run.name == name for run in runs):  # two files of the same name in folders of the same name
                name += "-" + hashlib.sha256(str(start).encode(errors="backslashreplace")).hexdigest()[:8]
            out = config.out / name
            runs.append(PlannedRun(name, entry, TrainConfig(**recipe, arch=arch, weights=start, out=out), RunFolder(out)))
        if not any(run.config.arch == arch for run in runs):
            raise UsageError(f"--weights {config.weights}: nothing for {arch}; add none, or {arch}=FILE")
    return runs


def _split(flag: str, text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise UsageError(f"{flag}: is empty")
    if len(set(parts)) < len(parts):
        raise UsageError(f"{flag} {text}: names something twice")
    return parts


def _name(arch: str, weights: str | None) -> str:
    """The sub-folder: resnet18-scratch, resnet18-IMAGENET1K_V1, resnet18-first-best (of first/best.safetensors)."""
    arch = folder_name(arch)
    if weights is None:
        return f"{arch}-scratch"
    path = Path(weights)
    parts = [part for part in (path.parent.name, path.stem) if part]
    label = re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join(parts)).strip("._-")
    return f"{arch}-{label.removeprefix(f'{arch}-') or 'weights'}"


def _finished(run: PlannedRun) -> bool:
    from fastretina.training.state import is_reported

    return is_reported(run.folder)


def _refuse_other_settings(runs: Sequence[PlannedRun]) -> None:
    """RunError where a run of this comparison was begun with other settings than those given now."""
    for run in runs:
        if not run.folder.last.is_file() and not _finished(run):
            continue
        try:
            others = differing(read_json(run.folder.config), as_settings(run.config), FIXED)
        except (OSError, ValueError, AttributeError) as error:
            raise RunError(f"{run.folder.config}: cannot be read ({error}); remove {run.folder.path} to train it anew") from error
        if others:
            shown = ", ".join(f"{key} was {was}, now {now}" for key, (was, now) in others.items())
            raise RunError(
                f"{run.folder.path}: begun with other settings ({shown}); give the same ones to go on, "
                "or another --out to begin anew"
            )


def _refuse_other_data(runs: Sequence[PlannedRun], data: Mapping[str, Beton]) -> None:
    """RunError where a run of this comparison has metrics of other data than these. Of a run of an older fastretina, whose metrics
    do not say of what data they are, nobody knows."""
    from fastretina.training.state import refuse_other_data

    for run in runs:
        try:
            stored = read_json(run.folder.metrics)["data"]
            was = {name: stored[name]["digest"] for name in data}
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not begun, or not known: then it is not taken for finished, and `fastretina train` says so
        refuse_other_data(run.folder, was, data)


def _check_models(runs: Sequence[PlannedRun], training: Beton) -> None:
    """Make all models once, with their initial weights, fetching what must be fetched: an error here has cost no training."""
    from fastretina.models.heads import head_for
    from fastretina.models.resnet import build_model
    from fastretina.models.timm_backbones import check_growth
    from fastretina.training.batchnorm_values import refuse_single_values

    for run in runs:
        classes = training.classes
        head = head_for(run.config.head, classes)
        try:
            check_growth(run.config.arch, run.config.grow_from, run.config.resolution)
            model = build_model(run.config.arch, head.outputs, run.config.weights, run.config.resolution)
        except CheckpointError as error:
            raise CheckpointError(
                f"--weights {run.entry} for {run.config.arch}: {error}. A file for one architecture alone: "
                f"ARCH=FILE; one for each: {{arch}} in its path. Nothing was trained"
            ) from error
        refuse_single_values(run.config, model, len(training))


run_command = partial(cli.run, CompareConfig, main, flags_from=partial(flags_from, CompareConfig))

if __name__ == "__main__":
    run_command()
