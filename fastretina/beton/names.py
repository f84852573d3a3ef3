"""The names of samples and other text about each, made one by one when asked for."""

from __future__ import annotations

import bisect
import itertools
import operator
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from fastretina.errors import BetonError


class Names(Sequence[str]):
    """`count` names, each made by `name` of its index (0 to count - 1) when asked for. where: begins the text of an IndexError.

    lines: makes all of them at once, UTF-8 with line feeds between; None: from `name`, one by one.
    """

    def __init__(self, count: int, name: Callable[[int], str], where: str = "", lines: Callable[[], bytes] | None = None) -> None:
        self._count, self._name, self._where = count, name, where
        self.lines: Callable[[], bytes] = lines or (lambda: "\n".join(self).encode())

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return [self._name(i) for i in range(*index.indices(self._count))]
        index = operator.index(index)
        if not -self._count <= index < self._count:
            raise IndexError(f"{self._where}no sample {index} among {self._count}")
        return self._name(index % self._count)


def chosen(names: Names, indices: NDArray[np.int64]) -> Names:
    """Those at these indices (n,), in this order."""

    def lines() -> bytes:
        found = names.lines().split(b"\n")
        return b"\n".join([found[index] for index in indices.tolist()])

    return Names(len(indices), lambda i: names[int(indices[i])], lines=lines)


def joined(parts: Sequence[Names]) -> Names:
    """All of them, one part after the other."""
    starts = [0, *itertools.accumulate(len(part) for part in parts)]

    def name(index: int) -> str:
        part = bisect.bisect_right(starts, index) - 1
        return parts[part][index - starts[part]]

    return Names(starts[-1], name, lines=lambda: b"\n".join(part.lines() for part in parts))


class StoredText:
    """The text in a name block, a line each, in UTF-8: `count` names, then as many lines for each further column."""

    def __init__(self, blob: NDArray[np.uint8], count: int, path: Path) -> None:
        self._blob, self._count, self._path = blob, count, path

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        found = np.flatnonzero(self._blob == 10).astype(np.int64)
        if len(found) == 0 or len(found) % self._count:
            raise BetonError(f"{self._path}: holds {len(found)} names for {self._count} samples")
        return found

    def column(self, number: int) -> Names:
        """Number 0: the names. BetonError, when the first of a column is asked for, where the lines are not so many.

        What is no UTF-8 (the name of a file may be any bytes) is replaced in a single name, and as it was in `lines`.
        """

        def between(first: int, last: int) -> bytes:
            if last >= len(self._ends):
                raise BetonError(f"{self._path}: holds {len(self._ends)} lines of text, too few for column {number}")
            start = int(self._ends[first - 1]) + 1 if first else 0
            return self._blob[start : int(self._ends[last])].tobytes()

        begin = number * self._count
        return Names(
            self._count,
            lambda index: between(begin + index, begin + index).decode("utf-8", "replace"),
            f"{self._path}: ",
            lambda: between(begin, begin + self._count - 1),
        )
