"""The door to all data sets: a .beton file, the shards that a pattern matches, or either by URL."""

from __future__ import annotations

import glob
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fastretina.beton.joined import JoinedBeton
from fastretina.beton.paths import as_url, files_of, is_pattern, parts_of, whole_path
from fastretina.beton.reader import Beton
from fastretina.beton.shards import ShardedBeton, in_order, open_all
from fastretina.errors import BetonError
from fastretina.system.limits import allow_open_files

if TYPE_CHECKING:
    from fastretina.beton.remote import Cache


def open_beton(source: str | os.PathLike[str] | Beton, cache: Cache | None = None) -> Beton:
    """A .beton file, or all shards that a pattern matches (`data/train-*.beton`) as one, or the same by a URL, through a cache
    (see fastretina.beton.remote); or several packings, commas between. An open one is returned as it is.

    Raises:
        BetonError: naming the file that is corrupt, missing from its set, doubled or of another packing.
        UsageError: naming two packings that cannot be used together.
        RemoteError: naming the URL that cannot be read.
    """
    if isinstance(source, Beton):
        return source
    if len(parts := parts_of(source)) > 1:
        return JoinedBeton(source, [open_beton(part, cache) for part in parts], partial(open_beton, os.fspath(source)))
    url = as_url(source)
    if url is not None:
        from fastretina.beton.remote import open_remote

        return open_remote(url, cache)
    path = Path(source)
    if not is_pattern(path):
        return _open_one(path)
    paths = files_of(path)
    if not paths:
        raise BetonError(f"{path}: no file matches. Make shards with fastretina pack --shards N")
    if (limit := allow_open_files(len(paths))) is not None:
        raise BetonError(
            f"{path}: {len(paths):,} files to have open, and this system allows {limit:,} (ulimit -n). Pack into fewer shards"
        )
    shards = open_all(paths, Beton)
    if len(shards) == 1 and "shard" not in shards[0].provenance:
        return shards[0]
    return ShardedBeton(path, in_order(path, shards), partial(open_beton, str(path)))


def _open_one(path: Path) -> Beton:
    shards = [] if path.exists() else files_of(path.with_name(f"{glob.escape(path.stem)}-[0-9]*-of-[0-9]*{path.suffix}"))
    if shards:
        raise BetonError(
            f"{path}: no such file, but there are shards of it; give '{whole_path(shards[0]).with_suffix('')}-*.beton'"
        )
    return Beton(path)
