"""The names of samples, made one by one when asked for."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from fastretina.errors import BetonError


class Names(Sequence[str]):
    """`count` names, each made by `name` of its index (0 to count - 1) when asked for. where: begins the text of an IndexError."""

    def __init__(self, count: int, name: Callable[[int], str], where: str = "") -> None:
        self._count, self._name, self._where = count, name, where

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


def stored_names(blob: NDArray[np.uint8], count: int, path: Path) -> Names:
    """The names in a name block, a line each, in UTF-8. BetonError, when the first is asked for, where they are not so many."""

    @cache
    def ends() -> NDArray[np.int64]:
        found = np.flatnonzero(blob == 10).astype(np.int64)
        if len(found) != count:
            raise BetonError(f"{path}: holds {len(found)} names for {count} samples")
        return found

    def name(index: int) -> str:
        start = int(ends()[index - 1]) + 1 if index else 0
        return blob[start : int(ends()[index])].tobytes().decode("utf-8", "replace")

    return Names(count, name, f"{path}: ")
