"""A result that outlives its process: saved before anything is said of it, and taken up by the next process, which leaves out what
ended the one before."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from measure import hardware, save, versions
from watchdog import HUNG, Watchdog

# How the reason for leaving something out begins where it ended a process.
FATAL = ("hung", "two processes ended")
Found = TypeVar("Found")


class OutOfBudget(Exception):
    """What would come next takes longer than there is time."""


class Journal:
    """result: what is known so far, as JSON has it."""

    def __init__(self, path: Path, benchmark: str, settings: Mapping[str, Any], budget: float, grace: float) -> None:
        """path: of the JSON; where it is there, with these settings and from this machine, it is gone on with.

        budget: seconds from the process's start. grace: seconds past a deadline at which work is thought to hang.
        """
        header = {"benchmark": benchmark, "settings": settings, "versions": versions(), "hardware": hardware()}
        header = json.loads(json.dumps(header, default=str))
        self.result: dict[str, Any] = header | {"processes": 0, "under_way": None}
        self.path, self._budget, self._grace, self._watchdog = path, budget, grace, Watchdog()
        if path.exists():
            earlier = json.loads(path.read_text())
            if all(earlier.get(key) == value for key, value in header.items()):
                self.result = earlier
        self.result |= {"processes": self.result["processes"] + 1, "command": " ".join(["python", *sys.argv]), "ended": None}

    def report(self, line: str) -> None:
        """Save, then say so: what is on standard output is on disk."""
        save(self.path, self.result)
        print(line, flush=True)

    @property
    def age(self) -> float:
        """Seconds since the process began."""
        return float(time.time() - psutil.Process().create_time())

    def spend(self, seconds: float) -> None:
        """Something of so many seconds comes next: OutOfBudget where they are not there."""
        if self.age + seconds > self._budget:
            raise OutOfBudget

    def attempt(self, failed: dict[str, str], place: str, part: str, seconds: float, work: Callable[[], Found]) -> Found | None:
        """What `work` gives; None where it raises, with the reason in failed[part], or where that holds one already.

        Where it takes so many seconds and `grace` more, the reason is noted and the process ends with HUNG. What was under way as a
        process was killed is tried once more by the next: it need not have been the reason.
        """
        if part in failed:
            return None
        name, before = f"{place}, {part}", self.result["under_way"]
        begun = before["begun"] + 1 if before and before["name"] == name else 1
        if begun > 2:
            self.drop(failed, name, part, f"{FATAL[1]} in it")
            return None
        self.result["under_way"] = {"name": name, "begun": begun}
        save(self.path, self.result)
        limit = seconds + self._grace
        try:
            with self._watchdog.over(limit, lambda: self.drop(failed, name, part, f"{FATAL[0]}: not over after {limit:g} s")):
                found = work()
            self.result["under_way"] = None
            return found
        except Exception as error:
            traceback.print_exc()
            self.drop(failed, name, part, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
        gc.collect()
        self._recover(name)
        return None

    def drop(self, failed: dict[str, str], name: str, part: str, reason: str) -> None:
        """Note what cannot be measured."""
        failed[part], self.result["under_way"] = reason, None
        self.report(f"{name}: left out: {reason}")

    def _recover(self, name: str) -> None:
        """Some errors leave a process nothing of the device: then the next one goes on."""
        if not torch.cuda.is_available():
            return
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            self.report(f"{name}: the device is lost to this process: {str(error).splitlines()[0]}")
            os._exit(HUNG)
