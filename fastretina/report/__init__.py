"""What people look at. Importing any of it imports matplotlib as it comes, whatever matplotlibrc lies around."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def _no_settings_found() -> Iterator[None]:
    """As matplotlib is imported it reads the first of these files that there is: one in the current folder, which may be anybody's,
    the one of $MATPLOTLIBRC, the user's. Bytes that are no text end the import, as a $MPLBACKEND does that it does not know, a FIFO
    hangs it, and every style ends up in our pictures. That it looks into the current folder nothing prevents, but that there is
    nothing to be found; next comes $MATPLOTLIBRC."""
    exists, chosen = os.path.exists, {name: os.environ.pop(name, None) for name in ("MATPLOTLIBRC", "MPLBACKEND")}

    def exists_but_for_settings(path: Any) -> bool:
        return not str(path).endswith("matplotlibrc") and exists(path)

    os.path.exists = exists_but_for_settings
    os.environ["MATPLOTLIBRC"] = os.devnull
    try:
        yield
    finally:
        os.path.exists = exists
        del os.environ["MATPLOTLIBRC"]
        os.environ.update({name: value for name, value in chosen.items() if value is not None})


if "matplotlib" not in sys.modules:
    with _no_settings_found():
        import matplotlib  # noqa: F401
