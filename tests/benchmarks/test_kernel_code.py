"""The warp kernel as it is compiled for GPUs, which Triton's interpreter does not show."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
from kernel_on_cpu import WRITTEN_FOR, Compiled, Unreadable, features
from warps import agrees, surrounded

from fastretina.loading.augment import Augment, gpu

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
STORES = {"float32": "STG.E.128", "bfloat16": "STG.E.64", "float16": "STG.E.64", "uint8": "STG.E"}


TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "uint8": torch.uint8}
INSTRUCTIONS = {"bfloat16": "avx512bf16", "float16": "f16c"}  # without which a CPU calls a library that is not there
LEVELS = {"float32": 0.01, "bfloat16": 0.51, "float16": 0.07, "uint8": 0.51}  # largest error, mostly of rounding
PRINT_IR = """
import sys, kernel_code
for words in sys.argv[1:]:
    dtype, recolour = words.split()
    print(kernel_code.compiled(90, dtype, recolour == "True", True)["llir"], end="\\0")
"""


def without_interpreter(tmp_path: Path) -> dict[str, str]:
    """The environment of a process in which Triton compiles, into a cache of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(BENCHMARKS.parent), str(BENCHMARKS), os.environ.get("PYTHONPATH", "")])
    return environment | {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "PYTHONPATH": path}


@pytest.mark.parametrize("capability", [75, 90])
def test_every_variant_compiles_without_spills_and_with_wide_accesses(capability, tmp_path):
    out = tmp_path / "code.json"
    command = [sys.executable, str(BENCHMARKS / "kernel_code.py"), "--capability", str(capability), "--json", str(out)]
    done = subprocess.run(command, env=without_interpreter(tmp_path), capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    variants = json.loads(out.read_text())["variants"]
    assert len(variants) == 12
    for name, counts in variants.items():
        step = counts["in_a_step"]
        assert counts["spilled_bytes"] == 0, name
        assert step["flushing_denormals"] == 0, f"{name}: bytes read as denormals would become zero"
        # Two rows of two words for each of four pixels, and no byte by itself.
        assert step["loads"] == {"LDG.E.64": 16}, name
        if "any resolution" not in name:
            assert step["stores"] == {STORES[name.split(",")[0]]: 3}, name


@pytest.mark.parametrize("dtype", TYPES)
def test_what_is_compiled_for_a_gpu_agrees_with_float64_thread_by_thread(dtype, tmp_path, monkeypatch):
    if dtype in INSTRUCTIONS and not features().get(INSTRUCTIONS[dtype]):
        pytest.skip(f"this CPU has no {INSTRUCTIONS[dtype]}")
    variants = (False, True)
    words = [f"{dtype} {recolour}" for recolour in variants]
    printed = subprocess.run(
        [sys.executable, "-c", PRINT_IR, *words], env=without_interpreter(tmp_path), capture_output=True, text=True, check=True
    )
    try:
        kernel = Compiled(dict(zip(variants, printed.stdout.split("\0")[:-1], strict=True)))
    except Unreadable as error:
        if triton.__version__.startswith(WRITTEN_FOR):
            raise
        pytest.skip(f"Triton's LLVM IR is of another kind here: {error}")
    monkeypatch.setattr(gpu, "_warp_kernel", kernel)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (h, w, 3), dtype=np.uint8) for h, w in ((64, 64), (1, 1), (5, 1), (1, 6), (33, 70), (90, 31))]
    for recolour in variants:
        sources = [surrounded(image, number % 4, 255, "cpu") for number, image in enumerate(images)]
        augment = Augment.full() if recolour else Augment(zoom=(0.4, 1.6), shift=0.3)
        for resolution in (16, 80):  # half a tile, and two and a half by one and a quarter
            agrees(images, sources, augment, resolution, TYPES[dtype], "cpu", LEVELS[dtype])
