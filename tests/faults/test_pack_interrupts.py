"""Ctrl-C in `write_beton`, called from Python: prompt, and nothing of it stays: no file, lock, descriptor, thread or process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_pack import SIZE, folder, jpeg, listing, picture, plain

PROGRAM = Path(__file__).parent / "interrupted_packs.py"
PROMPT = 5  # seconds until an error must have reached the user


@pytest.mark.tries(16, 200)
@pytest.mark.parametrize(("kind", "share"), [("passed through", 0.75), ("re-encoded", 0.25)])
def test_an_interrupted_call_leaves_nothing_and_the_next_one_works(kind: str, share: float, tmp_path, tries: int, tried) -> None:
    """Some of the moments in a call whose worker processes start, work and are ended; most in one that reads and publishes."""
    files, tries = plain(40) | {"77_left.jpeg": b"no image"}, round(share * tries)
    if kind == "re-encoded":
        files |= {f"{i + 100}_left.jpeg": jpeg(picture(400, 300, seed=i), progressive=True) for i in range(20)}
    root, out = folder(tmp_path / "in", files), tmp_path / "out"
    job = {"root": str(root), "out": str(out), "size": SIZE, "strikes": tries, "seed": tries}
    done = subprocess.run([sys.executable, PROGRAM, json.dumps(job)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["struck"] == tries
    assert found["longest"] < PROMPT
    assert listing(out) == ["o.beton", "o.beton.skipped.csv"]
    tried("converter: SIGINT in write_beton() at a random moment", tries)
