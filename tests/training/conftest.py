"""Runs are trained by the dozen here, and no test looks at their pictures."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from forked_torchrun import ForkedTorchrun


@pytest.fixture(scope="module", autouse=True)
def no_pictures(undrawn):
    """Before any module's fixture that trains."""


@pytest.fixture(scope="module")
def torchrun(tiny_betons) -> Iterator[ForkedTorchrun]:
    server = ForkedTorchrun(tiny_betons.train)
    yield server
    server.close()
