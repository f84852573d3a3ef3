"""One logical data set over many files: all shards as one Beton.

Rows are dealt in runs, not in turns: sample i of the set is then sample i of the one file that the same table would give,
so that order, batches and augmentation are the same to the bit, and shards read one after the other are in the table's order.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastretina.beton.format import PACKING_BYTES
from fastretina.beton.names import Names, joined
from fastretina.beton.paths import MAX_SHARDS, as_path, shard_path, whole_path
from fastretina.beton.reader import Beton
from fastretina.errors import BetonError, SampleError

WINDOW = 8  # shards that `sampling="shards"` draws from at a time
_OPENERS = 8  # threads; parsing tables is numpy and checksums, which release the GIL
# What the provenance of two shards of one packing may differ in: the counts, and whether anything was re-encoded.
_OWN = frozenset({"shard", "passed_through", "reencoded", "skipped", "rows", "left_out", "grades", "encoder"})


_Source = TypeVar("_Source")
_Opened = TypeVar("_Opened")


def open_all(
    sources: Sequence[_Source], opener: Callable[[_Source], _Opened], give_up: Callable[[], None] = lambda: None
) -> list[_Opened]:
    """All of them, opened by several threads; where one fails, its error, or where Ctrl-C comes: then `give_up` is called, to end
    the others. A Beton that nobody refers to any more is closed."""
    with ThreadPoolExecutor(min(_OPENERS, len(sources)), thread_name_prefix="fastretina-open") as threads:
        try:
            try:
                opened = threads.map(opener, sources)
            except RuntimeError as error:
                raise BetonError(f"{sources[0]}: cannot be opened: {error}. Raise the limit of threads (ulimit -u)") from None
            return list(opened)
        except BaseException:
            give_up()
            raise


def in_order(path: Path, shards: Sequence[Beton]) -> list[Beton]:
    """The shards by number, after a check that they are one packing, each once and none missing. BetonError names the culprit."""
    numbered = sorted(((_number(shard), shard) for shard in shards), key=lambda pair: pair[0])
    (_, of), first = numbered[0]
    again = f"Pack all again with fastretina pack --shards {of}"
    whole = next((shard for _, shard in numbered if shard.packing), first)  # the others were packed alone
    for (number, count), shard in numbered:
        if count != of:
            raise BetonError(
                f"{shard.path}: shard {number} of {count}, of another packing than {first.path}. Remove the older files, or give a "
                f"pattern that leaves them out: {shard_path(whole_path(first.path), '*', of)}"
            )
        if shard.packing not in ("", whole.packing) or _packing(shard) != _packing(whole):
            raise BetonError(
                f"{shard.path}: shard {number} of {count}, of another packing than {whole.path}; one that was to replace the other "
                f"may have been interrupted. {again}"
            )
    found: dict[int, Beton] = {}
    for (number, _), shard in numbered:
        if number in found:
            raise BetonError(f"{shard.path}: shard {number} of {of} is in the set twice, also as {found[number].path}. Remove one")
        found[number] = shard
    missing = [number for number in range(of) if number not in found]
    if missing:
        names = ", ".join(shard_path(whole_path(first.path), number, of).name for number in missing[:3])
        raise BetonError(
            f"{path}: {len(missing)} of {of} shards missing: {names}{', ...' if len(missing) > 3 else ''}. "
            f"Pack each with fastretina pack --shard K/{of}"
        )
    ordered = [found[number] for number in range(of)]
    for before, after in itertools.pairwise(ordered):
        if before.ids[-1] >= after.ids[0]:
            raise BetonError(f"{after.path}: its sample ids do not follow those of {before.path}. Pack both shards again")
    alone = next((shard for shard in ordered if not shard.packing), whole)
    if alone.packing != whole.packing != packing_id([shard.digest for shard in ordered]).hex():
        raise BetonError(
            f"{alone.path}: was packed alone (--shard), and holds other images or labels than the packing of {whole.path}. {again}"
        )
    return ordered


def packing_id(digests: Iterable[str]) -> bytes:
    """PACKING_BYTES that tell a packing from every other: of what all its shards hold, given as their digests in order, so that the
    same input gives the same bytes."""
    return hashlib.blake2b("".join(digests).encode(), digest_size=PACKING_BYTES).digest()


def _number(shard: Beton) -> tuple[int, int]:
    """(number, of) as the file itself says: names can be changed."""
    match shard.provenance.get("shard"):
        case {"number": int(number), "of": int(of)} if 0 <= number < of <= MAX_SHARDS:
            return number, of
    raise BetonError(
        f"{shard.path}: is no shard, so that its sample ids may be another file's, too. Give files of one packing "
        "(fastretina pack --shards N), or one file"
    )


def _packing(shard: Beton) -> Mapping[str, Any]:
    return {key: value for key, value in shard.provenance.items() if key not in _OWN}


class ShardedBeton(Beton):
    """The shards of one packing as one Beton, whose sample i lies in one of them.

    All that Beton promises holds; `path` is the pattern, and a SampleError names the shard and the index in it. It pickles as
    what opens it again.

    Attributes:
        shards: the files, in order. Their tables are views of the set's.
    """

    _columns = ("labels", "ids", "crcs", "widths", "heights", "modes")

    def __init__(self, path: str | os.PathLike[str], shards: Sequence[Beton], opener: Callable[[], Beton]) -> None:
        """shards: in order, as `in_order` gives them; they are the set's to close. opener: opens the set again, when unpickled."""
        self._opened_by = opener
        self.path = as_path(path)
        self.shards = tuple(shards)
        lengths = [len(shard) for shard in shards]
        self.stored = sum(lengths)
        self._starts = [sum(lengths[:number]) for number in range(len(lengths))]
        self._bounds = np.array(self._starts)
        for column in self._columns:
            whole = np.concatenate([getattr(shard, column) for shard in shards])
            setattr(self, column, whole)
            for shard, start in zip(shards, self._starts, strict=True):
                setattr(shard, column, whole[start : start + len(shard)])  # once in memory, not twice
        self.names = joined([shard.names for shard in shards])
        self._closed = False
        self._users = _Users()  # of the files: this set, and its selections
        self._token = object()
        self._users.add(self._token)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}: {len(self)} samples in {len(self.shards)} shards)"

    @property
    def provenance(self) -> Mapping[str, Any]:
        """What is the same in the provenance of all shards. Raises BetonError."""
        return _packing(self.shards[0])

    def _column(self, number: int) -> Names:
        return joined([shard._column(number) for shard in self.shards])

    @property
    def sizes(self) -> NDArray[np.int64]:
        whole = np.concatenate([shard.sizes for shard in self.shards])
        return whole if self._indices is None else whole[self._indices]

    @property
    def mean_bytes(self) -> float:
        return sum(shard.mean_bytes * len(shard) for shard in self.shards) / sum(map(len, self.shards))

    def shard_of(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where these samples (B,) lie: numbers of their shards and indices in those, int64 (B,) each."""
        rows = indices if self._indices is None else self._indices[indices]
        numbers = np.searchsorted(self._bounds, rows, side="right") - 1
        return numbers, rows - self._bounds[numbers]

    def at(self, index: int) -> tuple[Beton, int]:
        if self._closed:
            raise BetonError(f"{self.path}: already closed")
        if not 0 <= index < len(self.labels):
            raise IndexError(f"{self.path}: no sample {index} among {len(self)}")
        row = index if self._indices is None else int(self._indices[index])
        number = bisect.bisect_right(self._starts, row) - 1
        return self._shard(number), row - self._starts[number]

    def _shard(self, number: int) -> Beton:
        return self.shards[number]

    def _payload(self, index: int) -> NDArray[np.uint8]:
        shard, row = self.at(index)
        return shard._payload(row)

    def sample_error(self, index: int, reason: str) -> SampleError:
        shard, row = self.at(index)
        return shard.sample_error(row, reason)

    def check_order(self, sampling: str) -> None:
        """UsageError where the set cannot be read in such an order; local files can be in any."""

    def expect(self, indices: NDArray[np.int64]) -> None:
        """A hint: these samples will be asked for, in this order."""

    def select(self, indices: NDArray[np.int64]) -> Self:
        """The samples at these indices (N,), in this order, as a set of its own over the same open files, which stay open until
        the last of their sets is closed."""
        chosen = super().select(indices)
        chosen._token = object()
        self._users.add(chosen._token)  # only now: what no such sample is asked of must not hold the files open
        return chosen

    def close(self) -> None:
        """Let go of the files. Twice is fine."""
        self._closed = True
        self._users.discard(self._token)
        if not self._users:
            self._close_files()

    def _close_files(self) -> None:
        for shard in self.shards:
            shard.close()

    @property
    def _opener(self) -> Callable[[], Beton]:
        return self._opened_by


class _Users(set[object]):
    """Sets that use the same files. No lock: a signal handler or a finalizer may close one while another is closed or selected."""
