"""Runs are trained by the dozen here, and no test looks at their pictures."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def no_pictures(undrawn):
    """Before any module's fixture that trains."""
