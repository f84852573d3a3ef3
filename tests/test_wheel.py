"""The wheel alone, without the checkout: it makes the sample data set, packs, checks, trains, evaluates and predicts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def call(line: list[object], folder: Path) -> str:
    """Standard output of a command; a failure shows its standard error."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [str(word) for word in line], cwd=folder, env=environment, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, f"{line}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of what it is made of: setuptools leaves its build folder beside pyproject.toml."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "fastretina", source / "fastretina", ignore=shutil.ignore_patterns("__pycache__"))
    call([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", "dist", "."], source)
    (built,) = (source / "dist").glob("fastretina-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The scripts of a virtual environment with the wheel in it. The dependencies are those of the tests."""
    home = tmp_path_factory.mktemp("venv")
    call([sys.executable, "-m", "venv", "--without-pip", home], home)
    packages = sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)})
    # A line of a .pth file is a folder to import from; .pth files in that folder, an editable install's among them, do nothing.
    (Path(packages) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = home / "bin" / "python"
    call([sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel], home)
    where = call([python, "-c", "import fastretina; print(fastretina.__file__)"], home).strip()
    assert Path(where) == Path(packages) / "fastretina" / "__init__.py"
    return home / "bin"


def test_the_wheel_holds_the_data_files(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("py.typed", "report/report.css", "sample/retina_cc0.jpg"):
        assert f"fastretina/{name}" in names
    assert not [name for name in names if not name.startswith("fastretina")]


def test_its_console_script_goes_all_the_way(installed, tmp_path):
    program = installed / "fastretina"
    assert call([program, "--version"], tmp_path).startswith("fastretina ")
    make = [installed / "python", "-m", "fastretina.sample", "--out", "sample", "--train", 20, "--test", 10, "--workers", 1]
    assert "sample: 20 train and 10 test images" in call(make, tmp_path)
    for split, count in (("train", 20), ("test", 10)):
        pack = [program, "pack", "--root", "sample", "--split", split, "--out", f"{split}.beton", "--size", 64]
        assert f"{count} images" in call(pack, tmp_path)
    call([program, "verify", "train.beton"], tmp_path)
    train = [program, "train", "--train", "train.beton", "--test", "test.beton", "--out", "run", "--epochs", 1]
    assert "report: run/report.html" in call([*train, "--resolution", 32, "--batch-size", 10, "--workers", 1], tmp_path)
    assert "<style>" in (tmp_path / "run" / "report.html").read_text()
    checkpoint = ["--checkpoint", "run/best.safetensors", "--workers", 1]
    call([program, "evaluate", *checkpoint, "--data", "test.beton", "--out", "evaluated"], tmp_path)
    call([program, "predict", *checkpoint, "sample/data", "--csv", "grades.csv"], tmp_path)
    found = [json.loads((tmp_path / folder / "metrics.json").read_text()) for folder in ("run", "evaluated")]
    assert found[0]["best"]["confusion"] == found[1]["confusion"]
    assert len((tmp_path / "grades.csv").read_text().splitlines()) == 31
