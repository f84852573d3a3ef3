"""The run folder: its file names, and its lock."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastretina.errors import RunError
from fastretina.system.files import try_lock
from fastretina.system.json_text import read_json

_BEGUN = {".lock", ".config.json.tmp"}  # what a run leaves that was killed before it had written anything


class RunFolder:
    """Where one run keeps its files. Nothing is made or locked before `locked()`."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.results = self.path / "results.csv"
        self.metrics = self.path / "metrics.json"
        self.predictions = self.path / "predictions.csv"
        self.curves = self.path / "curves.png"
        self.confusion_train = self.path / "confusion_train.png"
        self.confusion_test = self.path / "confusion_test.png"
        self.batch = self.path / "batch.png"
        self.report = self.path / "report.html"
        self.best = self.path / "best.safetensors"
        self.staged_best = self.path / ".next.best.safetensors"  # a new one, until the last.pt that speaks of it is on disk
        self.last = self.path / "last.pt"
        # The save before that, for the day when last.pt is corrupt; and the best checkpoint that it speaks of, if only as a copy.
        self.previous = self.path / "last.prev.pt"
        self.previous_best = self.path / "best.prev.safetensors"

    def holds_comparison(self) -> bool:
        """Whether fastretina.compare writes here, whose runs have folders below this one."""
        try:
            return "archs" in read_json(self.config)
        except (OSError, ValueError, TypeError):
            return False

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder and hold it for this process alone; the kernel lets go of the lock when the process dies, however.

        RunError where another run holds it, where it cannot be made, or where it holds files but is no run folder.
        """
        try:
            if self.path.is_dir() and not self.config.exists() and {entry.name for entry in self.path.iterdir()} - _BEGUN:
                raise RunError(f"{self.path}: has files in it but is no run folder (no config.json); give another --out")
            self.path.mkdir(parents=True, exist_ok=True)
            handle = (self.path / ".lock").open("w")
        except OSError as error:
            raise RunError(f"{self.path}: cannot be used as a run folder: {error.strerror}; give another --out") from error
        with handle:
            if not try_lock(handle.fileno()):
                raise RunError(f"{self.path}: another run is writing to this folder; wait for it or give another --out")
            yield
