"""Several packings as one data set: two clinics', or two years of one."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from fastretina.beton.names import Names, joined
from fastretina.beton.reader import Beton
from fastretina.beton.shards import ShardedBeton
from fastretina.errors import BetonError, UsageError

SOURCE_BIT = 40  # from here on a sample id holds the number of its packing: ids are rows of tables, which are shorter


class JoinedBeton(ShardedBeton):
    """Several packings, one after the other, as one Beton.

    All that ShardedBeton promises holds. Sample ids are those of each packing plus its number << SOURCE_BIT. Patients of different
    packings are different people, whatever they are called: each clinic has a patient 10.

    Attributes:
        parts: the packings, in order.
    """

    def __init__(self, path: str | os.PathLike[str], parts: Sequence[Beton], opener: Callable[[], Beton]) -> None:
        """UsageError naming two packings whose preparation or classes differ, or one that is on a server."""
        self.parts = tuple(parts)
        for part in parts:
            if isinstance(part, ShardedBeton) and type(part) is not ShardedBeton:
                raise UsageError(f"{part.path}: a set on a server cannot be joined with others; fetch its files first")
        self._check_same("classes", lambda part: part.classes.as_dict(), "pack one of them again with the --classes of the other")
        self._check_same(
            "preparation",
            lambda part: part.provenance.get("preparation"),
            "pack one of them again with the --crop and --contrast of the other",
        )
        for number, part in enumerate(parts):
            if len(part) and int(part.ids.max()) >> SOURCE_BIT:
                raise BetonError(f"{part.path}: sample ids above {1 << SOURCE_BIT}, which cannot be joined with others")
            for file in _files(part):
                file.ids = file.ids + (number << SOURCE_BIT)
        super().__init__(path, [file for part in parts for file in _files(part)], opener)

    def _check_same(self, what: str, read: Callable[[Beton], Any], way_out: str) -> None:
        first = self.parts[0]
        for part in self.parts[1:]:
            if read(part) != read(first):
                raise UsageError(f"{first.path} and {part.path} differ in their {what}, {read(first)} and {read(part)}; {way_out}")

    @property
    def sources(self) -> tuple[Path, ...]:
        return tuple(part.path for part in self.parts)

    @property
    def provenance(self) -> Mapping[str, Any]:
        """What is the same in all packings. Raises BetonError."""
        first, *others = (part.provenance for part in self.parts)
        return {key: value for key, value in first.items() if all(key in other and other[key] == value for other in others)}

    @property
    def columns(self) -> Mapping[str, Names]:
        found = [part.columns for part in self.parts]
        empty = [Names(len(part), lambda _: "") for part in self.parts]
        names = dict.fromkeys(itertools.chain.from_iterable(found))
        return {
            name: self._chosen(joined([text.get(name, none) for text, none in zip(found, empty, strict=True)])) for name in names
        }

    def _known(self, column: str, read: Callable[[str], Any], part: Literal[0, 1]) -> list[Any] | None:
        found: list[Any] = []
        for number, beton in enumerate(self.parts):
            known = beton._known(column, read, part) or [None] * len(beton)
            found += known if part else [None if patient is None else f"{number}:{patient}" for patient in known]
        found = found if self._indices is None else [found[index] for index in self._indices.tolist()]
        return found if any(found) else None

    @property
    def known_as(self) -> frozenset[str] | None:
        qualified = super().known_as
        return None if qualified is None else frozenset(patient.partition(":")[2] for patient in qualified)


def _files(part: Beton) -> Sequence[Beton]:
    return part.shards if isinstance(part, ShardedBeton) else [part]
