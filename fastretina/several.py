"""Several runs in sub-folders of one, one after the other: what a comparison and the folds of a cross-validation have in common.

The same command again skips the finished ones and goes on with the one that was stopped. What cannot work is refused before
anything is trained; a run that fails all the same does not cost the others.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from fastretina import one_run
from fastretina.errors import FastretinaError, RunError, UsageError, printable
from fastretina.system.json_text import read_json
from fastretina.training.config import FREE_SETTINGS, REMOVED, TrainConfig, as_settings, check, differing
from fastretina.training.run_folder import RunFolder

if TYPE_CHECKING:
    from fastretina.beton.reader import Beton

Found = TypeVar("Found")
# A run by itself may be given more epochs later; those of several are compared at equal epochs.
FIXED = frozenset({*as_settings(TrainConfig()), *REMOVED}) - (FREE_SETTINGS - {"epochs"})


@dataclass(frozen=True)
class PlannedRun:
    """One of the runs. title: what it is called on the terminal. config: with its run folder as `out`."""

    title: str
    config: TrainConfig

    @property
    def folder(self) -> RunFolder:
        """Its own, a sub-folder."""
        return RunFolder(self.config.folder)

    @property
    def name(self) -> str:
        """Of this folder."""
        return self.config.folder.name


def refuse_ranks(message: str) -> None:
    """UsageError with this message under torchrun, which starts several ranks of one run."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(message)


def check_all(runs: Sequence[PlannedRun]) -> None:
    """UsageError where the settings of one cannot work, or where the device is not there."""
    from fastretina.models.precision import choose_device

    for run in runs:
        check(run.config)
    choose_device(runs[0].config.device)


@contextmanager
def locked(folder: RunFolder, kind: str, runs: Sequence[PlannedRun]) -> Iterator[None]:
    """Hold the folder that has the runs' folders in it. kind: what writes there, as `RunFolder.holds_several` calls it.

    RunError where it is not for these: one run's, another kind's, or of runs that were begun with other settings.
    """
    if folder.last.exists():
        raise RunError(f"{folder.path}: is the folder of a single training run; give another --out")
    with folder.locked([run.name for run in runs]):
        if (found := folder.holds_several()) not in (None, kind):
            raise RunError(f"{folder.path}: is the folder of {found}; give another --out")
        for run in runs:
            _refuse_other_settings(run)
        yield


def finished(run: PlannedRun) -> bool:
    """Whether nothing is left to do for it."""
    from fastretina.training.state import is_reported

    return is_reported(run.folder)


def _refuse_other_settings(run: PlannedRun) -> None:
    """RunError where it was begun with other settings than those given now."""
    if not run.folder.last.is_file() and not finished(run):
        return
    try:
        others = differing(read_json(run.folder.config), as_settings(run.config), FIXED)
    except (OSError, ValueError, AttributeError) as error:
        raise RunError(f"{run.folder.config}: cannot be read ({error}); remove {run.folder.path} to train it anew") from error
    if others:
        shown = ", ".join(f"{key} was {was}, now {now}" for key, (was, now) in others.items())
        raise RunError(
            f"{run.folder.path}: begun with other settings ({shown}); give the same ones to go on, or another --out to begin anew"
        )


def refuse_other_data(run: PlannedRun, data: Mapping[str, Beton]) -> None:
    """RunError where the run has metrics of other data than these. Of a run of an older fastretina, whose metrics do not say of
    what data they are, nobody knows."""
    from fastretina.training import state

    try:
        stored = read_json(run.folder.metrics)["data"]
        was = {name: stored[name]["digest"] for name in data}
    except (OSError, ValueError, KeyError, TypeError):
        return  # not begun, or not known: then it is not taken for finished, and `fastretina train` says so
    state.refuse_other_data(run.folder, was, data)


def check_model(config: TrainConfig, training: Beton) -> None:
    """Make the model once, with its initial weights, fetching what must be fetched: an error here has cost no training."""
    from fastretina.models.heads import head_for
    from fastretina.models.resnet import build_model
    from fastretina.models.timm_backbones import check_growth
    from fastretina.training.batchnorm_values import refuse_single_values

    head = head_for(config.head, training.classes)
    check_growth(config.arch, config.grow_from, config.resolution)
    refuse_single_values(config, build_model(config.arch, head.outputs, config.weights, config.resolution), len(training))


def train_all(
    runs: Sequence[PlannedRun], read: Callable[[PlannedRun], Found], show: Callable[[list[Found]], None]
) -> tuple[list[Found], list[str]]:
    """Train those that are not finished, in their order.

    Args:
        read: what a finished run found. show: called with what all finished ones found, whenever there is one more to look at while
            the others train, and at the end, if anything is there to show.

    Returns what was read, and the names of the runs that failed; why stands on standard error.
    """
    done: list[Found] = []
    failed: list[str] = []
    for number, run in enumerate(runs, start=1):
        skipped = finished(run)
        state = ", finished" if skipped else ""
        print(f"\n[{number}/{len(runs)}] {run.title}: {printable(str(run.folder.path))}{state}", flush=True)
        try:
            if not skipped:
                one_run.main(run.config)
            done.append(read(run))
        except FastretinaError as error:  # the others should not be lost for it
            print(printable(f"error: {error}"), file=sys.stderr, flush=True)
            failed.append(run.name)
            continue
        if not skipped and number < len(runs):
            show(done)
    if done:
        show(done)
    return done, failed


def raise_failed(failed: Sequence[str], runs: Sequence[PlannedRun]) -> None:
    """RunError naming the runs that failed, if any did."""
    if failed:
        raise RunError(
            f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}; the reason stands above at each. "
            "The table holds the others; the same command tries again"
        )
