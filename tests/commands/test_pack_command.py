"""The command without flags: both splits of the lab's four CSVs in data/, or what to give."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from test_pack import folder, plain

from fastretina.beton.reader import Beton

PROGRAM = Path(__file__).resolve().parents[2] / "tools" / "write_beton.py"


def call(place: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, PROGRAM], cwd=place, capture_output=True, text=True, timeout=120, check=False)


def test_without_flags_both_splits_of_data_are_packed(tmp_path: Path) -> None:
    folder(tmp_path / "data", plain(6))
    folder(tmp_path / "data", dict(list(plain(8).items())[6:]), split="test")
    done = call(tmp_path)
    assert done.returncode == 0, done.stderr
    for split, names in (("train", list(plain(6))), ("test", list(plain(8))[6:])):
        with Beton(tmp_path / "data" / f"{split}.beton") as beton:
            assert list(beton.names) == [name.removesuffix(".jpeg") for name in names]
            assert beton.provenance["split"] == split


def test_without_flags_and_without_the_four_files_it_says_what_to_give(tmp_path: Path) -> None:
    folder(tmp_path / "data", plain(2))
    done = call(tmp_path)
    assert done.returncode == 2
    assert "lacks test_img.csv, test_label.csv. Give --images DIR --labels FILE" in done.stderr
    assert not list(tmp_path.rglob("*.beton"))
