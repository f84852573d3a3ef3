"""The warp kernel as it is compiled for GPUs, which Triton's interpreter does not show."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
STORES = {"float32": "STG.E.128", "bfloat16": "STG.E.64", "float16": "STG.E.64", "uint8": "STG.E"}


@pytest.mark.parametrize("capability", [75, 90])
def test_every_variant_compiles_without_spills_and_with_wide_accesses(capability, tmp_path):
    # A process of its own, because Triton interprets kernels in this one; and a cache of its own, to compile them indeed.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(BENCHMARKS.parent)}
    out = tmp_path / "code.json"
    command = [sys.executable, str(BENCHMARKS / "kernel_code.py"), "--capability", str(capability), "--json", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    variants = json.loads(out.read_text())["variants"]
    assert len(variants) == 16
    for name, counts in variants.items():
        step = counts["in_a_step"]
        assert counts["spilled_bytes"] == 0, name
        assert step["flushing_denormals"] == 0, f"{name}: bytes read as denormals would become zero"
        if "planar" not in name:
            # Two rows of three words for each of four pixels, and no byte by itself.
            assert step["loads"] == {"LDG.E": 24}, name
        if "any resolution" not in name:
            assert step["stores"] == {STORES[name.split(",")[0]]: 3}, name
