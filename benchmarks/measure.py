"""What every benchmark here needs: interleaved rounds, medians with intervals, results that outlive their process."""

from __future__ import annotations

import faulthandler
import gc
import json
import math
import os
import platform
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Self, TypeVar

import psutil
import torch

PACKAGES = ("fastretina", "torch", "torchvision", "numpy", "numba", "pillow", "simplejpeg", "opencv-python-headless", "ffcv")
PEERS = ("nvidia-dali-cuda130", "spdl", "nvidia-nvimgcodec-cu13", "nvidia-nvjpeg", "triton")
FULL_TRAIN_SET = 28_100  # images in the training set that this project exists for
HUNG = 4  # exit code of a process that the watchdog ends
_LAST_RESORT_S = 15.0  # later, from a thread that needs no Python: what hangs may hold the interpreter's lock
# How the reason for leaving something out begins where it ended a process.
FATAL = ("hung", "two processes ended")
K = TypeVar("K")
Found = TypeVar("Found")


def environment(**more: str) -> dict[str, str]:
    """For a process that runs a script of this folder, which imports its neighbours: what a command starts may not, see cli.run."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"} | more


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result may depend on; those not installed are left out."""
    found = {"python": platform.python_version()}
    for package in (*PACKAGES, *PEERS):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


@cache
def hardware() -> dict[str, object]:
    """CPU model, usable cores, memory in GB, kernel; and the GPU where torch sees one."""
    found: dict[str, object] = {
        "cpu": _first("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": " ".join([platform.system(), *platform.release().split(".")[:2]]),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "gpu_memory_gb": round(properties.total_memory / 1e9, 1), "cuda": torch.version.cuda}
    return found


def command() -> str:
    """What repeats this run, from the project's root, wherever that is."""
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def save(path: Path | None, result: Mapping[str, object]) -> None:
    """Write a result as JSON, with what it was measured on; without a path nothing.

    Whoever is killed in it leaves the file as it was before: a benchmark of several parts saves after each.
    """
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps({**result, "versions": versions(), "hardware": hardware()}, indent=2) + "\n")
    temporary.replace(path)


class Utilisation:
    """While entered, asks a CUDA device 20 times a second how busy it is.

    Attributes:
        mean: per cent of the time in which a kernel ran, or None; why: the reason for None.
    """

    def __init__(self, device: str) -> None:
        self.mean: float | None = None
        self.why = "" if device == "cuda" else f"{device} is no CUDA device"
        self._found: list[float] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        if not self.why:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()
        if self._found:
            self.mean = statistics.fmean(self._found)

    def _watch(self) -> None:
        try:
            while not self._over.wait(0.05):
                self._found.append(float(torch.cuda.utilization()))
        except Exception as error:  # NVML's binding is not installed, or its driver does not tell
            self.why = f"torch.cuda.utilization: {str(error).splitlines()[0]}"


def private_mb() -> float:
    """Private memory in MB of this process and its children: anonymous pages; those of mapped files are the page cache's."""
    me, kb = psutil.Process(), 0
    for process in [me, *me.children(recursive=True)]:
        with suppress(ProcessLookupError, FileNotFoundError):  # it has ended, whether its parent has asked for that or not
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
            kb += sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))
    return kb * 1024 / 1e6


def cpu_seconds() -> float:
    """CPU time in s of this process and its living children."""
    me = psutil.Process()
    return time.process_time() + sum(sum(child.cpu_times()[:2]) for child in me.children(recursive=True))


