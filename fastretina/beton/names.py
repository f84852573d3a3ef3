"""The names of samples, made one by one when asked for."""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from fastretina.errors import BetonError


class NameList(Sequence[str]):
    """Names that are made one by one when asked for: what a list does with negative indices, slices and wrong ones."""

    _where = ""  # begins the message of an IndexError

    @abstractmethod
    def _name(self, index: int) -> str:
        """Name `index`, 0 to N - 1."""

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        count = len(self)
        if isinstance(index, slice):
            return [self._name(i) for i in range(*index.indices(count))]
        index = operator.index(index)
        if not -count <= index < count:
            raise IndexError(f"{self._where}no sample {index} among {count}")
        return self._name(index % count)


class Names(NameList):
    """Names of the samples, decoded one by one when asked for; "sample 17" and so on where the file holds none."""

    def __init__(self, blob: NDArray[np.uint8] | None, count: int, path: Path) -> None:
        self._blob, self._count, self._path = blob, count, path
        self._where = f"{path}: "
        self._ends: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return self._count

    def _name(self, index: int) -> str:
        if self._blob is None:
            return f"sample {index}"
        if self._ends is None:
            ends = np.flatnonzero(self._blob == 10).astype(np.int64)
            if len(ends) != self._count:
                raise BetonError(f"{self._path}: holds {len(ends)} names for {self._count} samples")
            self._ends = ends
        start = int(self._ends[index - 1]) + 1 if index else 0
        return self._blob[start : int(self._ends[index])].tobytes().decode("utf-8", "replace")


class Selected(NameList):
    """The names at some indices."""

    def __init__(self, names: Sequence[str], indices: NDArray[np.int64]) -> None:
        self._names, self._indices = names, indices

    def __len__(self) -> int:
        return len(self._indices)

    def _name(self, index: int) -> str:
        return self._names[int(self._indices[index])]
