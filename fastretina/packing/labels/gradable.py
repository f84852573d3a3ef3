"""Which rows are left out as asked: those whose image cannot be graded."""

from __future__ import annotations

from collections.abc import Sequence

from fastretina.errors import UsageError
from fastretina.packing.config import PackConfig
from fastretina.packing.labels.classes import known_grade, whole
from fastretina.packing.labels.table import LeftOut
from fastretina.packing.labels.words import loose


def comparable(text: str) -> str:
    """How values of --ungradable are compared with cells: 0 is 0.0, Poor is poor."""
    return whole(text) or loose(text)


def ungradable_rows(
    config: PackConfig, labels: Sequence[str] | None, quality: Sequence[str] | None
) -> tuple[dict[int, LeftOut], str]:
    """Row to reason, of the rows that --ungradable means, and a note, "" where there is nothing to say.

    Args:
        labels: N cells of grades; None: there are none. quality: N cells of --quality-column; None: there is no such column.

    Raises:
        UsageError: the values cannot be meant.
    """
    if config.ungradable is None:
        return {}, ""
    values = {comparable(value): value.strip() for value in config.ungradable.split(",") if value.strip()}
    if not values:
        raise UsageError("--ungradable: give the values that mean that an image cannot be graded, like 5 or poor")
    cells, what = (labels, "grade") if quality is None else (quality, "quality")
    if cells is None:
        raise UsageError(f"--ungradable {config.ungradable}: there are no grades; say of which column with --quality-column")
    if quality is None:
        _check_no_class(config, values)
    keys = {cell: comparable(cell) for cell in set(cells)}
    rows = {row: LeftOut("ungradable", f"{what} {cell!r}") for row, cell in enumerate(cells) if keys[cell] in values}
    unused = [value for key, value in values.items() if key not in keys.values()]
    return rows, f"--ungradable {','.join(unused)}: no row has that {what}" if unused else ""


def _check_no_class(config: PackConfig, values: dict[str, str]) -> None:
    """A grade that is one of the classes is none that means ungradable."""
    names = [] if config.classes in (None, "auto") else [comparable(name) for name in str(config.classes).split(",")]
    for key, value in values.items():
        if key in names or (config.classes is None and known_grade(value) is not None):
            raise UsageError(
                f"--ungradable {value}: that is one of the classes; name the column that it is about by --quality-column"
            )
