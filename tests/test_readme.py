"""Every command of the README runs, on a small data set: as it stands there, with flags added that make it small.

Those of the program run in this process, which has imported torch; that they are programs is shown by `make` and test_wheel.py.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import pytest

from fastretina import cli
from tests.conftest import one_pixel_pictures, signals_kept

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.strip() for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines() if line.strip()
]

SMALL_RUN = "--epochs 1 --resolution 32 --batch-size 16"
# What is added to a command, by how it begins; where two fit, the longer one. The last of a repeated flag counts.
SMALLER = {
    "make demo": "SAMPLE_FLAGS='--train 60 --test 20' DEMO_FLAGS='--epochs 1 --resolution 32'",
    "make bench": "BENCH_EXTRAS=dev SAMPLE_FLAGS='--train 60 --test 20' BENCH_FLAGS=--help",  # what it calls is called below
    "python tools/make_sample.py": "--train 60 --test 20",
    "fastretina pack": "",
    "fastretina verify": "",
    "fastretina train": SMALL_RUN,
    "python -m fastretina.train --train": f"{SMALL_RUN} --arch resnet18",
    "fastretina compare": f"{SMALL_RUN} --archs resnet10",
    "fastretina evaluate": "",
    "fastretina predict": "",
    "fastretina export": "--no-time",
    "python benchmarks/throughput.py": "--rounds 1 --workers 1",
    "python benchmarks/pack.py": "--count 24 --rounds 1",
    "python benchmarks/engine.py": "--samples 2000 --only opening",  # tests/benchmarks runs every piece
}
# Run by CI around this very test.
ELSEWHERE = {"make test"}
NEEDS_FFCV = "python benchmarks/pack.py"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with the checkout's files as links, the small sample data set packed, and the same in Kaggle's layout."""
    place = tmp_path_factory.mktemp("readme")
    for entry in ROOT.iterdir():
        if entry.name not in {"data", "runs", ".git", ".venv"}:
            (place / entry.name).symlink_to(entry)
    # Ready, so that no set-up is made: through a link it would install this folder into the interpreter of the checkout.
    (place / ".venv" / "bin").mkdir(parents=True)
    (place / ".venv" / "bin" / "python").symlink_to(sys.executable)
    made_of = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + (ROOT / "tools" / "setup.sh").read_bytes()).hexdigest()
    (place / ".venv" / ".ready").write_text(f"{made_of} dev\n")
    done = call("make data SAMPLE_FLAGS='--train 60 --test 20'", place)
    assert done.returncode == 0, done.stderr[-2000:]
    sample = place / "data" / "sample"
    names, grades = ((sample / f"train_{kind}.csv").read_text().split() for kind in ("img", "label"))
    rows = [f"{name},{grade}" for name, grade in zip(names, grades, strict=True)]
    (place / "data" / "trainLabels.csv").write_text("\n".join(["image,level", *rows]) + "\n")
    (place / "data" / "kaggle").symlink_to(sample / "data")
    return place


def call(command: str, place: Path) -> subprocess.CompletedProcess[str]:
    python = shlex.quote(sys.executable)
    command = re.sub(r"^python ", f"{python} ", command)
    return subprocess.run(
        command.replace("make ", f"make PYTHON_IN={python} ", 1) if command.startswith("make ") else command,
        shell=True, cwd=place, capture_output=True, text=True, timeout=240, check=False,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip


def program(command: str) -> Callable[[], None] | None:
    """What `fastretina train ...` and `python -m fastretina.train ...` run; None for other commands."""
    words = shlex.split(command)
    if words[0] == "fastretina":
        return lambda: cli.main(words[1:])
    if words[:2] == ["python", "-m"]:
        return lambda: import_module(words[2]).run_command(words[3:])
    if words[:2] == ["python", "benchmarks/throughput.py"]:
        return lambda: throughput(words[1:])
    return None


def throughput(words: list[str]) -> None:
    """The benchmark, FFCV in the last comparison of cached data alone: in each it compiles for a quarter of a minute, and what it
    does in the last holds what it does in the others. That it is a program `make bench` shows."""
    import throughput

    *_, last = (one for one in throughput.COMPARISONS if one.group == "resident")
    fewer = [
        one if one is last else replace(one, sides=tuple(side for side in one.sides if side != "ffcv_raw"))
        for one in throughput.COMPARISONS
    ]
    with patch.object(throughput, "COMPARISONS", fewer), patch.object(sys, "argv", words):
        throughput.run(throughput.ThroughputBenchmark, throughput.main)


def test_the_readme_names_every_command():
    text = "\n".join(COMMANDS)
    for command in ("make demo", "make test", "make bench", *SMALLER):
        assert command in text, f"{command} is not in the README"


@pytest.mark.usefixtures("one_thread")
def test_every_readme_command_runs_in_order(workplace, monkeypatch, capfd):
    monkeypatch.chdir(workplace)
    for command in COMMANDS:
        if command in ELSEWHERE:
            continue
        known = [start for start in SMALLER if command.startswith(start)]
        assert known, f"{command}: no entry in SMALLER"
        start = max(known, key=len)
        if start == NEEDS_FFCV and find_spec("ffcv") is None:
            continue
        command = f"{command} {SMALLER[start]}"
        if (run := program(command)) is not None:
            with signals_kept(), one_pixel_pictures(), pytest.raises(SystemExit) as end:
                run()
            assert end.value.code == 0, f"{command}\n{capfd.readouterr().err[-2000:]}"
            continue
        done = call(command, workplace)
        assert done.returncode == 0, f"{command}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}"
    assert (workplace / "runs" / "demo" / "report.html").is_file()
    assert (workplace / "runs" / "grades.csv").read_text().count("\n") >= 80


def test_the_python_examples_of_the_readme_run_after_its_commands(workplace):
    examples = "".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    code = examples.replace("resolution=512", "resolution=32").replace("range(10)", "range(2)")
    done = subprocess.run([sys.executable, "-c", code], cwd=workplace, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