def _first(path: str, key: str) -> str:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Median of `samples` and the narrowest interval of order statistics that holds the true median with >= 95 %.

    The number of samples below the true median is binomial (n, 1/2) whatever the distribution, so no assumption is
    made. With fewer than 6 samples no interval reaches 95 %: then it is the whole range, and `confidence` says how much
    that is (5 samples: 93.75 %). Keys: median, low, high, confidence, n.
    """
    ordered = sorted(samples)
    n = len(ordered)
    if n == 0:
        raise ValueError("no samples")
    k = 0  # symmetric interval from the k-th smallest to the k-th largest; misses with twice the tail of k successes
    while k + 1 < (n + 1) // 2 and 1 - 2 * _tail(n, k + 1) >= 0.95:
        k += 1
    return {
        "median": statistics.median(ordered),
        "low": ordered[k],
        "high": ordered[n - 1 - k],
        "confidence": max(0.0, 1 - 2 * _tail(n, k)),
        "n": n,
    }


def _tail(n: int, k: int) -> float:
    """P(at most k of n fair coins show heads)."""
    return float(sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def interleave(sides: Mapping[K, Callable[[], float]], rounds: int, pause: float = 0.3) -> dict[K, list[float]]:
    """Call every side once untimed, then `rounds` times in turn; the order within a round alternates.

    Each call returns its own measurement (a throughput, seconds, ...). A busy neighbour then hits all sides alike, and
    `pause` seconds between calls let the OpenMP threads of the last one stop spinning (200 ms) before the next.
    """
    names = list(sides)
    for name in names:
        sides[name]()
        time.sleep(pause)
    results: dict[K, list[float]] = {name: [] for name in names}
    for round_number in range(rounds):
        for name in names if round_number % 2 == 0 else reversed(names):
            results[name].append(sides[name]())
            time.sleep(pause)
    return results


def brief(value: Any) -> Any:
    """The same with medians in place of summaries."""
    if isinstance(value, dict):
        return f"{value['median']:,.4g}" if "median" in value else {key: brief(part) for key, part in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def timed(work: Callable[[], Any], device: torch.device, rounds: int, calls: int = 1) -> list[float]:
    """Seconds of one call of `work`, `rounds` times after two untimed ones, each over so many calls."""

    def synchronised() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    found = []
    for number in range(rounds + 2):
        start = synchronised()
        for _ in range(calls):
            work()
        if number >= 2:
            found.append((synchronised() - start) / calls)
    return found


def roof(device: torch.device, rounds: int) -> dict[str, Any]:
    """TFLOP/s of a square matrix product in bfloat16 (on a CPU float32), GB/s of a copy (bytes read + bytes written)."""
    large = device.type == "cuda"
    side, size = (8192, 1 << 30) if large else (256, 1 << 22)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16 if large else torch.float32) for _ in range(2))
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    product = timed(lambda: torch.matmul(a, b), device, rounds, 10)
    copy = timed(lambda: target.copy_(source), device, rounds, 10)
    return {
        "matmul_tflops": summary([2 * side**3 / seconds / 1e12 for seconds in product]),
        "copy_gb_per_second": summary([2 * size / seconds / 1e9 for seconds in copy]),
    }


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
        self.result |= {"processes": self.result["processes"] + 1, "command": command(), "ended": None}

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

    def attempt(self, failed: dict[str, str], where: str, part: str, seconds: float, work: Callable[[], Found]) -> Found | None:
        """What `work` gives; None where it raises, with the reason in failed[part], or where that holds one already.

        Where it takes so many seconds and `grace` more, the reason is noted and the process ends with HUNG. What was under way as a
        process was killed is tried once more by the next: it need not have been the reason.
        """
        if part in failed:
            return None
        name, before = f"{where}, {part}", self.result["under_way"]
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


class Watchdog:
    """Looks at one piece of work at a time."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._ends: float | None = None
        self._hung: Callable[[], None] = lambda: None
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @contextmanager
    def over(self, seconds: float, hung: Callable[[], None]) -> Iterator[None]:
        """While entered for longer than that: `hung` is called, from another thread, and the process ends with HUNG.

        Where not even that is possible the process ends 15 s later, with 1, and where it was is on standard error.
        """
        with self._changed:
            self._ends, self._hung = time.monotonic() + seconds, hung
            self._changed.notify()
        faulthandler.dump_traceback_later(seconds + _LAST_RESORT_S, exit=True, file=2)
        try:
            yield
        finally:
            with self._changed:  # held by the other thread from its decision to the end of the process
                self._ends = None
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        with self._changed:
            while True:
                left = None if self._ends is None else self._ends - time.monotonic()
                if left is not None and left <= 0:
                    try:
                        self._hung()
                    finally:
                        os._exit(HUNG)
                self._changed.wait(left)
