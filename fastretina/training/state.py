"""The training state, last.pt: how a run is taken up again."""

from __future__ import annotations

import hashlib
import json
import sys
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastretina.beton.reader import Beton
from fastretina.errors import BetonError, CheckpointError, LoaderError, RunError
from fastretina.models.checkpoint import read_info, sealed_bytes
from fastretina.models.weights import load_safely, refuse_inflating
from fastretina.system.files import sync_folder, unfinished, write_atomically, write_bytes
from fastretina.system.json_text import read_json
from fastretina.training.config import FREE_SETTINGS, differing
from fastretina.training.environment import environment, resume_note
from fastretina.training.loop import Training
from fastretina.training.run_folder import RunFolder
from fastretina.training.run_info import SET_TITLES
from fastretina.version import __version__

STATE_FORMAT = 2  # last.pt's layout; one more whenever an older program could misread it


def save_state(path: Path, state: dict[str, Any], older: Path | None = None) -> None:
    """Write a training state (tensors and plain values) atomically: `path` holds the new state or, come what may, the old one.

    older: where the old one stays.
    """
    write_atomically(path, lambda file: torch.save({"format": STATE_FORMAT, "fastretina": __version__, **state}, file), older)


def load_state(path: Path) -> dict[str, Any]:
    """Read a training state, on the CPU; runs no code from it. CheckpointError naming the file and the way out."""
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such training state")
    refuse_inflating(path)
    try:
        # torch.save notes a crc32 of each tensor, torch.load does not look at it: 0.1 s for ResNet18's 134 MB.
        with zipfile.ZipFile(path) as archive:
            corrupt = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, zlib.error, NotImplementedError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: corrupt, or not a training state (last.pt): {error}") from error
    if corrupt is not None:
        raise CheckpointError(f"{path}: corrupt: the checksum of {corrupt} is wrong")
    state = load_safely(path)
    if not isinstance(state, dict) or "progress" not in state:
        raise CheckpointError(f"{path}: not a training state of fastretina; give a run's last.pt to --resume")
    if state.get("format") != STATE_FORMAT:
        raise CheckpointError(
            f"{path}: format {state.get('format')}, this fastretina reads {STATE_FORMAT}; go on with the version that wrote it"
        )
    if wrong := _misshapen(state):
        raise CheckpointError(f"{path}: not as fastretina writes it: {wrong}")
    return state


def _misshapen(state: Mapping[str, Any]) -> str | None:
    """What of the values that are looked at before the rest fits a run is none that a run can save, in words."""
    at = state["progress"]
    for name in ("settings", "data", "environment", "progress"):
        if not isinstance(state.get(name, {}), dict):
            return f"{name} {state[name]!r}"
    for name in ("epoch", "batch", "step"):
        if type(at.get(name)) is not int or at[name] < 0:
            return f"{name} {at.get(name)!r}"
    best = at.get("best_epoch")
    if best is not None and not (type(best) is int and 1 <= best <= at["epoch"]):
        return f"best epoch {best!r} of {at['epoch']}"
    return None


def state_digest(path: Path) -> str | None:
    """What tells a last.pt from every other, 32 hexadecimal digits: of the checksums that torch.save keeps of its parts, so that it
    takes no time. None where it cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            parts = [(part.filename, part.CRC, part.file_size) for part in archive.infolist()]
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError):
        return None
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def report_ending(digest: str | None) -> str:
    """The last line of a run's report.html: of which state it tells, and that it was written to its end."""
    return f"<!-- made from the training state {digest} -->\n"


def is_reported(run: RunFolder) -> bool:
    """Whether the folder's metrics and report are of its last.pt and, like that, of a finished run, and all tables and plots there.

    A last.pt that was removed does not count: what is left must then agree with itself.
    """
    try:
        metrics = read_json(run.metrics)
        digest, finished = metrics["state"], metrics["finished"]
        ending = report_ending(digest).encode()
        whole = run.report.read_bytes().endswith(ending)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    others = (run.results, run.predictions, run.curves, run.confusion_test, run.confusion_train)
    of_state = not run.last.is_file() or state_digest(run.last) == digest
    return finished is True and whole and of_state and all(path.is_file() for path in others)


