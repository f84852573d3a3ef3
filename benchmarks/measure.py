"""What every benchmark here needs: interleaved rounds, a median with its interval, and what it was measured on."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Self, TypeVar

PACKAGES = ("fastretina", "torch", "torchvision", "numpy", "numba", "pillow", "simplejpeg", "opencv-python-headless", "ffcv")
PEERS = ("nvidia-dali-cuda130", "webdataset", "nvidia-nvimgcodec-cu13", "nvidia-nvjpeg", "triton")
FULL_TRAIN_SET = 28_100  # images in the training set that this project exists for
K = TypeVar("K")


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
    """CPU model, usable cores, memory in GB, kernel; and the GPU where torch is already imported and sees one."""
    found: dict[str, object] = {
        "cpu": _first("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": " ".join([platform.system(), *platform.release().split(".")[:2]]),
    }
    try:
        import torch
    except ImportError:
        return found
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "gpu_memory_gb": round(properties.total_memory / 1e9, 1), "cuda": torch.version.cuda}
    return found


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
        import torch

        try:
            while not self._over.wait(0.05):
                self._found.append(float(torch.cuda.utilization()))
        except Exception as error:  # NVML's binding is not installed, or its driver does not tell
            self.why = f"torch.cuda.utilization: {str(error).splitlines()[0]}"


def private_bytes(pid: int) -> int:
    """Memory in bytes that is the process's alone: anonymous pages, not those of mapped files, which are the page cache's."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return next(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Anonymous:"))


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

    Each call returns its own measurement (a rate, seconds, ...). A busy neighbour then hits all sides alike, and
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
