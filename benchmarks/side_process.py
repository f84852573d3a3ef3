"""One side of a comparison in a process of its own, so that its threads, memory and CPU time are its own.

Run by throughput.py: `python side_process.py SIDE TASK_JSON`. Says how long the first batch took, then answers each line of
standard input with one line of JSON: "epoch" times one, "gap" measures the pause between epochs. Ends with its input.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from measure import Utilisation, cpu_seconds, environment, private_mb
from sides import FILES, IMPORTS, SIDES, Epoch, Task

_MARK = "\x1e"  # starts our lines; whatever a peer prints is passed over


class Moment(NamedTuple):
    """What the clocks show: seconds of wall time, of CPU time, and of a training side's waiting for data."""

    wall: float
    cpu: float
    wait: float


def measure_epoch(epoch: Epoch, device: str) -> dict[str, Any]:
    """One epoch: images, wall and CPU seconds, median seconds between batches.

    An untimed epoch goes before it, without a pause between: it uses up what threads that run on have made since the last question.
    The clock then runs from one seam to the next, so that as much is made ahead at its end as at its start: of a loader that runs
    on what it always has, of one whose epochs end nothing. The time that it takes to start anew with an epoch is in it.

    On a GPU also its utilisation in per cent (None, and why, where it cannot be asked) and the memory in use at the end, in GB,
    which holds what torch's allocator has at its peak and what decoder libraries have of their own.
    """
    extra: dict[str, float] = getattr(epoch, "extra", {})

    def moment() -> Moment:
        if device == "cuda":
            torch.cuda.synchronize()  # what was only queued has not been done
        return Moment(time.perf_counter(), cpu_seconds(), extra.get("wait", 0.0))

    for _ in epoch():
        pass
    with Utilisation(device) as busy:
        start, images, times = moment(), 0, []
        for size in epoch():
            images += size
            times.append(time.perf_counter())
        end = moment()
    found: dict[str, Any] = {
        "images": images,
        "wall": end.wall - start.wall,
        "cpu": end.cpu - start.cpu,
        "interval": statistics.median(b - a for a, b in itertools.pairwise(times)) if len(times) > 1 else 0.0,
        "private_mb": private_mb(),
    }
    if "wait" in extra:
        found["wait"] = end.wait - start.wait
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        found |= {"gpu_utilisation": busy.mean, "gpu_utilisation_why": busy.why, "device_memory_gb": (total - free) / 1e9}
    return extra | found


def measure_gap(epoch: Epoch, device: str) -> dict[str, float]:
    """The wait in s for the first batch of an epoch, for a consumer whose step takes twice as long as the loader needs.

    Such a consumer never waits inside an epoch; what it waits at the seam is the loader's doing. Longest of three seams.
    """
    step = 2 * measure_epoch(epoch, device)["interval"]
    gaps = []
    ended: float | None = None
    for _ in range(4):
        first = True
        for _ in epoch():
            if first and ended is not None:
                gaps.append(time.perf_counter() - ended)
            first = False
            time.sleep(step)
            ended = time.perf_counter()
    return {"gap": max(gaps)}


class SideProcess:
    """The parent's end: starts the process, asks for epochs. A side that ends, or does not answer in time, is a RuntimeError."""

    def __init__(self, side: str, task: Any, patience: float = 300.0, script: str = __file__) -> None:
        """task: a dataclass, which the process gets as JSON. patience: seconds that it has for its first batch, and for each answer
        after that. script: what it runs."""
        command = [sys.executable, str(Path(script).resolve()), side, json.dumps(asdict(task))]
        self.name, self._patience = side, patience
        # A file: from a pipe that nobody reads until the end, a side that writes 64 KB would wait for ever.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # close() closes it
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=environment()
        )
        try:
            self.ready = self._answer()
        except RuntimeError:
            self.close()
            raise

    def ask(self, question: str) -> dict[str, Any]:
        """ "epoch" or "gap": see measure_epoch, measure_gap."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # what it said as it ended is told below
            self._process.stdin.write(question + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        late = threading.Event()

        def end() -> None:
            late.set()
            self._kill()

        timer = threading.Timer(self._patience, end)
        timer.start()
        try:
            assert self._process.stdout is not None
            for line in self._process.stdout:
                if line.startswith(_MARK):
                    answer: dict[str, Any] = json.loads(line[1:])
                    return answer
        finally:
            timer.cancel()
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - 1500))
        said = self._errors.read().decode(errors="replace")
        if late.is_set():
            raise RuntimeError(f"{said}\n{self.name} gave no answer in {self._patience:g} s".lstrip())
        raise RuntimeError(f"{self.name} ended: {said}")

    def _kill(self) -> None:
        """It, and the processes that it has started, which would keep its pipe open."""
        with suppress(psutil.NoSuchProcess):
            for process in [*psutil.Process(self._process.pid).children(recursive=True), self._process]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()

    def close(self) -> None:
        self._kill()
        with suppress(BrokenPipeError):
            self._process.communicate()
        self._errors.close()


def say(answer: dict[str, Any]) -> None:
    """To the parent."""
    print(_MARK + json.dumps(answer), flush=True)


def main() -> None:
    side, task = sys.argv[1], Task(**json.loads(sys.argv[2]))
    importlib.import_module(IMPORTS.get(side, "fastretina.loading.loader"))  # imports aside
    if side in FILES:
        FILES[side](task)
    start = time.perf_counter()
    if task.device == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call]  # the context, as an import, is not the loader's
    epoch = SIDES[side](task)
    iterator = iter(epoch())
    next(iterator)
    say({"cold_first_batch": time.perf_counter() - start})
    for _ in iterator:
        pass
    for question in sys.stdin:
        say(measure_gap(epoch, task.device) if question.strip() == "gap" else measure_epoch(epoch, task.device))


if __name__ == "__main__":
    main()
