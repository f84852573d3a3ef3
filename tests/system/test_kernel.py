"""The compiler's cache: of use where it can be written and read, and never in the way."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
from numba.core.caching import IndexDataCacheFile

SOURCE = """
from fastretina.system.kernel import kernel

@kernel()
def twice(values):
    return values * 2
"""


def found_in_cache(folder: Path) -> int:
    """How often the function, imported anew, is found compiled, where it works."""
    specification = spec_from_file_location("mine", folder / "mine.py")
    module = module_from_spec(specification)
    specification.loader.exec_module(module)
    assert module.twice(np.arange(3)).tolist() == [0, 2, 4]
    return module.twice._cache_hits.total()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(SOURCE)
    return tmp_path


def corrupt(cache: Path) -> None:
    for file in cache.glob("*.nb[ic]"):
        file.write_bytes(b"\x80\x04nonsense")


def truncate(cache: Path) -> None:
    for file in cache.glob("*.nb[ic]"):
        file.write_bytes(file.read_bytes()[:20])


def only_the_code(cache: Path) -> None:
    for file in cache.glob("*.nbc"):
        file.write_bytes(b"")


def in_the_way(cache: Path) -> None:
    for file in cache.glob("*.nb[ic]"):
        file.unlink()
        file.mkdir()


@pytest.mark.parametrize("harm", [corrupt, truncate, only_the_code, in_the_way])
def test_a_cache_that_cannot_be_read_is_compiled_anew(harm: Callable[[Path], None], folder: Path) -> None:
    assert found_in_cache(folder) == 0
    assert found_in_cache(folder) == 1
    harm(folder / "__pycache__")
    assert found_in_cache(folder) == 0


def test_without_a_place_for_a_cache_everything_is_compiled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "__pycache__").write_text("no folder")
    for name in ("HOME", "XDG_CACHE_HOME"):  # not even root can make a folder below a file
        monkeypatch.setenv(name, str(folder / "mine.py"))
    assert found_in_cache(folder) == found_in_cache(folder) == 0


def test_a_disk_that_is_full_when_the_cache_is_written_is_no_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(IndexDataCacheFile, "save", full)
    assert found_in_cache(folder) == found_in_cache(folder) == 0
