"""Exactly these names are the library, and they cost no torch before they are used."""

from __future__ import annotations

import subprocess
import sys

import fastretina

NAMES = ["Augment", "FastretinaError", "Grader", "Loader", "build_model", "open_beton", "verify_beton", "write_beton"]


def test_the_exported_names_are_exact_and_all_there():
    assert fastretina.__all__ == NAMES
    assert all(callable(getattr(fastretina, name)) for name in NAMES)


def test_importing_fastretina_imports_no_torch():
    subprocess.run([sys.executable, "-c", "import sys, fastretina; assert 'torch' not in sys.modules"], check=True)
