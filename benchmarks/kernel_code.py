"""What the warp kernel compiles to for a GPU, counted without one: instructions a pixel, registers, spills, widths of its accesses.

    python benchmarks/kernel_code.py --json out.json

Triton brings NVIDIA's assembler and disassembler, so that all of it but the time can be seen on any machine. A count does not say
how long an instruction takes. An H100 issues 90 to 100 in the time in which its memory moves a pixel's nine bytes.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from measure import command, save
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastretina.cli import run
from fastretina.loading.augment import gpu

TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "uint8": "u8"}
PIXELS = 4  # that a thread makes in one step of its tile
STEPS = gpu._TILE_HEIGHT.value // gpu._STEP_HEIGHT.value
_INSTRUCTION = re.compile(r"/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")


@dataclass(frozen=True)
class KernelCode:
    """What the warp kernel compiles to, counted without a GPU."""

    json: Path | None = None
    """Where to write the results."""
    capability: int = 90
    """Compute capability, without its point: 90 is an H100."""


def compiled(capability: int, dtype: str, recolour: bool, whole: bool) -> dict[str, Any]:
    """One variant of the kernel, by stage ("llir": LLVM IR as text, "cubin": machine code); whole: for resolutions that are
    multiples of 16."""
    pointers = {"addresses": "i64", "heights": "i32", "widths": "i32", "affine": "fp32", "colour": "fp32", "norm": "fp32"}
    constants = {"recolour": recolour, "whole": whole}
    signature = {name: f"*{element}" for name, element in pointers.items()}
    signature |= {"output": f"*{TYPES[dtype]}", "resolution": "i32"} | dict.fromkeys(constants, "constexpr")
    # What Triton finds out of real arguments: torch's memory begins at multiples of 16.
    aligned = range(len(pointers) + 1 + whole)
    source = ASTSource(
        gpu._warp_kernel, signature=signature, constexprs=constants, attrs={(n,): [["tt.divisibility", 16]] for n in aligned}
    )
    stages: dict[str, Any] = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4}).asm
    return stages


def counted(code: bytes) -> dict[str, Any]:
    """Counts of one variant's machine code. Per pixel: its part of a step, and of what comes before the steps."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text, usage = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-sass", "-res-usage")
        )
    found = [(int(address, 16), name, rest) for address, name, rest in _INSTRUCTION.findall(text)]
    numbers = {address: number for number, (address, _, _) in enumerate(found)}
    loops = [
        (numbers[int(match[1], 16)], number)
        for number, (address, name, rest) in enumerate(found)
        if name == "BRA" and (match := re.search(r"0x([0-9a-f]+)", rest)) and int(match[1], 16) < address
    ]
    (start, end), *others = loops
    if others:
        raise ValueError("the kernel has more loops than the one over its steps")
    names = Counter(name.removesuffix(".SYS") for _, name, _ in found[start : end + 1])  # how sm_75 says what others leave out
    registers, stack = (int(re.findall(rf"{key}:(\d+)", usage)[0]) for key in ("REG", "STACK"))
    return {
        "instructions_per_pixel": round(((end + 1 - start) + start / STEPS) / PIXELS, 1),
        "registers": registers,
        "spilled_bytes": stack,
        "in_a_step": {
            "loads": {name: count for name, count in names.items() if name.startswith("LDG")},
            "stores": {name: count for name, count in names.items() if name.startswith("STG")},
            "slow_conversions": sum(count for name, count in names.items() if name.split(".")[0] in {"I2F", "F2I", "F2F", "FRND"}),
            "flushing_denormals": sum(count for name, count in names.items() if re.match(r"F(ADD|MUL|FMA)\.\S*FTZ", name)),
        },
    }


def main(config: KernelCode) -> None:
    """What the warp kernel compiles to, counted without a GPU."""
    variants: dict[str, dict[str, Any]] = {}
    for dtype in TYPES:
        for recolour, whole in ((False, True), (True, True), (False, False)):
            parts = [dtype, "recoloured" * recolour, "any resolution" * (not whole)]
            name = ", ".join(part for part in parts if part)
            variants[name] = counts = counted(compiled(config.capability, dtype, recolour, whole)["cubin"])
            print(
                f"{name}: {counts['instructions_per_pixel']} instructions a pixel, {counts['registers']} registers, "
                f"{counts['spilled_bytes']} bytes spilled, {counts['in_a_step']}"
            )
    save(
        config.json,
        {
            "benchmark": "kernel_code",
            "command": command(),
            "capability": config.capability,
            "variants": variants,
        },
    )


if __name__ == "__main__":
    run(KernelCode, main)
