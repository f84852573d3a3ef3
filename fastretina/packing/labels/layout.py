"""What a layout of labels is: the flags that mean it, and how its files are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastretina.packing.config import PackConfig
from fastretina.packing.labels.table import LabelTable


def _no_names(config: PackConfig) -> None:
    return None


@dataclass(frozen=True)
class Layout:
    """A layout of labels. Fields are those of PackConfig that only say where labels and images are.

    Attributes:
        name: what the file's provenance calls it. usage: the flags that it needs, as a user would type them.
        field: the one that means this layout; `needs` go with it, `takes` may.
        read: the table; missing images are errors, or, where the second argument is true, its `problems`. LabelError, UsageError.
        other_names: the images' names in the other split, to look for patients in both; None where there is none. LabelError.
    """

    name: str
    usage: str
    field: str
    needs: tuple[str, ...]
    read: Callable[[PackConfig, bool], LabelTable]
    takes: tuple[str, ...] = ()
    other_names: Callable[[PackConfig], Sequence[str] | None] = _no_names

    @property
    def fields(self) -> frozenset[str]:
        """All that it may be given."""
        return frozenset({self.field, *self.needs, *self.takes})
