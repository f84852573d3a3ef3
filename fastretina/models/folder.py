"""Folders of trained models: those of runs, and one that can leave the house, with weights, card, thresholds and preparation."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastretina.errors import CheckpointError, RunError, UsageError
from fastretina.metrics.operating import Operating
from fastretina.models.card import card
from fastretina.models.checkpoint import CheckpointInfo, read_info, sealed_bytes
from fastretina.models.photographs import rules
from fastretina.system.files import sync_folder, write_bytes, write_json
from fastretina.system.json_text import read_json
from fastretina.version import __version__


def checkpoint_files(path: Path) -> list[Path]:
    """A checkpoint itself; those of a folder that `Grader.save` wrote, of a run, or of all folds of a cross-validation.
    CheckpointError where there is none, or where folds are missing."""
    if not path.is_dir():
        return [path]
    if found := sorted(path.glob("model*.safetensors")) or [file for file in [path / "best.safetensors"] if file.is_file()]:
        return found
    try:
        folds = int(read_json(path / "config.json")["folds"])
    except (OSError, ValueError, KeyError, TypeError):
        folds = 0
    if not folds:
        raise CheckpointError(f"{path}: a folder without a checkpoint: neither model.safetensors nor best.safetensors is in it")
    files = [path / f"fold-{number}" / "best.safetensors" for number in range(1, folds + 1)]
    if missing := [str(file) for file in files if not file.is_file()]:
        raise CheckpointError(f"{path}: {len(missing)} of its {folds} folds have no checkpoint, {missing[0]} first; train them all")
    return files


def save_folder(folder: Path, members: Sequence[tuple[Path, CheckpointInfo]], size: int, operating: Operating | None) -> None:
    """Write what `Grader.save` says of the checkpoints at these paths. It appears only when it is complete."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(f"{folder}: is there already; give a new or an empty folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        unfinished.mkdir()
    except OSError as error:
        raise RunError(f"{folder}: cannot be made: {error.strerror}") from error
    try:
        for number, (path, info) in enumerate(members, start=1):
            suffix = f"-{number}" if len(members) > 1 else ""
            data = sealed_bytes(path)
            if read_info(path) != info:
                raise CheckpointError(f"{path}: is another checkpoint than the one that was loaded; load it again")
            write_bytes(unfinished / f"model{suffix}.safetensors", data)
            write_bytes(unfinished / f"card{suffix}.md", _card(path, info, hashlib.sha256(data).hexdigest()).encode())
        write_json(unfinished / "thresholds.json", operating and operating.as_dict())
        write_json(unfinished / "preparation.json", _preparation([info for _, info in members], size))
        unfinished.replace(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise RunError(f"{folder}: cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _preparation(infos: Sequence[CheckpointInfo], size: int) -> dict[str, Any]:
    """How a photograph becomes what the networks are shown; resolution: of each of them."""
    sides = list(dict.fromkeys(info.resolution for info in infos))
    steps = {str(side): rules(infos[0].preparation, size, side) for side in sides}
    return {
        "fastretina": __version__,
        **asdict(infos[0].preparation),
        "size": size,
        "resolution": [info.resolution for info in infos],
        "rules": steps,
        "normalisation": {"mean": infos[0].mean, "std": infos[0].std},
    }


def _card(path: Path, info: CheckpointInfo, digest: str) -> str:
    """Of this checkpoint, with its run's metrics where these lie beside it and are of its epoch; of one that was saved before, that
    which lies beside it."""
    beside = path.with_name(path.stem.replace("model", "card") + ".md")
    if path.name.startswith("model") and beside.is_file() and digest in (text := beside.read_text("utf-8", "replace")):
        return text
    try:
        metrics = read_json(path.parent / "metrics.json")
        fits = metrics["best_epoch"] == info.epoch and metrics["data"]["train"]["digest"] == (info.data or {}).get("train")
    except (OSError, ValueError, KeyError, TypeError):
        fits = False
    return card(info, metrics if fits else None, digest)
