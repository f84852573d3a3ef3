"""The device's own limits, which shares are told of: TFLOP/s of a matrix product, GB/s of a copy."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from measure import summary


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
