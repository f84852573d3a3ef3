"""Which device to train on, and in which number format: AMP where the hardware has it, float32 where it would be emulated."""

from __future__ import annotations

import copy
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastretina.errors import UsageError
from fastretina.models.options import AmpDtype
from fastretina.models.timm_backbones import sees_one_side

TRIAL_IMAGES, TRIAL_SIDE, TRIAL_ROUNDS = 8, 128, 3  # at most: a second or two for ResNet18 on one core with AVX-512


@dataclass(frozen=True)
class Precision:
    """How the forward pass computes.

    Attributes:
        device_type: "cpu" or "cuda". dtype: torch.bfloat16 or torch.float16 under autocast, None for plain float32.
        note: one line for the user: what was chosen and why.
    """

    device_type: str
    dtype: torch.dtype | None
    note: str

    @property
    def name(self) -> str:
        """`float32`, `bfloat16` or `float16`."""
        return str(self.dtype or torch.float32).removeprefix("torch.")

    def autocast(self) -> torch.autocast:
        """A fresh autocast context; it does nothing in float32."""
        return torch.autocast(self.device_type, dtype=self.dtype or torch.bfloat16, enabled=self.dtype is not None)

    def scaler(self) -> torch.amp.GradScaler:
        """A gradient scaler: at work for float16 only, whose gradients underflow without it; bfloat16 has float32's range."""
        return torch.amp.GradScaler(self.device_type, enabled=self.dtype is torch.float16)


def choose_device(name: str) -> torch.device:
    """`auto` (CUDA where there is one), `cpu` or `cuda`. UsageError where CUDA is asked for and absent."""
    present = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if present else "cpu")
    if name == "cuda" and not present:
        raise UsageError("--device cuda: torch sees no CUDA device here; use --device cpu or auto")
    return torch.device(name)


def choose_precision(
    amp: bool,
    device: torch.device,
    wanted: AmpDtype = "auto",
    speedup: Callable[[], float] | None = None,
    began: str | None = None,
) -> Precision:
    """The number format for `--amp` on a device; `wanted` by `--amp-dtype`. UsageError for float16 on a CPU.

    CUDA: bfloat16 from compute capability 8.0 on, float16 with a gradient scaler before. CPU: bfloat16 only where the CPU has
    instructions for it and it is faster. The first is not enough: ResNet18, channels-last, torch 2.14, trained in bfloat16 at 1.8
    (128 px) and 2.1 times (256 px) the speed of float32 on an AMD EPYC with AVX512-BF16, at 0.36 times (96 px) on an Intel Xeon
    that has it, too; emulated it runs at 0.47 (AVX-512) or 0.09 (AVX2) of float32's speed.

    speedup: says how many times as fast bfloat16 is on this CPU (see `bf16_speedup`); None: instructions must do, so that the
    answer is the same each time.
    began: the `name` of the precision that a run began in, which goes on in it: two trials of one machine could differ.
    """
    if not amp:
        return Precision(device.type, None, "float32 (--amp is off)")
    if device.type == "cuda":
        if wanted == "bfloat16" or (wanted == "auto" and torch.cuda.is_bf16_supported(including_emulation=False)):
            return Precision("cuda", torch.bfloat16, "bfloat16 autocast (--amp)")
        why = "--amp-dtype" if wanted == "float16" else "--amp; this GPU has no bfloat16"
        return Precision("cuda", torch.float16, f"float16 autocast with gradient scaling ({why})")
    if wanted == "float16":
        raise UsageError("--amp-dtype float16: is for CUDA; a CPU has bfloat16 (auto) or float32 (without --amp)")
    if wanted == "bfloat16":
        return Precision("cpu", torch.bfloat16, "bfloat16 autocast (--amp-dtype)")
    instructions = cpu_bf16_instructions()
    if not instructions:
        return Precision("cpu", None, "float32: --amp has no effect, this CPU would only emulate bfloat16, 2 to 12 times slower")
    if began in ("float32", "bfloat16"):
        return Precision("cpu", torch.bfloat16 if began == "bfloat16" else None, f"{began}, as this run began (--amp)")
    if speedup is None:
        return Precision("cpu", torch.bfloat16, f"bfloat16 autocast (--amp; this CPU has {instructions})")
    ratio = speedup()
    found = f"bfloat16 ({instructions}) is {ratio:.1f} times as fast as float32 here"
    if ratio > 1:
        return Precision("cpu", torch.bfloat16, f"bfloat16 autocast (--amp; {found})")
    return Precision("cpu", None, f"float32: --amp has no effect, {found}")


def bf16_speedup(model: nn.Module, images: tuple[int, ...]) -> float:
    """How many times as fast a CPU computes the model's forward and backward pass in bfloat16 as in float32.

    images: (B, 3, R, R) of a training step, of which 2 to 8 of at most 128 px are tried, or of R where the network takes no other
    side. The best of three rounds each, in turn,
    after one that does not count. The model and torch's random state stay as they are.
    """
    count, side = max(2, min(images[0], TRIAL_IMAGES)), images[2] if sees_one_side(model) else min(images[2], TRIAL_SIDE)
    twin = copy.deepcopy(model).train()
    zeros = torch.zeros(count, 3, side, side).contiguous(memory_format=torch.channels_last)

    def seconds(precision: Precision) -> float:
        start = time.perf_counter()
        with precision.autocast():
            answer: Tensor = twin(zeros)
        torch.autograd.backward(answer.float().sum())
        return time.perf_counter() - start

    sides = [Precision("cpu", dtype, "") for dtype in (None, torch.bfloat16)]
    with torch.random.fork_rng([]):
        rounds = [[seconds(side) for side in sides] for _ in range(1 + TRIAL_ROUNDS)][1:]
    float32, bfloat16 = (min(times) for times in zip(*rounds, strict=True))
    ratio: float = float32 / bfloat16
    return ratio


def cpu_bf16_instructions() -> str | None:
    """The name of this CPU's bfloat16 matrix instructions that torch uses, or None where it would emulate them."""
    found = _cpu_capabilities()
    return "AMX-BF16" if found.get("amx_bf16") else "AVX512-BF16" if found.get("avx512_bf16") else None


def _cpu_capabilities() -> Mapping[str, Any]:
    found: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # an older torch has none
    return found


def device_name(device: torch.device) -> str:
    """What a reader of a report would call the device, e.g. `NVIDIA H100 80GB HBM3` or `AMD EPYC, 2 threads`."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    name = _cpu_capabilities().get("cpu_name") or platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads != 1 else ''}"
