"""The run folder: its file names, and its lock."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastretina.errors import RunError
from fastretina.system.files import still_names, try_lock
from fastretina.system.json_text import read_json

_BEGUN = {".lock", ".config.json.tmp"}  # what a run leaves that was killed before it had written anything


class _File:
    """A file of the folder: its path, which is given out only as long as the folder is this run's."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, run: RunFolder, kind: type[RunFolder]) -> Path:
        return run.file(self._name)


class RunFolder:
    """Where one run keeps its files. Nothing is made or locked before `locked()`."""

    config = _File("config.json")
    results = _File("results.csv")
    metrics = _File("metrics.json")
    predictions = _File("predictions.csv")
    curves = _File("curves.png")
    confusion_train = _File("confusion_train.png")
    confusion_test = _File("confusion_test.png")
    batch = _File("batch.png")
    report = _File("report.html")
    card = _File("card.md")
    best = _File("best.safetensors")
    staged_best = _File(".next.best.safetensors")  # a new one, until the last.pt that speaks of it is on disk
    last = _File("last.pt")
    # The save before that, for the day when last.pt is corrupt; and the best checkpoint that it speaks of, if only as a copy.
    previous = _File("last.prev.pt")
    previous_best = _File("best.prev.safetensors")

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._lock: int | None = None  # the descriptor of its lock file, while it is held

    def file(self, name: str) -> Path:
        """The path of a file in it. RunError where it is locked, and its path has come to name something else since: what is
        written there would end up among another run's files."""
        lock = self.path / ".lock"
        with suppress(OSError):
            if self._lock is None or still_names(lock, self._lock):
                return self.path / name
        raise RunError(
            f"{self.path}: was removed, renamed or taken by another run while this one went on, which stops here and writes no "
            "more. If it was renamed, give its new name as --out: the last state saved is in it"
        )

    def holds_several(self) -> str | None:
        """What writes here whose runs have folders below this one, a comparison or folds, in words; None where nothing does."""
        try:
            settings = read_json(self.config)
            if "archs" in settings:
                return "a comparison"
            return f"{settings['folds']} folds" if settings.get("folds") and settings.get("fold") is None else None
        except (OSError, ValueError, TypeError, AttributeError):
            return None

    @contextmanager
    def locked(self, runs: Collection[str] = ()) -> Iterator[None]:
        """Make the folder and hold it for this process alone; the kernel lets go of the lock when the process dies, however.

        runs: sub-folders that may be there before it has a config.json: runs of it that were begun by themselves.

        RunError where another run holds it, where it cannot be made, or where it holds files but is no run folder.
        """
        try:
            expected = _BEGUN | set(runs)
            if self.path.is_dir() and not self.config.exists() and {entry.name for entry in self.path.iterdir()} - expected:
                raise RunError(f"{self.path}: has files in it but is no run folder (no config.json); give another --out")
            self.path.mkdir(parents=True, exist_ok=True)
            handle = (self.path / ".lock").open("w")
        except OSError as error:
            raise RunError(f"{self.path}: cannot be used as a run folder: {error.strerror}; give another --out") from error
        with handle:
            with suppress(OSError):  # a file system without locks: one run at a time is then the user's care
                if not try_lock(handle.fileno()):
                    raise RunError(f"{self.path}: another run is writing to this folder; wait for it or give another --out")
            self._lock = handle.fileno()
            try:
                self.file(".lock")  # between opening and locking it the folder may have been removed
                yield
            finally:
                self._lock = None
