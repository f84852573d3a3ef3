"""Train architectures × initial weights with one recipe, and put the results side by side.

fastretina compare --archs resnet18,resnet50 --weights none --out runs/scratch
fastretina compare --archs resnet18,resnet50 --weights none,IMAGENET1K_V1 --out runs/imagenet
fastretina compare --weights 'none,runs/scratch/{arch}-scratch/best.safetensors' --out runs/again
"""

from __future__ import annotations

import hashlib
import re
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from fastretina import cli, several
from fastretina.errors import CheckpointError, UsageError
from fastretina.models.options import backbone_of, folder_name, is_arch
from fastretina.several import PlannedRun
from fastretina.training.config import Recipe, TrainConfig, as_settings, flags_before
from fastretina.training.run_folder import RunFolder

if TYPE_CHECKING:
    from fastretina.beton.reader import Beton

SCRATCH = "none"


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


def main(config: CompareConfig) -> int:
    # What imports torch, scipy and matplotlib comes now: --help is there before them.
    from fastretina.report.compared import ComparedRun, terminal_table
    from fastretina.report.comparison import write_comparison
    from fastretina.system.files import write_json
    from fastretina.training.data import open_data

    several.refuse_ranks(
        "fastretina.compare is not for torchrun: train each run by torchrun -m fastretina.train, with one --out each"
    )
    runs = plan(config)
    several.check_all(runs)
    folder = RunFolder(config.out)
    with several.locked(folder, "a comparison", runs), ExitStack() as stack:
        data = open_data(runs[0].config, stack)  # the same for all
        for run in runs:
            several.refuse_other_data(run, data)
        for run in runs:
            if not several.finished(run):
                _check_model(run, data["train"])
        settings = as_settings(config)
        write_json(folder.config, settings)

        def read(run: PlannedRun) -> ComparedRun:
            return ComparedRun.read(run.folder, run.config.arch, run.config.weights)

        done, failed = several.train_all(runs, read, lambda done: write_comparison(folder, done, settings))
        if done:
            print("\n" + "\n".join(terminal_table(done)))
            print(f"report: {folder.report}", flush=True)
        several.raise_failed(failed, runs)
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
            settings = TrainConfig(**recipe, arch=arch, weights=start, out=out)
            runs.append(PlannedRun(f"{arch}, weights {entry}", settings))
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


def _check_model(run: PlannedRun, training: Beton) -> None:
    try:
        several.check_model(run.config, training)
    except CheckpointError as error:
        raise CheckpointError(
            f"--weights {run.config.weights} for {run.config.arch}: {error}. A file for one architecture alone: "
            "ARCH=FILE; one for each: {arch} in its path. Nothing was trained"
        ) from error


run_command = partial(cli.run, CompareConfig, main, flags_before=partial(flags_before, CompareConfig))

if __name__ == "__main__":
    run_command()