def find_best(run: RunFolder, best_epoch: int | None) -> Path | None:
    """The sound checkpoint of `best_epoch` (from 1; None before the first), whatever name it has just now.

    CheckpointError where there is none.
    """
    if best_epoch is None:
        return None
    for path in (run.best, run.staged_best, run.previous_best):
        try:
            if read_info(path).epoch == best_epoch:
                sealed_bytes(path)
                return path
        except CheckpointError:
            continue
    raise CheckpointError(
        f"{run.best}: missing, corrupt or not of epoch {best_epoch}, which the training state beside it calls the best; "
        "start anew in another --out"
    )


def latest_state(run: RunFolder) -> tuple[dict[str, Any], Path | None, CheckpointError | None]:
    """The newest training state that is sound and has its best checkpoint; that checkpoint; what is wrong with last.pt, if it is.

    CheckpointError (of last.pt) where neither state can be used. Changes nothing.
    """
    problem: CheckpointError | None = None
    for path in (run.last, run.previous):
        try:
            state = load_state(path)
            return state, find_best(run, state["progress"]["best_epoch"]), problem
        except CheckpointError as error:
            problem = problem or error
    assert problem is not None
    raise problem


def settle(run: RunFolder, best: Path | None, fell_back: bool) -> None:
    """Make the folder agree with the state and the checkpoint that `latest_state` found.

    A run saves in the order: staged best, last.pt, promote. Killed anywhere between, the next start comes here and finds either a
    staged best that last.pt knows of, which gets its name, or one that last.pt has never heard of, which goes.
    """
    if best is None:
        run.best.unlink(missing_ok=True)  # of a later state, which could not be read
    elif best == run.previous_best:
        best.replace(run.best)
    elif best != run.best:
        promote_best(run)
    run.staged_best.unlink(missing_ok=True)
    unfinished(run.previous_best).unlink(missing_ok=True)
    if fell_back:
        run.previous.replace(run.last)
        run.previous_best.unlink(missing_ok=True)
    sync_folder(run.path)


def keep_best_twice(run: RunFolder, best_epoch: int | None) -> None:
    """Where both states speak of the same best checkpoint, let there be two of it, for the day when one is corrupt.

    CheckpointError where it is corrupt by now.
    """
    try:
        if read_info(run.previous_best).epoch == best_epoch:
            return
    except CheckpointError:
        pass
    if best_epoch is not None:
        write_bytes(run.previous_best, sealed_bytes(run.best))


def promote_best(run: RunFolder) -> None:
    """Give the staged checkpoint its name; the one before it stays, for the state before the last speaks of it."""
    if run.best.is_file():
        run.best.replace(run.previous_best)
    run.staged_best.replace(run.best)
    sync_folder(run.path)


