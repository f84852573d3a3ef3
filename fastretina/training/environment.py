"""What the weights of a run depend on besides its settings and data: how many threads and ranks, which instructions and libraries.

Sums of floats are rounded in another order with another number of threads, wider vectors or another library, and a multiplication
and an addition that are one instruction are rounded once, not twice. Measured after eight steps of a ResNet18 at 32 px, of 122
tensors of weights: two threads instead of one change 99, by up to 3e-6; AVX2 instead of AVX-512 92, by 1e-6; a loader without FMA
100, by 3e-6. More steps carry it further.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version

import cv2
import numba
import torch
from numba.core.codegen import get_host_cpu_features

from fastretina.models.precision import device_name
from fastretina.training.distributed import World
from fastretina.training.run_info import versions

_INSTRUCTIONS = ("fma", "avx2", "avx512f")  # that decide how the loader's kernels round


def environment(world: World) -> dict[str, str | int]:
    """Of this rank, by what it is called in a message."""
    told = numba.config.CPU_FEATURES  # NUMBA_CPU_FEATURES
    enabled = (get_host_cpu_features() if told is None else told).split(",")
    return {
        "ranks": world.size,
        "device": device_name(world.device).rpartition(", ")[0] or device_name(world.device),
        "threads": torch.get_num_threads(),
        "torch's instructions": torch.backends.cpu.get_cpu_capability(),
        "the loader's instructions": ", ".join(name for name in _INSTRUCTIONS if f"+{name}" in enabled) or "none of these",
        **versions(),
        "numba": numba.__version__,
        "opencv": cv2.__version__,
        "simplejpeg": version("simplejpeg"),
    }


def resume_note(was: Mapping[str, str | int], now: Mapping[str, str | int]) -> str | None:
    """What must be said of a run that goes on in another environment than it began in; None where it is the same."""
    others = [f"{name}: was {was.get(name, 'unknown')}, now {value}" for name, value in now.items() if was.get(name) != value]
    if not others:
        return None
    return (
        "goes on with the same samples in the same order, but its weights will not be those of a run that was never stopped, since "
        f"other things compute them ({'; '.join(others)})"
    )
