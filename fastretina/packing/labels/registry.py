"""All layouts of labels, and which of them a command line means."""

from __future__ import annotations

from fastretina.errors import UsageError
from fastretina.packing.config import PackConfig
from fastretina.packing.labels import class_folders, lab, one_table
from fastretina.packing.labels.table import Layout

LAYOUTS = (lab.LAYOUT, one_table.LAYOUT, class_folders.LAYOUT)


def layout_of(config: PackConfig) -> Layout:
    """The layout whose flags are given. UsageError where they mean none, several or half of one."""
    given = {field for layout in LAYOUTS for field in layout.fields if getattr(config, field) is not None}
    meant = [layout for layout in LAYOUTS if layout.field in given]
    if len(meant) != 1:
        raise UsageError("give either " + ", or ".join(layout.usage for layout in LAYOUTS))
    (layout,) = meant
    for wrong, what in ((set(layout.needs) - given, "needs"), (given - layout.fields, "takes no")):
        if wrong:
            flags = " and ".join(f"--{field.replace('_', '-')}" for field in sorted(wrong))
            raise UsageError(f"--{layout.field.replace('_', '-')} {what} {flags}: give {layout.usage}")
    return layout
