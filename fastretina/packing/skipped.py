"""The list of rows that a packing left out, beside the .beton."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path


def skipped_path(out: Path) -> Path:
    """Where the rows that were left out of `out` are listed."""
    return out.with_name(out.name + ".skipped.csv")


def skipped_csv(skipped: Sequence[tuple[int, str, str]]) -> bytes:
    """Columns row (1-based line of the label file), name, reason; no cell that a spreadsheet would take for a formula."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("row", "name", "reason"))
    for line, name, reason in skipped:
        writer.writerow((line, _plain(name), _plain(reason)))
    return out.getvalue().encode("utf-8", "replace")


def _plain(cell: str) -> str:
    return "'" + cell if cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else cell
