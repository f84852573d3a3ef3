"""JSON of strangers: whatever is wrong with it is a ValueError."""

from __future__ import annotations

import json
import os
from typing import Any

from fastretina.system.files import read_regular

MAX_JSON = 1 << 28  # bytes of a file: a run of 1,000 epochs writes 2 MB


def parse_json(text: str | bytes) -> Any:
    """`json.loads`, for which 1,000 brackets, one in the other, are a RecursionError."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("too deeply nested") from None


def read_json(path: str | os.PathLike[str]) -> Any:
    """A JSON file's value. OSError: what is no file, or has more than MAX_JSON bytes; ValueError."""
    return parse_json(read_regular(path, MAX_JSON))
