"""Which device to train on, and in which number format: AMP where the hardware has it, float32 where it would be emulated."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Literal

import torch

from fastretina.errors import UsageError

AmpDtype = Literal["auto", "bfloat16", "float16"]


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


def choose_precision(amp: bool, device: torch.device, wanted: AmpDtype = "auto") -> Precision:
    """The number format for `--amp` on a device; `wanted` by `--amp-dtype`. UsageError for float16 on a CPU.

    CUDA: bfloat16 from compute capability 8.0 on, float16 with a gradient scaler before. CPU: bfloat16 only where the CPU has
    instructions for it. Measured, ResNet18, channels-last, 2 cores, AVX512-BF16 (AMD EPYC, torch 2.14): bf16 trains 1.8 times as
    fast as float32 at 128 px and 2.1 times at 256 px; emulated it runs at 0.47 (AVX-512) or 0.09 (AVX2) of float32's speed.
    """
    if not amp:
        return Precision(device.type, None, "float32 (--amp is off)")
    if device.type == "cuda":
        if wanted == "float16":
            return Precision("cuda", torch.float16, "float16 autocast with gradient scaling (--amp-dtype)")
        if wanted == "bfloat16" or torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision("cuda", torch.bfloat16, "bfloat16 autocast (--amp)")
        return Precision("cuda", torch.float16, "float16 autocast with gradient scaling (--amp; this GPU has no bfloat16)")
    if wanted == "float16":
        raise UsageError("--amp-dtype float16: is for CUDA; a CPU has bfloat16 (auto) or float32 (without --amp)")
    if wanted == "bfloat16":
        return Precision("cpu", torch.bfloat16, "bfloat16 autocast (--amp-dtype)")
    instructions = cpu_bf16_instructions()
    if instructions:
        return Precision("cpu", torch.bfloat16, f"bfloat16 autocast (--amp; this CPU has {instructions})")
    return Precision("cpu", None, "float32: --amp has no effect, this CPU would only emulate bfloat16, 2 to 12 times slower")


def cpu_bf16_instructions() -> str | None:
    """The name of this CPU's bfloat16 matrix instructions that torch uses, or None where it would emulate them."""
    query = getattr(torch.cpu, "get_capabilities", None)
    found = query() if query is not None else {}
    for key, name in (("amx_bf16", "AMX-BF16"), ("avx512_bf16", "AVX512-BF16")):
        if found.get(key):
            return name
    return None


def device_name(device: torch.device) -> str:
    """What a reader of a report would call the device, e.g. `NVIDIA H100 80GB HBM3` or `AMD EPYC, 2 threads`."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    query = getattr(torch.cpu, "get_capabilities", None)
    found = query().get("cpu_name") if query is not None else None
    threads = torch.get_num_threads()
    return f"{found or platform.processor() or platform.machine()}, {threads} thread{'s' if threads != 1 else ''}"