def resume_state(run: RunFolder, resume: str, settings: Mapping[str, Any], data: Mapping[str, Beton]) -> dict[str, Any] | None:
    """The training state to go on from, or None to begin. The folder must be locked.

    resume: `auto` (the folder's last.pt, if any), `never`, or a last.pt (or its folder), whose best checkpoint comes along.
    data: the open data sets by name: train, test, and val if there is one.
    Where last.pt is corrupt, the save before it counts, and a line on standard error says so.
    RunError where the folder is taken, where `settings` differ from those of the state in more than FREE_SETTINGS, or where a data
    set is another one than it was.
    """
    if several := run.holds_several():
        raise RunError(f"{run.path}: is the folder of {several}; give another --out")
    if resume == "never":
        if run.config.exists():
            raise RunError(f"{run.path}: holds a run already; give another --out, remove the folder, or go on with --resume auto")
        return None
    source = run
    if resume != "auto":
        given = Path(resume)
        source = RunFolder(given if given.is_dir() else given.parent)
        if not _has_state(source) or (given.is_file() and given.name != source.last.name):
            raise CheckpointError(f"--resume {resume}: no training state there; give a run's last.pt, or its folder, auto or never")
        if source.path.resolve() == run.path.resolve():
            source = run
        elif run.config.exists():
            raise RunError(f"{run.path}: holds a run already; give an empty --out to go on from {source.last}")
    if not _has_state(source):
        return None
    state, best, problem = latest_state(source)
    if others := differing(state["settings"], settings, {*settings, *state["settings"]} - FREE_SETTINGS):
        shown = ", ".join(f"{key} was {was}, now {now}" for key, (was, now) in others.items())
        raise RunError(
            f"{source.path}: begun with other settings ({shown}); give the same ones to go on, or another --out to begin anew"
        )
    if state.get("data") is None:
        print(
            f"{source.last}: of an older fastretina, which did not note what data it was of, nor on what machine: "
            "whether they are those of now is unknown",
            file=sys.stderr,
        )
    else:
        refuse_other_data(source, state["data"], data)
    if source is run:
        settle(run, best, fell_back=problem is not None)
    elif best is not None:
        write_bytes(run.best, best.read_bytes())
    if problem is not None:
        at = state["progress"]
        print(f"{problem}. Going on from the save before it: epoch {at['epoch'] + 1}, after step {at['step']:,}", file=sys.stderr)
    return state


def refuse_other_data(run: RunFolder, was: Mapping[str, str | None], data: Mapping[str, Beton]) -> None:
    """RunError where a data set (by name: train, test, val) has not the digest that it had (`was`)."""
    for name, beton in data.items():
        if was.get(name) != beton.digest:
            raise RunError(
                f"{beton.path}: is not the {SET_TITLES[name]} set that {run.path} was begun with: it has been packed anew or "
                "replaced since. Put the file of then back to go on, or give another --out to begin anew"
            )


def _has_state(run: RunFolder) -> bool:
    return run.last.is_file() or run.previous.is_file()


def restore(training: Training, state: dict[str, Any], source: Path) -> None:
    """Put a state that `Recorder.save` wrote to `source` into the training. The number of ranks may be another."""
    try:
        training.progress.load_state_dict(state["progress"], training.world)
        _check_position(training, state["loader"])
        training.model.load_state_dict(state["model"])
        if training.average is not None:
            training.average.load_state_dict(state["average"])
        training.optimizer.load_state_dict(state["optimizer"])
        training.schedule.load_state_dict(state["schedule"])
        training.scaler.load_state_dict(state["scaler"])
        loader = training.train_loader(training.progress.epoch)
        # Where an older state does not say of what data it is, `resume_state` has said so.
        loader.load_state_dict({"data": loader.dataset.digest} | state["loader"])
        torch.set_rng_state(state["rng_cpu"])
        if state["rng_cuda"]:
            torch.cuda.set_rng_state(state["rng_cuda"][0])
        note = resume_note(state["environment"], environment(training.world)) if "environment" in state else None
        if training.world.is_main and note is not None:
            print(f"{source}: {note}", file=sys.stderr)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError, LoaderError, BetonError) as error:
        raise CheckpointError(f"{source}: does not fit this run: {error}; begin anew in another --out") from error


def _check_position(training: Training, loader: Mapping[str, Any]) -> None:
    """ValueError where the state cannot be of a run on these data, of which only what is there is known of an older state."""
    at, batches = training.progress, len(training.train_loader(training.progress.epoch))
    if not 0 <= at.batch <= batches:
        raise ValueError(f"batch {at.batch} of an epoch of {batches}")
    stands, expected = (loader["epoch"], loader["batch"]), (at.epoch + at.batch // batches, at.batch % batches)
    if stands != expected:
        raise ValueError(f"its loader stands at epoch and batch {stands}, its progress at {expected}")
    for answers, evaluated in ((at.best_test, training.test_loader), (at.best_val, training.val_loader)):
        if answers is not None and evaluated is not None:
            beton = evaluated.dataset
            labels = beton.labels[beton.index_of(answers.ids.numpy())]
            if len(labels) != len(beton) or labels.tolist() != answers.labels.tolist():
                raise ValueError(f"its answers are not for the images of {beton.path}")
