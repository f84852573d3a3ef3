"""Pictures are the same whatever settings of matplotlib lie around, and none of these is a reason to fail."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

STYLE = b"axes.facecolor: red\nfont.size: 20\nlines.linewidth: 9\naxes.grid: True\nsavefig.bbox: tight\nnonsense: 3\n"
# In a process of its own, as matplotlib reads its settings only once; each folder holds settings of its own.
DRAW = """
import hashlib, os, sys
before = dict(os.environ), os.path.exists
import fastretina.report
assert (dict(os.environ), os.path.exists) == before
import matplotlib
assert matplotlib.rcParams == matplotlib.rcParamsDefault
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
figure = Figure(figsize=(2, 2))
figure.subplots().plot([1, 2], label="a")
FigureCanvasAgg(figure).draw()
print(hashlib.sha256(figure.canvas.buffer_rgba()).hexdigest())
"""


def everywhere(folder: Path) -> dict[str, str]:
    (folder / "matplotlibrc").write_bytes(STYLE)
    (folder / "style").write_bytes(STYLE)
    (folder / "matplotlib").mkdir()
    (folder / "matplotlib" / "matplotlibrc").write_bytes(STYLE)
    return {"MATPLOTLIBRC": "style", "XDG_CONFIG_HOME": str(folder)}


def of_no_sense(folder: Path) -> dict[str, str]:
    (folder / "matplotlibrc").write_bytes(b"\xff\xfe\0")
    return {"MPLBACKEND": "nonsense"}


def of_no_end(folder: Path) -> dict[str, str]:
    os.mkfifo(folder / "matplotlibrc")
    return {}


def drawn(folder: Path, environment: dict[str, str]) -> str:
    line = [sys.executable, "-c", DRAW]
    done = subprocess.run(
        line, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    return drawn(tmp_path_factory.mktemp("plain"), {})


@pytest.mark.parametrize("settings", [everywhere, of_no_sense, of_no_end])
def test_settings_of_matplotlib_change_no_picture(settings: Callable[[Path], dict[str, str]], plain: str, tmp_path: Path) -> None:
    assert drawn(tmp_path, settings(tmp_path)) == plain
