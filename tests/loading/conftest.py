"""The file that several tests of the Loader read."""

from __future__ import annotations

from pathlib import Path

import pytest
from loader_cases import write


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("loader") / "data.beton")
